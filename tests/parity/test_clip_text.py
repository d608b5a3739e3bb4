"""CLIPTextModel and CLIPTextModelWithProjection against transformers' own, live, on the same weights."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("diffusers")

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from mlx_unet3d import CLIPTextModel, CLIPTextModelWithProjection  # noqa: E402
from reference import randomize_constants, relative_error  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]

TOLERANCE = 1e-5

VIT_H = dict(hidden_act="gelu", hidden_size=128, intermediate_size=512, num_attention_heads=2)
VIT_L = dict(hidden_act="quick_gelu", hidden_size=96, intermediate_size=384, num_attention_heads=12)
CONFIGS = {
    "vit-h": VIT_H,
    "vit-l": VIT_L,
    "one-head": dict(hidden_act="gelu", hidden_size=48, intermediate_size=64, num_attention_heads=1),
    "large-eps": dict(VIT_L, num_hidden_layers=1, layer_norm_eps=1e-3),
}
COMMON = dict(
    vocab_size=300,
    num_hidden_layers=3,
    max_position_embeddings=77,
    bos_token_id=298,
    eos_token_id=299,
    pad_token_id=0,
)


def reference(seed=0, kind="CLIPTextModel", **config) -> "transformers.CLIPPreTrainedModel":
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(transformers.CLIPTextConfig(**COMMON | config)).eval()
    randomize_constants(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embedding" not in name:
                # transformers starts so small that every layer is nearly the identity
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    return model


@pytest.fixture(params=["vit-h", "vit-l"])
def pair(request, tmp_path):
    theirs = reference(**CONFIGS[request.param])
    theirs.save_pretrained(tmp_path)
    return theirs, CLIPTextModel.from_pretrained(tmp_path)


@pytest.fixture(params=[*CONFIGS, "legacy-eos"])
def projected(request, tmp_path):
    """With projection; the last as SDXL's own, whose config names another token than its texts end with."""
    config = CONFIGS.get(request.param) or VIT_H | dict(eos_token_id=2)
    theirs = reference(kind="CLIPTextModelWithProjection", projection_dim=40, **config)
    theirs.save_pretrained(tmp_path)
    return theirs, CLIPTextModelWithProjection.from_pretrained(tmp_path)


def make_ids(batch=2, length=77, seed=1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 300, (batch, length)).astype(np.int32)


def hidden_states(model, ids) -> tuple:
    with torch.no_grad():
        return model(torch.tensor(ids).long(), output_hidden_states=True)


@pytest.mark.parametrize("shape", [(2, 77), (1, 1), (3, 12)])
def test_last_hidden_state(pair, shape):
    theirs, ours = pair
    ids = make_ids(*shape)
    error = relative_error(ours(mx.array(ids)), hidden_states(theirs, ids).last_hidden_state)
    assert error <= TOLERANCE


@pytest.mark.parametrize("clip_skip", [None, 0, 1, 2])
def test_clip_skip(pair, clip_skip):
    """diffusers' rule, which transformers 5 needs done by hand."""
    theirs, ours = pair
    ids = make_ids()
    with torch.no_grad():
        states = hidden_states(theirs, ids).hidden_states
        assert len(states) == 4
        expected = theirs.final_layer_norm(states[-((clip_skip or 0) + 1)])
    assert relative_error(ours(ids, clip_skip=clip_skip), expected) <= TOLERANCE


def test_skipping_matters(pair):
    _, ours = pair
    ids = make_ids()
    assert mx.abs(ours(ids) - ours(ids, clip_skip=1)).max().item() > 0.1


def test_hub_spelling_of_keys(pair, tmp_path):
    theirs, ours = pair
    folder = tmp_path / "hub"
    theirs.save_pretrained(folder)
    state = {f"text_model.{key}": value for key, value in theirs.state_dict().items()}
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    ids = make_ids()
    np.testing.assert_array_equal(CLIPTextModel.from_pretrained(folder)(ids), ours(ids))


def test_saved_folder_loads_in_transformers(pair, tmp_path):
    theirs, ours = pair
    folder = tmp_path / "saved"
    ours.save_pretrained(folder, layout="diffusers")
    again, info = transformers.CLIPTextModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    ids = make_ids()
    a, b = (hidden_states(model, ids).last_hidden_state for model in (theirs, again))
    assert torch.equal(a, b)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 5e-3), ("bfloat16", 4e-2)])
