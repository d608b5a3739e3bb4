"""Every scheduler against the diffusers class of its name, over a grid of configurations."""

import inspect
import json
import math
import warnings

import mlx.core as mx
import numpy as np
import pytest
from mlx_unet3d import schedulers as ours
from mlx_unet3d.schedulers import REFUSED, SCHEDULERS, Scheduler, scheduler_from_config

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
KarrasDiffusionSchedulers = diffusers.schedulers.KarrasDiffusionSchedulers

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

SHAPE = (2, 4, 3, 5, 4)  # (B, C, F, H, W)
STEPS = (1, 2, 5, 10, 25)

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

SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SPACINGS = [{"timestep_spacing": s} for s in ("leading", "linspace", "trailing")]
OFFSET = {"timestep_spacing": "leading", "steps_offset": 1}
V = {"prediction_type": "v_prediction"}
SAMPLE = {"prediction_type": "sample"}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
TRAINED = {"trained_betas": np.linspace(2e-4, 0.015, 1000).tolist()}
THRESHOLD = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5}
ZERO_SNR = {"rescale_betas_zero_snr": True, **V}
KARRAS, EXPONENTIAL, LU, SIGMA_MIN = (
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_lu_lambdas": True},
    {"final_sigmas_type": "sigma_min"},
)

COMMON = [{}, SCALED, *SPACINGS, OFFSET, V, COSINE, TRAINED, {**SCALED, **V, **OFFSET}]

