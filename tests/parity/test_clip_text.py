"""CLIPTextModel against transformers' own, live, on the same weights."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("diffusers")

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from mlx_unet3d.models.clip_text import CLIPTextModel  # noqa: E402
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
COMMON = dict(
    vocab_size=300,
    num_hidden_layers=3,
    max_position_embeddings=77,
    bos_token_id=298,
    eos_token_id=299,
    pad_token_id=0,
)


def reference(seed=0, **config) -> "transformers.CLIPTextModel":
    torch.manual_seed(seed)
    model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**COMMON | config)).eval()
    randomize_constants(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embedding" not in name:
                # transformers starts so small that every layer is nearly the identity
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    return model


@pytest.fixture(params=[VIT_H, VIT_L], ids=["vit-h", "vit-l"])
def pair(request, tmp_path):
    theirs = reference(**request.param)
    theirs.save_pretrained(tmp_path)
    return theirs, CLIPTextModel.from_pretrained(tmp_path)


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
