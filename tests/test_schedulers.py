"""The schedulers without torch: numbers of diffusers' own tests, dtypes, states, configs, refusals."""

import copy
import inspect
import itertools
import json
import math
import pickle

import mlx.core as mx
import numpy as np
import pytest
from mlx_unet3d import schedulers
from mlx_unet3d.noise import noise_source
from mlx_unet3d.schedulers import (
    REFUSED,
    SCHEDULERS,
    Scheduler,
    scheduler_from_config,
    scheduler_of_pipeline,
)

MS_1_7B = {  # scheduler/scheduler_config.json of text-to-video-ms-1.7b
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.15.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "thresholding": False,
    "trained_betas": None,
}
NAMES = sorted(Scheduler.classes)
V = {"prediction_type": "v_prediction"}
KARRAS = {"use_karras_sigmas": True}
DPM = {"lower_order_final": False, "final_sigmas_type": "sigma_min"}
UNIPC = {"final_sigmas_type": "sigma_min"}
EULER = {"num_train_timesteps": 1100}
HEUN = {**EULER, "beta_start": 0.0001, "beta_end": 0.02}


def make(name, **arguments):
    return Scheduler.classes[name](**arguments)


def ramp(shape=(3, 8, 8, 4)):
    values = mx.arange(math.prod(shape)).reshape(shape).astype(mx.float32) / math.prod(shape)
    return values.transpose(len(shape) - 1, *range(len(shape) - 1))


def network(x, t):
    return x * float(t) / (float(t) + 1)


def loop(scheduler, sample, timesteps, noise=None, keep_scaled=False):
    """Sample; the tests of diffusers give the scaled sample to `step` too (`keep_scaled`)."""
    for t in timesteps:
        scaled = scheduler.scale_model_input(sample, t)
        sample = scaled if keep_scaled else sample
        sample = scheduler.step(network(scaled, t), t, sample, noise=noise).prev_sample
    return sample


def sums(sample):
    return float(mx.abs(sample).sum()), float(mx.abs(sample).mean())


# The loops of the tests of diffusers: 10 steps, (Σ|x|, mean|x|), None where they do not say.
LOOPS = [
    ("DDIMScheduler", {}, 172.0067, 0.223967),
    ("DDIMScheduler", V, 52.5302, 0.0684),
    ("DDIMScheduler", {"set_alpha_to_one": True, "beta_start": 0.01}, 149.8295, 0.1951),
    ("DDIMScheduler", {"set_alpha_to_one": False, "beta_start": 0.01}, 149.0784, 0.1941),
    ("DPMSolverMultistepScheduler", DPM, None, 0.3301),
    ("DPMSolverMultistepScheduler", {**DPM, **V}, None, 0.2251),
    ("DPMSolverMultistepScheduler", {**DPM, **V, **KARRAS}, None, 0.2096),
    ("DPMSolverMultistepScheduler", {**DPM, **V, "use_lu_lambdas": True}, None, 0.1554),
    (
        "DPMSolverMultistepScheduler",
        {**DPM, "thresholding": True, "dynamic_thresholding_ratio": 0.87, "sample_max_value": 0.5},
        None,
        1.1364,
    ),
    ("UniPCMultistepScheduler", UNIPC, None, 0.2464),
    ("UniPCMultistepScheduler", {**UNIPC, **KARRAS}, None, 0.2925),
    ("UniPCMultistepScheduler", {**UNIPC, **V}, None, 0.1014),
    ("UniPCMultistepScheduler", {**UNIPC, **V, **KARRAS}, None, 0.1966),
    ("EulerDiscreteScheduler", EULER, 10.0807, 0.0131),
    ("EulerDiscreteScheduler", {**EULER, **V}, 0.0002, 2.2676e-06),
    ("EulerDiscreteScheduler", {**EULER, **KARRAS}, 124.52299, 0.162139),
    ("HeunDiscreteScheduler", HEUN, 0.1233, 0.0002),
    ("HeunDiscreteScheduler", {**HEUN, **V}, 4.6934e-07, 6.1112e-10),
    ("HeunDiscreteScheduler", {**HEUN, **KARRAS}, 0.00015, 1.9869e-07),
    ("DEISMultistepScheduler", {}, None, 0.23916),
    ("DEISMultistepScheduler", V, None, 0.091),
    ("PNDMScheduler", {}, 198.1318, 0.2580),
    ("PNDMScheduler", V, 67.3986, 0.0878),
    ("PNDMScheduler", {"set_alpha_to_one": True, "beta_start": 0.01}, 230.0399, 0.2995),
    ("PNDMScheduler", {"set_alpha_to_one": False, "beta_start": 0.01}, 186.9482, 0.2434),
]


@pytest.mark.parametrize(("name", "arguments", "total", "mean"), LOOPS)
def test_loops_of_the_diffusers_tests(name, arguments, total, mean):
    scheduler = make(name, **arguments)
    scheduler.set_timesteps(10)
    got = sums(loop(scheduler, ramp() * scheduler.init_noise_sigma, scheduler.timesteps, keep_scaled=True))
    assert got[1] == pytest.approx(mean, abs=1e-3)
    if total is not None:
        assert got[0] == pytest.approx(total, abs=1e-2)


