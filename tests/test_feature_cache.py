"""Feature caching and guidance in part of a run: exact where nothing is saved, and less work."""

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx_unet3d import FeatureCache, TextContext, TextToVideoPipeline, UNet3DConditionModel
from mlx_unet3d.layers.resnet import ResnetBlock2D
from mlx_unet3d.pipelines.guidance import full_steps

THREE_LEVELS = tiny.UNET | dict(
    block_out_channels=(8, 8, 16),
    down_block_types=("CrossAttnDownBlock3D", "DownBlock3D", "DownBlock3D"),
    up_block_types=("UpBlock3D", "UpBlock3D", "CrossAttnUpBlock3D"),
    layers_per_block=2,
)


@pytest.fixture(scope="module")
def unet():
    return tiny.randomize(UNet3DConditionModel(**THREE_LEVELS))


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return TextToVideoPipeline.from_pretrained(tiny.write_pipeline(tmp_path_factory.mktemp("pipe")))


def inputs(seed=1, height=5, width=6):
    mx.random.seed(seed)
    return mx.random.normal((2, 4, 3, height, width)), mx.array([500, 20]), mx.random.normal((2, 5, 12))


@pytest.fixture
def resnets(monkeypatch):
    """How many resnets ran, as a list of one number."""
    count, call = [0], ResnetBlock2D.__call__

    def counting(self, *args):
        count[0] += 1
        return call(self, *args)

    monkeypatch.setattr(ResnetBlock2D, "__call__", counting)
    return count


@pytest.mark.parametrize("depth", range(1, 9))
def test_features_of_the_same_input(unet, depth, resnets):
    """A shallow forward on the input of the full one gives its result, whatever the depth; odd sizes too."""
    plain = unet(*inputs()).sample
    full = resnets[0]
    cache = FeatureCache(interval=2, depth=depth)
    for wanted in (full, None, full):
        resnets[0] = 0
        np.testing.assert_array_equal(np.array(unet(*inputs(), feature_cache=cache).sample), np.array(plain))
        if wanted is None:
            # `depth` layers on the way up, and on the way down those that make as many skips; every third
            # skip after the first is a convolution alone.
            assert resnets[0] == depth + (depth - 1) - (depth - 1) // 3
        else:
            assert resnets[0] == wanted


def test_stale_features_count(unet):
    """With another input the shallow forward differs from the full one, and from the one before."""
    cache = FeatureCache(interval=2)
    first = unet(*inputs(1), feature_cache=cache).sample
    shallow = unet(*inputs(2), feature_cache=cache).sample
    full = unet(*inputs(2)).sample
    assert mx.abs(shallow - full).max() > 1e-3
    assert mx.abs(shallow - first).max() > 1e-3
    cache.reset()
    assert mx.array_equal(unet(*inputs(2), feature_cache=cache).sample, full)


def test_compiled(unet):
    sample, timestep, text = inputs()
    plain, compiled = FeatureCache(interval=3, depth=2), FeatureCache(interval=3, depth=2)
    expected = [unet(sample * i, timestep, text, feature_cache=plain).sample for i in range(1, 5)]
    unet.compile()
    context = TextContext(text)
    for i, wanted in enumerate(expected, start=1):
        found = unet(sample * i, timestep, context, feature_cache=compiled).sample
        np.testing.assert_allclose(np.array(found), np.array(wanted), atol=1e-4)
    unet.uncompile()


def test_refusals(unet):
    for bad in (0, -1, 1.5, True, None):
        with pytest.raises(ValueError, match=f"interval={bad!r}"):
            FeatureCache(interval=bad)
        with pytest.raises(ValueError, match=f"depth={bad!r}"):
            FeatureCache(depth=bad)
    with pytest.raises(ValueError, match="is 9; it must be an integer from 1 to 8"):
        unet(*inputs(), feature_cache=FeatureCache(depth=9))
    cache = FeatureCache()
    with pytest.raises(ValueError, match="leave out additional residuals"):
        unet(*inputs(), feature_cache=cache, mid_block_additional_residual=mx.zeros((1, 16, 1, 1)))
    unet(*inputs(), feature_cache=cache)
    with pytest.raises(ValueError, match=r"\(2, 3, 5, 6\) in .*float32, this sample needs \(2, 3, 4, 4\)"):
        unet(*inputs(height=4, width=4), feature_cache=cache)


