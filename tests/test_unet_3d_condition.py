"""UNet3DConditionModel without torch: goldens, properties, options, errors."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_unet3d import TextContext, UNet3DConditionModel
from mlx.utils import tree_flatten, tree_map
from mlx_unet3d.layers import attention_adapters as adapters
from mlx_unet3d.layers import attention_processors as processors
from mlx_unet3d.layers.conditions import Conditions
from mlx_unet3d.layers.convolution import TemporalConv
from mlx_unet3d.layers.resnet import upsample_nearest

GOLDENS = Path(__file__).parent / "goldens"

TINY = dict(
    block_out_channels=(8, 16),
    down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
    up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    cross_attention_dim=12,
    attention_head_dim=4,
    layers_per_block=1,
    norm_num_groups=4,
    sample_size=8,
)


def randomize(model, seed=0):
    """No layer at its neutral start: the temporal convolutions begin as the identity."""
    rng = np.random.default_rng(seed)

    def change(p):
        fan_in = max(p.size // p.shape[0], 1)
        return mx.array(rng.normal(0, fan_in**-0.5, p.shape).astype(np.float32)) if p.ndim > 1 else p

    model.update(tree_map(change, model.parameters()))
    model.eval()
    mx.eval(model.parameters())
    return model


@pytest.fixture
def unet():
    mx.random.seed(0)
    return randomize(UNet3DConditionModel(**TINY))


def make_inputs(batch=1, frames=2, height=6, width=4, tokens=5, dtype=mx.float32, seed=1):
    rng = np.random.default_rng(seed)
    sample = mx.array(rng.normal(size=(batch, 4, frames, height, width)).astype(np.float32))
    text = mx.array(rng.normal(size=(batch, tokens, 12)).astype(np.float32))
    return sample.astype(dtype), text.astype(dtype)


def close(a, b, tolerance=2e-5):
    a, b = np.array(a.astype(mx.float32)), np.array(b.astype(mx.float32))
    return a.shape == b.shape and np.abs(a - b).max() <= tolerance * np.abs(b).max()


@pytest.mark.parametrize("case", ["plain", "freeu", "residuals", "odd"])
def test_golden(case):
    """Outputs of diffusers, dumped by tests/goldens/make_unet.py."""
    unet = UNet3DConditionModel.from_pretrained(GOLDENS / "unet")
    data = mx.load(str(GOLDENS / "unet" / "cases.safetensors"))
    kwargs = {}
    if case == "freeu":
        unet.enable_freeu(0.9, 0.2, 1.2, 1.4)
    if case == "residuals":
        kwargs["down_block_additional_residuals"] = [data[f"residuals.down.{i}"] for i in range(4)]
        kwargs["mid_block_additional_residual"] = data["residuals.mid"]
    out = unet(data[f"{case}.sample"], data[f"{case}.timestep"], data[f"{case}.text"], **kwargs)
    assert close(out.sample, data[f"{case}.out"], 1e-5)


def test_default_parameter_count():
    assert UNet3DConditionModel().num_parameters() == 1_411_233_860


def test_output_forms(unet):
    sample, text = make_inputs()
    out = unet(sample, 10, text)
    assert out.sample is out["sample"] is out[0] is out.to_tuple()[0]
    assert list(out) == ["sample"]
    (plain,) = unet(sample, 10, text, return_dict=False)
    assert mx.array_equal(plain, out.sample)


def test_fresh_temporal_convolutions_are_the_identity():
    unet = UNet3DConditionModel(**TINY)
    layer = unet.down_blocks[0].temp_convs[0]
    layer.eval()
    x = mx.random.normal((4, 3, 3, 8))
    assert mx.array_equal(layer(x, Conditions(2, 2)), x)


def test_batch_of_two_is_two_singles(unet):
    sample, text = make_inputs(batch=2)
    both = unet(sample, mx.array([7, 900]), text).sample
    for i, t in enumerate((7, 900)):
        assert close(both[i : i + 1], unet(sample[i : i + 1], t, text[i : i + 1]).sample)


def test_frames_are_coupled_and_ordered(unet):
    sample, text = make_inputs(frames=3)
    out = unet(sample, 10, text).sample
    changed = mx.concatenate([sample[:, :, :2], -sample[:, :, 2:]], axis=2)
    assert not close(unet(changed, 10, text).sample[:, :, :1], out[:, :, :1], 1e-3)
    reverse = mx.array([2, 1, 0])
    assert not close(unet(sample[:, :, reverse], 10, text).sample[:, :, reverse], out, 1e-3)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("option", ["plain", "freeu", "sliced", "explicit", "mask", "lora", "residuals"])
def test_half_precision_stays(unet, dtype, option):
    sample, text = make_inputs()
    kwargs = {}
    if option == "freeu":
        unet.enable_freeu(0.9, 0.2, 1.2, 1.4)
    elif option == "sliced":
        unet.set_attention_slice(1)
    elif option == "explicit":
        unet.set_default_attn_processor()
    elif option == "mask":
        kwargs["attention_mask"] = mx.array([[1, 1, 0, 0, 1]])
    elif option == "lora":
        unet.set_attn_processor(lora_processors(unet))  # in fp32
    elif option == "residuals":
        kwargs["mid_block_additional_residual"] = mx.ones((2, 16, 3, 2))
    expected = unet(sample, 500, text, **kwargs).sample
    unet.set_dtype(dtype)
    out = unet(sample.astype(dtype), 500, text.astype(dtype), **kwargs).sample
    assert out.dtype == dtype
    assert close(out, expected, 0.02 if dtype == mx.float16 else 0.15)


@pytest.mark.parametrize("option", ["slice", "chunk", "fuse", "context", "explicit"])
def test_memory_options_leave_the_result_alone(unet, option):
    sample, text = make_inputs(batch=2)
    expected = unet(sample, 10, text).sample
    if option == "slice":
        unet.set_attention_slice("max")
        assert {p.slice_size for p in unet.attn_processors.values()} == {1}
    elif option == "chunk":
        unet.enable_forward_chunking(2, 0)
    elif option == "fuse":
        unet.fuse_qkv_projections()
    elif option == "context":
        text = TextContext(text)
        unet(sample, 500, text)
    else:
        unet.set_default_attn_processor()
    assert close(unet(sample, 10, text).sample, expected)


def test_chunks_must_divide(unet):
    sample, text = make_inputs(frames=3)
    unet.enable_forward_chunking(2, 1)
    with pytest.raises(ValueError, match="not a multiple of chunk_size=2"):
        unet(sample, 10, text)
    unet.disable_forward_chunking()
    unet(sample, 10, text)
    with pytest.raises(ValueError, match="either 0 or 1, not 2"):
        unet.enable_forward_chunking(1, 2)
    with pytest.raises(ValueError, match="chunk_size"):
        unet.enable_forward_chunking(-1)


def test_attention_slice_sizes(unet):
    count = len(unet.attn_processors)
    heads = [a.heads for a in unet._attentions().values()]
    unet.set_attention_slice("auto")
    assert [p.slice_size for p in unet.attn_processors.values()] == [max(h // 2, 1) for h in heads]
    sizes = [1 + i % 2 for i in range(count)]
    unet.set_attention_slice(sizes)
    assert [p.slice_size for p in unet.attn_processors.values()] == sizes
    for bad, error in [
        (0, ValueError),
        (-1, ValueError),
        (9, ValueError),
        ([1] * (count - 1), ValueError),
        (1.5, TypeError),
        ("some", TypeError),
        (True, TypeError),
    ]:
        with pytest.raises(error):
            unet.set_attention_slice(bad)
    assert [p.slice_size for p in unet.attn_processors.values()] == sizes  # nothing half-done
    unet.set_attention_slice(None)
    assert {type(p) for p in unet.attn_processors.values()} == {processors.AttnProcessor2_0}


def test_default_network_limits_an_integer_slice_to_five():
    unet = UNet3DConditionModel()
    heads = [a.heads for a in unet._attentions().values()]
    assert heads == [8, 8] + [5] * 8 + [10] * 8 + [20] * 8 + [20] * 12 + [10] * 12 + [5] * 12 + [20] * 4
    with pytest.raises(ValueError, match="smaller or equal to 5"):
        unet.set_attention_slice(6)


def test_processor_dict(unet):
    chosen = {path: processors.AttnProcessor() for path in unet.attn_processors}
    kept = dict(chosen)
    unet.set_attn_processor(chosen)
    assert chosen == kept
    assert unet.attn_processors == chosen
    with pytest.raises(ValueError, match="number of processors 1"):
        unet.set_attn_processor({"a": processors.AttnProcessor()})
    wrong = dict(chosen)
    wrong["other.processor"] = wrong.pop(next(iter(wrong)))
    with pytest.raises(KeyError, match="transformer_in"):
        unet.set_attn_processor(wrong)
    with pytest.raises(ValueError, match="added_kv_proj_dim"):
        unet.set_attn_processor(processors.AttnAddedKVProcessor())
    assert unet.attn_processors == chosen


def lora_processors(unet, kind=adapters.LoRAAttnProcessor2_0, **kwargs):
    rng = np.random.default_rng(3)
    made = {}
    for path, layer in unet._attentions().items():
        context = layer.cross_attention_dim if layer.is_cross_attention else None
        lora = kind(layer.query_dim, context, rank=2, **kwargs)
        for name in ("to_q_lora", "to_k_lora", "to_v_lora", "to_out_lora"):
            up = lora[name].up
            up.weight = mx.array(rng.normal(0, 0.3, up.weight.shape).astype(np.float32))
        made[f"{path}.processor"] = lora
    return made


def merge_lora(unet, loras, scale):
    """The same by adding the products to the weights."""
    for path, layer in unet._attentions().items():
        lora = loras[f"{path}.processor"]
        for name, linear in [
            ("to_q", layer.to_q),
            ("to_k", layer.to_k),
            ("to_v", layer.to_v),
            ("to_out", layer.to_out[0]),
        ]:
            part = lora[f"{name}_lora"]
            factor = scale if part.network_alpha is None else scale * part.network_alpha / part.rank
            linear.weight = linear.weight + factor * (part.up.weight @ part.down.weight)


@pytest.mark.parametrize(
    "kind",
    [
        adapters.LoRAAttnProcessor,
        adapters.LoRAAttnProcessor2_0,
        adapters.LoRAXFormersAttnProcessor,
    ],
)
@pytest.mark.parametrize("alpha", [None, 1.0])
def test_lora(unet, kind, alpha):
    sample, text = make_inputs()
    base = unet(sample, 10, text).sample
    loras = lora_processors(unet, kind, network_alpha=alpha)
    unet.set_attn_processor(loras)
    assert unet.attn_processors == loras
    off = unet(sample, 10, text, cross_attention_kwargs={"scale": 0.0}).sample
    half = unet(sample, 10, text, cross_attention_kwargs={"scale": 0.5}).sample
    full = unet(sample, 10, text).sample
    cached = TextContext(text)
    again = [unet(sample, 10, cached, cross_attention_kwargs={"scale": s}).sample for s in (0.5, 1.0)]
    assert close(off, base)
    assert not close(full, base, 0.01)
    assert close(again[0], half)
    assert close(again[1], full)

    # Another processor keeps them, as long as nobody asks for their removal.
    unet.set_attn_processor(processors.AttnProcessor())
    assert close(unet(sample, 10, text).sample, full)
    unet.set_attn_processor(processors.AttnProcessor2_0(), _remove_lora=True)
    assert close(unet(sample, 10, text).sample, base)
    unet.set_attn_processor(loras)
    unet.set_default_attn_processor()
    assert {type(p) for p in unet.attn_processors.values()} == {processors.AttnProcessor}
    assert close(unet(sample, 10, text).sample, base)

    merge_lora(unet, loras, 0.5)
    assert close(unet(sample, 10, text).sample, half)


def test_fresh_lora_changes_nothing(unet):
    sample, text = make_inputs()
    base = unet(sample, 10, text).sample
    fresh = {
        f"{path}.processor": adapters.LoRAAttnProcessor(
            layer.query_dim, layer.cross_attention_dim if layer.is_cross_attention else None
        )
        for path, layer in unet._attentions().items()
    }
    unet.set_attn_processor(fresh)
    assert close(unet(sample, 10, text).sample, base)


def test_custom_diffusion_first_token_has_no_gradient(unet):
    processor = adapters.CustomDiffusionAttnProcessor(train_kv=False, train_q_out=False)
    sample, text = make_inputs()
    base = unet(sample, 10, text).sample
    unet.set_attn_processor(processor)
    assert close(unet(sample, 10, text).sample, base)
    with pytest.raises(ValueError, match="set_default_attn_processor"):
        unet.set_default_attn_processor()

    def loss(text):
        return unet(sample, 10, text).sample.square().sum()

    gradient = mx.grad(loss)(text)
    assert mx.abs(gradient[:, 0]).max().item() == 0
    assert mx.abs(gradient[:, 1]).max().item() > 0


def test_gradients_reach_every_parameter(unet):
    sample, text = make_inputs()

    def loss(parameters):
        unet.update(parameters)
        return unet(sample, 10, text).sample.square().mean()

    parameters = unet.parameters()
    gradients = mx.grad(loss)(parameters)
    unet.update(parameters)
    for name, gradient in tree_flatten(gradients):
        largest = mx.abs(gradient).max().item()
        assert np.isfinite(largest), name
        # attn2 has no key bias; all layers take part
        assert largest > 0, name


def test_unfuse(unet):
    sample, text = make_inputs()
    before = unet.attn_processors
    expected = unet(sample, 10, text).sample
    with pytest.raises(ValueError, match="call fuse_qkv_projections first"):
        unet.unfuse_qkv_projections()
    names = {name for name, _ in tree_flatten(unet.parameters())}
    unet.fuse_qkv_projections()
    unet.fuse_qkv_projections()
    unet.unfuse_qkv_projections()
    assert {name for name, _ in tree_flatten(unet.parameters())} == names
    assert unet.attn_processors == before
    assert mx.array_equal(unet(sample, 10, text).sample, expected)


def test_fused_network_saves_its_plain_weights(unet, tmp_path):
    sample, text = make_inputs()
    expected = unet(sample, 10, text).sample
    unet.fuse_qkv_projections()
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        unet.save_pretrained(tmp_path)
    unet.unfuse_qkv_projections()
    unet.set_attn_processor(lora_processors(unet))
    with pytest.raises(ValueError, match="adapter"):
        unet.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    unet.set_default_attn_processor()
    unet.save_pretrained(tmp_path)
    assert close(UNet3DConditionModel.from_pretrained(tmp_path)(sample, 10, text).sample, expected)


def test_text_projected_once(unet, monkeypatch):
    """A TextContext projects once in all; a plain array once a forward; frames never multiply the work."""
    rows = []
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn2
    project = type(layer).project_keys_values

    def counting(self, context):
        if self is layer and isinstance(context, mx.array):
            rows.append(context.shape[0])
        return project(self, context)

    monkeypatch.setattr(type(layer), "project_keys_values", counting)
    sample, text = make_inputs(batch=2, frames=3)
    context = TextContext(text)
    for t in (3, 2, 1):
        unet(sample, t, context)
    assert rows == [2]
    for t in (3, 2):
        unet(sample, t, text)
    assert rows == [2, 2, 2]


def test_no_conv3d_and_no_text_per_frame(unet):
    """What the graph holds: only two-axis convolutions, and the text projected once a sample."""
    sample, text = make_inputs(batch=2, frames=3, tokens=5)
    records = []
    mx.eval(unet.parameters())
    mx.disable_compile()  # a fused element-wise chain has no record
    try:
        mx.export_function(records.append, lambda s, t: unet(s, 10, t).sample, sample, text)
    finally:
        mx.enable_compile()
    primitives = [r for r in records if r["type"] == "primitive"]
    convolutions = [r for r in primitives if r["name"] == "Convolution"]
    assert convolutions
    assert all(len(r["inputs"][0][1]) == 4 for r in convolutions)
    assert sum(tuple(r["inputs"][1][1])[1:3] == (3, 1) for r in convolutions) == 4 * 8  # 8 layers
    # The text has 12 channels, which nothing else has: (batch, 5, 12) or folded, never once a frame.
    products = [tuple(r["inputs"][0][1]) for r in primitives if r["name"] in ("Matmul", "AddMM")]
    from_text = [shape for shape in products if shape[-1] == 12]
    assert from_text
    assert {int(np.prod(shape[:-1])) for shape in from_text} == {2 * 5}


def test_temporal_conv_is_a_conv3d():
    conv = TemporalConv(4, 6)
    x = mx.random.normal((2, 5, 12, 4))
    expected = mx.conv3d(x.reshape(2, 5, 3, 4, 4), conv.weight[:, :, :, None], padding=(1, 0, 0))
    assert close(conv(x), expected.reshape(2, 5, 12, 6) + conv.bias)


@pytest.mark.parametrize("size", [(6, 8), (5, 7), (6, 7)])
def test_upsample_nearest(size):
    x = mx.random.normal((2, 3, 4, 5))
    y = np.array(upsample_nearest(x, *size))
    x = np.array(x)
    for i in range(size[0]):
        for j in range(size[1]):
            assert (y[:, i, j] == x[:, i * 3 // size[0], j * 4 // size[1]]).all()


BAD_CONFIGS = {
    "heads": (dict(num_attention_heads=4), NotImplementedError, "num_attention_heads=4"),
    "up_count": (
        dict(up_block_types=("UpBlock3D",)),
        ValueError,
        "same number of `down_block_types`",
    ),
    "channel_count": (
        dict(block_out_channels=(8,)),
        ValueError,
        "same number of `block_out_channels`",
    ),
    "down_name": (
        dict(down_block_types=("DownBlock2D", "DownBlock3D")),
        ValueError,
        "`DownBlock2D` does not exist",
    ),
    "up_name": (
        dict(up_block_types=("UpBlockMotion", "UpBlock3D")),
        ValueError,
        "`UpBlockMotion` does not exist",
    ),
    "no_text_width": (
        dict(cross_attention_dim=None),
        ValueError,
        "must be specified for CrossAttn",
    ),
    "act": (dict(act_fn="tanh"), ValueError, "act_fn='tanh'"),
    "groups": (dict(norm_num_groups=3), ValueError, "does not divide"),
    "no_groups": (dict(norm_num_groups=None), ValueError, "norm_num_groups=None"),
    "head_dim_tuple": (dict(attention_head_dim=(4, 4)), ValueError, "attention_head_dim"),
    "head_dim_wide": (dict(attention_head_dim=16), ValueError, "no head"),
    "layers": (dict(layers_per_block=0), ValueError, "layers_per_block=0"),
    "layers_tuple": (dict(layers_per_block=(1, 1)), ValueError, "layers_per_block"),
    "padding": (dict(downsample_padding=2), ValueError, "downsample_padding=2"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_configs(name):
    change, error, message = BAD_CONFIGS[name]
    with pytest.raises(error, match=message):
        UNet3DConditionModel(**{**TINY, **change})


SKIPS = [(2, 8, 6, 4), (2, 8, 6, 4), (2, 8, 3, 2), (2, 16, 3, 2)]
BAD_CALLS = {
    "rank": (dict(sample=mx.zeros((1, 4, 6, 4))), "sample has shape"),
    "channels": (dict(sample=mx.zeros((1, 5, 2, 6, 4))), "sample has shape"),
    "no_frames": (dict(sample=mx.zeros((1, 4, 0, 6, 4))), "sample has shape"),
    "dtype": (dict(sample=mx.zeros((1, 4, 2, 6, 4), mx.float16)), "cast it"),
    "text_dtype": (dict(encoder_hidden_states=mx.zeros((1, 5, 12), mx.float16)), "cast it"),
    "text_width": (dict(encoder_hidden_states=mx.zeros((1, 5, 13))), "cross_attention_dim"),
    "text_batch": (dict(encoder_hidden_states=mx.zeros((2, 5, 12))), "one row of text a sample"),
    "no_text": (dict(encoder_hidden_states=None), "encoder_hidden_states is None"),
    "timesteps": (dict(timestep=mx.array([1, 2, 3])), "timestep has shape"),
    "classes": (dict(class_labels=mx.array([1])), "class_labels must be None"),
    "cond": (dict(timestep_cond=mx.zeros((1, 4))), "time_cond_proj_dim"),
    "mask": (dict(attention_mask=mx.ones((1, 4))), "attention_mask has shape"),
    "residual_count": (
        dict(down_block_additional_residuals=[mx.zeros(s) for s in SKIPS[:3]]),
        "has 3 entries",
    ),
    "residual_shape": (
        dict(down_block_additional_residuals=[mx.zeros(s[::-1]) for s in SKIPS]),
        r"residuals\[0\] has shape",
    ),
    "mid_shape": (dict(mid_block_additional_residual=mx.zeros((2, 16, 3, 3))), "must broadcast"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(unet, name):
    change, message = BAD_CALLS[name]
    sample, text = make_inputs()
    with pytest.raises(ValueError, match=message):
        unet(**{"sample": sample, "timestep": 5, "encoder_hidden_states": text, **change})


def test_residuals_of_the_right_shapes(unet):
    sample, text = make_inputs()
    base = unet(sample, 5, text).sample
    out = unet(sample, 5, text, down_block_additional_residuals=[mx.zeros(s) for s in SKIPS]).sample
    assert mx.array_equal(out, base)


def test_unknown_attention_keyword(unet):
    sample, text = make_inputs()
    with pytest.raises(TypeError, match="gligen"):
        unet(sample, 5, text, cross_attention_kwargs={"gligen": 1})


def test_xformers_operator_is_refused():
    for kind in (processors.XFormersAttnProcessor, processors.XFormersAttnAddedKVProcessor):
        with pytest.raises(ValueError, match="attention_op"):
            kind(attention_op=len)
    with pytest.raises(ValueError, match="attention_op"):
        adapters.LoRAXFormersAttnProcessor(8, attention_op=len)
    with pytest.raises(ValueError, match="attention_op"):
        adapters.CustomDiffusionXFormersAttnProcessor(hidden_size=8, attention_op=len)
    assert not adapters.CustomDiffusionXFormersAttnProcessor(hidden_size=8).train_q_out


def test_lora_on_added_kv():
    from mlx_unet3d.layers.attention import Attention

    attn = Attention(10, heads=2, dim_head=5, added_kv_proj_dim=6, norm_num_groups=1)
    x, text = mx.random.normal((2, 7, 10)), mx.random.normal((2, 3, 6))
    base = attn(x, text)
    lora = adapters.LoRAAttnAddedKVProcessor(10, 6, rank=2)
    attn.set_processor(lora)
    assert close(attn(x, text), base)
    for name in ("to_q", "to_k", "to_v", "to_out", "add_k_proj", "add_v_proj"):
        up = lora[f"{name}_lora"].up
        up.weight = mx.random.normal(up.weight.shape)
        assert not close(attn(x, text), base, 1e-3), name
        up.weight = mx.zeros(up.weight.shape)
    with pytest.raises(ValueError, match="does not know"):
        attn.set_processor(processors.AttnProcessor())