CONFIGS = {
    "DDIMScheduler": [
        *COMMON,
        SAMPLE,
        THRESHOLD,
        {"clip_sample": False},
        {"clip_sample_range": 0.4},
        {"set_alpha_to_one": False, "clip_sample": False},
        *[{**ZERO_SNR, **spacing} for spacing in SPACINGS],
        MS_1_7B,
    ],
    "DDPMScheduler": [
        *COMMON,
        SAMPLE,
        THRESHOLD,
        {"clip_sample": False},
        {"variance_type": "fixed_large"},
        {"variance_type": "fixed_small_log"},
        {"beta_schedule": "sigmoid"},
        {"beta_schedule": "laplace"},
        {**ZERO_SNR, "timestep_spacing": "trailing"},
        {"variance_type": None},
    ],
    "PNDMScheduler": [
        *[{**config, "skip_prk_steps": skip} for config in COMMON for skip in (True, False)],
        {"set_alpha_to_one": True},
        {**MS_1_7B, "_class_name": "PNDMScheduler"},
    ],
    "LCMScheduler": [
        {},
        V,
        SAMPLE,
        COSINE,
        THRESHOLD,
        {"clip_sample": True},
        {"original_inference_steps": 100, "timestep_scaling": 3.0},
        {"timestep_scaling": 4.0},  # MCM
        ZERO_SNR,
    ],
    "TCDScheduler": [
        {},
        V,
        SAMPLE,
        COSINE,
        TRAINED,
        {"beta_schedule": "linear"},
        {"original_inference_steps": 100, "clip_sample": True, **THRESHOLD},
        {"num_train_timesteps": 1100, "original_inference_steps": 30},
        ZERO_SNR,
    ],
    "HeunDiscreteScheduler": [
        *COMMON,
        SAMPLE,
        {"beta_schedule": "exp"},
        {"clip_sample": True},
        {"clip_sample": True, "clip_sample_range": 0.4, **V},
        {"num_train_timesteps": 1100},
        *[{**SCALED, **c} for c in (KARRAS, EXPONENTIAL, {**KARRAS, **V}, {**KARRAS, **OFFSET})],
    ],
    "DEISMultistepScheduler": [
        *COMMON,
        SAMPLE,
        THRESHOLD,
        {"num_train_timesteps": 1100},
        *[{**SCALED, **c} for c in (KARRAS, EXPONENTIAL, {**KARRAS, **COSINE})],
        {"algorithm_type": "dpmsolver++", "solver_type": "midpoint"},
        *[
            {**SCALED, **c, "solver_order": order, "lower_order_final": lower}
            for order in (1, 2, 3)
            for lower in (True, False)
            for c in ({}, V, SAMPLE, KARRAS, SPACINGS[2])
        ],
    ],
    "EulerDiscreteScheduler": [
        *COMMON,
        SAMPLE,
        SIGMA_MIN,
        *[{**SCALED, **c} for c in (KARRAS, EXPONENTIAL, {**KARRAS, **V}, {**KARRAS, **OFFSET})],
        {**KARRAS, "sigma_min": 0.05, "sigma_max": 20.0},
        {"interpolation_type": "log_linear"},
        {**V, "timestep_type": "continuous"},
        {**V, **KARRAS, "timestep_type": "continuous", "sigma_min": 0.002, "sigma_max": 700.0},
        {**ZERO_SNR, "timestep_spacing": "trailing"},
        {"num_train_timesteps": 1100},
    ],
    "EulerAncestralDiscreteScheduler": [
        *COMMON,
        {**ZERO_SNR, "timestep_spacing": "trailing"},
    ],
    "DPMSolverMultistepScheduler": [
        *COMMON,
        SAMPLE,
        THRESHOLD,
        {**SCALED, **THRESHOLD, **SIGMA_MIN, "algorithm_type": "dpmsolver"},
        SIGMA_MIN,
        *[{**SCALED, **c} for c in (KARRAS, LU, EXPONENTIAL, {**KARRAS, **SIGMA_MIN})],
        {**COSINE, **KARRAS},
        {**COSINE, "lambda_min_clipped": -5.1},
        {**COSINE, "lambda_min_clipped": -5.1, "timestep_spacing": "trailing"},
        {**ZERO_SNR, "timestep_spacing": "trailing"},
        {"euler_at_final": True, **SIGMA_MIN},
        {"lower_order_final": False, **SIGMA_MIN},
        {"algorithm_type": "deis", "solver_type": "logrho", **SIGMA_MIN},
        *[
            {**SCALED, **c, "solver_order": order, "solver_type": kind, "algorithm_type": algorithm}
            for algorithm in ours.dpmsolver_multistep.ALGORITHMS
            for order in (1, 2, 3)
            for kind in ("midpoint", "heun")
            for c in ({**SIGMA_MIN}, {**SIGMA_MIN, **V}, {**SAMPLE, **SIGMA_MIN}, {})
            if (algorithm, order) != ("sde-dpmsolver", 3) and ("++" in algorithm or "final_sigmas_type" in c)
        ],
    ],
    "UniPCMultistepScheduler": [
        *COMMON,
        SAMPLE,
        THRESHOLD,
        SIGMA_MIN,
        *[{**SCALED, **c} for c in (KARRAS, EXPONENTIAL, {**KARRAS, **SIGMA_MIN})],
        {**KARRAS, "sigma_min": 0.05, "sigma_max": 20.0},
        {**ZERO_SNR, "timestep_spacing": "trailing"},
        {"disable_corrector": [0, 1]},
        {"lower_order_final": False, **SIGMA_MIN},
        {"solver_type": "heun"},
        *[
            {**SCALED, **SIGMA_MIN, **c, "solver_order": order, "solver_type": kind}
            for order in (1, 2, 3)
            for kind in ("bh1", "bh2")
            for x0 in (True, False)
            for c in ({"predict_x0": x0}, {"predict_x0": x0, **V}, {"predict_x0": x0, **SAMPLE})
        ],
        {"solver_order": 3},
    ],
}
CASES = [
    pytest.param(name, config, id=f"{name.removesuffix('Scheduler')}-{number}")
    for name, configs in CONFIGS.items()
    for number, config in enumerate(configs)
]


def make(name, config):
    """(theirs, ours) from the arguments in a config."""
    theirs = getattr(diffusers, name).from_config(dict(config))
    return theirs, getattr(ours, name).from_config(config)


