"""What Metal will do with our networks, by the rules of MLX 0.32.2; nothing here runs on Metal."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import mlx.core as mx
import pytest
import tiny
from mlx_unet3d import UNet3DConditionModel, UNetMotionModel
from metal import rules, workloads
from metal.predict import kind_of_place
from metal.trace import trace
from metal.workloads import REFERENCE, Workload
from mlx.utils import tree_flatten
from mlx_unet3d.chips import CHIPS, GIB

# What the full-size network must do at the reference sizes, in half precision.

# (place) -> (copies, reason). A group norm whose input is a skip or a residual as well copies it, to have
# each group in one row, as `mx.fast.layer_norm` wants it; the others have something to add on the way there,
# and all have a scale to apply on the way back.
NORM = "gathers the groups"
COPIES = {
    "the network itself": (1, "channels first to channels last, of four channels"),
    "transformer_in.norm": (1, NORM),
    "resnets.norm1": (22, NORM),
    "temp_convs.conv1.0": (22, NORM),
    "attentions.norm": (16, NORM),
    "temp_attentions.norm": (16, NORM),
    "conv_norm_out": (1, NORM),
    "upsamplers": (3, "four times the pixels"),
}

# diffusers 0.42.1 with torch's flop counter, sample (1, 4, 16, 32, 32), 77 tokens.
REFERENCE_FLOPS = 4_887_105_142_784


@pytest.fixture(scope="module")
def unet():
    return workloads.full_unet()


@pytest.fixture(scope="module", params=REFERENCE, ids=str)
def full(request, unet):
    """A step with guidance, and what is done once for a prompt."""
    return request.param, *workloads.predict_unet(unet, request.param)


def test_nothing_is_slow_or_large(full):
    work, step, once = full
    found = Counter(c.route for c in step.done.convolutions)
    assert set(found) == {rules.WINOGRAD, rules.IMPLICIT}  # no unfold, no conv3d, not the general kernel
    assert found.total() == 140
    assert {a.route for a in step.attentions} == {rules.FUSED}
    assert len(step.attentions) == 66
    over_frames = [a for a in step.attentions if re.search("temp_attentions|transformer_in", a.place)]
    assert len(over_frames) == 34
    assert {(a.queries, a.keys) for a in over_frames} == {(work.frames, work.frames)}
    assert step.leaks == once.leaks == []
    assert step.weight_work == once.weight_work == []
    assert step.done.largest[1] < 2**31
    assert max(c.conv.rows for c in step.done.convolutions) < 2**31


def test_every_copy_is_known(full):
    _, step, once = full
    assert once.copies == []
    found = Counter(kind_of_place(copy.place) or "the network itself" for copy in step.copies)
    assert found == {place: count for place, (count, _) in COPIES.items()}
    assert {copy.why for copy in step.copies} == {"reshape"}


def test_text_is_projected_once(full):
    _, step, once = full
    widths = 5 * 320 + 5 * 640 + 6 * 1280
    assert once.flops == once.matmul_flops == 2 * 2 * 77 * 1024 * 2 * widths
    assert once.kernels == 32
    assert step.weights == pytest.approx(2 * 1.411e9, rel=1e-3)


def test_element_wise_chains_are_fused(full):
    """Compiling all of a forward would fuse nothing more. Before this was so: 2262 kernels or more, and 70.1,
    285 and 895 GB."""
    work, step, _ = full
    assert step.kernels <= 1723
    assert round(step.bytes / 1e9, 1) == dict(zip(REFERENCE, (53.9, 217.0, 677.4), strict=True))[work]
    assert step.kernels_fused == step.kernels
    chip = CHIPS["M2 Max"]
    # at least the FLOPs at the peak, where Winograd has a quarter or so of them
    winograd = sum(c.conv.flops for c in step.done.convolutions if c.route == rules.WINOGRAD)
    assert step.seconds(chip) > (step.flops - 0.75 * winograd) / (chip.fp16_tflops * 1e12)


def test_memory(full):
    """Bytes of activations alive at once; the smallest size fits an 8 GB Mac with its weights."""
    work, step, _ = full
    assert round(step.peak / 1e9, 2) == dict(zip(REFERENCE, (0.51, 1.94, 6.18), strict=True))[work]
    if work == REFERENCE[0]:
        assert step.peak + step.weights + GIB < CHIPS["M1"].working_sets()[8]


def test_flops_are_the_reference_less_what_it_repeats(unet):
    """diffusers projects the text and the time embedding for each frame; otherwise the FLOPs are equal."""
    step, once = workloads.predict_unet(unet, Workload(256, 256, 16, guidance=False))
    outputs = 2 * 320 + 2 * 640 + 4 * 1280 + 2 * 1280 + 6 * 1280 + 3 * 640 + 3 * 320
    time_embedding = 2 * 1280 * outputs
    assert step.flops == REFERENCE_FLOPS - 16 * once.flops - 15 * time_embedding


@pytest.mark.parametrize("work", REFERENCE, ids=str)
@pytest.mark.parametrize("dtype", [mx.float16, mx.float32], ids=["float16", "float32"])
def test_decoding(work, dtype):
    done, chunks = workloads.predict_decode(workloads.full_vae(), work, dtype)
    assert chunks == work.frames
    assert {c.route for c in done.done.convolutions} <= {rules.WINOGRAD, rules.IMPLICIT}
    assert done.leaks == done.weight_work == []
    assert done.done.largest[1] < 2**31
    # One head of 512 channels: no fused kernel is as wide. The scores of one frame are kept.
    pixels = work.height * work.width // 64
    unfused = [a for a in done.attentions if a.route == rules.UNFUSED]
    assert [(a.batch, a.heads, a.keys, a.dim) for a in unfused] == [(1, 1, pixels, 512)]
    assert pixels**2 < done.done.largest[1] or work != REFERENCE[2]
    found = Counter(kind_of_place(copy.place) for copy in done.copies)
    assert found == {
        "resnets.norm1": 14,
        "attentions.group_norm": 1,
        "decoder.conv_norm_out": 1,
        "upsamplers": 3,
    }
    assert done.peak < 4.1e9


# The other UNets. A merge is of heads that no kernel takes, or that were padded for one.
MERGE = "puts the heads side by side again"
MOTION = {
    "motion_modules.norm": (21, NORM),
    "motion_modules.transformer_blocks.attn1": (16, MERGE),
    "motion_modules.transformer_blocks.attn2": (16, MERGE),
}
SVD_COPIES = {
    "conv_in": (1, "channels first to channels last, of eight channels"),
    "resnets.spatial_res_block.norm1": (22, NORM),
    "resnets.temporal_res_block.norm1": (22, NORM),
    "attentions.norm": (16, NORM),
    "upsamplers": (3, "four times the pixels"),
    "conv_norm_out": (1, NORM),
}
FAMILY_COPIES = {
    "animatediff": {name: COPIES[name] for name in COPIES if "temp" not in name and "_in" not in name}
    | MOTION
    | {
        "attentions.transformer_blocks.attn1": (11, MERGE),
        "attentions.transformer_blocks.attn2": (11, MERGE),
    },
    "animatediff-sdxl": {
        "the network itself": COPIES["the network itself"],
        "resnets.norm1": (17, NORM),
        "attentions.norm": (11, NORM),
        "motion_modules.norm": (15, NORM),
        "motion_modules.transformer_blocks.attn1": (10, MERGE),
        "motion_modules.transformer_blocks.attn2": (10, MERGE),
        "upsamplers": (2, "four times the pixels"),
        "conv_norm_out": (1, NORM),
    },
    "svd": SVD_COPIES,
    "svd-xt": SVD_COPIES,
    "i2vgen-xl": COPIES
    | {
        "the network itself": (
            2,
            "channels first to channels last, and frames inside, of the image's four channels",
        ),
        "image_latents_temporal_encoder.attn1": (1, MERGE),
    },
}
# GB of activations alive at once in a step. Without padded heads AnimateDiff took 9.19.
PEAKS = {"animatediff": 1.72, "animatediff-sdxl": 6.76, "svd": 6.18, "svd-xt": 11.01, "i2vgen-xl": 6.31}


@pytest.fixture(scope="module", params=workloads.FAMILY)
def member(request):
    """A step of another UNet with guidance, and what is done once."""
    make, work = workloads.FAMILY[request.param]
    return request.param, *workloads.predict_unet(make(), work)


def test_nothing_is_slow_or_large_in_the_family(member):
    _, step, once = member
    routes = {(c.route, "conv_in" if c.place == "conv_in" else "") for c in step.done.convolutions}
    # MLX pads the eight channels of conv_in, and its kernel, to sixteen.
    routes -= {(rules.IMPLICIT_PADDED, "conv_in")}
    assert {route for route, _ in routes} == {rules.WINOGRAD, rules.IMPLICIT}
    large = [a for a in step.attentions if a.keys > 256]
    assert {a.route for a in large} == {rules.FUSED}
    assert step.weight_work == once.weight_work == []
    # Sinusoids of the positions of frames and of SDXL's sizes are single: (F, C) and (2, 2816).
    leaks = [*step.leaks, *once.leaks]
    assert all(re.search("time_pos_embed|^$", place) and len(shape) == 2 for place, _, shape in leaks)
    assert all(max(shape) <= 2816 and min(shape) <= 25 for *_, shape in leaks)
    assert max(step.done.largest[1], once.done.largest[1]) < 2**31
    assert max(c.conv.rows for c in step.done.convolutions) < 2**31


def test_every_copy_of_the_family_is_known(member):
    name, step, once = member
    assert once.copies == []
    found = Counter(kind_of_place(copy.place) or "the network itself" for copy in step.copies)
    assert found == {place: count for place, (count, _) in FAMILY_COPIES[name].items()}


def test_memory_of_the_family(member):
    name, step, _ = member
    assert round(step.peak / 1e9, 2) == PEAKS[name]
    # Two sums of I2VGen-XL's embeddings could be fused with what is before them.
    assert step.kernels - step.kernels_fused == (2 if name == "i2vgen-xl" else 0)


@pytest.mark.parametrize("padding", ["auto", "always", "never"])
def test_padded_heads(padding):
    """Heads of 40 are padded where there are many scores, or everywhere, or nowhere; of 160 never."""
    unet = UNetMotionModel(
        block_out_channels=(320, 1280),
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        layers_per_block=1,
        cross_attention_dim=768,
    )
    unet.set_attention_padding(padding)
    step, _ = workloads.predict_unet(unet, Workload(160, 160, 16))
    fused = {(a.keys, a.dim) for a in step.attentions if a.route == rules.FUSED}
    unfused = {(a.keys, a.dim) for a in step.attentions if a.route == rules.UNFUSED}
    coarse = {(16, 160), (77, 160), (100, 160)}
    assert fused == dict(auto={(400, 64)}, always={(n, 64) for n in (16, 77, 400)}, never=set())[padding]
    assert unfused - coarse == {(n, 40) for n in (16, 77, 400)} - {(keys, 40) for keys, _ in fused}
    assert unfused & coarse == coarse


@pytest.mark.parametrize("name", ["svd", "svd-xt"])
def test_decoding_of_a_clip(name):
    """As many frames together as MLX can index; spatial layers take them one by one."""
    work = workloads.FAMILY[name][1]
    done, chunks = workloads.predict_decode(workloads.full_temporal_vae(), work, mx.float16)
    assert chunks == dict(zip(("svd", "svd-xt"), (1, 2), strict=True))[name]
    assert {c.route for c in done.done.convolutions} <= {rules.WINOGRAD, rules.IMPLICIT}
    assert done.leaks == done.weight_work == []
    assert done.done.largest[1] < 2**31
    assert {(a.batch, a.keys, a.dim) for a in done.attentions} == {(1, 9216, 512)}
    assert done.peak < 30e9


def test_demo_and_its_weights():
    """Weights that were really loaded: row-major, or each convolution would copy them on every call."""
    unet, vae = workloads.demo()
    for model in unet, vae:
        for name, parameter in tree_flatten(model.parameters()):
            if parameter.ndim > 2:
                assert memoryview(parameter).c_contiguous, name
    step, _ = workloads.predict_unet(unet, Workload(128, 128, 16))
    assert rules.UNFOLD not in {c.route for c in step.done.convolutions}
    assert step.leaks == step.weight_work == []
    assert {a.route for a in step.attentions if a.keys > 256} <= {rules.FUSED}


def test_compiled_network_is_seen():
    """`unet.compile()` runs the kernels that were predicted for it; FreeU has chains that no layer fuses."""
    unet = UNet3DConditionModel(**tiny.UNET)
    unet.enable_freeu(0.9, 0.2, 1.2, 1.4)
    work = Workload(32, 32, 3)
    plain, _ = workloads.predict_unet(unet, work)
    unet.compile()
    compiled, _ = workloads.predict_unet(unet, work)
    assert compiled.kernels == compiled.kernels_fused == plain.kernels_fused < plain.kernels
    assert compiled.bytes == plain.bytes_fused < plain.bytes


def test_tracing_leaves_no_trace():
    """The network runs as before."""
    unet = tiny.randomize(UNet3DConditionModel(**tiny.UNET))
    unet.compile()
    inputs = (mx.ones((1, 4, 2, 4, 4)), mx.array(1.0), mx.ones((1, 3, 12)))
    mx.eval(inputs)
    before = unet(*inputs).sample
    mx.eval(before)
    trace(lambda unet, *args: unet(*args).sample, *inputs, model=unet)
    with pytest.raises(ValueError, match="sample has shape"):
        trace(lambda unet, *args: unet(*args).sample, inputs[2], *inputs[1:], model=unet)
    assert mx.array_equal(before, unet(*inputs).sample)


def test_command():
    script = Path(__file__).parents[1] / "benchmarks" / "metal_routes.py"
    command = [sys.executable, str(script), "--model", "demo", "--height", "64", "--width", "64"]
    done = subprocess.run(
        [*command, "--frames", "8", "--no-guidance", "--chip", "m2-max"],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert "not measured" in lines[0]
    assert "# demo UNet, 64x64x8, no guidance, float16: one step" in lines
    assert "| activations in single precision | none |" in lines
    assert sum(line.startswith("| M2 Max | 13.6 | 400 |") for line in lines) == 2
    for wrong, message in ([], "belong together"), (["--chip", "M9"], "chip 'M9' is not in the table"):
        refused = subprocess.run([*command, *wrong], capture_output=True, text=True)
        assert refused.returncode == 2
        assert message in refused.stderr
