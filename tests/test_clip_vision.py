"""CLIPVisionModelWithProjection without torch: goldens, sizes, dtypes, quantization, errors."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx_unet3d import CLIPVisionModelWithProjection
from mlx.utils import tree_flatten
from mlx_unet3d.layers.quantized import QuantizedLayer

GOLDEN = Path(__file__).parent / "goldens" / "clip_vision"


@pytest.fixture
def model():
    return CLIPVisionModelWithProjection.from_pretrained(GOLDEN)


@pytest.fixture
def cases():
    return mx.load(str(GOLDEN / "cases.safetensors"))


def test_golden(model, cases):
    """Outputs of transformers; the image has a pixel each way beyond the last complete patch."""
    output = model(cases["pixels"], output_hidden_states=True)
    np.testing.assert_allclose(output.image_embeds, cases["embeds"], rtol=0, atol=2e-5)
    assert len(output.hidden_states) == 3
    for i, state in enumerate(output.hidden_states):
        np.testing.assert_allclose(state, cases[f"states.{i}"], rtol=0, atol=2e-5)
    assert mx.array_equal(output.last_hidden_state, output.hidden_states[-1])
    assert model(cases["pixels"]).keys() == ["image_embeds", "last_hidden_state"]


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("layout", ["mlx", "diffusers"])
def test_save_and_load(tmp_path, model, cases, layout, dtype):
    model.set_dtype(dtype)
    model.save_pretrained(tmp_path, layout=layout)
    again = CLIPVisionModelWithProjection.from_pretrained(tmp_path)
    assert again.config == model.config
    output = again(cases["pixels"], output_hidden_states=True)
    assert {a.dtype for a in (output[0], output[1], *output[2])} == {dtype}
    assert mx.array_equal(output.image_embeds, model(cases["pixels"]).image_embeds)


def test_names_and_shapes_of_vit_h():
    """Stable Video Diffusion's; the arrays are never computed."""
    model = CLIPVisionModelWithProjection(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16,
        patch_size=14, projection_dim=1024, hidden_act="gelu",
    )  # fmt: skip
    shapes = {name: tuple(array.shape) for name, array in tree_flatten(model.parameters())}
    assert model.num_parameters() == 632_076_800
    assert len(shapes) == 520
    assert shapes["vision_model.embeddings.class_embedding"] == (1280,)
    assert shapes["vision_model.embeddings.patch_embedding.weight"] == (1280, 14, 14, 3)
    assert shapes["vision_model.embeddings.position_embedding.weight"] == (257, 1280)
    assert shapes["vision_model.pre_layrnorm.bias"] == (1280,)
    assert shapes["visual_projection.weight"] == (1024, 1280)


def test_quantized(tmp_path):
    """Patches too: their rows of 3 * 8 * 8 divide into groups."""
    model = CLIPVisionModelWithProjection(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16,
        patch_size=8, projection_dim=16,
    )  # fmt: skip
    tiny.randomize(model)
    pixels = mx.random.normal((2, 3, 16, 16))
    truth = model(pixels).image_embeds
    model.quantize(8).save_pretrained(tmp_path)
    assert isinstance(model.vision_model.embeddings.patch_embedding, QuantizedLayer)
    again = CLIPVisionModelWithProjection.from_pretrained(tmp_path)
    result = again(pixels).image_embeds
    assert mx.array_equal(result, model(pixels).image_embeds)
    assert 0 < mx.abs(result - truth).max().item() < 0.05 * mx.abs(truth).max().item()


def test_gradient(model, cases):
    """Along a random direction, against the difference of two forwards."""
    mx.random.seed(0)
    direction = mx.random.normal(cases["pixels"].shape)

    def loss(pixels):
        return model(pixels).image_embeds.square().sum()

    slope = (mx.grad(loss)(cases["pixels"]) * direction).sum().item()
    step = 1e-2
    difference = loss(cases["pixels"] + step * direction) - loss(cases["pixels"] - step * direction)
    assert slope == pytest.approx(difference.item() / (2 * step), rel=1e-2)


@pytest.mark.parametrize("shape", [(2, 3, 8, 9), (3, 9, 9), (2, 1, 9, 9), (0, 3, 9, 9), (2, 9, 9, 3)])
def test_other_shapes_are_refused(model, shape):
    with pytest.raises(ValueError, match=r"pixel_values has shape .*\(batch, 3, 9, 9\).*CLIPImageProcessor"):
        model(mx.zeros(shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 225}, "image_size=224 must be at least patch_size=225"),
        ({"image_size": 10**6}, "image_size=1000000 must be .* at most 16384"),
        ({"image_size": 0}, "image_size=0 must be an integer of at least 1"),
        ({"hidden_act": "relu"}, "hidden_act='relu' is not known"),
        ({"num_attention_heads": 5}, "num_attention_heads=5 does not divide hidden_size=768"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers=1000000 is above"),
    ],
)
def test_wrong_configs(change, message):
    with pytest.raises(ValueError, match=message):
        CLIPVisionModelWithProjection(**change)