def network(x, t):
    """A stand-in for the model: smooth, bounded growth, dependent on the timestep."""
    return (0.6 * np.sin(1.7 * x) + 0.3 * x * math.cos(0.01 * float(t))).astype(np.float32)


def noise_source(seed=3):
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: mx.array(torch.randn(shape, generator=generator).numpy())


def relative(a, b):
    """The largest difference, relative to the largest value."""
    return float(np.abs(a - b).max() / np.abs(b).max())


def start(init_noise_sigma):
    noise = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    return noise * np.float32(init_noise_sigma)


def run_loops(theirs, mine, x=None, begin=0, theirs_extra=None, mine_extra=None):
    """Both through the same steps; gives the worst relative difference of all steps' results."""
    if x is None:
        x = start(theirs.init_noise_sigma)
        mine.set_begin_index(0)
        if hasattr(theirs, "set_begin_index"):
            theirs.set_begin_index(0)
    generator, noise = torch.Generator().manual_seed(3), noise_source()
    theirs_extra = dict(theirs_extra or {})
    if "generator" in theirs.step.__code__.co_varnames:
        theirs_extra["generator"] = generator
    a, b, worst = torch.from_numpy(x), mx.array(x), 0.0
    assert len(theirs.timesteps) == len(mine.timesteps)
    for t, u in zip(theirs.timesteps[begin:], mine.timesteps[begin:], strict=True):
        seen_a = theirs.scale_model_input(a, t).numpy()
        seen_b = np.array(mine.scale_model_input(b, u))
        got = theirs.step(torch.from_numpy(network(seen_a, t)), t, a, **theirs_extra)
        out = mine.step(mx.array(network(seen_b, u)), u, b, noise=noise, **(mine_extra or {}))
        a, b = got.prev_sample, out.prev_sample
        worst = max(worst, relative(np.array(b), a.numpy()))
        x0 = got.get("pred_original_sample", got.get("denoised"))
        if x0 is not None:
            worst = max(worst, relative(np.array(out.pred_original_sample), x0.numpy()))
        assert np.isfinite(np.array(out.pred_original_sample)).all()
    return worst


def too_few(theirs, steps):
    return theirs.__class__.__name__ == "PNDMScheduler" and not theirs.config.skip_prk_steps and steps < 4


@pytest.mark.parametrize(("name", "config"), CASES)
def test_loops(name, config, record_property):
    worst = 0.0
    theirs, mine = make(name, config)
    assert mine.init_noise_sigma == pytest.approx(float(theirs.init_noise_sigma), rel=1e-6)
    for steps in STEPS:
        if too_few(theirs, steps):
            continue
        theirs.set_timesteps(steps)
        mine.set_timesteps(steps)
        compare_schedules(theirs, mine)
        assert mine.init_noise_sigma == pytest.approx(float(theirs.init_noise_sigma), rel=1e-6)
        if name == "DEISMultistepScheduler":
            # The integrals are differences that cancel: in float32 diffusers loses four digits of them.
            theirs.sigmas = theirs.sigmas.double()
        worst = max(worst, run_loops(theirs, mine))
    record_property("worst", worst)
    # diffusers takes the difference of two numbers of the size of sigma in float32.
    assert worst <= max(1e-4, 2.4e-7 * float(getattr(theirs, "sigmas", np.zeros(1)).max()))


def compare_schedules(theirs, mine):
    expected = theirs.timesteps.numpy()
    if np.issubdtype(mine.timesteps.dtype, np.integer):
        assert mine.timesteps.tolist() == expected.tolist()
    else:
        assert mine.timesteps.dtype == np.float32
        np.testing.assert_allclose(mine.timesteps, expected, rtol=1e-5, atol=1e-4)
    if hasattr(mine, "sigmas"):
        # Rescaling to zero SNR divides float32 numbers that are nearly equal.
        rtol = 5e-5 if theirs.config.get("rescale_betas_zero_snr") else 2e-6
        np.testing.assert_allclose(mine.sigmas, theirs.sigmas.numpy(), rtol=rtol)


