"""Options that save memory do, and change nothing."""

import mlx_unet3d
import mlx.core as mx
import numpy as np
import pytest
from mlx_unet3d import AutoencoderKL, TextContext, UNet3DConditionModel
from mlx_unet3d.layers import attention_processors
from mlx_unet3d.layers.attention import Attention
from mlx_unet3d.layers.chunking import Chunks, in_sequence
from mlx_unet3d.layers.conditions import Conditions
from mlx_unet3d.layers.transformers import BasicTransformerBlock
from peaks import UNET, VAE, peak_of, run_step
from tiny import randomize, write_pipeline


@pytest.fixture(scope="module")
def unet():
    return randomize(UNet3DConditionModel(**UNET))


@pytest.fixture
def plain_unet(unet):
    yield unet
    unet.chunks = Chunks()
    unet.disable_forward_chunking()
    unet.set_attention_slice(None)


def inputs(batch=1, frames=4, size=16):
    rng = np.random.default_rng(0)
    sample = mx.array(rng.standard_normal((batch, 4, frames, size, size), dtype=np.float32))
    states = mx.array(rng.standard_normal((batch, 7, 12), dtype=np.float32))
    mx.eval(sample, states)
    return sample, states


def forward(unet, sample, states):
    return lambda: unet(sample, 10, states).sample


def assert_same(result, expected, tolerance=2e-5):
    error = mx.abs(result - expected).max().item() / mx.abs(expected).max().item()
    assert error < tolerance


def frames(unet):
    unet.enable_frame_chunking(1)


def pixels(unet):
    unet.enable_pixel_chunking(60)  # of 256 and of 64, with rests


def frames_and_pixels(unet):
    frames(unet)
    pixels(unet)


def test_a_forward_in_pieces_takes_less_and_gives_the_same(plain_unet, exact_peaks):
    sample, states = inputs()
    run = forward(plain_unet, sample, states)
    expected, whole = peak_of(run)
    frames(plain_unet)
    result, by_frames = peak_of(run)
    assert_same(result, expected)
    assert by_frames < 0.8 * whole
    pixels(plain_unet)
    result, by_both = peak_of(run)
    assert_same(result, expected)
    assert by_both < 0.7 * by_frames


def test_pieces_within_compile(plain_unet, exact_peaks):
    sample, states = inputs()
    expected, whole = peak_of(forward(plain_unet, sample, states))
    frames_and_pixels(plain_unet)
    result, peak = peak_of(lambda: mx.compile(lambda x, t: plain_unet(x, 10, t).sample)(sample, states))
    assert_same(result, expected)
    assert peak < 0.5 * whole


def test_options_can_be_turned_off(plain_unet):
    frames_and_pixels(plain_unet)
    assert plain_unet.chunks == Chunks(frames=1, pixels=60)
    plain_unet.disable_frame_chunking()
    plain_unet.disable_pixel_chunking()
    assert plain_unet.chunks == Chunks()


@pytest.mark.parametrize("size", [0, -1, True, 1.5])
def test_sizes_of_pieces_are_checked(unet, size):
    with pytest.raises(ValueError, match="at least 1"):
        unet.enable_frame_chunking(size)
    with pytest.raises(ValueError, match="at least 1"):
        unet.enable_pixel_chunking(size)


def test_frames_of_several_samples_keep_their_text_mask_and_time(plain_unet):
    sample, states = inputs(batch=2, frames=3, size=8)
    mask = mx.array([[1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0]])

    def run(text):
        return plain_unet(sample, mx.array([10, 500]), text, attention_mask=mask).sample

    expected = run(states)
    plain_unet.enable_frame_chunking(2)
    assert_same(run(states), expected)
    assert_same(run(TextContext(states)), expected)


def test_forward_chunks_save(exact_peaks):
    block = BasicTransformerBlock(16, 2, 8)
    mx.eval(block.parameters())
    x = mx.random.normal((256, 4, 16))
    mx.eval(x)
    expected, whole = peak_of(lambda: block(x, Conditions()))
    block.set_chunk_feed_forward(16, 0)
    result, peak = peak_of(lambda: block(x, Conditions()))
    assert_same(result, expected)
    assert peak < 0.8 * whole


@pytest.mark.parametrize("masked", [False, True])
def test_attention_slices_save(exact_peaks, masked):
    attention = Attention(16, None, 4, 4)
    mx.eval(attention.parameters())
    x = mx.random.normal((4, 256, 16))
    mask = mx.random.normal((4, 1, 256)) if masked else None
    mx.eval(x)
    expected, whole = peak_of(lambda: attention(x, attention_mask=mask))
    attention.set_processor(attention_processors.SlicedAttnProcessor(1))
    result, peak = peak_of(lambda: attention(x, attention_mask=mask))
    assert_same(result, expected)
    assert peak < 0.3 * whole


def test_attention_on_the_cpu_bounds_its_scores(exact_peaks, monkeypatch):
    attention = Attention(16, None, 4, 4)
    mx.eval(attention.parameters())
    attention.set_dtype(mx.float16)  # in single precision it takes another way, see test_cpu.py
    x = mx.random.normal((8, 256, 16)).astype(mx.float16)
    mx.eval(x)
    expected, whole = peak_of(lambda: attention(x))
    monkeypatch.setattr(attention_processors, "_SCORES_AT_ONCE", 2 * 4 * 256**2)
    result, peak = peak_of(lambda: attention(x))
    assert_same(result, expected, 1e-6)
    assert peak < 0.6 * whole or mx.default_device() != mx.cpu


