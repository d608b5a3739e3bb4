"""Context windows: schedules, the average, text of frames, memory; FreeNoise within the network."""

from itertools import product

import mlx_unet3d
import mlx.core as mx
import numpy as np
import pytest
from mlx_unet3d import TextToVideoPipeline, UNetMotionModel
from mlx_unet3d.layers.free_noise import FreeNoise, window_weights
from mlx_unet3d.pipelines.guidance import Guidance
from mlx_unet3d.pipelines.sampling import Sampling
from mlx_unet3d.pipelines.windows import FUSES, SCHEDULES, ContextWindows, Windowed, halved
from peaks import peak_of, run_step
from tiny import randomize, write_pipeline

UNET = dict(
    block_out_channels=(16, 32),
    down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
    up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
    cross_attention_dim=12,
    num_attention_heads=2,
    motion_num_attention_heads=2,
    layers_per_block=1,
    norm_num_groups=4,
    motion_max_seq_length=16,
)


@pytest.fixture(scope="module")
def unet():
    return randomize(UNetMotionModel(**UNET))


@pytest.fixture
def free_unet(unet):
    yield unet
    unet.disable_free_noise()
    unet.disable_pixel_chunking()
    unet.disable_frame_chunking()
    unet.uncompile()


def normal(*shape, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def guidance(network, text, **options):
    inputs = ({"encoder_hidden_states": text}, {"encoder_hidden_states": -text})
    sampling = Sampling(num_inference_steps=2, guidance_scale=7.0)
    return Guidance(network, sampling, *inputs, steps=2, dtype=mx.float32, **options)


def guided(unet, text):
    return guidance(lambda *args, **inputs: unet(*args, **inputs).sample, text)


class Places:
    """A network that sees the place of a frame in its window only."""

    dtype = mx.float32

    def __call__(self, sample, timestep, step, frames=None):
        return sample * mx.arange(1, sample.shape[2] + 1)[:, None, None]

    def resumes_at(self, step):
        return step


@pytest.mark.parametrize(("schedule", "fuse"), list(product(SCHEDULES, FUSES)))
def test_windows_cover_the_clip_and_shares_sum_to_one(schedule, fuse):
    strides = (1,) if schedule == "static_standard" else (1, 3)
    for frames, (length, overlap), stride, step in product(
        (1, 7, 16, 17, 31, 40), ((16, 4), (5, 4), (8, 0), (1, 0)), strides, (0, 1, 2, 5)
    ):
        context = ContextWindows(length, overlap, stride, schedule, fuse)
        windows = context.windows(frames, step)
        assert all(len(set(window)) == min(length, frames) for window in windows)
        assert len(set(windows)) == len(windows)
        assert set().union(*windows) == set(range(frames))
        sums = np.zeros(frames)
        for window, share in zip(windows, context.shares(windows, frames), strict=True):
            assert (share > 0).all()
            sums[list(window)] += share
        np.testing.assert_allclose(sums, 1)
        if schedule != "looped_uniform":
            assert all(window[0] <= window[-1] for window in windows)


def test_schedules():
    static = ContextWindows(16, 4, schedule="static_standard")
    assert [w[0] for w in static.windows(42, 3)] == [0, 12, 24, 26]
    assert static.windows(42, 3) == static.windows(42, 0)
    assert [halved(step) for step in range(5)] == [0, 0.5, 0.25, 0.75, 0.125]
    looped = ContextWindows(16, 4, schedule="looped_uniform", closed_loop=True)
    assert [(w[0], w[-1]) for w in looped.windows(32, 0)] == [(0, 15), (12, 27), (24, 7)]
    assert [w[0] for w in looped.windows(32, 1)] == [16, 28, 8]
    standard = ContextWindows(16, 4, 2)
    assert [(w[0], w[1], w[-1]) for w in standard.windows(32, 1)] == [
        (16, 17, 31),
        (0, 1, 15),
        (8, 9, 23),
        (1, 3, 31),
    ]


def test_weights():
    assert [window_weights("pyramid", n).tolist() for n in (4, 5)] == [[1, 2, 2, 1], [1, 2, 3, 2, 1]]
    assert window_weights("delayed_reverse_sawtooth", 4).tolist() == [0.01, 2, 2, 1]
    assert window_weights("delayed_reverse_sawtooth", 5).tolist() == [0.01, 0.01, 3, 2, 1]
    shares = ContextWindows(4, 2, schedule="static_standard", fuse="overlap-linear").shares(
        [(0, 1, 2, 3), (2, 3, 4, 5)], 6
    )
    np.testing.assert_allclose(shares, [[1, 1, 2 / 3, 1 / 3], [1 / 3, 2 / 3, 1, 1]])


def test_the_average_is_the_weighted_one():
    sample = mx.ones((1, 1, 6, 1, 1))
    made = Windowed(Places(), ContextWindows(4, 2, schedule="static_standard"))(sample, 0.0, 0)
    expected = [1, 2, (2 * 3 + 1 * 1) / 3, (1 * 4 + 2 * 2) / 3, 3, 4]
    np.testing.assert_allclose(made[0, 0, :, 0, 0], expected, rtol=1e-6)


def test_a_closed_loop_turns_with_its_latents():
    context = ContextWindows(8, 2, schedule="looped_uniform", closed_loop=True)
    sample = normal(1, 2, 24, 1, 3)
    windowed = Windowed(Places(), context)
    made = windowed(mx.roll(sample, -6, axis=2), 0.0, 0)
    assert mx.allclose(made, mx.roll(windowed(sample, 0.0, 0), -6, axis=2), atol=1e-5)
    open_end = ContextWindows(8, 2, schedule="looped_uniform")
    assert [w[-1] for w in context.windows(20, 0)] == [7, 13, 19, 5]
    assert [w[-1] for w in open_end.windows(20, 0)] == [7, 13, 19]


def test_one_window_is_none(unet):
    predict, sample = guided(unet, normal(1, 7, 12)), normal(1, 4, 6, 8, 8)
    expected = predict(sample, 10.0, 0)
    assert mx.array_equal(Windowed(predict, ContextWindows(6, 2))(sample, 10.0, 0), expected)
    assert not mx.allclose(Windowed(predict, ContextWindows(5, 2))(sample, 10.0, 0), expected, atol=1e-3)


def test_windows_of_a_network_are_its_forwards(unet):
    predict, sample = guided(unet, normal(1, 7, 12)), normal(1, 4, 12, 8, 8)
    made = Windowed(predict, ContextWindows(6, 0, schedule="static_standard"))(sample, 10.0, 0)
    parts = [predict(sample[:, :, :6], 10.0, 0), predict(sample[:, :, 6:], 10.0, 0)]
    assert mx.allclose(made, mx.concatenate(parts, axis=2), atol=1e-5)


@pytest.mark.parametrize("sequential", [False, True])
def test_inputs_of_frames_go_by_window(sequential):
    seen = []

    def network(sample, timestep, feature_cache, encoder_hidden_states, depth):
        seen.append((getattr(encoder_hidden_states, "states", encoder_hidden_states), depth))
        return sample

    text, depth = normal(2, 6, 3, 5), normal(2, 6, 1)
    inputs = [{"encoder_hidden_states": sign * text, "depth": depth} for sign in (1, -1)]
    scale = 1 + mx.arange(6.0).reshape(1, 1, 6, 1, 1)
    predict = Guidance(
        network,
        Sampling(num_inference_steps=1, guidance_scale=7.0),
        *inputs,
        steps=1,
        dtype=mx.float32,
        scale=scale,
        frame_axes={"depth": 1},
        sequential=sequential,
    )
    sample = normal(2, 4, 6, 1, 1)
    made = Windowed(predict, ContextWindows(4, 2, schedule="static_standard"))(sample, 0.0, 0)
    assert mx.allclose(made, sample, atol=1e-6)
    texts = [x for x, _ in seen]
    if sequential:
        texts = [mx.concatenate(texts[i : i + 2]) for i in (0, 2)]
    for start, rows in zip((0, 2), texts, strict=True):
        part = text[:, start : start + 4].reshape(8, 3, 5)
        assert mx.array_equal(rows, mx.concatenate([-part, part]))
    assert {x.shape[1] for _, x in seen} == {4}


def test_memory_is_that_of_a_window(unet, exact_peaks):
    """MLX may free a buffer a moment late, which adds to a reading and never takes from it, so that the least
    of some readings is the graph's own."""
    windows = ContextWindows(16, 0, schedule="static_standard")
    window, clip = (run_step(unet, 7.0, False, frames, 8, context=windows) for frames in (16, 64))
    least = min(peak_of(window)[1] for _ in range(3))
    readings = []
    while len(readings) < 20 and min(readings, default=2**62) > 1.05 * least:
        readings.append(peak_of(clip)[1])
    assert min(readings) <= 1.05 * least


def test_other_pipelines_take_windows(tmp_path):
    pipe = TextToVideoPipeline.from_pretrained(write_pipeline(tmp_path / "pipeline"))
    states, settings = pipe.encode_prompt("a fox"), dict(num_inference_steps=2, height=32, width=32)
    noise = normal(1, 4, 8, 4, 4)
    windows = ContextWindows(4, 0, schedule="static_standard")
    made = list(pipe.steps(states, num_frames=8, latents=noise, context_windows=windows, **settings))
    half = list(pipe.steps(states, num_frames=4, latents=noise[:, :, 4:], **settings))
    assert mx.allclose(made[-1].latents[:, :, 4:], half[-1].latents, atol=1e-4)


# FreeNoise within the network.


def test_free_noise_of_one_window_is_none(free_unet):
    sample, text = normal(1, 4, 6, 8, 8), normal(1, 7, 12)
    expected = free_unet(sample, 10, text).sample
    free_unet.enable_free_noise(6, 2)
    assert mx.array_equal(free_unet(sample, 10, text).sample, expected)
    free_unet.enable_free_noise(5, 2)
    assert not mx.allclose(free_unet(sample, 10, text).sample, expected, atol=1e-3)


def test_free_noise_takes_more_frames_than_positions_in_all_ways(free_unet):
    sample, text = normal(1, 4, 23, 8, 8), normal(1, 7, 12)
    with pytest.raises(ValueError, match=r"num_frames=23 exceeds.*--context-frames 16.*enable_free_noise"):
        free_unet(sample, 10, text)
    free_unet.enable_free_noise(None, 5)
    assert free_unet.free_noise.context_length == 16
    expected = free_unet(sample, 10, text).sample
    free_unet.enable_pixel_chunking(5)
    free_unet.enable_frame_chunking(4)
    assert mx.allclose(free_unet(sample, 10, text).sample, expected, atol=1e-5)
    free_unet.compile()
    assert mx.allclose(free_unet(sample, 10, text).sample, expected, atol=1e-5)
    free_unet.enable_free_noise(8, 4)
    assert not mx.allclose(free_unet(sample, 10, text).sample, expected, atol=1e-3)


def test_free_noise_averages_frames_left_over_as_they_are():
    windows = FreeNoise(4, 3, "pyramid")
    x = normal(2, 9, 3)
    np.testing.assert_allclose(windows.average(lambda w: 2 * w, x), 2 * np.array(x), rtol=1e-6)
    places = windows.average(lambda w: mx.broadcast_to(mx.arange(1.0, 5)[:, None], w.shape), x)
    assert places[0, :, 0].tolist() == [1, 2, 3, 2.5, 2, 3, 4, 3, 4]
    assert windows.average(lambda w: w, x.astype(mx.float16)).dtype == mx.float16


def test_free_noise_attends_in_the_memory_of_a_window(exact_peaks):
    block = randomize(UNetMotionModel(**UNET)).down_blocks[0].motion_modules[0].transformer_blocks[0]

    def peak(frames, windows):
        x = normal(64, frames, 16)
        cond = mlx_unet3d.layers.conditions.Conditions(free_noise=windows)
        mx.eval(x)
        run = lambda: windows.average(lambda w: block._add_attentions(w, cond), x)  # noqa: E731
        return min(peak_of(run)[1] for _ in range(4)) - x.nbytes

    windows = FreeNoise(8, 4)
    extra = 64 * 32 * 16 * 4  # of the result, in pieces and joined
    assert peak(32, windows) - peak(8, windows) <= 2 * extra


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(length=0), "length=0 must be an integer of at least 1"),
        (dict(overlap=16), "overlap=16 leaves windows of length=16 no frame"),
        (dict(stride=1.5), "stride=1.5 must be an integer"),
        (dict(schedule="uniform"), "schedule='uniform' must be one of 'static_standard'"),
        (dict(fuse="mean"), "fuse='mean' must be one of 'pyramid'"),
        (dict(closed_loop=True), "closed_loop needs schedule='looped_uniform'"),
        (dict(schedule="static_standard", stride=2), "stride=2 means nothing"),
    ],
)
def test_bad_context_windows(options, message):
    with pytest.raises(ValueError, match=message):
        ContextWindows(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((17, 4), "context_length=17 exceeds the motion module's 16 positions"),
        ((0, 4), "context_length=0 must be an integer"),
        ((8, 9), "context_stride=9 exceeds context_length=8"),
        ((8, 4, "round"), "weighting_scheme='round' must be one of 'flat', 'pyramid'"),
    ],
)
def test_bad_free_noise(free_unet, options, message):
    with pytest.raises(ValueError, match=message):
        free_unet.enable_free_noise(*options)
    assert free_unet.free_noise is None
