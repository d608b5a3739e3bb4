"""FreeInit, FreeNoise and prompt travel of a pipeline: records, noise, text, errors."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_unet3d import (
    AnimateDiffPipeline,
    AutoencoderKL,
    CLIPTextModel,
    CLIPTokenizer,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UNetMotionModel,
)
from mlx_unet3d.noise import noise_source
from mlx_unet3d.pipelines.free_init import FreeInit, Run, denoise_again
from mlx_unet3d.pipelines.windows import ContextWindows
from tiny import SCHEDULER, TEXT, VAE, randomize, write_tokenizer

UNET = dict(
    block_out_channels=(8, 16),
    down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
    up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
    cross_attention_dim=12,
    num_attention_heads=2,
    motion_num_attention_heads=2,
    layers_per_block=1,
    norm_num_groups=4,
    sample_size=4,
    motion_max_seq_length=8,
)
SMALL = dict(num_frames=6, num_inference_steps=3, output_type="latent", seed=4)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("animatediff")
    words = write_tokenizer(folder / "tokenizer")
    return AnimateDiffPipeline(
        unet=randomize(UNetMotionModel(**UNET), 0),
        vae=randomize(AutoencoderKL(**VAE), 1),
        text_encoder=randomize(CLIPTextModel(vocab_size=words, **TEXT), 2),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer", subfolder=None),
        scheduler=DDIMScheduler(**SCHEDULER),
    )


@pytest.fixture
def pipe(loaded):
    before = loaded.scheduler
    yield loaded
    loaded.scheduler = before
    loaded.disable_free_init()
    loaded.disable_free_noise()


def test_records_count_through_all_iterations(pipe):
    pipe.enable_free_init(num_iters=3, use_fast_sampling=True)
    assert pipe.free_init_enabled
    states = pipe.encode_prompt("a fox")
    settings = dict(num_frames=3, num_inference_steps=4, seed=1)
    records = list(pipe.steps(states, **settings))
    assert [record.step for record in records] == list(range(7))  # 1, 2 and 4
    assert {record.total for record in records} == {7}
    calls = []
    args = dict(
        num_frames=3, num_inference_steps=4, output_type="latent", callback=lambda i, *_: calls.append(i)
    )
    assert mx.array_equal(pipe("a fox", seed=1, **args).frames, records[-1].latents)
    assert calls == list(range(7))
    pipe.disable_free_init()
    assert len(list(pipe.steps(states, **settings))) == 4


@pytest.mark.parametrize("done", [1, 2, 3, 4, 6])
def test_a_run_that_stopped_goes_on(pipe, done):
    pipe.enable_free_init(num_iters=3)
    states, settings = pipe.encode_prompt("a fox"), dict(num_frames=2, num_inference_steps=2, eta=0.5)
    records = list(pipe.steps(states, **settings))
    again = list(pipe.steps(states, **settings, predictions=[r.prediction for r in records[:done]]))
    assert len(again) == len(records) == 6
    assert mx.array_equal(again[-1].latents, records[-1].latents)
    with pytest.raises(ValueError, match="predictions are those of 7 steps; this run makes 6"):
        next(pipe.steps(states, **settings, predictions=[records[0].prediction] * 7))


def test_latents_of_a_callback_go_into_the_next_iteration(pipe):
    pipe.enable_free_init(num_iters=2)
    states, settings = pipe.encode_prompt("a fox"), dict(num_frames=2, num_inference_steps=1)
    plain = list(pipe.steps(states, **settings))
    steps = pipe.steps(states, **settings)
    first = next(steps)
    assert not mx.allclose(steps.send(3 * first.latents).latents, plain[-1].latents)
    with pytest.raises(StopIteration):
        next(steps)


@pytest.mark.parametrize("options", [dict(spatial_stop_frequency=0), dict(temporal_stop_frequency=0.0)])
def test_no_low_frequencies_are_new_noise(options):
    x, noise = (mx.random.normal((1, 2, 6, 4, 8)) for _ in range(2))
    assert mx.allclose(FreeInit(**options).mix(x, noise), noise, atol=1e-6)
    still = FreeInit().mix(mx.ones(x.shape), mx.zeros(x.shape))
    assert mx.allclose(still, mx.ones(x.shape), atol=1e-6)  # a mean is the lowest frequency


class Zeros:
    """A network that predicts zeros, and notes the deviation of its samples."""

    dtype = mx.float32

    def __init__(self):
        self.deviations = []

    def __call__(self, sample, timestep, step, frames=None):
        self.deviations.append(sample.std().item())
        return mx.zeros(sample.shape)

    def resumes_at(self, step):
        return step


@pytest.mark.parametrize(
    ("scheduler", "spacing"),
    [
        (DDIMScheduler, "trailing"),
        (EulerDiscreteScheduler, "trailing"),
        (DPMSolverMultistepScheduler, "leading"),  # whose schedule lacks the last timestep of training
    ],
)
def test_all_iterations_begin_at_the_noise_level_of_the_sampler(scheduler, spacing):
    betas = {name: value for name, value in SCHEDULER.items() if name.startswith("beta")}
    laid_out = scheduler(**betas, timestep_spacing=spacing).laid_out(4)
    predict, noise = Zeros(), noise_source(0)
    latents = noise((1, 4, 8, 8, 8)) * laid_out.init_noise_sigma
    runs = [Run(predict, scheduler(**betas, timestep_spacing=spacing).laid_out(4), 1) for _ in range(3)]
    replaced = mx.zeros(latents.shape)  # a video of nothing: all that comes back is noise
    steps = denoise_again(runs, latents, FreeInit(), noise=noise)
    next(steps)
    for _ in runs[1:]:
        steps.send(replaced)
    np.testing.assert_allclose(predict.deviations, 1, atol=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_iters=0), "num_iters=0 must be an integer"),
        (dict(method="box"), "method='box' must be one of 'butterworth'"),
        (dict(order=0), "order=0 must be above 0"),
        (dict(spatial_stop_frequency=1.5), "spatial_stop_frequency=1.5 must lie between 0 and 1"),
        (dict(temporal_stop_frequency=float("nan")), "temporal_stop_frequency is nan"),
    ],
)
def test_bad_free_init(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        pipe.enable_free_init(**options)
    assert not pipe.free_init_enabled


def test_fast_sampling_needs_steps_to_divide(pipe):
    pipe.enable_free_init(use_fast_sampling=True)
    with pytest.raises(ValueError, match="use_fast_sampling of FreeInit divides num_inference_steps"):
        pipe.steps(pipe.encode_prompt("a fox"), num_frames=2, timesteps=[900, 500])


# FreeNoise and prompt travel.


def test_noise_of_long_clips(pipe):
    shape, noise = (2, 4, 14, 4, 4), pipe.sampling(seed=[3, 5]).noise
    assert pipe._long_noise(shape, None, noise(2)) is None
    drawn = noise(2)(shape)
    pipe.enable_free_noise(8, 4, noise_type="random")
    assert pipe._long_noise(shape, None, noise(2)) is None
    pipe.enable_free_noise(8, 4, noise_type="repeat_context")
    repeated = pipe._long_noise(shape, None, noise(2))
    assert mx.array_equal(repeated, mx.take(drawn, mx.arange(14) % 8, axis=2))
    pipe.enable_free_noise(8, 4)
    shuffled = pipe._long_noise(shape, None, noise(2))
    assert mx.array_equal(shuffled[:, :, :8], drawn[:, :, :8])
    for row, seed in enumerate((3, 5)):
        source = noise_source(seed)
        source((1, *shape[1:]))
        order = np.concatenate([source.permutation(4), 4 + source.permutation(4)])[:6]
        assert mx.array_equal(shuffled[row, :, 8:], mx.take(drawn[row], mx.array(order), axis=1))
    window = drawn[:, :, :8]
    assert mx.array_equal(pipe._long_noise(shape, window, noise(2))[:, :, :8], window)
    assert pipe._long_noise(shape, drawn, noise(2)) is drawn


def test_a_prompt_for_all_frames_is_that_prompt(pipe):
    expected = pipe("a fox", negative_prompt="rain", **SMALL).frames
    made = pipe({0: "a fox"}, negative_prompt="rain", **SMALL).frames
    assert mx.allclose(made, expected, atol=1e-4)
    twice = pipe({0: "a fox"}, negative_prompt={0: "rain"}, num_videos_per_prompt=2, **SMALL)
    assert twice.frames.shape[0] == 2
    assert not mx.allclose(pipe({0: "a fox", 5: "snow"}, **SMALL).frames, expected, atol=1e-3)
    one = SMALL | {"num_frames": 1}
    assert mx.allclose(pipe({0: "a fox"}, **one).frames, pipe("a fox", **one).frames, atol=1e-4)


def test_prompts_travel_through_windows(pipe):
    """Halves of a clip in windows that do not overlap: each is a clip of its own text."""
    windows = ContextWindows(4, 0, schedule="static_standard")
    settings = dict(num_inference_steps=2, output_type="latent")
    noise = noise_source(1)((1, 4, 8, 4, 4))
    states = pipe.encode_prompt({0: "a fox", 7: "snow"}, num_frames=8)
    made = pipe.steps(states, num_frames=8, latents=noise, num_inference_steps=2, context_windows=windows)
    made = list(made)[-1].latents
    for start in (0, 4):
        embeds = dict(zip(("prompt_embeds", "negative_prompt_embeds"), (x for x in states), strict=True))
        embeds = {k: x[:, start : start + 4] for k, x in embeds.items()}
        half = pipe(latents=noise[:, :, start : start + 4], num_frames=4, **embeds, **settings).frames
        assert mx.allclose(made[:, :, start : start + 4], half, atol=1e-4)


def test_text_between_prompts(pipe):
    fox, snow = (np.array(pipe.encode_prompt(text).prompt_embeds) for text in ("a fox", "snow"))
    made = np.array(pipe.encode_prompt({0: "a fox", 2: "snow"}, num_frames=4).prompt_embeds)
    expected = np.concatenate([fox, (fox + snow) / 2, snow, snow])[None]
    np.testing.assert_allclose(made, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ({1: "a"}, ValueError, "prompt begins at frame 1"),
        ({0: "a", 6: "b"}, ValueError, "prompt has frame 6, but num_frames=6"),
        ({0: "a", 2.5: "b"}, TypeError, "a string or a mapping of frames to strings"),
        ({0: 3}, TypeError, "a string or a mapping of frames to strings"),
        ({}, TypeError, "a string or a mapping of frames to strings"),
    ],
)
def test_bad_prompts_of_frames(pipe, prompt, error, message):
    with pytest.raises(error, match=message):
        pipe(prompt, **SMALL)
    with pytest.raises(error, match=message.replace("prompt ", "negative_prompt ")):
        pipe("a", negative_prompt=prompt, **SMALL)


def test_other_refusals(pipe):
    with pytest.raises(ValueError, match="noise_type='pink' must be one of 'shuffle_context'"):
        pipe.enable_free_noise(4, noise_type="pink")
    assert not pipe.free_noise_enabled
    pipe.enable_free_noise(4, 2, prompt_interpolation_callback=lambda first, last, start, end: start)
    assert pipe.free_noise_enabled
    with pytest.raises(ValueError, match=r"prompt_interpolation_callback\(0, 3, ...\) returned states \(1,"):
        pipe({0: "a", 3: "b"}, **SMALL)
    pipe.disable_free_noise()
    states = pipe.encode_prompt({0: "a"}, num_frames=5, guidance_scale=1)
    with pytest.raises(ValueError, match="text states are those of 5 frames"):
        pipe.steps(states, num_frames=6, guidance_scale=1)
    with pytest.raises(ValueError, match="cannot stand beside prompts of frames"):
        pipe({0: "a"}, negative_prompt_embeds=mx.zeros((1, 77, 12)), **SMALL)
    states = pipe.encode_prompt("a fox")
    with pytest.raises(
        ValueError, match=r"num_frames=9 exceeds .* context_windows=ContextWindows\(length=8\)"
    ):
        pipe.steps(states, num_frames=9)
    with pytest.raises(ValueError, match="length of context_windows=9 exceeds the motion module's 8"):
        pipe.steps(states, num_frames=10, context_windows=ContextWindows(9))
    with pytest.raises(TypeError, match="context_windows is a int"):
        pipe.sampling(context_windows=16)
    with pytest.raises(ValueError, match="cache_interval=2 keeps features"):
        pipe.sampling(context_windows=ContextWindows(), cache_interval=2)
