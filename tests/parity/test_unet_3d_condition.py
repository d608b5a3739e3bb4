"""UNet3DConditionModel against diffusers' own, live, in fp32 on the same weights."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from mlx_unet3d import TextContext, UNet3DConditionModel  # noqa: E402
from diffusers import UNet3DConditionModel as ReferenceUNet  # noqa: E402
from diffusers.models import attention_processor as reference_processors  # noqa: E402
from mlx_unet3d.layers import attention_processors as processors  # noqa: E402
from mlx_unet3d.layers.attention_adapters import (  # noqa: E402
    CustomDiffusionAttnProcessor,
    CustomDiffusionAttnProcessor2_0,
)
from reference import Inputs, relative_error, to_mlx, unet_pair  # noqa: E402

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]

TOLERANCE = 1e-5

CROSS, PLAIN = "CrossAttnDownBlock3D", "DownBlock3D"
UP_CROSS, UP_PLAIN = "CrossAttnUpBlock3D", "UpBlock3D"

# config changes, input changes
CASES = {
    "tiny": ({}, {}),
    "diffusers_test_config": (
        dict(
            block_out_channels=(4, 8),
            norm_num_groups=4,
            cross_attention_dim=8,
            attention_head_dim=2,
        ),
        dict(batch=4, frames=4, height=16, width=16, tokens=4, timestep=[10, 10, 10, 10]),
    ),
    "diffusers_0_23_test_config": (
        dict(block_out_channels=(32, 64), norm_num_groups=32, cross_attention_dim=32),
        dict(batch=2, frames=4, height=16, width=16, tokens=4, timestep=10),
    ),
    "four_levels": (
        dict(
            block_out_channels=(32, 64, 96, 96),
            down_block_types=(CROSS, CROSS, CROSS, PLAIN),
            up_block_types=(UP_PLAIN, UP_CROSS, UP_CROSS, UP_CROSS),
            layers_per_block=2,
            attention_head_dim=16,
        ),
        dict(frames=2, height=16, width=8),
    ),
    "three_levels_odd_size": (
        dict(
            block_out_channels=(16, 32, 48),
            down_block_types=(CROSS, PLAIN, CROSS),
            up_block_types=(UP_CROSS, UP_PLAIN, UP_CROSS),
        ),
        dict(height=11, width=7),
    ),
    "one_level": (
        dict(block_out_channels=(32,), down_block_types=(CROSS,), up_block_types=(UP_CROSS,)),
        {},
    ),
    "all_cross": (dict(down_block_types=(CROSS, CROSS), up_block_types=(UP_CROSS, UP_CROSS)), {}),
    "no_cross": (dict(down_block_types=(PLAIN, PLAIN), up_block_types=(UP_PLAIN, UP_PLAIN)), {}),
    "no_text": (
        dict(
            down_block_types=(PLAIN, PLAIN),
            up_block_types=(UP_PLAIN, UP_PLAIN),
            cross_attention_dim=None,
        ),
        {},
    ),
    "mixed_sides": (dict(down_block_types=(PLAIN, CROSS), up_block_types=(UP_CROSS, UP_PLAIN)), {}),
    "three_layers": (dict(layers_per_block=3), {}),
    "channels_in_out": (dict(in_channels=9, out_channels=3), {}),
    "head_dim_16": (dict(attention_head_dim=16), {}),
    "head_dim_not_a_divisor": (dict(attention_head_dim=12), {}),
    "head_dim_32": (dict(attention_head_dim=32), {}),
    "groups_2": (dict(norm_num_groups=2), {}),
    "groups_16": (dict(norm_num_groups=16), {}),
    "norm_eps": (dict(norm_eps=1e-3), {}),
    "padding_0": (dict(downsample_padding=0), {}),
    "padding_0_odd": (dict(downsample_padding=0), dict(height=9, width=6)),
    "mid_scale": (dict(mid_block_scale_factor=2.5), {}),
    "act_swish": (dict(act_fn="swish"), {}),
    "act_mish": (dict(act_fn="mish"), {}),
    "act_gelu": (dict(act_fn="gelu"), {}),
    "act_relu": (dict(act_fn="ReLU"), {}),
    "odd_9x7": ({}, dict(height=9, width=7)),
    "odd_10x13": ({}, dict(height=10, width=13)),
    "thin_1x5": (dict(norm_num_groups=2), dict(height=1, width=5)),
    "thin_2x3": (dict(norm_num_groups=2), dict(height=2, width=3)),
    "one_frame": ({}, dict(frames=1)),
    "twelve_frames": ({}, dict(frames=12, height=4, width=4)),
    "batch_3": ({}, dict(batch=3)),
    "one_token": ({}, dict(tokens=1)),
    "many_tokens": ({}, dict(tokens=77)),
    "timestep_0": ({}, dict(timestep=0)),
    "timestep_float": ({}, dict(timestep=437.25)),
    "timestep_per_sample": ({}, dict(batch=2, timestep=[3, 902])),
    "timestep_999": ({}, dict(timestep=999)),
    "time_cond_unused": (dict(time_cond_proj_dim=6), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_forward(name, tmp_path):
    config, shape = CASES[name]
    theirs, ours = unet_pair(tmp_path, **config)
    inputs = Inputs(theirs, **shape)
    assert relative_error(inputs.ours(ours), inputs.theirs(theirs)) <= TOLERANCE


def test_single_pixel(tmp_path):
    """One pixel leaves few numbers to a norm, and rounding grows: measured against float64."""
    theirs, ours = unet_pair(tmp_path, norm_num_groups=2)
    inputs = Inputs(theirs, batch=2, frames=4, height=1, width=1)
    out, ref = np.array(inputs.ours(ours)), inputs.theirs(theirs).numpy()
    inputs.sample, inputs.text = inputs.sample.double(), inputs.text.double()
    exact = inputs.theirs(theirs.double()).numpy()
    noise = np.abs(ref - exact).max()
    assert np.abs(out - exact).max() <= max(TOLERANCE * np.abs(exact).max(), 4 * noise)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return unet_pair(tmp_path_factory.mktemp("unet"))


def test_timestep_forms(pair):
    theirs, ours = pair
    inputs = Inputs(theirs)
    expected = inputs.theirs(theirs)
    for t in (981, 981.0, np.int64(981), mx.array(981), mx.array([981]), mx.array(981.0)):
        inputs.timestep = t
        assert relative_error(inputs.ours(ours), expected) <= TOLERANCE


def test_timestep_cond(tmp_path):
    theirs, ours = unet_pair(tmp_path, time_cond_proj_dim=6)
    inputs = Inputs(theirs, batch=2)
    cond = inputs.randn(2, 6)
    expected = inputs.theirs(theirs, timestep_cond=cond)
    assert relative_error(inputs.ours(ours, timestep_cond=to_mlx(cond)), expected) <= TOLERANCE
    assert relative_error(inputs.ours(ours), expected) > 1e-3


@pytest.mark.parametrize("size", [(8, 8), (9, 7)])
def test_additional_residuals(pair, size):
    theirs, ours = pair
    inputs = Inputs(theirs, batch=2, frames=2, height=size[0], width=size[1])
    half = [-(-n // 2) for n in size]
    shapes = [(32, *size), (32, *size), (32, *half), (64, *half)]
    down = [inputs.randn(4, *shape) for shape in shapes]
    mid = inputs.randn(4, 64, *half)
    expected = inputs.theirs(
        theirs, down_block_additional_residuals=tuple(down), mid_block_additional_residual=mid
    )
    out = inputs.ours(
        ours,
        down_block_additional_residuals=[to_mlx(d) for d in down],
        mid_block_additional_residual=to_mlx(mid),
    )
    assert relative_error(out, expected) <= TOLERANCE
    only_mid = inputs.theirs(theirs, mid_block_additional_residual=mid[:1, :, :1])
    out = inputs.ours(ours, mid_block_additional_residual=to_mlx(mid[:1, :, :1]))
    assert relative_error(out, only_mid) <= TOLERANCE


@pytest.mark.parametrize("size", [(8, 8), (5, 7), (2, 2), (16, 3)])
@pytest.mark.parametrize("factors", [(0.9, 0.2, 1.2, 1.4), (0.0, 0.2, 1.2, 1.4)])
def test_freeu(pair, size, factors):
    theirs, ours = pair
    inputs = Inputs(theirs, frames=2, height=size[0], width=size[1])
    plain = inputs.theirs(theirs)
    names = ("s1", "s2", "b1", "b2")
    kwargs = dict(zip(names, factors, strict=True))
    theirs.enable_freeu(**kwargs)
    ours.enable_freeu(**kwargs)
    try:
        expected = inputs.theirs(theirs)
        assert relative_error(inputs.ours(ours), expected) <= TOLERANCE
        if all(factors):
            assert relative_error(expected, plain) > 1e-3
    finally:
        theirs.disable_freeu()
        ours.disable_freeu()
    assert relative_error(inputs.ours(ours), plain) <= TOLERANCE


@pytest.mark.parametrize(("size", "dim"), [(None, 0), (2, 0), (4, 0), (2, 1), (1, 1)])
def test_forward_chunking(pair, size, dim):
    theirs, ours = pair
    inputs = Inputs(theirs, batch=2, frames=4)
    theirs.enable_forward_chunking(size, dim)
    ours.enable_forward_chunking(size, dim)
    try:
        expected = inputs.theirs(theirs)
        assert relative_error(inputs.ours(ours), expected) <= TOLERANCE
    finally:
        theirs.disable_forward_chunking()
        ours.disable_forward_chunking()


@pytest.mark.parametrize("size", ["auto", "max", 1, 2, 3, "list"])
def test_attention_slice(pair, size):
    theirs, ours = pair
    if size == "list":
        size = [1 + i % 4 for i in range(len(ours.attn_processors))]
    inputs = Inputs(theirs, frames=2, height=9, width=7)
    theirs.set_attention_slice(size)
    ours.set_attention_slice(size)
    try:
        expected = inputs.theirs(theirs)
        assert relative_error(inputs.ours(ours), expected) <= TOLERANCE
    finally:
        theirs.set_attention_slice(None)
        ours.set_attention_slice(None)


PROCESSORS = {
    "AttnProcessor": lambda module: module.AttnProcessor(),
    "AttnProcessor2_0": lambda module: module.AttnProcessor2_0(),
    "SlicedAttnProcessor": lambda module: module.SlicedAttnProcessor(3),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_processor(pair, name):
    theirs, ours = pair
    inputs = Inputs(theirs, batch=2)
    theirs.set_attn_processor(PROCESSORS[name](reference_processors))
    ours.set_attn_processor(PROCESSORS[name](processors))
    try:
        expected = inputs.theirs(theirs)
        assert relative_error(inputs.ours(ours), expected) <= TOLERANCE
    finally:
        theirs.set_attn_processor(reference_processors.AttnProcessor2_0())
        ours.set_attn_processor(processors.AttnProcessor2_0())


def test_xformers_name_is_the_fused_attention(pair):
    theirs, ours = pair
    inputs = Inputs(theirs)
    expected = inputs.ours(ours)
    ours.set_attn_processor(processors.XFormersAttnProcessor())
    assert mx.array_equal(inputs.ours(ours), expected)
    ours.set_attn_processor(processors.AttnProcessor2_0())


def test_processor_paths(pair):
    theirs, ours = pair
    assert list(ours.attn_processors) == list(theirs.attn_processors)
    names = [type(p).__name__ for p in theirs.attn_processors.values()]
    assert [type(p).__name__ for p in ours.attn_processors.values()] == names


def test_fuse_qkv(tmp_path):
    theirs, ours = unet_pair(tmp_path)
    inputs = Inputs(theirs, batch=2)
    expected = inputs.theirs(theirs)
    ours.fuse_qkv_projections()
    assert relative_error(inputs.ours(ours), expected) <= TOLERANCE
    theirs.fuse_qkv_projections()
    assert relative_error(inputs.ours(ours), inputs.theirs(theirs)) <= TOLERANCE
    theirs.unfuse_qkv_projections()
    ours.unfuse_qkv_projections()
    assert relative_error(inputs.ours(ours), expected) <= TOLERANCE


@pytest.mark.parametrize("train_q_out", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_custom_diffusion(tmp_path, train_q_out, fused):
    theirs, ours = unet_pair(tmp_path)
    torch.manual_seed(3)
    name = "CustomDiffusionAttnProcessor2_0" if fused else "CustomDiffusionAttnProcessor"
    their_class = getattr(reference_processors, name)
    our_class = CustomDiffusionAttnProcessor2_0 if fused else CustomDiffusionAttnProcessor
    their_dict, our_dict = {}, {}
    for path in theirs.attn_processors:
        layer = theirs.get_submodule(path.removesuffix(".processor"))
        crosses = layer.to_k.in_features != layer.to_q.in_features
        args = dict(
            train_kv=crosses,
            train_q_out=crosses and train_q_out,
            hidden_size=layer.to_q.in_features,
            cross_attention_dim=layer.to_k.in_features if crosses else None,
        )
        their_dict[path], our_dict[path] = their_class(**args), our_class(**args)
        state = [(key, to_mlx(value)) for key, value in their_dict[path].state_dict().items()]
        our_dict[path].load_weights(state)
    inputs = Inputs(theirs, batch=2)
    plain = inputs.theirs(theirs)
    theirs.set_attn_processor(their_dict)
    ours.set_attn_processor(our_dict)
    assert len(our_dict) == len(ours.attn_processors)
    expected = inputs.theirs(theirs)
    assert relative_error(expected, plain) > 1e-2
    assert relative_error(inputs.ours(ours), expected) <= TOLERANCE


def test_text_context_and_mask(pair):
    theirs, ours = pair
    inputs = Inputs(theirs, batch=2)
    expected = inputs.theirs(theirs)
    sample, text = to_mlx(inputs.sample), to_mlx(inputs.text)
    context = TextContext(text)
    for _ in range(2):
        assert relative_error(ours(sample, 981, context).sample, expected) <= TOLERANCE
    ones = mx.ones(text.shape[:2])
    assert relative_error(ours(sample, 981, text, attention_mask=ones).sample, expected) <= TOLERANCE

    # The reference ignores its mask; leaving the masked tokens out is what a mask means.
    mask = mx.array([[1, 1, 1, 1, 0, 0, 0]] * 2)
    inputs.text = inputs.text[:, :4]
    shorter = inputs.theirs(theirs)
    for processor in (
        processors.AttnProcessor(),
        processors.SlicedAttnProcessor(3),
        processors.AttnProcessor2_0(),
    ):
        ours.set_attn_processor(processor)
        masked = ours(sample, 981, text, attention_mask=mask).sample
        assert relative_error(masked, shorter) <= TOLERANCE


def test_added_kv_processors():
    """The standalone attention with added keys and values, as diffusers tests it."""
    from diffusers.models.attention_processor import Attention as ReferenceAttention
    from mlx_unet3d.layers.attention import Attention

    for only_cross in (False, True):
        args = dict(
            query_dim=10,
            heads=2,
            dim_head=4,
            added_kv_proj_dim=6,
            norm_num_groups=1,
            only_cross_attention=only_cross,
            bias=True,
            scale_qk=True,
        )
        torch.manual_seed(0)
        theirs = ReferenceAttention(**args, processor=reference_processors.AttnAddedKVProcessor()).eval()
        ours = Attention(**args)
        ours.load_weights([(k, to_mlx(v)) for k, v in theirs.state_dict().items()])
        x, text = torch.randn(3, 10, 4, 5), torch.randn(3, 7, 6)
        with torch.no_grad():
            expected = theirs(x, text).permute(0, 2, 3, 1)
        for processor in (
            processors.AttnAddedKVProcessor(),
            processors.AttnAddedKVProcessor2_0(),
            processors.SlicedAttnAddedKVProcessor(4),
            processors.XFormersAttnAddedKVProcessor(),
        ):
            ours.set_processor(processor)
            out = ours(to_mlx(x.permute(0, 2, 3, 1).contiguous()), to_mlx(text))
            assert relative_error(out, expected) <= TOLERANCE


@pytest.mark.parametrize("layout", ["mlx", "diffusers"])
def test_save_and_load(pair, tmp_path, layout):
    theirs, ours = pair
    inputs = Inputs(theirs)
    ours.save_pretrained(tmp_path, layout=layout)
    again = UNet3DConditionModel.from_pretrained(tmp_path)
    assert mx.array_equal(inputs.ours(again), inputs.ours(ours))
    if layout == "diffusers":
        loaded = ReferenceUNet.from_pretrained(tmp_path)
        for name, value in theirs.state_dict().items():
            assert torch.equal(value, loaded.state_dict()[name]), name
        assert torch.equal(inputs.theirs(loaded), inputs.theirs(theirs))


def test_early_config_keys(pair):
    """Configs of the first ModelScope commits carry keys that later went away."""
    theirs, _ = pair
    config = dict(theirs.config)
    config |= {"class_embed_type": None, "upcast_attention": False, "use_linear_projection": True}
    UNet3DConditionModel.from_config(config)
    with pytest.raises(ValueError, match="class_embed_type"):
        UNet3DConditionModel.from_config(config | {"class_embed_type": "timestep"})