@pytest.mark.parametrize(
    ("arguments", "mean"),
    [({}, 0.2441), (KARRAS, 0.2898), (V, 0.1014), ({**V, **KARRAS}, 0.1944)],
)
def test_unipc_on_samples_with_one_axis(arguments, mean):
    scheduler = make("UniPCMultistepScheduler", **UNIPC, **arguments)
    scheduler.set_timesteps(10)
    got = sums(loop(scheduler, ramp((3, 8, 4)), scheduler.timesteps))
    assert got[1] == pytest.approx(mean, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "arguments", "begin", "total", "mean"),
    [
        ("DDIMScheduler", {}, 8, 354.5418, 0.4616),
        ("DPMSolverMultistepScheduler", DPM, 5, 318.4111, 0.4146),
        ("UniPCMultistepScheduler", UNIPC, 8, 315.5757, 0.4109),
        ("EulerDiscreteScheduler", EULER, 8, 57062.9297, 74.3007),
        ("HeunDiscreteScheduler", HEUN, 16, 75074.8906, 97.7538),
        ("DEISMultistepScheduler", {}, 8, 315.3016, 0.41054),
    ],
)
def test_loops_that_begin_late(name, arguments, begin, total, mean):
    scheduler = make(name, **arguments)
    scheduler.set_timesteps(10)
    sample = ramp() * scheduler.init_noise_sigma
    noise = ramp().transpose(1, 2, 3, 0).reshape(-1)[::-1].reshape(3, 8, 8, 4).transpose(3, 0, 1, 2)
    timesteps = scheduler.timesteps[begin:]
    got = sums(
        loop(scheduler, scheduler.add_noise(sample, noise, timesteps[:1]), timesteps, keep_scaled=True)
    )
    assert got[0] == pytest.approx(total, rel=1e-4)
    assert got[1] == pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize(("arguments", "total", "mean"), [({}, 258.9606, 0.3372), (V, 202.0296, 0.2631)])
def test_ddpm_with_the_noise_of_torch(arguments, total, mean):
    """All 1000 steps with the numbers of torch.manual_seed(0)."""
    scheduler = make("DDPMScheduler", **arguments)
    scheduler.set_timesteps(1000)
    sample = ramp()
    noise = noise_source(0)
    for t in scheduler.timesteps:
        sample = scheduler.step(network(sample, t), t, sample, noise=noise).prev_sample
        mx.eval(sample)
    assert sums(sample) == (pytest.approx(total, abs=1e-2), pytest.approx(mean, abs=1e-3))


@pytest.mark.parametrize(("arguments", "total", "mean"), [({}, 152.3192, 0.1983), (V, 108.4439, 0.1412)])
def test_euler_ancestral_with_the_noise_of_torch(arguments, total, mean):
    scheduler = make("EulerAncestralDiscreteScheduler", **EULER, **arguments)
    scheduler.set_timesteps(10)
    sample = ramp() * scheduler.init_noise_sigma
    got = sums(loop(scheduler, sample, scheduler.timesteps, noise_source(0), keep_scaled=True))
    assert got == (pytest.approx(total, abs=1e-2), pytest.approx(mean, abs=1e-3))


@pytest.mark.parametrize(("steps", "total"), [(4, 152.99976), (10, 181.20401)])
def test_tcd_without_noise(steps, total):
    """The sums of diffusers' TCDScheduler with eta 0."""
    scheduler = make("TCDScheduler")
    scheduler.set_timesteps(steps)
    sample = ramp()
    for t in scheduler.timesteps:
        sample = scheduler.step(network(sample, t), t, sample, eta=0.0).prev_sample
    assert sums(sample)[0] == pytest.approx(total, rel=1e-5)


# text-to-video-ms-1.7b's config, 5-D samples: (Σ|x| after 10 steps, after 25).
MS_LOOPS = [
    ("ddim", {}, 366.75531, 388.16690),
    ("dpm++", {}, 368.37137, 383.44415),
    ("dpm++", {"final_sigmas_type": "sigma_min"}, 383.04614, 417.68323),
    ("dpm++-karras", {}, 425.42316, 410.95636),
    ("dpm++-karras", {"final_sigmas_type": "sigma_min"}, 425.24228, 410.78162),
    ("euler", {}, 357.78552, 383.75195),
    ("euler", KARRAS, 359.38477, 388.93851),
    ("unipc", {}, 369.61804, 383.09888),
    ("unipc", {"final_sigmas_type": "sigma_min"}, 384.10678, 396.03391),
    ("pndm", {}, 403.03552, 405.77744),
]