@pytest.mark.parametrize("name", CONFIGS)
def test_timesteps_of_every_step_count(name):
    seen = set()
    for config in CONFIGS[name]:
        keys = (
            "timestep",
            "steps_offset",
            "use_",
            "beta",
            "trained",
            "skip",
            "lambda",
            "rescale",
            "sigma",
            "prediction",
        )
        relevant = {k: v for k, v in config.items() if k.startswith(keys)}
        if (mark := json.dumps(relevant, sort_keys=True)) in seen:
            continue
        seen.add(mark)
        theirs, mine = make(name, config)
        for steps in range(1, 101):
            if too_few(theirs, steps) or steps > mine.config.get("original_inference_steps", steps):
                continue
            theirs.set_timesteps(steps)
            mine.set_timesteps(steps)
            if config.get("timestep_spacing") == "trailing" and theirs.timesteps[-1] < 0:
                # For some counts, 61 say, rounding gives diffusers a timestep too many, -1.
                assert mine.timesteps.min() >= 0
                continue
            compare_schedules(theirs, mine)


CUSTOM = [  # (class, config, timesteps)
    ("DDPMScheduler", {}, [980, 700, 699, 301, 0]),
    ("DDPMScheduler", SCALED, [100, 87, 50, 1]),
    ("LCMScheduler", {}, [999, 500, 499, 259, 3]),
    ("TCDScheduler", {}, [999, 839, 500, 20]),
    ("DPMSolverMultistepScheduler", SCALED, [999, 845, 730, 587, 443, 310, 193, 116, 53, 13]),
    ("DPMSolverMultistepScheduler", {**SIGMA_MIN, "solver_order": 3}, [960, 600, 599, 5]),
    ("DPMSolverMultistepScheduler", {"solver_order": 1}, [999, 999, 500, 500, 3]),
    ("EulerDiscreteScheduler", SCALED, [999, 845, 730, 587.5, 443, 310, 193, 116, 53, 13]),
    ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}, [999, 500, 499]),
    ("EulerDiscreteScheduler", V, [999, 999, 500, 500, 3]),
    ("HeunDiscreteScheduler", SCALED, [999, 845.25, 730, 587, 3]),
    ("HeunDiscreteScheduler", V, [999, 500, 500, 3]),
]


@pytest.mark.parametrize(("name", "config", "timesteps"), CUSTOM)
def test_custom_timesteps(name, config, timesteps):
    theirs, mine = make(name, config)
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(timesteps=timesteps)
    compare_schedules(theirs, mine)
    assert mine.num_inference_steps == len(timesteps)
    extra = {"eta": 0.4} if mine.uses_eta else {}
    assert run_loops(theirs, mine, theirs_extra=extra, mine_extra=extra) <= 1e-4


@pytest.mark.parametrize("config", [SCALED, V, {**KARRAS, **SCALED}, {**V, "timestep_type": "continuous"}])
@pytest.mark.parametrize("last", [0.0, 0.05])
def test_custom_sigmas(config, last):
    sigmas = [12.5, 8.0, 3.0, 3.0, 1.25, 0.4, last]
    theirs, mine = make("EulerDiscreteScheduler", config)
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(sigmas=sigmas)
    compare_schedules(theirs, mine)
    assert mine.num_inference_steps == len(mine.timesteps) == 6
    assert mine.init_noise_sigma == pytest.approx(float(theirs.init_noise_sigma), rel=1e-6)
    assert run_loops(theirs, mine) <= 2e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_which_classes_take_schedules(name):
    arguments = inspect.signature(getattr(diffusers, name).set_timesteps).parameters
    flow_only = name == "UniPCMultistepScheduler"  # it takes sigmas, of flow matching alone
    taken = [kind for kind in ("timesteps", "sigmas") if kind in arguments and not flow_only]
    assert getattr(ours, name).custom_schedules == tuple(taken)


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
def test_original_inference_steps(name):
    theirs, mine = make(name, {})
    for original, steps in ((100, 7), (None, 7), (20, 5)):
        theirs.set_timesteps(steps, original_inference_steps=original)
        mine.set_timesteps(steps, original_inference_steps=original)
        compare_schedules(theirs, mine)
    assert run_loops(theirs, mine) <= 1e-5