def test_pieces_come_one_after_the_other(exact_peaks):
    x = mx.zeros((16, 2**14))
    mx.eval(x)

    def of_piece(piece):
        return mx.cumsum(mx.concatenate([piece] * 8), axis=0)[-1:] + 1

    _, side_by_side = peak_of(lambda: mx.concatenate([of_piece(p) for p in mx.split(x, 16)]))
    for every in (1, None):
        _, peak = peak_of(
            lambda every=every: mx.concatenate(in_sequence(of_piece, ([p] for p in mx.split(x, 16)), every))
        )
        assert peak < 0.5 * side_by_side


def test_guidance_in_two_passes_saves(unet, exact_peaks):
    expected, both = peak_of(run_step(unet, 5.0, False))
    result, peak = peak_of(run_step(unet, 5.0, True))
    assert_same(result, expected)
    assert peak < 0.8 * both
    assert_same(run_step(unet, 1.0, True)(), run_step(unet, 1.0, False)(), 1e-7)


def test_vae_frame_by_frame_and_tiles_save(exact_peaks):
    vae = randomize(AutoencoderKL(**VAE, sample_size=16))
    z = mx.random.normal((4, 4, 24, 24))
    mx.eval(z)
    expected, whole = peak_of(lambda: vae.decode(z))
    vae.enable_slicing()
    result, by_frame = peak_of(lambda: vae.decode(z))
    assert_same(result, expected, 1e-6)
    assert by_frame < 0.5 * whole
    vae.enable_tiling()
    _, by_tile = peak_of(lambda: vae.decode(z))
    assert by_tile < 0.7 * by_frame


# Pipelines.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("memory") / "pipeline")


def test_pipeline_options_reach_the_networks(folder):
    pipe = mlx_unet3d.TextToVideoPipeline.from_pretrained(folder)
    call = dict(num_frames=2, num_inference_steps=2, output_type="np")
    expected = pipe("a cat", **call).frames
    pipe.enable_sequential_guidance()
    pipe.enable_vae_slicing()
    pipe.enable_attention_slicing("max")
    assert pipe.vae.use_slicing
    assert {type(p).__name__ for p in pipe.unet.attn_processors.values()} == {"SlicedAttnProcessor"}
    np.testing.assert_allclose(pipe("a cat", **call).frames, expected, atol=2e-5)
    pipe.enable_vae_tiling()
    assert pipe.vae.use_tiling
    pipe.disable_vae_tiling()
    pipe.disable_vae_slicing()
    pipe.disable_attention_slicing()
    pipe.disable_sequential_guidance()
    assert not pipe.vae.use_tiling
    assert not pipe.vae.use_slicing
    assert not pipe.sequential_guidance
    np.testing.assert_array_equal(pipe("a cat", **call).frames, expected)


def test_networks_are_let_go_when_done(folder):
    pipe = mlx_unet3d.TextToVideoPipeline.from_pretrained(folder)
    call = dict(num_frames=2, num_inference_steps=1)
    expected = pipe("a cat", **call).frames
    held = mx.get_active_memory()
    sizes = {name: getattr(pipe, name).num_parameters() * 4 for name in ("unet", "text_encoder")}
    pipe.enable_release()
    np.testing.assert_array_equal(pipe("a cat", **call).frames, expected)
    assert held - mx.get_active_memory() >= sum(sizes.values())
    with pytest.raises(ValueError, match="text encoder of this pipeline was released"):
        pipe("a cat", **call)
    with pytest.raises(ValueError, match="the unet of this pipeline was released"):
        pipe(prompt_embeds=mx.zeros((1, 77, 12)), negative_prompt_embeds=mx.zeros((1, 77, 12)), **call)
    pipe.release("vae")
    with pytest.raises(ValueError, match="the vae of this pipeline was released"):
        pipe.decode(mx.zeros((1, 4, 1, 4, 4)))
    with pytest.raises(ValueError, match="the networks are"):
        pipe.release("tokenizer")


def test_what_was_released_is_named(folder, tmp_path):
    pipe = mlx_unet3d.TextToVideoPipeline.from_pretrained(folder)
    pipe.release("text_encoder")
    uses = [
        pipe.fuse_lora,
        pipe.unfuse_lora,
        pipe.unload_lora_weights,
        lambda: pipe.set_adapters("style"),
        lambda: pipe.load_textual_inversion({"<x>": mx.zeros((12,))}),
        lambda: pipe.save_pretrained(tmp_path / "saved"),
    ]
    for use in uses:
        with pytest.raises(ValueError, match="the text encoder of this pipeline was released"):
            use()
    assert not (tmp_path / "saved").exists()
    pipe.release("unet")
    name = "unet.conv_in.lora_{}.weight"
    lora = {name.format("A"): mx.zeros((2, 4, 3, 3)), name.format("B"): mx.zeros((8, 2, 1, 1))}
    for use in (lambda: pipe.load_lora_weights(lora), lambda: pipe.latent_size(None, None)):
        with pytest.raises(ValueError, match="the unet of this pipeline was released"):
            use()
