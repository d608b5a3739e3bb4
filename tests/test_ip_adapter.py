"""IP-Adapters on UNetMotionModel by their properties, without torch."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_unet3d import TextContext, UNetMotionModel
from mlx.utils import tree_flatten
from mlx_unet3d.errors import CheckpointError
from mlx_unet3d.layers.attention_adapters import CustomDiffusionAttnProcessor
from mlx_unet3d.layers.attention_processors import SlicedAttnProcessor
from mlx_unet3d.layers.image_attention import IPAdapterAttnProcessor
from seeded import CONFIGS, normal, weight

WIDTH, CHANNELS = CONFIGS["UNetMotionModel"]["cross_attention_dim"], 6


def make():
    unet = UNetMotionModel(**CONFIGS["UNetMotionModel"])
    drawn = [
        (k, a if k.endswith(".pe") else mx.array(weight(k, tuple(a.shape))))
        for k, a in tree_flatten(unet.parameters())
    ]
    unet.load_weights(drawn)
    return unet.eval()


@pytest.fixture
def unet():
    return make()


def adapter(unet, name="ip"):
    """The arrays of a file of a plain IP-Adapter."""
    arrays = {
        "image_proj.proj.weight": normal(f"{name}.w", 4 * WIDTH, CHANNELS),
        "image_proj.proj.bias": normal(f"{name}.b", 4 * WIDTH),
        "image_proj.norm.weight": np.ones(WIDTH, np.float32),
        "image_proj.norm.bias": normal(f"{name}.n", WIDTH),
    }
    for i, attn in enumerate(unet._image_attentions().values()):
        for letter in "kv":
            key = f"ip_adapter.{2 * i + 1}.to_{letter}_ip.weight"
            arrays[key] = normal(f"{name}.{key}", attn.query_dim, WIDTH) / np.float32(WIDTH**0.5)
    return {key: mx.array(array) for key, array in arrays.items()}


def forward(unet, images=None, dtype=mx.float32, text=None, tokens=4, **options):
    sample = mx.array(normal("sample", 2, 4, 3, 4, 6)).astype(dtype)
    states = mx.array(normal("text", 2, tokens, WIDTH)).astype(dtype) if text is None else text
    added = None if images is None else {"image_embeds": images}
    return unet(sample, 500, states, added_cond_kwargs=added, **options).sample


def embeds(name="image", batch=2, count=1):
    return mx.array(normal(name, batch, count, CHANNELS))


def far(x, y):
    return mx.abs(x - y).max().item() > 1e-3 * mx.abs(y).max().item()


def test_images_count_and_leave_no_trace(unet):
    before = forward(unet)
    names = dict(tree_flatten(unet.parameters())).keys()
    unet.load_ip_adapter(adapter(unet))
    assert far(forward(unet, [embeds()]), before)
    assert far(forward(unet, [embeds()]), forward(unet, [embeds("another")]))
    unet.set_ip_adapter_scale(0.0)
    assert mx.array_equal(forward(unet, [embeds()]), before)
    unet.unload_ip_adapter()
    assert dict(tree_flatten(unet.parameters())).keys() == names
    assert mx.array_equal(forward(unet), before)


def test_one_token_of_text_does_not_hide_the_images(unet):
    """The attention to a lone token is linear, and the images still count."""
    before = forward(unet, tokens=1)
    unet.load_ip_adapter(adapter(unet))
    assert far(forward(unet, [embeds()], tokens=1), before)


def test_half_precision_stays(unet):
    unet.load_ip_adapter(adapter(unet))
    expected = forward(unet, [embeds()])
    unet.set_dtype(mx.float16)
    images = [embeds()]
    context = TextContext(mx.array(normal("text", 2, 4, WIDTH)).astype(mx.float16))
    found = forward(unet, images, mx.float16, context)
    assert found.dtype == mx.float16
    assert mx.abs(found - expected).max().item() <= 0.02 * mx.abs(expected).max().item()
    _, _, projected, beside = unet_context(unet, context, images).take_apart()
    arrays = [a for _, a in tree_flatten([projected, [part[2] for part in beside]])]
    assert arrays
    assert all(a.dtype == mx.float16 for a in arrays)


def unet_context(unet, context, images):
    return context.with_images(unet.encoder_hid_proj, images)


def test_images_are_projected_once_a_context(unet, monkeypatch):
    unet.load_ip_adapter(adapter(unet))
    calls = []
    projection = type(unet.encoder_hid_proj)
    original = projection.__call__
    monkeypatch.setattr(projection, "__call__", lambda self, x: calls.append(1) or original(self, x))
    context, images = TextContext(mx.array(normal("text", 2, 4, WIDTH))), [embeds()]
    first = forward(unet, images, text=context)
    layer = next(iter(unet._image_attentions().values())).processor.to_k_ip[0]
    keys = unet_context(unet, context, images).images[0].keys_values(layer, None)
    second = forward(unet, images, text=context)
    assert mx.array_equal(first, second)
    assert len(calls) == 1
    assert unet_context(unet, context, images).images[0].keys_values(layer, None)[0] is keys[0]
    other = forward(unet, [embeds("another")], text=context)
    assert len(calls) == 2
    assert far(other, first)


def test_compiled_forwards_see_scales_and_adapters(unet):
    unet.load_ip_adapter(adapter(unet))
    unet.compile()
    context, images = TextContext(mx.array(normal("text", 2, 4, WIDTH))), [embeds()]
    for scale in (0.0, 1.0, 0.25):
        unet.set_ip_adapter_scale(scale)
        found = [forward(unet, images), forward(unet, images, text=context)]
        unet.uncompile()
        expected = forward(unet, images)
        unet.compile()
        for x in found:
            assert mx.allclose(x, expected, atol=1e-5 * mx.abs(expected).max().item())
    unet.load_ip_adapter(adapter(unet, "other"))
    unet.uncompile()
    expected = forward(unet, images)
    unet.compile()
    assert mx.allclose(forward(unet, images, text=context), expected, atol=1e-4)


def test_attention_changes_under_the_adapter(unet):
    unet.load_ip_adapter(adapter(unet))
    expected = forward(unet, [embeds()])
    unet.fuse_qkv_projections()
    unet.unload_ip_adapter()
    unet.load_ip_adapter(adapter(unet))
    unet.unfuse_qkv_projections()
    unet.set_attention_slice("max")
    processors = [a.processor for a in unet._image_attentions().values()]
    assert all(isinstance(p, IPAdapterAttnProcessor) for p in processors)
    assert all(isinstance(p.base, SlicedAttnProcessor) for p in processors)
    assert mx.allclose(forward(unet, [embeds()]), expected, atol=1e-5 * mx.abs(expected).max().item())
    unet.unload_ip_adapter()
    assert all(isinstance(p, SlicedAttnProcessor) for p in unet.attn_processors.values())
    unet.load_ip_adapter(adapter(unet))
    with pytest.raises(ValueError, match="unload_ip_adapter"):
        unet.set_attn_processor(CustomDiffusionAttnProcessor(False, False))
    assert all(isinstance(a.processor, IPAdapterAttnProcessor) for a in unet._image_attentions().values())


def test_the_adapter_is_no_part_of_the_network(unet, tmp_path):
    layers = unet._adaptable().keys()
    unet.load_ip_adapter(adapter(unet))
    assert unet._adaptable().keys() == layers
    for act in (lambda: unet.save_pretrained(tmp_path / "unet"), lambda: unet.quantize(8)):
        with pytest.raises(ValueError, match="unload_ip_adapter"):
            act()
    assert not (tmp_path / "unet").exists()
    with pytest.raises(ValueError, match="without weights"):
        unet.save_attn_procs(tmp_path)
    unet.save_motion_modules(tmp_path / "motion")
    unet.unload_ip_adapter()
    unet.save_pretrained(tmp_path / "unet")
    assert UNetMotionModel.from_pretrained(tmp_path / "unet").config.encoder_hid_dim_type is None


@pytest.mark.parametrize(
    ("images", "match"),
    [
        (None, "image_embeds"),
        ([], "0 entries for 1"),
        ([embeds(), embeds()], "2 entries for 1"),
        ([embeds(batch=1)], r"must be \(2, images, 6\)"),
        ([embeds()[:, 0]], r"must be \(2, images, 6\)"),
        ([embeds()[..., :5]], r"must be \(2, images, 6\)"),
        ([embeds()[:, :0]], r"must be \(2, images, 6\)"),
    ],
)
def test_images_that_do_not_fit(unet, images, match):
    unet.load_ip_adapter(adapter(unet))
    with pytest.raises(ValueError, match=match):
        forward(unet, images)


def test_images_without_an_adapter(unet):
    with pytest.raises(ValueError, match="load_ip_adapter"):
        forward(unet, [embeds()])
    with pytest.raises(ValueError, match="load_ip_adapter"):
        unet.embed_context(mx.zeros((2, 4, WIDTH)), [embeds()])
    with pytest.raises(ValueError, match="load_ip_adapter"):
        unet.set_ip_adapter_scale(1.0)


def damaged(unet, how):
    arrays = adapter(unet)
    first = "ip_adapter.1.to_k_ip.weight"
    if how == "a layer less":
        del arrays[first]
    elif how == "a layer more":
        arrays["ip_adapter.99.to_k_ip.weight"] = arrays[first]
    elif how == "another width":
        arrays[first] = arrays[first][:, :-1]
    elif how == "no projection":
        arrays = {k: a for k, a in arrays.items() if k.startswith("ip_adapter.")}
    elif how == "something else":
        arrays["unet.conv_in.weight"] = arrays[first]
    elif how == "FaceID":
        arrays["ip_adapter.0.to_q_lora.down.weight"] = arrays[first]
    elif how == "FaceID Plus":
        arrays["image_proj.perceiver_resampler.proj_in.weight"] = arrays[first]
    elif how == "text of another width":
        arrays["image_proj.norm.weight"] = mx.ones(2 * WIDTH)
        arrays["image_proj.norm.bias"] = mx.ones(2 * WIDTH)
    elif how == "a bias less":
        del arrays["image_proj.proj.bias"]
    elif how == "no norm":
        del arrays["image_proj.norm.weight"]
    return arrays


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ("a layer less", "another base model"),
        ("a layer more", "99.to_k_ip"),
        ("another width", "1.to_k_ip"),
        ("no projection", "lacks a part"),
        ("something else", "unet.conv_in"),
        ("FaceID", "LoRA inside"),
        ("FaceID Plus", "FaceID Plus"),
        ("text of another width", "makes tokens of 24 channels"),
        ("a bias less", "image_embeds.bias"),
        ("no norm", "norm.weight is missing"),
    ],
)
def test_files_that_do_not_fit_change_nothing(unet, how, match):
    with pytest.raises(CheckpointError, match=match):
        unet.load_ip_adapter([adapter(unet), damaged(unet, how)])
    assert "encoder_hid_proj" not in unet
    forward(unet)


def test_lists_and_folders(unet, tmp_path):
    with pytest.raises(ValueError, match="source has 2 entries, another list 3"):
        unet.load_ip_adapter([adapter(unet)] * 2, weight_name=["a", "b", "c"])
    with pytest.raises(ValueError, match="weight_name"):
        unet.load_ip_adapter(tmp_path)
    mx.save_safetensors(str(tmp_path / "one.safetensors"), adapter(unet))
    mx.save_safetensors(str(tmp_path / "two.safetensors"), adapter(unet, "two"))
    unet.load_ip_adapter(tmp_path, weight_name=["one.safetensors", "two.safetensors"])
    both = forward(unet, [embeds(), embeds("another")])
    unet.load_ip_adapter([adapter(unet), adapter(unet, "two")])
    assert mx.array_equal(forward(unet, [embeds(), embeds("another")]), both)
    with pytest.raises(FileNotFoundError, match=r"none.safetensors; it has one"):
        unet.load_ip_adapter(tmp_path, weight_name="none.safetensors")


@pytest.mark.parametrize(
    ("scale", "match"),
    [
        ([1.0, 1.0], "2 scales for 1"),
        (float("nan"), "finite"),
        ("strong", "finite"),
        ({"down": {"block_1": 1.0}}, "down.block_1"),
        ({"middle": 1.0}, "middle"),
        ({"up": {"block_1": [1.0, 1.0, 1.0]}}, "2 transformers"),
    ],
)
def test_scales_that_do_not_fit(unet, scale, match):
    unet.load_ip_adapter(adapter(unet))
    with pytest.raises(ValueError, match=match):
        unet.set_ip_adapter_scale(scale)
    assert {tuple(a.processor.scale) for a in unet._image_attentions().values()} == {(1.0,)}