def test_half_precision(pair, dtype, tolerance):
    theirs, ours = pair
    ids = make_ids()
    expected = hidden_states(theirs, ids).last_hidden_state
    ours.set_dtype(getattr(mx, dtype))
    states = ours(ids)
    assert states.dtype == getattr(mx, dtype)
    assert relative_error(states.astype(mx.float32), expected) <= tolerance


@pytest.mark.parametrize("name", CONFIGS)
def test_hidden_states(name, tmp_path):
    theirs = reference(**CONFIGS[name])
    theirs.save_pretrained(tmp_path)
    ours = CLIPTextModel.from_pretrained(tmp_path)
    ids = make_ids()
    expected, result = hidden_states(theirs, ids), ours(ids, output_hidden_states=True)
    assert result.keys() == ["last_hidden_state", "hidden_states"]
    assert mx.array_equal(result[0], ours(ids))
    assert len(result.hidden_states) == len(expected.hidden_states) == theirs.config.num_hidden_layers + 1
    for a, b in zip(result.hidden_states, expected.hidden_states, strict=True):
        assert relative_error(a, b) <= TOLERANCE


def ended_ids() -> np.ndarray:
    """Texts that end at several places: padded with the end, padded with another token, without an end."""
    ids = make_ids(3, 12) % 298
    ids[0, 5:] = 299
    ids[1, 7], ids[1, 8:] = 299, 0
    return ids


def test_projection(projected):
    theirs, ours = projected
    ids = ended_ids()
    expected, result = hidden_states(theirs, ids), ours(ids, output_hidden_states=True)
    assert result.keys() == ["text_embeds", "last_hidden_state", "hidden_states"]
    assert relative_error(result.text_embeds, expected.text_embeds) <= TOLERANCE
    assert relative_error(result.last_hidden_state, expected.last_hidden_state) <= TOLERANCE
    for a, b in zip(result.hidden_states, expected.hidden_states, strict=True):
        assert relative_error(a, b) <= TOLERANCE
    plain = ours(mx.array(ids))
    assert plain.hidden_states is None
    assert mx.array_equal(plain.text_embeds, result.text_embeds)
    for i in range(3):
        assert relative_error(ours(ids[i : i + 1]).text_embeds, expected.text_embeds[i : i + 1]) <= TOLERANCE


def test_projection_is_saved_for_both_sides(projected, tmp_path):
    theirs, ours = projected
    ids = ended_ids()
    for layout in ("mlx", "diffusers"):
        ours.save_pretrained(tmp_path / layout, layout=layout)
        again = CLIPTextModelWithProjection.from_pretrained(tmp_path / layout)
        assert again.config == ours.config
        assert mx.array_equal(again(ids).text_embeds, ours(ids).text_embeds)
    back, info = transformers.CLIPTextModelWithProjection.from_pretrained(
        tmp_path / "diffusers", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(hidden_states(back, ids).text_embeds, hidden_states(theirs, ids).text_embeds)


def test_projection_without_prefix_and_in_half_precision(projected, tmp_path):
    theirs, ours = projected
    ids = ended_ids()
    theirs.half().save_pretrained(tmp_path / "half")
    state = {key.removeprefix("text_model."): value for key, value in theirs.state_dict().items()}
    assert "text_projection.weight" in state
    assert "final_layer_norm.bias" in state
    save_file(state, tmp_path / "half" / "model.safetensors", metadata={"format": "pt"})
    result = CLIPTextModelWithProjection.from_pretrained(tmp_path / "half")(ids, output_hidden_states=True)
    assert {a.dtype for a in (result[0], result[1], *result[2])} == {mx.float16}
    assert relative_error(result[0].astype(mx.float32), np.array(ours(ids).text_embeds)) <= 5e-3


def test_a_file_with_projection_serves_without_it(projected, tmp_path):
    """Hidden states are those of the same text encoder."""
    theirs, ours = projected
    theirs.save_pretrained(tmp_path / "projected")
    ids = ended_ids()
    plain = CLIPTextModel.from_pretrained(tmp_path / "projected")
    assert mx.array_equal(plain(ids), ours(ids).last_hidden_state)
