"""CLIPVisionModelWithProjection against transformers' own, live, on the same weights."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("diffusers")

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from mlx_unet3d import CLIPVisionModelWithProjection  # noqa: E402
from reference import randomize_constants, relative_error, to_mlx  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]

TOLERANCE = 1e-5

COMMON = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=28,
    patch_size=7,
    projection_dim=16,
    hidden_act="gelu",
)
CONFIGS = {
    "vit-h": dict(hidden_size=160, intermediate_size=640, num_attention_heads=2, patch_size=14),
    "vit-l": dict(hidden_act="quick_gelu", projection_dim=48),
    "one-patch": dict(num_hidden_layers=1, patch_size=28, layer_norm_eps=1e-3),
    "left-over-pixels": dict(image_size=30, patch_size=8),
    "one-channel": dict(num_channels=1, num_attention_heads=1),
}


def reference(seed=0, **config) -> "transformers.CLIPVisionModelWithProjection":
    torch.manual_seed(seed)
    config = transformers.CLIPVisionConfig(**COMMON | config)
    model = transformers.CLIPVisionModelWithProjection(config).eval()
    randomize_constants(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "position" not in name:
                # transformers starts so small that every layer is nearly the identity
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    return model


@pytest.fixture(params=CONFIGS, ids=str)
def pair(request, tmp_path):
    theirs = reference(**CONFIGS[request.param])
    theirs.save_pretrained(tmp_path)
    return theirs, CLIPVisionModelWithProjection.from_pretrained(tmp_path)


def pixels(model, batch=2, seed=1) -> torch.Tensor:
    config = model.config
    shape = (batch, config.num_channels, config.image_size, config.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def forward(model, x):
    with torch.no_grad():
        return model(x, output_hidden_states=True)


def test_forward(pair):
    theirs, ours = pair
    x = pixels(theirs)
    expected, result = forward(theirs, x), ours(to_mlx(x), output_hidden_states=True)
    assert result.keys() == list(expected.keys())
    assert relative_error(result.image_embeds, expected.image_embeds) <= TOLERANCE
    assert relative_error(result.last_hidden_state, expected.last_hidden_state) <= TOLERANCE
    assert len(result.hidden_states) == len(expected.hidden_states) == theirs.config.num_hidden_layers + 1
    for a, b in zip(result.hidden_states, expected.hidden_states, strict=True):
        assert relative_error(a, b) <= TOLERANCE
    plain = ours(to_mlx(x))
    assert plain.hidden_states is None
    assert mx.array_equal(plain[0], result.image_embeds)
    singles = mx.concatenate([ours(to_mlx(x[i : i + 1])).image_embeds for i in range(2)])
    assert relative_error(singles, expected.image_embeds) <= TOLERANCE


def test_half_precision_stays(pair, tmp_path):
    theirs, _ = pair
    x = pixels(theirs)
    expected = forward(theirs, x).image_embeds
    theirs.half().save_pretrained(tmp_path / "half")
    ours = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "half")
    result = ours(to_mlx(x), output_hidden_states=True)
    assert {a.dtype for a in (result[0], result[1], *result[2])} == {mx.float16}
    assert relative_error(result.image_embeds.astype(mx.float32), expected) <= 5e-3


def test_saved_folders_load_on_both_sides(pair, tmp_path):
    theirs, ours = pair
    x = pixels(theirs)
    for layout in ("mlx", "diffusers"):
        ours.save_pretrained(tmp_path / layout, layout=layout)
        again = CLIPVisionModelWithProjection.from_pretrained(tmp_path / layout)
        assert again.config == ours.config
        assert mx.array_equal(again(to_mlx(x)).image_embeds, ours(to_mlx(x)).image_embeds)
    back, info = transformers.CLIPVisionModelWithProjection.from_pretrained(
        tmp_path / "diffusers", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(forward(back, x).image_embeds, forward(theirs, x).image_embeds)


def test_position_ids_of_old_files(pair, tmp_path):
    theirs, ours = pair
    state = {k: v.contiguous() for k, v in theirs.state_dict().items()}
    assert all(key.startswith(("vision_model.", "visual_projection.")) for key in state)
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    theirs.save_pretrained(tmp_path / "old")
    save_file(state, tmp_path / "old" / "model.safetensors", metadata={"format": "pt"})
    x = to_mlx(pixels(theirs))
    again = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "old")
    np.testing.assert_array_equal(again(x).image_embeds, ours(x).image_embeds)