@pytest.mark.parametrize("eta", [0.0, 0.1, 0.3, 0.55, 0.9, 1.0])
def test_tcd_eta(eta):
    """Every eta and aim: where noise is taken off down to is rounded as in diffusers."""
    for config in ({}, V, {"original_inference_steps": 1000}):
        theirs, mine = make("TCDScheduler", config)
        for scheduler in (theirs, mine):
            scheduler.set_timesteps(12)
        extra = {"eta": eta}
        assert run_loops(theirs, mine, theirs_extra=extra, mine_extra=extra) <= 1e-5


REPEATING = [
    (name, {**config, **spacing, "num_train_timesteps": 100}, steps)
    for spacing in SPACINGS
    for steps in (100, 150)
    for name, config in (
        ("DPMSolverMultistepScheduler", {"solver_order": 1}),
        ("DEISMultistepScheduler", {"solver_order": 1}),
        ("UniPCMultistepScheduler", {"solver_order": 1}),
        ("EulerDiscreteScheduler", SCALED),
        ("EulerAncestralDiscreteScheduler", SCALED),
        ("HeunDiscreteScheduler", {}),
        ("PNDMScheduler", {"skip_prk_steps": True}),
    )
]


@pytest.mark.parametrize(("name", "config", "steps"), REPEATING)
def test_more_steps_than_timesteps(name, config, steps):
    theirs, mine = make(name, config)
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(steps)
    if len(theirs.timesteps) != len(mine.timesteps):  # diffusers' rounding has made a timestep of -1
        assert mine.timesteps.min() >= 0
        return
    compare_schedules(theirs, mine)
    small = start(theirs.init_noise_sigma)[:1, :1, :1, :2, :2]
    if hasattr(theirs, "set_begin_index"):
        theirs.set_begin_index(0)
    mine.set_begin_index(0)
    assert run_loops(theirs, mine, x=small) <= 1e-4


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("length", [600, 1400])
def test_trained_betas_of_another_length(name, length):
    """A table longer than num_train_timesteps, or shorter where diffusers does not read past its end."""
    betas = np.linspace(1e-4, 0.02, length).tolist()
    theirs, mine = make(name, {"trained_betas": betas})
    mine.set_timesteps(8) if length > 600 or hasattr(mine, "sigmas") else None
    theirs.set_timesteps(8)
    x = torch.from_numpy(start(1))
    if length == 600 and not hasattr(mine, "sigmas"):
        with pytest.raises(ValueError, match="0 to 599"):
            mine.set_timesteps(8)
        with pytest.raises(IndexError):
            theirs.step(x, theirs.timesteps[0], x)
        return
    compare_schedules(theirs, mine)
    assert run_loops(theirs, mine) <= 1e-4


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("clipped", [False, True])
def test_ddim_eta(eta, clipped):
    for config in ({}, MS_1_7B, {**ZERO_SNR, "timestep_spacing": "leading"}):
        theirs, mine = make("DDIMScheduler", config)
        for scheduler in (theirs, mine):
            scheduler.set_timesteps(10)
        extra = {"eta": eta, "use_clipped_model_output": clipped}
        assert run_loops(theirs, mine, theirs_extra=extra, mine_extra=extra) <= 1e-5