@pytest.mark.parametrize(("short", "overrides", "ten", "twenty_five"), MS_LOOPS)
def test_loops_on_the_ms_1_7b_config(short, overrides, ten, twenty_five):
    scheduler = scheduler_from_config({**MS_1_7B, **overrides}, short)
    shape = (2, 4, 3, 8, 8)
    unit = mx.arange(1536).reshape(shape).astype(mx.float32) / 1536
    for steps, total in ((10, ten), (25, twenty_five)):
        scheduler.set_timesteps(steps)
        got = sums(loop(scheduler, unit * scheduler.init_noise_sigma, scheduler.timesteps))
        assert got[0] == pytest.approx(total, rel=1e-5)
        assert got[1] == pytest.approx(total / 1536, rel=1e-5)


@pytest.mark.parametrize(
    ("short", "overrides", "first", "last"),
    [
        ("ddim", {}, [961, 921], [41, 1]),
        ("dpm++", {}, [999, 959, 919], [80, 40]),
        ("dpm++", {"timestep_spacing": "leading"}, [951, 913, 875], [77, 39]),
        ("dpm++-karras", {}, [999, 970, 938, 905], [4, 1, 0]),
        ("euler", {}, [999, 957.375], [41.625, 0]),
        ("unipc", {}, [999, 959, 919], [80, 40]),
        ("pndm", {}, [961, 921, 921, 881], [1]),
    ],
)
def test_timesteps_of_25_steps(short, overrides, first, last):
    scheduler = scheduler_from_config({**MS_1_7B, **overrides}, short)
    scheduler.set_timesteps(25)
    assert scheduler.timesteps[: len(first)].tolist() == first
    assert scheduler.timesteps[-len(last) :].tolist() == last
    assert scheduler.init_noise_sigma == (pytest.approx(14.614647) if short == "euler" else 1.0)


def test_tables():
    alphas = scheduler_from_config(MS_1_7B).alphas_cumprod[[0, 1, 500, 981, 999]]
    expected = [0.99914998, 0.99829602, 0.27633247, 0.0057754959, 0.0046600951]
    np.testing.assert_allclose(alphas, expected, rtol=1e-6)
    ddim = make("DDIMScheduler")
    pairs = {(420, 400): 0.14771, (980, 960): 0.32460, (487, 486): 0.00979, (999, 998): 0.02, (0, 0): 0}
    for (t, prev_t), variance in pairs.items():
        assert ddim.variance(t, prev_t) == pytest.approx(variance, abs=1e-5)
    pndm = make("PNDMScheduler", steps_offset=1)
    pndm.set_timesteps(10)
    assert pndm.timesteps.tolist() == (
        [901, 851, 851, 801, 801, 751, 751, 701, 701, 651, 651, 601, 601, 501, 401, 301, 201, 101, 1]
    )
    zero = make("DDIMScheduler", rescale_betas_zero_snr=True, **V)
    assert zero.alphas_cumprod[-1] == 0


def test_beta_sigmas_are_quantiles():
    """The sigmas of 5 steps from 1 to 0 are the quartiles of Beta(0.6, 0.6)."""
    scheduler = make("EulerDiscreteScheduler", use_beta_sigmas=True, sigma_min=0.0, sigma_max=1.0)
    scheduler.set_timesteps(5)
    assert scheduler.sigmas.tolist()[::2] == [1.0, 0.5, 0.0]
    upper, lower = scheduler.sigmas[[1, 3]]
    assert upper + lower == pytest.approx(1.0, abs=1e-6)
    # The distribution function at x, integrated over u = x ** 0.6, which takes the pole at 0 away.
    u = np.linspace(0, lower**0.6, 100_001)
    density = (1 - u ** (1 / 0.6)) ** -0.4 / 0.6
    share = (density[1:] + density[:-1]).sum() / 2 * (u[1] - u[0])
    assert share / (math.gamma(0.6) ** 2 / math.gamma(1.2)) == pytest.approx(0.25, abs=1e-6)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("name", NAMES)
def test_timesteps_fall_and_stay_in_range(name, spacing):
    scheduler = make(name, timestep_spacing=spacing)
    for steps in (4, 7, 33, 50):
        scheduler.set_timesteps(steps)
        assert (np.diff(scheduler.timesteps) <= (50 if name == "PNDMScheduler" else 0)).all()
        assert scheduler.timesteps.min() >= 0
        assert scheduler.timesteps.max() <= 999
        entries = 2 * steps - 1 if scheduler.order == 2 else steps
        assert name == "PNDMScheduler" or len(scheduler.timesteps) == entries


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_trailing_gives_no_timestep_too_many(spacing):
    """61 steps: the rounding of 1000 / 61 must not add a timestep of -1."""
    scheduler = make("DDIMScheduler", timestep_spacing=spacing)
    scheduler.set_timesteps(61)
    assert len(scheduler.timesteps) == 61
    assert scheduler.timesteps.min() >= 0


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
@pytest.mark.parametrize("short", SCHEDULERS)
def test_the_dtype_of_the_sample_stays(short, dtype):
    scheduler = scheduler_from_config(MS_1_7B, short)
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(0)
    sample = noise_source(1)((1, 4, 2, 3, 3)).astype(dtype)
    assert scheduler.add_noise(sample, sample, scheduler.timesteps[:1]).dtype == dtype
    noise = noise_source(2)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(sample, t)
        out = scheduler.step(0.3 * scaled, t, sample, noise=noise)
        assert (scaled.dtype, *(x.dtype for x in out)) == (dtype,) * 3
        sample = out.prev_sample
    assert mx.isfinite(sample).all().item()


