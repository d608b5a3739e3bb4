"""UNetMotionModel, UNetSpatioTemporalConditionModel and I2VGenXLUNet against diffusers' own, live, in
fp32."""

import re

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

import mlx_unet3d  # noqa: E402
import diffusers  # noqa: E402
import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from mlx_unet3d import TextContext  # noqa: E402
from reference import relative_error, to_mlx  # noqa: E402
from video_networks import KINDS, SDXL, ours_of, theirs_of  # noqa: E402

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

TOLERANCE = 1e-5

_M, _CM, _UM, _CUM = "DownBlockMotion", "CrossAttnDownBlockMotion", "UpBlockMotion", "CrossAttnUpBlockMotion"
_S, _CS = "DownBlockSpatioTemporal", "CrossAttnDownBlockSpatioTemporal"
_US, _CUS = "UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"

# kind, changes of the config, of the inputs
CASES = {
    "motion": ("motion", {}, {}),
    "motion_batch": ("motion", {}, dict(batch=2, frames=2)),
    "motion_no_mid": ("motion", dict(use_motion_mid_block=False), {}),
    "motion_odd": ("motion", {}, dict(height=9, width=7)),
    "motion_one_frame": ("motion", {}, dict(frames=1)),
    "motion_all_positions": ("motion", dict(motion_max_seq_length=12), dict(frames=12, height=4, width=4)),
    "motion_linear": ("motion", dict(use_linear_projection=True), {}),
    "motion_sdxl": ("motion", SDXL, dict(batch=2)),
    "motion_heads_a_level": (
        "motion",
        dict(num_attention_heads=(3, 5), motion_num_attention_heads=(2, 8)),
        {},
    ),
    "motion_layers_a_level": (
        "motion",
        dict(layers_per_block=(1, 2), temporal_transformer_layers_per_block=(2, 1)),
        {},
    ),
    "motion_layers_a_layer": (
        "motion",
        dict(
            layers_per_block=(1, 1),
            transformer_layers_per_block=[[2], [1]],
            reverse_transformer_layers_per_block=[[1, 2], [2, 1]],
            temporal_transformer_layers_per_block=[[1], [2]],
            reverse_temporal_transformer_layers_per_block=[[2, 1], [1, 1]],
        ),
        {},
    ),
    "motion_mid_layers": (
        "motion",
        dict(
            mid_block_layers=2,
            transformer_layers_per_mid_block=(2, 1),
            temporal_transformer_layers_per_mid_block=(1, 2),
        ),
        {},
    ),
    "motion_no_mid_layers": (
        "motion",
        dict(use_motion_mid_block=False, mid_block_layers=2, transformer_layers_per_mid_block=2),
        {},
    ),
    "motion_mid_scale_padding": (
        "motion",
        dict(mid_block_scale_factor=2.5, downsample_padding=0),
        dict(height=9, width=6),
    ),
    "motion_eps_act": ("motion", dict(norm_eps=1e-3, act_fn="gelu", norm_num_groups=4), {}),
    "motion_time_cond": ("motion", dict(time_cond_proj_dim=6), dict(batch=2)),
    "motion_three_levels": (
        "motion",
        dict(
            block_out_channels=(16, 32, 32),
            down_block_types=(_M, _CM, _CM),
            up_block_types=(_CUM, _CUM, _UM),
            layers_per_block=2,
            norm_num_groups=16,
        ),
        dict(height=8, width=12),
    ),
    "motion_channels": ("motion", dict(in_channels=9, out_channels=5), dict(timestep=3.5)),
    "svd": ("svd", {}, {}),
    "svd_batch": ("svd", {}, dict(batch=2, frames=2)),
    "svd_tokens": ("svd", {}, dict(tokens=5)),
    "svd_tokens_batch": ("svd", {}, dict(tokens=3, batch=2)),
    "svd_odd": ("svd", {}, dict(height=9, width=7)),
    "svd_one_frame": ("svd", {}, dict(frames=1)),
    "svd_many_frames": ("svd", {}, dict(frames=14, height=4, width=4)),
    "svd_two_layers": ("svd", dict(layers_per_block=2), dict(timestep=-1.5)),
    "svd_layers_a_level": ("svd", dict(layers_per_block=(1, 2), num_attention_heads=(1, 2)), {}),
    "svd_deep": ("svd", dict(transformer_layers_per_block=2), {}),
    "svd_deep_a_level": ("svd", dict(transformer_layers_per_block=(2, 1)), {}),
    "svd_all_cross": ("svd", dict(down_block_types=(_CS, _CS), up_block_types=(_CUS, _CUS)), {}),
    "svd_no_cross": ("svd", dict(down_block_types=(_S, _S), up_block_types=(_US, _US)), {}),
    "svd_heads": ("svd", dict(num_attention_heads=8), {}),
    "svd_widths": ("svd", dict(block_out_channels=(64, 96)), {}),
    "svd_three_levels": (
        "svd",
        dict(
            block_out_channels=(32, 64, 64),
            down_block_types=(_CS, _CS, _S),
            up_block_types=(_US, _CUS, _CUS),
            num_attention_heads=(2, 2, 4),
        ),
        dict(height=8, width=12),
    ),
    "svd_channels": ("svd", dict(in_channels=6, out_channels=3), dict(timestep=0)),
    "svd_ids": ("svd", dict(addition_time_embed_dim=8, projection_class_embeddings_input_dim=24), {}),
    "i2v": ("i2vgenxl", {}, {}),
    "i2v_batch": ("i2vgenxl", {}, dict(batch=2, frames=2, height=4, width=6)),
    "i2v_odd": ("i2vgenxl", {}, dict(height=9, width=7)),
    "i2v_one_frame": ("i2vgenxl", {}, dict(frames=1)),
    "i2v_wider_than_pooled": ("i2vgenxl", {}, dict(frames=2, height=33, width=36)),
    "i2v_pooled": ("i2vgenxl", {}, dict(frames=1, height=32, width=32)),
    "i2v_two_layers": ("i2vgenxl", dict(layers_per_block=2), {}),
    "i2v_head_dim": ("i2vgenxl", dict(attention_head_dim=16), {}),
    "i2v_head_dim_no_divisor": ("i2vgenxl", dict(attention_head_dim=12), {}),
    "i2v_groups": ("i2vgenxl", dict(norm_num_groups=16), {}),
    "i2v_channels": ("i2vgenxl", dict(in_channels=8, out_channels=8), {}),
    "i2v_narrow": ("i2vgenxl", dict(in_channels=3, out_channels=2), {}),
    "i2v_tokens": ("i2vgenxl", {}, dict(tokens=1)),
    "motion_width_of_a_plain_level": (
        "motion",
        dict(
            cross_attention_dim=(8, 24),
            down_block_types=(_M, _CM),
            up_block_types=(_CUM, _UM),
        ),
        {},
    ),
    "svd_width_of_a_plain_level": (
        "svd",
        dict(cross_attention_dim=(8, 24), down_block_types=(_S, _CS), up_block_types=(_CUS, _US)),
        {},
    ),
    "i2v_text_width": ("i2vgenxl", dict(cross_attention_dim=40), {}),
    "i2v_all_cross": (
        "i2vgenxl",
        dict(
            down_block_types=("CrossAttnDownBlock3D",) * 2,
            up_block_types=("CrossAttnUpBlock3D",) * 2,
        ),
        {},
    ),
    "i2v_no_cross": (
        "i2vgenxl",
        dict(down_block_types=("DownBlock3D",) * 2, up_block_types=("UpBlock3D",) * 2),
        {},
    ),
    "i2v_frames": ("i2vgenxl", {}, dict(frames=9, height=4, width=4)),
}