@pytest.mark.parametrize("config", [{}, V, {**KARRAS, **SCALED}, SAMPLE])
def test_euler_churn(config):
    theirs, mine = make("EulerDiscreteScheduler", config)
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(10)
    extra = {"s_churn": 3.0, "s_tmin": 0.2, "s_tmax": 10.0, "s_noise": 1.01}
    assert run_loops(theirs, mine, theirs_extra=extra, mine_extra=extra) <= 1e-5


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_ddpm_learned_variance(variance_type):
    theirs, mine = make("DDPMScheduler", {"variance_type": variance_type})
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(5)
    generator, noise = torch.Generator().manual_seed(3), noise_source()
    a, b = torch.from_numpy(start(1)), mx.array(start(1))
    for t, u in zip(theirs.timesteps, mine.timesteps, strict=True):
        outputs = []
        for x, time in ((a.numpy(), t), (np.array(b), u)):
            variance = np.abs(np.cos(x)) * 0.1
            outputs.append(np.concatenate([network(x, time), variance], axis=1))
        a = theirs.step(torch.from_numpy(outputs[0]), t, a, generator=generator).prev_sample
        b = mine.step(mx.array(outputs[1]), u, b, noise=noise).prev_sample
    assert relative(np.array(b), a.numpy()) <= 1e-5


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("set_begin", [True, False])
def test_beginning_later(name, set_begin):
    """Video-to-video: noise to the level of timesteps[begin], then the steps from there."""
    config = {**MS_1_7B, "_class_name": name}
    theirs, mine = make(name, config)
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(10)
    begin = 4 if mine.order == 2 else 3  # Heun: at the beginning of a step
    if set_begin:
        mine.set_begin_index(begin)
        if hasattr(theirs, "set_begin_index"):
            theirs.set_begin_index(begin)
    clean, noise = start(0.7), start(1)[::-1].copy()
    t = theirs.timesteps[begin : begin + 1]
    expected = theirs.add_noise(torch.from_numpy(clean), torch.from_numpy(noise), t)
    got = mine.add_noise(mx.array(clean), mx.array(noise), mine.timesteps[begin])
    assert relative(np.array(got), expected.numpy()) <= 1e-6
    assert run_loops(theirs, mine, x=expected.numpy(), begin=begin) <= 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_add_noise_per_sample(name):
    theirs, mine = make(name, {**MS_1_7B, "_class_name": name})
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(10)
    clean, noise = start(0.7), start(1)[::-1].copy()
    places = [2, 7]
    expected = theirs.add_noise(torch.from_numpy(clean), torch.from_numpy(noise), theirs.timesteps[places])
    got = mine.add_noise(mx.array(clean), mx.array(noise), mine.timesteps[places])
    assert relative(np.array(got), expected.numpy()) <= 1e-6


NAMES = list(CONFIGS)
CROSSINGS = {
    "PNDMScheduler": {"skip_prk_steps": True, "set_alpha_to_one": True},
    "DDIMScheduler": {"clip_sample": False, "rescale_betas_zero_snr": True},
    "DDPMScheduler": {"variance_type": "fixed_large", "timestep_spacing": "trailing"},
    "LCMScheduler": {"original_inference_steps": 40, "timestep_scaling": 5.0},
    "TCDScheduler": {"original_inference_steps": 40, "beta_schedule": "linear"},
    "HeunDiscreteScheduler": {"use_exponential_sigmas": True, "clip_sample_range": 2.0},
    "DEISMultistepScheduler": {"solver_order": 3, "thresholding": True},
    "EulerDiscreteScheduler": {"use_karras_sigmas": True, "sigma_max": 30.0},
    "EulerAncestralDiscreteScheduler": {"prediction_type": "v_prediction"},
    "DPMSolverMultistepScheduler": {"solver_type": "heun", "algorithm_type": "sde-dpmsolver++"},
    "UniPCMultistepScheduler": {"solver_type": "bh1", "disable_corrector": [0], "beta_end": 0.01},
}


def plain(config):
    values = {k: v for k, v in dict(config).items() if not k.startswith("_")}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