def test_half_precision_steps_compute_in_single():
    """A step on float16 arrays is the float32 step on the same numbers, rounded once."""
    sample, residual = (noise_source(s)((1, 4, 8, 8)).astype(mx.float16) for s in (1, 2))
    for short in SCHEDULERS:
        results = []
        for dtype in (mx.float16, mx.float32):
            scheduler = scheduler_from_config(MS_1_7B, short)
            scheduler.set_timesteps(5)
            t = scheduler.timesteps[0]
            arrays = residual.astype(dtype), t, sample.astype(dtype)
            results.append(scheduler.step(*arrays, noise=noise_source(3)).prev_sample)
        assert mx.array_equal(results[0], results[1].astype(mx.float16)), short


@pytest.mark.parametrize("short", SCHEDULERS)
def test_set_timesteps_forgets(short):
    scheduler = scheduler_from_config(MS_1_7B, short)
    sample, results = noise_source(1)((1, 4, 4, 4)), []
    for _ in range(2):
        scheduler.set_timesteps(6)
        results.append(loop(scheduler, sample, scheduler.timesteps, noise_source(5)))
        scheduler.set_timesteps(6)  # and one that is broken off
        loop(scheduler, sample, scheduler.timesteps[:3], noise_source(5))
    assert mx.array_equal(*results)


@pytest.mark.parametrize("short", SCHEDULERS)
def test_noise_is_asked_for_where_it_is_drawn(short):
    scheduler = scheduler_from_config(MS_1_7B, short)
    scheduler.set_timesteps(4)
    sample = mx.ones((1, 4, 4, 4))
    t = scheduler.timesteps[0]
    assert scheduler.uses_noise == (short in ("ddpm", "dpm++-sde", "euler-a", "lcm", "tcd"))
    if scheduler.uses_noise:
        with pytest.raises(ValueError, match=r"noise=noise_source\(seed\)"):
            scheduler.step(sample, t, sample)
    assert ("eta" in inspect.signature(scheduler.step).parameters) == scheduler.uses_eta
    scheduler.step(sample, t, sample, noise=noise_source(0))


def test_how_much_noise_is_drawn():
    draws = []

    def counting(shape):
        draws.append(shape)
        return mx.zeros(shape)

    counts = {"ddim": 0, "ddpm": 3, "dpm++": 0, "dpm++-sde": 4, "euler": 0, "euler-a": 4, "lcm": 3}
    counts |= {"tcd": 3, "heun": 0, "deis": 0}
    for short, count in counts.items():
        scheduler = scheduler_from_config({**MS_1_7B, "steps_offset": 0}, short)
        scheduler.set_timesteps(4)
        draws.clear()
        loop(scheduler, mx.ones((1, 4, 2, 2)), scheduler.timesteps, counting)
        assert draws == [(1, 4, 2, 2)] * count, short
    ddim = scheduler_from_config(MS_1_7B)
    ddim.set_timesteps(4)
    with pytest.raises(ValueError, match=r"noise_source"):
        ddim.step(mx.ones((1, 4)), 751, mx.ones((1, 4)), eta=0.5)
    with pytest.raises(ValueError, match=r"eta=1\.5 must be from 0"):
        ddim.step(mx.ones((1, 4)), 751, mx.ones((1, 4)), eta=1.5, noise=counting)


@pytest.mark.parametrize("short", SCHEDULERS)
def test_a_perfect_model_is_believed(short):
    """With the true noise as output, each step's clean sample is the one that was noised."""
    scheduler = scheduler_from_config(MS_1_7B, short)
    scheduler.set_timesteps(5)
    clean, noise = noise_source(1)((2, 4, 3, 3)), noise_source(2)((2, 4, 3, 3))
    t = scheduler.timesteps[0]
    noisy = scheduler.add_noise(clean, noise, [float(t)] * 2)
    out = scheduler.step(noise, t, noisy, noise=noise_source(3))
    assert mx.allclose(out.pred_original_sample, clean, atol=2e-4)


