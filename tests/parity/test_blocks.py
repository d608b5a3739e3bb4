"""Every block of diffusers' 3D UNets alone, with our block run by its steps, live, in fp32."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

import mlx_unet3d  # noqa: E402, F401
import mlx.core as mx  # noqa: E402
from diffusers.models.resnet import AlphaBlender as ReferenceBlender  # noqa: E402
from diffusers.models.unets import unet_3d_blocks, unet_motion_model  # noqa: E402
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2DCrossAttn as ReferenceMid2D  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_unet3d.checkpoints import parameter_layouts, to_mlx  # noqa: E402
from mlx_unet3d.layers import blocks  # noqa: E402
from mlx_unet3d.layers.conditions import Conditions  # noqa: E402
from mlx_unet3d.layers.temporal import AlphaBlender  # noqa: E402
from reference import relative_error  # noqa: E402
from reference import to_mlx as array  # noqa: E402
from video_networks import draw, randomize  # noqa: E402

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

TOLERANCE = 1e-5
B, F, H, W, T, D = 2, 3, 6, 5, 16, 24
N = B * F

LEVEL = blocks.Level(
    channels=64,
    temb_channels=T,
    heads=4,
    dim_head=16,
    cross_attention_dim=D,
    use_linear_projection=False,
    motion_heads=4,
    motion_positions=8,
)
SPATIAL = dict(temb_channels=T, cross_attention_dim=D, num_attention_heads=4)
THREE_D = dict(temb_channels=T, cross_attention_dim=D, num_attention_heads=16)  # which is the head dimension
MOTION = dict(
    temb_channels=T,
    temporal_num_attention_heads=4,
    temporal_max_seq_length=8,
    temporal_cross_attention_dim=None,
)
DOWN = dict(in_channels=32, out_channels=64, num_layers=2, add_downsample=True)
UP = dict(
    in_channels=32, prev_output_channel=96, out_channels=64, num_layers=2, add_upsample=True, resolution_idx=0
)


def _motion(cls, **options):
    known = cls.__init__.__code__.co_varnames
    return cls(**{k: v for k, v in options.items() if k in known})


REFERENCES = {
    "DownBlock3D": lambda: unet_3d_blocks.DownBlock3D(**DOWN, temb_channels=T),
    "CrossAttnDownBlock3D": lambda: unet_3d_blocks.CrossAttnDownBlock3D(**DOWN, **THREE_D),
    "UpBlock3D": lambda: unet_3d_blocks.UpBlock3D(**UP, temb_channels=T),
    "CrossAttnUpBlock3D": lambda: unet_3d_blocks.CrossAttnUpBlock3D(**UP, **THREE_D),
    "UNetMidBlock3DCrossAttn": lambda: unet_3d_blocks.UNetMidBlock3DCrossAttn(in_channels=64, **THREE_D),
    "DownBlockMotion": lambda: _motion(unet_motion_model.DownBlockMotion, **DOWN, **MOTION),
    "CrossAttnDownBlockMotion": lambda: _motion(
        unet_motion_model.CrossAttnDownBlockMotion, **DOWN, **(MOTION | SPATIAL)
    ),
    "UpBlockMotion": lambda: _motion(unet_motion_model.UpBlockMotion, **UP, **MOTION),
    "CrossAttnUpBlockMotion": lambda: _motion(
        unet_motion_model.CrossAttnUpBlockMotion, **UP, **(MOTION | SPATIAL)
    ),
    "UNetMidBlockCrossAttnMotion": lambda: _motion(
        unet_motion_model.UNetMidBlockCrossAttnMotion, in_channels=64, num_layers=2, **(MOTION | SPATIAL)
    ),
    "UNetMidBlock2DCrossAttn": lambda: ReferenceMid2D(in_channels=64, resnet_eps=1e-5, **SPATIAL),
    "DownBlockSpatioTemporal": lambda: unet_3d_blocks.DownBlockSpatioTemporal(
        in_channels=32, out_channels=64, temb_channels=T, num_layers=2
    ),
    "CrossAttnDownBlockSpatioTemporal": lambda: unet_3d_blocks.CrossAttnDownBlockSpatioTemporal(
        in_channels=32, out_channels=64, num_layers=2, **SPATIAL
    ),
    "UpBlockSpatioTemporal": lambda: unet_3d_blocks.UpBlockSpatioTemporal(
        in_channels=32, prev_output_channel=96, out_channels=64, temb_channels=T, num_layers=2
    ),
    "CrossAttnUpBlockSpatioTemporal": lambda: unet_3d_blocks.CrossAttnUpBlockSpatioTemporal(
        in_channels=32, prev_output_channel=96, out_channels=64, num_layers=2, **SPATIAL
    ),
    "UNetMidBlockSpatioTemporal": lambda: unet_3d_blocks.UNetMidBlockSpatioTemporal(64, **SPATIAL),
}
"""diffusers' blocks, all with eps 1e-6 in their resnets where they take one."""