@pytest.mark.parametrize("first", NAMES)
@pytest.mark.parametrize("second", NAMES)
def test_from_config_crossings(first, second):
    """From class to class and back: the same values, defaulted anew in the same places."""
    for arguments in ({}, {**CROSSINGS[first], "steps_offset": 1}):
        theirs = getattr(diffusers, first)(**arguments)
        mine = getattr(ours, first)(**arguments)
        assert plain(mine.config.to_dict()) == plain(theirs.config)
        for name in (second, first):
            if name == "DEISMultistepScheduler" and theirs.config.get("algorithm_type") == "sde-dpmsolver++":
                with pytest.raises(NotImplementedError):
                    getattr(diffusers, name).from_config(theirs.config)
                with pytest.raises(ValueError, match="no algorithm_type='sde-dpmsolver"):
                    getattr(ours, name).from_config(mine.config)
                break
            theirs = getattr(diffusers, name).from_config(theirs.config)
            mine = getattr(ours, name).from_config(mine.config)
            assert plain(mine.config.to_dict()) == plain(theirs.config), name


@pytest.mark.parametrize("name", NAMES)
def test_from_a_live_diffusers_config(name):
    theirs = diffusers.DDIMScheduler.from_config(MS_1_7B)
    expected = getattr(diffusers, name).from_config(theirs.config)
    got = getattr(ours, name).from_config(theirs.config)
    assert plain(got.config.to_dict()) == plain(expected.config)


@pytest.mark.parametrize("name", NAMES)
def test_defaults(name):
    theirs = getattr(diffusers, name)()
    assert plain(getattr(ours, name)().config.to_dict()) == plain(theirs.config)


@pytest.mark.parametrize("name", NAMES)
def test_saved_config_loads_in_diffusers(name, tmp_path):
    mine = getattr(ours, name)(**CROSSINGS[name])
    mine.save_pretrained(tmp_path)
    theirs = getattr(diffusers, name).from_pretrained(tmp_path)
    assert plain(theirs.config) == plain(mine.config.to_dict())
    theirs.save_pretrained(tmp_path / "theirs")
    files = [tmp_path / "scheduler_config.json", tmp_path / "theirs" / "scheduler_config.json"]
    assert files[0].read_text() == files[1].read_text()


@pytest.mark.parametrize("short", SCHEDULERS)
def test_short_names_on_the_ms_1_7b_config(short):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine = scheduler_from_config(MS_1_7B, short)
    cls, overrides = SCHEDULERS[short]
    theirs = getattr(diffusers, cls.__name__).from_config(MS_1_7B, **overrides)
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(25)
    compare_schedules(theirs, mine)
    assert run_loops(theirs, mine) <= 2e-5
    assert isinstance(mine, Scheduler)


@pytest.mark.parametrize(
    "name",
    [
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "DEISMultistepScheduler",
        "UniPCMultistepScheduler",
    ],
)
def test_beta_sigmas(name):
    pytest.importorskip("scipy")  # diffusers asks it for the quantiles
    theirs, mine = make(name, {**SCALED, "use_beta_sigmas": True})
    for steps in STEPS:
        theirs.set_timesteps(steps)
        mine.set_timesteps(steps)
        compare_schedules(theirs, mine)
        assert run_loops(theirs, mine) <= 1e-4


def test_diffusers_has_no_numbers_where_unipc_refuses():
    """To sigma 0 with the noise predicted, or at second order, diffusers gives NaN."""
    for config in ({"predict_x0": False}, {"lower_order_final": False}):
        with pytest.raises(ValueError, match="final_sigmas_type='sigma_min'"):
            ours.UniPCMultistepScheduler(**config)
        theirs = diffusers.UniPCMultistepScheduler(**config)
        theirs.set_timesteps(3)
        x = torch.from_numpy(start(1))
        for t in theirs.timesteps:
            x = theirs.step(torch.from_numpy(network(x.numpy(), t)), t, x).prev_sample
        assert not torch.isfinite(x).all()


def test_every_sampler_of_diffusers_is_here_or_refused_by_name():
    known = {*Scheduler.classes, *REFUSED}
    assert {kind.name for kind in KarrasDiffusionSchedulers} <= known
    assert all(hasattr(diffusers, name) for name in known)