@pytest.mark.parametrize("short", SCHEDULERS)
def test_misuse_is_refused(short):
    scheduler = scheduler_from_config(MS_1_7B, short)
    sample, noise = mx.ones((1, 4, 2, 2)), noise_source(0)
    with pytest.raises(ValueError, match="call set_timesteps"):
        scheduler.step(sample, 999, sample, noise=noise)
    with pytest.raises(ValueError, match="call set_timesteps"):
        scheduler.set_begin_index(0)
    most = 10**6 if scheduler.repeats_timesteps else 1000
    range_ = f"must be from 1 to {most}"
    for steps, message in ((0, range_), (most + 1, range_), (2.0, "whole"), (True, "whole")):
        with pytest.raises(ValueError, match=message):
            scheduler.set_timesteps(steps)
    for schedule, given in (((), "nothing"), ((5, [3]), "timesteps and num_inference_steps")):
        with pytest.raises(ValueError, match=f"was given {given}; give one of"):
            scheduler.set_timesteps(schedule[0] if schedule else None, timesteps=[*schedule][1:] or None)
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="not in the schedule; use an entry of"):
        scheduler.step(sample, 3, sample, noise=noise)
    with pytest.raises(ValueError, match=r"model_output has shape \(1, 4, 2, 3\) and sample"):
        scheduler.step(mx.ones((1, 4, 2, 3)), scheduler.timesteps[0], sample, noise=noise)
    with pytest.raises(ValueError, match="begin_index=50 must be from 0"):
        scheduler.set_begin_index(50)
    with pytest.raises(ValueError, match="3 timesteps were given for 2 samples"):
        scheduler.add_noise(mx.ones((2, 4)), mx.ones((2, 4)), scheduler.timesteps[[0, 1, 1]])
    with pytest.raises(ValueError, match="noise has shape"):
        scheduler.add_noise(sample, mx.ones((1, 4)), scheduler.timesteps[:1])
    with pytest.raises(ValueError, match="a step takes a single one"):
        scheduler.step(sample, scheduler.timesteps, sample, noise=noise)


@pytest.mark.parametrize("short", ["dpm++", "euler", "euler-a", "unipc", "lcm"])
def test_steps_go_in_order(short):
    scheduler = scheduler_from_config(MS_1_7B, short)
    scheduler.set_timesteps(5)
    sample = mx.ones((1, 4))
    for t in scheduler.timesteps:
        scheduler.step(sample, mx.array(t), sample, noise=noise_source(0))
    with pytest.raises(ValueError, match="all 5 steps are done"):
        scheduler.step(sample, scheduler.timesteps[0], sample, noise=noise_source(0))
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(2)
    with pytest.raises(ValueError, match="number 2 with timestep"):
        scheduler.step(sample, scheduler.timesteps[0], sample, noise=noise_source(0))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("DDIMScheduler", {"beta_schedule": "cosine"}, "no beta_schedule='cosine'; it has 'linear'"),
        ("DDIMScheduler", {"prediction_type": "flow"}, "no prediction_type='flow'"),
        ("DDIMScheduler", {"timestep_spacing": "even"}, "no timestep_spacing='even'"),
        ("DDIMScheduler", {"trained_betas": [[0.1]]}, r"trained_betas has shape \(1, 1\)"),
        ("DDIMScheduler", {"trained_betas": []}, r"trained_betas has shape \(0,\)"),
        ("DDIMScheduler", {"num_train_timesteps": 0}, "num_train_timesteps=0"),
        ("DDIMScheduler", {"dynamic_thresholding_ratio": 1.5}, "must be from 0 to 1"),
        ("DDPMScheduler", {"variance_type": "fixed_large_log"}, "no variance_type"),
        ("DEISMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "it has 'deis'"),
        ("DEISMultistepScheduler", {"solver_type": "x"}, "it has 'logrho'"),
        ("HeunDiscreteScheduler", {"beta_schedule": "sigmoid"}, "no beta_schedule='sigmoid'"),
        ("TCDScheduler", {"original_inference_steps": 0}, "original_inference_steps=0"),
        ("PNDMScheduler", {"prediction_type": "sample"}, "no prediction_type='sample'"),
        ("LCMScheduler", {"original_inference_steps": 2000}, "original_inference_steps=2000"),
        ("LCMScheduler", {"distilled_spacing": "even"}, "no distilled_spacing='even'"),
        ("EulerDiscreteScheduler", {"interpolation_type": "cubic"}, "no interpolation_type"),
        ("EulerDiscreteScheduler", {"timestep_type": "warm"}, "no timestep_type"),
        (
            "EulerDiscreteScheduler",
            {**KARRAS, "use_beta_sigmas": True},
            "karras and beta sigmas at once",
        ),
        ("EulerAncestralDiscreteScheduler", {"prediction_type": "sample"}, "no prediction_type"),
        ("DPMSolverMultistepScheduler", {"solver_order": 4}, "solver_order=4 must be 1, 2 or 3"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "x"}, "no algorithm_type='x'"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}, "use final_sigmas_type='sigma_min'"),
        (
            "DPMSolverMultistepScheduler",
            {"algorithm_type": "sde-dpmsolver", "solver_order": 3, **UNIPC},
            "use solver_order=2",
        ),
        ("DPMSolverMultistepScheduler", {"variance_type": "learned"}, "variance_type='learned'"),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "not support use_flow_sigmas=True"),
        ("DPMSolverMultistepScheduler", {"flow_shift": 3.0}, "not support flow_shift=3.0"),
        ("DPMSolverMultistepScheduler", {"use_dynamic_shifting": True}, "use_dynamic_shifting"),
        ("DPMSolverMultistepScheduler", {"time_shift_type": "linear"}, "time_shift_type"),
        ("DPMSolverMultistepScheduler", {"final_sigmas_type": "one"}, "no final_sigmas_type"),
        ("UniPCMultistepScheduler", {"solver_p": object()}, "solver_p"),
        ("UniPCMultistepScheduler", {"shift_terminal": 0.1}, "shift_terminal=0.1"),
        ("UniPCMultistepScheduler", {"predict_x0": False}, "use final_sigmas_type='sigma_min'"),
        ("UniPCMultistepScheduler", {"predict_x0": False, "thresholding": True}, "predict_x0=True"),
        ("UniPCMultistepScheduler", {"lower_order_final": False}, "first order"),
        ("UniPCMultistepScheduler", {"solver_type": "bh3"}, "no solver_type='bh3'"),
    ],
)
def test_what_is_not_supported_is_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(name, **arguments)