@pytest.mark.parametrize("name", CASES)
def test_forward(name, tmp_path):
    """At once, and a frame and some pixels at a time."""
    kind, config, shape = CASES[name]
    theirs, ours = KINDS[kind].pair(tmp_path, **config)
    inputs = KINDS[kind].inputs(theirs.config, **shape)
    expected = theirs_of(theirs, inputs)
    assert relative_error(ours_of(ours, inputs), expected) <= TOLERANCE
    ours.enable_frame_chunking(1)
    ours.enable_pixel_chunking(5)
    assert relative_error(ours_of(ours, inputs), expected) <= TOLERANCE


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    kind = KINDS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    theirs, ours = kind.pair(folder, layers_per_block=2)
    return kind, folder, theirs, ours


def test_saved_networks_load_on_both_sides(pair, tmp_path):
    kind, _, theirs, ours = pair
    ours.save_pretrained(tmp_path / "mlx")
    ours.save_pretrained(tmp_path / "torch", layout="diffusers")
    inputs = kind.inputs(theirs.config)
    again = type(ours).from_pretrained(tmp_path / "mlx")
    assert mx.array_equal(ours_of(again, inputs), ours_of(ours, inputs))
    back, report = type(theirs).from_pretrained(tmp_path / "torch", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ours_state, state = back.state_dict(), theirs.state_dict()
    assert ours_state.keys() == state.keys()
    assert all(torch.equal(ours_state[name], state[name]) for name in state)


def test_number_of_parameters(pair):
    _, _, theirs, ours = pair
    assert ours.num_parameters() == theirs.num_parameters()


def test_attention_processors_are_listed_in_the_same_order(pair):
    _, _, theirs, ours = pair
    assert list(ours.attn_processors) == list(theirs.attn_processors)


def test_freeu(pair):
    kind, _, theirs, ours = pair
    if not hasattr(theirs, "enable_freeu"):
        pytest.skip("diffusers has no FreeU for this network")
    inputs = kind.inputs(theirs.config, height=8, width=12)
    for model in (theirs, ours):
        model.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    try:
        assert relative_error(ours_of(ours, inputs), theirs_of(theirs, inputs)) <= TOLERANCE
    finally:
        for model in (theirs, ours):
            model.disable_freeu()


@pytest.mark.parametrize("dim", [0, 1])
def test_forward_chunking(pair, dim):
    kind, _, theirs, ours = pair
    inputs = kind.inputs(theirs.config, frames=4)
    expected = theirs_of(theirs, inputs)
    ours.enable_forward_chunking(2, dim)
    try:
        assert relative_error(ours_of(ours, inputs), expected) <= TOLERANCE
    finally:
        ours.disable_forward_chunking()


def test_residuals(pair):
    kind, _, theirs, ours = pair
    if kind.name != "UNetMotionModel":
        pytest.skip("diffusers has no residuals for this network")
    inputs = kind.inputs(theirs.config)
    draw = torch.Generator().manual_seed(5)
    shapes = [(32, 8)] * 3 + [(32, 4)] + [(64, 4)] * 2
    residuals = [torch.randn(3, c, s, s, generator=draw) for c, s in shapes]
    mid = torch.randn(3, 64, 4, 4, generator=draw)
    names = dict(down_block_additional_residuals=residuals, mid_block_additional_residual=mid)
    expected = theirs_of(theirs, (inputs[0], inputs[1] | names))
    found = ours_of(
        ours,
        inputs,
        down_block_additional_residuals=[to_mlx(x) for x in residuals],
        mid_block_additional_residual=to_mlx(mid),
    )
    assert relative_error(found, expected) <= TOLERANCE


def test_a_mask_of_pixels_in_a_network_of_one_level(tmp_path):
    config = dict(block_out_channels=(32,), down_block_types=(_CM,), up_block_types=(_CUM,))
    theirs, ours = KINDS["motion"].pair(tmp_path, **config)
    inputs = KINDS["motion"].inputs(theirs.config)
    mask = torch.ones(3, 64)
    mask[:, 20:50] = 0
    expected = theirs_of(theirs, (inputs[0], {"attention_mask": mask}))
    assert relative_error(ours_of(ours, inputs, attention_mask=to_mlx(mask)), expected) <= TOLERANCE
    assert relative_error(ours_of(ours, inputs), expected) > 1e-3


def test_text_of_a_row_a_sample(tmp_path):
    """The same as the row repeated for each frame, as an array and projected once."""
    kind = KINDS["motion"]
    theirs, ours = kind.pair(tmp_path)
    (sample, t, text), more = kind.inputs(theirs.config, batch=2)
    rows = text[::3]
    expected = theirs_of(theirs, ([sample, t, rows.repeat_interleave(3, dim=0)], more))
    states = to_mlx(rows)
    for context in (states, TextContext(states)):
        assert relative_error(ours(to_mlx(sample), t, context).sample, expected) <= TOLERANCE


def test_a_context_made_once(tmp_path):
    theirs, ours = KINDS["i2vgenxl"].pair(tmp_path)
    inputs = KINDS["i2vgenxl"].inputs(theirs.config, batch=2)
    sample, t, fps, latents, image, text = (
        to_mlx(x) if isinstance(x, torch.Tensor) else x for x in inputs[0]
    )
    context = ours.embed_context(text, latents, image)
    assert context.states.shape == (2, 7 + 64 + 4, 24)
    for _ in range(2):
        found = ours(sample, t, fps, latents, None, context).sample
        assert relative_error(found, theirs_of(theirs, inputs)) <= TOLERANCE


def test_fused_projections(pair):
    kind, _, theirs, ours = pair
    inputs = kind.inputs(theirs.config)
    expected = theirs_of(theirs, inputs)
    ours.fuse_qkv_projections()
    try:
        assert relative_error(ours_of(ours, inputs), expected) <= TOLERANCE
    finally:
        ours.unfuse_qkv_projections()


def test_explicit_and_sliced_attention(pair):
    kind, _, theirs, ours = pair
    inputs = kind.inputs(theirs.config, batch=2)
    expected = theirs_of(theirs, inputs)
    for change in (ours.set_default_attn_processor, lambda: ours.set_attention_slice("max")):
        change()
        assert relative_error(ours_of(ours, inputs), expected) <= TOLERANCE
    ours.set_attention_slice(None)


def test_block_names_of_other_families_are_refused():
    with pytest.raises(ValueError, match="CrossAttnDownBlock3D"):
        mlx_unet3d.UNetMotionModel(down_block_types=("CrossAttnDownBlock3D",) * 4)


# AnimateDiff from its parts.


def parts(tmp_path, unet=None, adapter=None):
    """A 2-D UNet and a motion adapter of diffusers, seeded and saved."""
    from video_networks import randomize

    torch.manual_seed(0)
    base = dict(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=4,
        layers_per_block=1,
        norm_num_groups=8,
    )
    flat = diffusers.UNet2DConditionModel(**base | (unet or {}))
    small = dict(
        block_out_channels=(32, 64),
        motion_layers_per_block=1,
        motion_num_attention_heads=4,
        motion_norm_num_groups=8,
    )
    motion = diffusers.MotionAdapter(**small | (adapter or {}))
    for part, name in ((flat, "unet"), (motion, "adapter")):
        randomize(part)
        part.eval().save_pretrained(tmp_path / name)
    return flat, motion


@pytest.mark.parametrize(
    ("unet", "adapter"),
    [
        ({}, {}),
        ({}, dict(use_motion_mid_block=False, motion_max_seq_length=24)),
        ({}, dict(conv_in_channels=9)),
        (
            dict(
                attention_head_dim=(2, 4),
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=64,
                transformer_layers_per_block=(1, 2),
            ),
            {},
        ),
    ],
    ids=["v2", "v1", "pia", "sdxl"],
)
def test_a_unet_of_two_checkpoints(tmp_path, unet, adapter):
    flat, motion = parts(tmp_path, unet, adapter)
    kind = KINDS["motion"]
    theirs = diffusers.UNetMotionModel.from_unet2d(flat, motion)
    if unet:  # which diffusers forgets
        theirs.add_embedding.load_state_dict(flat.add_embedding.state_dict())
    ours = mlx_unet3d.UNetMotionModel.from_unet2d(tmp_path / "unet", tmp_path / "adapter")
    inputs = kind.inputs(theirs.config)
    expected = theirs_of(theirs.eval(), inputs)
    assert relative_error(ours_of(ours, inputs), expected) <= TOLERANCE
    loaded = mlx_unet3d.MotionAdapter.from_pretrained(tmp_path / "adapter")
    again = mlx_unet3d.UNetMotionModel.from_unet2d(tmp_path / "unet", loaded)
    if not adapter.get("conv_in_channels"):
        assert mx.array_equal(ours_of(again, inputs), ours_of(ours, inputs))
        ours.save_motion_modules(tmp_path / "saved", layout="diffusers")
        state = diffusers.MotionAdapter.from_pretrained(tmp_path / "saved").state_dict()
        assert all(torch.equal(state[name], array) for name, array in motion.state_dict().items())


_AUTHORS = {
    "attn1": "attention_blocks.0",
    "attn2": "attention_blocks.1",
    "norm1": "norms.0",
    "norm2": "norms.1",
    "norm3": "ff_norm",
}


@pytest.mark.parametrize("table", [True, False])
def test_motion_modules_under_the_names_of_their_authors(tmp_path, table):
    """One file without a config; the table of positions is under other names, or missing."""
    from safetensors.torch import save_file

    flat, motion = parts(tmp_path, adapter=dict(motion_max_seq_length=24, motion_num_attention_heads=8))
    state = {}
    for name, array in motion.state_dict().items():
        head, module, tail = re.fullmatch(
            r"(.*\.motion_modules\.\d+\.)(.*?\.?)([^.]+\.?[^.]+)", name
        ).groups()
        for ours, authors in _AUTHORS.items():
            module, tail = (part.replace(f"{ours}.", f"{authors}.") for part in (module, tail))
        module = f"{head}temporal_transformer.{module}"
        if tail != "pos_embed.pe":
            state[module + tail] = array.contiguous()
        elif table:
            for i in (0, 1):
                state[f"{module}attention_blocks.{i}.pos_encoder.pe"] = array.clone()
    save_file(state, tmp_path / "mm.safetensors")
    ours = mlx_unet3d.UNetMotionModel.from_unet2d(tmp_path / "unet", tmp_path / "mm.safetensors")
    assert ours.config.motion_max_seq_length == (24 if table else 32)
    theirs = diffusers.UNetMotionModel.from_unet2d(flat, motion)
    inputs = KINDS["motion"].inputs(theirs.config)
    assert relative_error(ours_of(ours, inputs), theirs_of(theirs.eval(), inputs)) <= TOLERANCE


def test_parts_that_do_not_belong_together(tmp_path):
    parts(tmp_path, adapter=dict(motion_layers_per_block=2))
    with pytest.raises(Exception, match="layers"):
        mlx_unet3d.UNetMotionModel.from_unet2d(tmp_path / "unet", tmp_path / "adapter")
    with pytest.raises(Exception, match="UNet2DConditionModel"):
        mlx_unet3d.UNetMotionModel.from_unet2d(tmp_path / "adapter", tmp_path / "adapter")


def test_a_new_adapter_changes_nothing(tmp_path):
    flat, _ = parts(tmp_path)
    ours = mlx_unet3d.UNetMotionModel.from_unet2d(tmp_path / "unet")
    inputs = KINDS["motion"].inputs(ours.config)
    sample, t, text = inputs[0]
    with torch.no_grad():
        frames = flat(sample[0].transpose(0, 1), t, text).sample
    assert relative_error(ours_of(ours, inputs)[0].transpose(1, 0, 2, 3), frames) <= TOLERANCE


def test_the_attention_to_one_token_needs_no_queries(tmp_path):
    """Changing what the queries are made of changes nothing, in diffusers as here."""
    theirs, ours = KINDS["svd"].pair(tmp_path)
    inputs = KINDS["svd"].inputs(theirs.config)
    before = np.array(ours_of(ours, inputs))
    for _, module in ours.named_modules():
        if type(module).__name__.endswith("TransformerBlock"):
            module.attn2.to_q.weight = module.attn2.to_q.weight + 1
            module.norm2.weight = module.norm2.weight * 3
    assert np.array_equal(before, np.array(ours_of(ours, inputs)))