def ours_like(name, theirs):
    cls = getattr(blocks, name)
    eps = theirs.resnets[0].norm1.eps if hasattr(theirs.resnets[0], "norm1") else 1e-6
    level = blocks.Level(**{**vars(LEVEL), "norm_eps": eps, "use_linear_projection": "3D" in name})
    if issubclass(cls, blocks.DownBlock):
        block = cls(level, 32, 2, True)
    elif issubclass(cls, blocks.UpBlock):
        block = cls(level, 32, 96, 2, True, 0)
    else:
        block = cls(level, len(theirs.resnets) - 1)
    layouts = parameter_layouts(block)
    state = {k: to_mlx(layouts.get(k, "identity"), array(v)) for k, v in theirs.state_dict().items()}
    assert state.keys() == dict(tree_flatten(block.parameters())).keys()
    block.load_weights(list(state.items()))
    return block.eval()


@pytest.mark.parametrize("name", REFERENCES)
def test_block(name):
    torch.manual_seed(0)
    theirs = REFERENCES[name]().eval()
    randomize(theirs)
    ours = ours_like(name, theirs)
    randn = draw()
    width = {"D": 32, "C": 32}.get(name[0]) if "Down" in name else 96 if "Up" in name else 64
    x, temb, text = randn(N, width, H, W), randn(B, T), randn(B, 1 if "Spatio" in name else 5, D)
    skips = (randn(N, 32, H, W), randn(N, 64, H, W))
    per_frame = temb.repeat_interleave(F, dim=0)
    arguments = dict(hidden_states=x, temb=per_frame)
    if "Spatio" in name:
        arguments["image_only_indicator"] = torch.zeros(B, F)
    elif "2D" not in name:
        arguments["num_frames"] = F
    if "Attn" in name or name == "UNetMidBlockSpatioTemporal":
        arguments["encoder_hidden_states"] = text.repeat_interleave(F, dim=0)
    if "Up" in name:
        arguments["res_hidden_states_tuple"] = skips
    with torch.no_grad():
        expected = theirs(**arguments)
    states = expected[1] if isinstance(expected, tuple) else ()
    expected = expected[0] if isinstance(expected, tuple) else expected

    cond = Conditions(B, F, temb=array(temb), context=array(text))
    kept = [array(s).transpose(0, 2, 3, 1) for s in skips] if "Up" in name else []
    found = array(x).transpose(0, 2, 3, 1)
    for step in ours.steps():
        found = step(found, cond, kept)
    assert relative_error(found.transpose(0, 3, 1, 2), expected) <= TOLERANCE
    for ours_kept, theirs_kept in zip(kept, states, strict=True):
        assert relative_error(ours_kept.transpose(0, 3, 1, 2), theirs_kept) <= TOLERANCE


@pytest.mark.parametrize("switch", [False, True])
@pytest.mark.parametrize("strategy", ["fixed", "learned", "learned_with_images"])
def test_alpha_blender(strategy, switch):
    theirs = ReferenceBlender(0.3, strategy, switch)
    ours = AlphaBlender(0.3, strategy, switch)
    indicator = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    randn = draw()
    spatial, temporal = (randn(B, 8, F, H, W) for _ in range(2))
    with torch.no_grad():
        expected = theirs(spatial, temporal, indicator)
    # (B, C, F, H, W) -> (B, F, L, C) and back
    flat = [array(x).transpose(0, 2, 3, 4, 1).reshape(B, F, H * W, 8) for x in (spatial, temporal)]
    found = ours(*flat, Conditions(B, F, image_only=array(indicator)))
    found = found.reshape(B, F, H, W, 8).transpose(0, 4, 1, 2, 3)
    assert relative_error(found, expected) <= 1e-6
    half = ours(*(x.astype(mx.float16) for x in flat), Conditions(B, F))
    assert half.dtype == mx.float16