@pytest.mark.parametrize(
    ("name", "arguments", "steps", "message"),
    [
        ("PNDMScheduler", {}, 3, "at least 4, or skip_prk_steps=True"),
        ("LCMScheduler", {}, 51, "more than the original_inference_steps=50"),
        (
            "DDIMScheduler",
            {"steps_offset": 1},
            1000,
            "timesteps 1000, .* must be from 0 to 999, .* steps_offset=0",
        ),
        ("DDIMScheduler", {"trained_betas": [0.01] * 500}, 10, "from 0 to 499, .* or trained_betas for each"),
        ("TCDScheduler", {}, 51, "more than the original_inference_steps=50"),
    ],
)
def test_step_counts_that_a_scheduler_cannot_do(name, arguments, steps, message):
    scheduler = make(name, **arguments)
    with pytest.raises(ValueError, match=message):
        scheduler.set_timesteps(steps)


@pytest.mark.parametrize(
    ("name", "arguments", "schedule", "message"),
    [
        ("DDIMScheduler", {}, {"timesteps": [3]}, "takes no timesteps, .* DDPMScheduler, .*LCMScheduler"),
        ("DDPMScheduler", {}, {"sigmas": [3, 0]}, "takes no sigmas, .*: EulerDiscreteScheduler$"),
        ("DDPMScheduler", {}, {"timesteps": [5, 7]}, "timesteps 5, 7 must fall"),
        ("TCDScheduler", {}, {"timesteps": [7, 7]}, "timesteps 7, 7 must fall"),
        ("LCMScheduler", {}, {"timesteps": [1000, 7]}, "must be from 0 to 999"),
        ("DDPMScheduler", {}, {"timesteps": [7, -1]}, "must be from 0 to 999"),
        ("LCMScheduler", {}, {"timesteps": []}, r"timesteps=\[\] must be a list of numbers, 1 or more"),
        ("EulerDiscreteScheduler", {}, {"sigmas": [1.0]}, "must be a list of numbers, 2 or more"),
        ("EulerDiscreteScheduler", {}, {"sigmas": [1.0, math.nan]}, "must be a list of numbers"),
        ("EulerDiscreteScheduler", {}, {"timesteps": "999"}, "timesteps='999' must be a list"),
        ("EulerDiscreteScheduler", {}, {"timesteps": [9, None]}, "must be a list"),
        ("EulerDiscreteScheduler", {}, {"timesteps": [9], "sigmas": [1, 0]}, "given timesteps and sigmas"),
        ("EulerDiscreteScheduler", KARRAS, {"timesteps": [9]}, "asks for karras sigmas"),
        ("EulerDiscreteScheduler", {**V, "timestep_type": "continuous"}, {"timesteps": [9]}, "give sigmas"),
        ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}, {"timesteps": [9]}, "asks for lu sigmas"),
    ],
)
def test_schedules_that_a_scheduler_cannot_do(name, arguments, schedule, message):
    scheduler = make(name, **arguments)
    with pytest.raises(ValueError, match=message):
        scheduler.set_timesteps(**schedule)


def test_custom_schedules():
    heun = make("HeunDiscreteScheduler")
    heun.set_timesteps(timesteps=[999, 500.5, 0])
    assert heun.timesteps.tolist() == [999, 500.5, 500.5, 0, 0]
    assert heun.sigmas[[1, 3]].tolist() == heun.sigmas[[2, 4]].tolist()
    assert (heun.num_inference_steps, heun.sigmas[-1]) == (3, 0)
    euler = make("EulerDiscreteScheduler")
    euler.set_timesteps(sigmas=[10, 1, 0.5])
    assert euler.sigmas.tolist() == [10, 1, 0.5]
    assert (euler.num_inference_steps, len(euler.timesteps), euler.init_noise_sigma) == (2, 2, 10)
    run = euler.laid_out(sigmas=[3, 0])
    assert (run.sigmas.tolist(), euler.sigmas.tolist()) == ([3, 0], [10, 1, 0.5])
    lcm = make("LCMScheduler")
    lcm.set_timesteps(4, original_inference_steps=100)
    assert lcm.timesteps.tolist() == [999, 749, 499, 249]
    lcm.set_timesteps(4)
    assert lcm.timesteps.tolist() == [999, 759, 499, 259]