def test_features_of_other_samples_and_dtypes_are_refused(unet):
    """As many frames in all are not enough."""
    sample, timestep, text = inputs()
    cache = FeatureCache()
    unet(sample, timestep, text, feature_cache=cache)
    other = mx.zeros((3, 4, 2, 5, 6)), 500, mx.zeros((3, 5, 12))
    with pytest.raises(ValueError, match=r"\(2, 3, 5, 6\) in .*needs \(3, 2, 5, 6\)"):
        unet(*other, feature_cache=cache)
    half = UNet3DConditionModel(**THREE_LEVELS)
    half.set_dtype(mx.float16)
    with pytest.raises(ValueError, match=r"in .*float32, this sample needs .* in .*float16"):
        half(sample.astype(mx.float16), timestep, text.astype(mx.float16), feature_cache=cache)


def test_full_steps():
    assert full_steps([True] * 7, 3) == [0, 3, 6]
    assert full_steps([True] * 4, 1) == [0, 1, 2, 3]
    assert full_steps([False, True, True, True, True, False, False], 3) == [0, 1, 4, 5]


SETTINGS = dict(num_frames=3, num_inference_steps=6, guidance_scale=5.0, seed=3, output_type="latent")


def test_pipeline_saves_work(pipe, resnets):
    """Six steps of a network of 8 resnets: 2 on the way down, 2 in the middle, 4 on the way up."""

    def run(**settings):
        resnets[0] = 0
        return np.array(pipe("a cat", **SETTINGS, **settings).frames), resnets[0]

    plain, count = run()
    assert count == 48
    same, count = run(guidance_interval=(0.0, 1.0), cache_interval=1)
    assert count == 48
    np.testing.assert_array_equal(same, plain)
    cached, count = run(cache_interval=2)
    assert count == 3 * 8 + 3 * 1
    deeper, count = run(cache_interval=3, cache_depth=2)
    assert count == 2 * 8 + 4 * 3
    results = [plain, cached, deeper]
    assert all(np.abs(a - b).max() > 1e-3 for i, a in enumerate(results) for b in results[:i])


def test_guidance_in_part(pipe, monkeypatch):
    batches, forward = [], UNet3DConditionModel.__call__

    def counting(self, sample, *args, **keywords):
        batches.append(sample.shape[0])
        return forward(self, sample, *args, **keywords)

    monkeypatch.setattr(UNet3DConditionModel, "__call__", counting)
    part = pipe("a cat", **SETTINGS, guidance_interval=(0.3, 0.8)).frames
    assert batches == [1, 1, 2, 2, 2, 1]
    assert mx.abs(part - pipe("a cat", **SETTINGS).frames).max() > 1e-3
    with pytest.raises(ValueError, match=r"guidance_interval=\(0.99, 1\) holds none of the 6 steps"):
        pipe("a cat", **SETTINGS, guidance_interval=(0.99, 1.0))


@pytest.mark.parametrize(
    "saving",
    [
        dict(cache_interval=2),
        dict(cache_interval=3, cache_depth=2, guidance_interval=(0.0, 0.6)),
    ],
)
def test_going_on(pipe, saving):
    """A run that stopped ends where it would have, wherever it stopped."""
    settings = {k: v for k, v in SETTINGS.items() if k != "output_type"} | saving
    states = pipe.encode_prompt("a cat", guidance_scale=5.0)
    whole = list(pipe.steps(states, **settings))
    for done in range(1, 6):
        start = [record.prediction for record in whole[:done]]
        again = list(pipe.steps(states, **settings, predictions=start))
        np.testing.assert_array_equal(np.array(again[-1].latents), np.array(whole[-1].latents))


@pytest.mark.parametrize(
    ("saving", "message"),
    [
        (dict(cache_interval=0), "cache_interval=0"),
        (dict(cache_interval=2, cache_depth=4), "depth of a feature cache is 4"),
        (dict(guidance_interval=(0.5, 0.5)), "guidance_interval"),
        (dict(guidance_interval=0.5), "must be two numbers"),
        (dict(guidance_interval=("0", "1")), "must be two numbers"),
        (dict(guidance_interval=(-0.1, 0.5)), "guidance_interval"),
        (dict(guidance_interval=(0.2, 1.1)), "guidance_interval"),
        (dict(guidance_interval=(0.2, 1.0), guidance_scale=1.0), "guides none of it; use a scale above 1"),
        (dict(cache_depth=2), "use a cache_interval above 1"),
    ],
)
def test_pipeline_refuses(pipe, saving, message):
    with pytest.raises(ValueError, match=message):
        pipe("a cat", **SETTINGS | saving)