@pytest.mark.parametrize(
    ("steps", "timesteps"),
    [
        (1, [999]),
        (4, [999, 759, 519, 279]),
        (8, [999, 879, 759, 639, 519, 399, 279, 159]),
        (50, list(range(999, 0, -20))),
    ],
)
def test_strided_timesteps(steps, timesteps):
    """T2V-Turbo's `origin[::-(50 // n)][:n]`, of 50 timesteps 19, 39, ..., 999."""
    scheduler = make("LCMScheduler", distilled_spacing="strided")
    scheduler.set_timesteps(steps)
    origin = np.arange(19, 1000, 20)
    assert scheduler.timesteps.tolist() == origin[:: -(50 // steps)][:steps].tolist() == timesteps


def test_the_spacing_goes_with_the_config():
    strided = make("LCMScheduler", distilled_spacing="strided")
    assert strided.config.to_dict()["distilled_spacing"] == "strided"
    assert "distilled_spacing" not in make("LCMScheduler").config.to_dict()
    other = schedulers.EulerDiscreteScheduler.from_config(strided.config)
    assert schedulers.LCMScheduler.from_config(other.config).config == strided.config
    assert scheduler_from_config(strided.config.to_dict()).config.distilled_spacing == "strided"


@pytest.mark.parametrize("short", ["dpm++", "deis", "unipc"])
@pytest.mark.parametrize("order", [2, 3])
def test_timesteps_that_stand_twice(short, order):
    """Two steps at one noise level are one: diffusers divides by their distance, and gives NaN."""
    scheduler = scheduler_from_config({**MS_1_7B, "num_train_timesteps": 40, "solver_order": order}, short)
    results = []
    for steps, repeated in ((40, 1), (39, 0)):
        scheduler.set_timesteps(steps)
        assert (np.diff(scheduler.timesteps) == 0).sum() == repeated
        results.append(loop(scheduler, ramp(), scheduler.timesteps))
    assert mx.isfinite(results[0]).all().item()
    assert mx.allclose(results[0], results[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("short", SCHEDULERS)
def test_a_copy_for_a_run(short):
    """Runs on copies, step by step in turn, are what each is alone; the scheduler is as before."""
    scheduler = scheduler_from_config(MS_1_7B, short)
    before = {name: copy.copy(value) for name, value in vars(scheduler).items()}
    samples = [noise_source(i)((1, 4, 4, 4)) for i in (1, 2)]

    def steps(count, sample):
        run, noise = scheduler.laid_out(count), noise_source(count)
        for t in run.timesteps:
            scaled = run.scale_model_input(sample, t)
            sample = run.step(network(scaled, t), t, sample, noise=noise).prev_sample
            yield sample

    alone = [list(steps(count, sample)) for count, sample in zip((9, 6), samples, strict=True)]
    runs = [steps(count, sample) for count, sample in zip((9, 6), samples, strict=True)]
    in_turn = list(itertools.zip_longest(*runs))
    for k in (0, 1):
        got = [pair[k] for pair in in_turn if pair[k] is not None]
        assert len(got) == len(alone[k])
        assert all(mx.array_equal(a, b) for a, b in zip(got, alone[k], strict=True))
    for name, value in vars(scheduler).items():
        assert np.array_equal(value, before[name]), name


def test_pure_noise_has_no_epsilon():
    scheduler = make("DDIMScheduler", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="pure noise"):
        scheduler.step(mx.ones((1, 4)), 999, mx.ones((1, 4)))


def test_runge_kutta_goes_from_the_first_timestep():
    scheduler = make("PNDMScheduler")
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="skip_prk_steps=True to begin later"):
        scheduler.step(mx.ones((1, 4)), scheduler.timesteps[5], mx.ones((1, 4)))


def test_learned_variance_needs_its_channels():
    scheduler = make("DDPMScheduler", variance_type="learned_range")
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="needs 8 channels"):
        scheduler.step(mx.ones((1, 4, 2)), 800, mx.ones((1, 4, 2)), noise=noise_source(0))


def test_a_config_is_read_only_and_knows_what_was_given():
    config = make("DDIMScheduler", beta_end=0.03).config
    assert config.beta_end == config["beta_end"] == 0.03
    assert config.given == {"beta_end"}
    with pytest.raises(AttributeError, match=r"from_config\(config, beta_end=0.1\)"):
        config.beta_end = 0.1
    with pytest.raises(AttributeError, match="no argument 'beta_middle'"):
        _ = config.beta_middle
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    assert "beta_end=0.03" in repr(config)


def test_only_given_values_cross():
    ddim = schedulers.DDIMScheduler.from_config(MS_1_7B)
    dpm = schedulers.DPMSolverMultistepScheduler.from_config(ddim.config)
    assert (ddim.config.timestep_spacing, dpm.config.timestep_spacing) == ("leading", "linspace")
    assert (dpm.config.beta_end, dpm.config.steps_offset) == (0.012, 1)
    assert "clip_sample" not in dpm.config
    back = schedulers.DDIMScheduler.from_config(dpm.config)
    assert back.config == ddim.config
    assert back.config.clip_sample is False
    spelled = {**MS_1_7B, "timestep_spacing": "leading"}
    assert schedulers.UniPCMultistepScheduler.from_config(spelled).config.timestep_spacing == "leading"
    over = schedulers.EulerDiscreteScheduler.from_config(ddim.config, timestep_spacing="trailing")
    assert over.config.timestep_spacing == "trailing"
    with pytest.raises(TypeError, match="no argument solver_order"):
        schedulers.EulerDiscreteScheduler.from_config(ddim.config, solver_order=2)


def test_unknown_keys_warn_and_stay_out():
    with pytest.warns(UserWarning, match="'beta_stop', which no scheduler knows"):
        scheduler = schedulers.DDIMScheduler.from_config({**MS_1_7B, "beta_stop": 1})
    assert "beta_stop" not in scheduler.config.to_dict()


@pytest.mark.parametrize("short", SCHEDULERS)
def test_save_and_load(short, tmp_path):
    scheduler = scheduler_from_config(MS_1_7B, short)
    folder = tmp_path / "pipeline" / "scheduler"
    scheduler.save_pretrained(folder)
    scheduler.save_pretrained(folder)  # over what is there
    assert [path.name for path in folder.iterdir()] == ["scheduler_config.json"]
    saved = json.loads((folder / "scheduler_config.json").read_text())
    assert list(saved) == sorted(saved)
    assert saved["_class_name"] == type(scheduler).__name__
    again = type(scheduler).from_pretrained(tmp_path / "pipeline", subfolder="scheduler")
    assert again.config == scheduler.config
    other = type(scheduler).from_pretrained(folder, beta_end=0.02)
    assert other.config == {**scheduler.config, "beta_end": 0.02}
    assert scheduler_from_config(saved).config == scheduler.config


def test_choosing_a_scheduler():
    assert isinstance(scheduler_from_config(MS_1_7B), schedulers.DDIMScheduler)
    assert isinstance(scheduler_from_config(MS_1_7B, "PNDMScheduler"), schedulers.PNDMScheduler)
    sde = scheduler_from_config(MS_1_7B, "dpm++-sde")
    assert scheduler_from_config(sde.config, "dpm++-karras").config.use_karras_sigmas
    assert scheduler_from_config(sde.config).config.algorithm_type == "sde-dpmsolver++"
    with pytest.raises(ValueError, match=r"no scheduler 'kdpm2'; there are ddim, ddpm, deis, dpm\+\+"):
        scheduler_from_config(MS_1_7B, "kdpm2")
    for name, nearest in REFUSED.items():
        with pytest.raises(
            ValueError, match=f"no scheduler '{name}', which the config asks for; the nearest"
        ):
            scheduler_from_config({**MS_1_7B, "_class_name": name})
        assert nearest in Scheduler.classes
    with pytest.raises(ValueError, match=r"'FlowMatchEulerDiscreteScheduler', which .* flow matching"):
        scheduler_from_config({**MS_1_7B, "_class_name": "FlowMatchEulerDiscreteScheduler"})
    with pytest.raises(ValueError, match="no _class_name"):
        scheduler_from_config({})
    with pytest.raises(TypeError, match="base class"):
        Scheduler()


def test_the_scheduler_of_a_pipeline():
    """The class in model_index.json decides, whatever the config says, or where it says nothing."""
    entry = ["diffusers", "DPMSolverMultistepScheduler"]
    with pytest.warns(UserWarning, match="asks for DPMSolverMultistepScheduler, .* of 'DDIMScheduler'"):
        scheduler = scheduler_of_pipeline(MS_1_7B, entry)
    assert isinstance(scheduler, schedulers.DPMSolverMultistepScheduler)
    assert scheduler.config == schedulers.DPMSolverMultistepScheduler.from_config(MS_1_7B).config
    assert isinstance(scheduler_of_pipeline(MS_1_7B, entry, "euler"), schedulers.EulerDiscreteScheduler)
    unnamed = {key: value for key, value in MS_1_7B.items() if key != "_class_name"}
    assert isinstance(scheduler_of_pipeline(unnamed, entry), schedulers.DPMSolverMultistepScheduler)
    same = scheduler_of_pipeline(MS_1_7B, ["diffusers", "DDIMScheduler"])
    assert same.config == scheduler_from_config(MS_1_7B).config
    refused = "no scheduler 'LMSDiscreteScheduler', which model_index.json asks for; the nearest is DEIS"
    with pytest.raises(ValueError, match=refused):
        scheduler_of_pipeline(MS_1_7B, ["diffusers", "LMSDiscreteScheduler"])
    for wrong in (None, "DDIMScheduler", ["DDIMScheduler"], {}, ["diffusers", None], ["diffusers", ["x"]]):
        with pytest.raises(ValueError, match=r"model_index\.json"):
            scheduler_of_pipeline(MS_1_7B, wrong)
