"""Base of all schedulers: the schedule, the position in it, predictions, and adding noise."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import mlx.core as mx
import numpy as np

from .arrays import SchedulerOutput, Timestep, as_number, check_same_shape, dynamic_threshold
from .config import ConfigMixin
from .tables import (
    BETA_SCHEDULES,
    SPACINGS,
    cumulative_alphas,
    make_betas,
    rescale_zero_terminal_snr,
    spaced_timesteps,
)

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..noise import NoiseSource

_MOST_TIMESTEPS = 10**6  # a thousand are usual; the tables hold one number for each


class Scheduler(ConfigMixin):
    """Base of the samplers, which compute less and less noisy samples from a network's outputs.

    Use: `set_timesteps(n)`, or `laid_out(n)` for a copy; begin with noise times `init_noise_sigma` (or
    `set_begin_index(i)` and `add_noise` to begin from a sample at `timesteps[i]`); then for each `t` in
    `timesteps`, call the network on `scale_model_input(sample, t)` and give its output to `step`.

    Samples may have any shape (B, ...) and any float dtype. The arithmetic is float32; results have the
    sample's dtype. A scheduler keeps state between steps; `set_timesteps` resets it.

    Attributes:
        config: the constructor arguments, a `SchedulerConfig`.
        timesteps: (n,) inputs of the network, falling; before `set_timesteps`, all training timesteps.
        num_inference_steps: the n of `set_timesteps`; None before it is called.
        alphas_cumprod: (T,) float32, the share of signal variance ᾱ at each training timestep.
    """

    order: ClassVar[int] = 1
    """Entries of `timesteps` that the strength of video-to-video counts as one step."""
    uses_eta: ClassVar[bool] = False
    """True if `step` takes `eta`."""
    custom_schedules: ClassVar[tuple[str, ...]] = ()
    """Custom schedules that `set_timesteps` takes: "timesteps", "sigmas"."""
    repeats_timesteps: ClassVar[bool] = False
    """True if there may be more steps than training timesteps."""
    prediction_types: ClassVar[tuple[str, ...]] = ("epsilon", "sample", "v_prediction")
    beta_schedules: ClassVar[tuple[str, ...]] = BETA_SCHEDULES

    def __init__(self) -> None:
        if type(self) is Scheduler:
            raise TypeError("Scheduler is a base class; use one of " + ", ".join(Scheduler.classes))
        config = self.config
        total = config.num_train_timesteps
        if not isinstance(total, int) or not 1 <= total <= _MOST_TIMESTEPS:
            raise ValueError(
                f"num_train_timesteps={total!r} must be a whole number above 0, and at most {_MOST_TIMESTEPS}"
            )
        self._check_choice("prediction_type", self.prediction_types)
        self._check_choice("timestep_spacing", SPACINGS)
        ratio = config.get("dynamic_thresholding_ratio", 1.0)
        if not 0 <= ratio <= 1:
            raise ValueError(f"dynamic_thresholding_ratio={ratio} must be from 0 to 1, a quantile")
        if config.trained_betas is None:
            self._check_choice("beta_schedule", self.beta_schedules)
            betas = make_betas(config.beta_schedule, config.beta_start, config.beta_end, total)
        else:
            betas = np.array(config.trained_betas, dtype=np.float32)
            if betas.ndim != 1 or not 1 <= len(betas) <= _MOST_TIMESTEPS:
                raise ValueError(
                    f"trained_betas has shape {betas.shape}; it must be a list of one value for each "
                    f"training timestep, {_MOST_TIMESTEPS} at most"
                )
        if not np.isfinite(betas).all():
            raise ValueError(
                f"beta_start={config.beta_start!r}, beta_end={config.beta_end!r} and trained_betas must be "
                "finite numbers above 0"
            )
        if config.get("rescale_betas_zero_snr", False):
            betas = rescale_zero_terminal_snr(betas)
        self.betas = betas
        self.alphas_cumprod = cumulative_alphas(betas)
        self.num_inference_steps: int | None = None
        self.timesteps: np.ndarray = np.arange(total)[::-1].copy()
        self._step_index: int | None = None
        self._begin_index: int | None = None

    # -- the schedule ------------------------------------------------------------------------------

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation of the initial noise."""
        return 1.0

    @property
    def uses_noise(self) -> bool:
        """True if `step` draws noise and needs a `noise` source; DDIM with eta > 0 needs one as well."""
        return False

    @property
    def step_index(self) -> int | None:
        """The position of the next step in `timesteps`, known after the first step.

        It stays None in DDIM, DDPM and PNDM, which depend on the timestep alone.
        """
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The position set by `set_begin_index`, at which sampling begins; None without it."""
        return self._begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        *,
        timesteps: Sequence[float] | np.ndarray | None = None,
        sigmas: Sequence[float] | np.ndarray | None = None,
    ) -> None:
        """Lay out a schedule and reset all state.

        Args:
            num_inference_steps: n, for a schedule spaced by the config; from 1 to `num_train_timesteps`, or
                more in a class that `repeats_timesteps`.
            timesteps: (n,) a custom schedule instead, noisiest first.
            sigmas: (n + 1,) noise levels instead, falling; the last one is where the last step ends.

        Raises:
            ValueError: not exactly one of the three, a number out of range, or a schedule that is not in
                `custom_schedules`.
        """
        custom = {"timesteps": timesteps, "sigmas": sigmas}
        custom = {name: values for name, values in custom.items() if values is not None}
        if len(custom) + (num_inference_steps is not None) != 1:
            given = [*custom, *["num_inference_steps"] * (num_inference_steps is not None)]
            raise ValueError(
                f"set_timesteps was given {' and '.join(given) or 'nothing'}; give one of "
                "num_inference_steps, timesteps and sigmas"
            )
        if num_inference_steps is not None:
            steps = self._checked_steps(num_inference_steps)
        else:
            custom = {name: self._checked_schedule(name, values) for name, values in custom.items()}
            steps = sum(len(values) - (name == "sigmas") for name, values in custom.items())
        self._lay_out(steps, **custom)
        self._check_range()
        self.num_inference_steps = steps
        self._step_index = None
        self._begin_index = None
        self._reset()

    def laid_out(self, num_inference_steps: int | None = None, **schedule: Any) -> Self:
        """Return a copy for one run with a schedule laid out; the scheduler itself is not changed.

        Arguments and errors are those of `set_timesteps`.
        """
        # A shallow copy is enough: set_timesteps replaces all state and changes none in place.
        scheduler = copy.copy(self)
        scheduler.set_timesteps(num_inference_steps, **schedule)
        return scheduler

    def set_begin_index(self, begin_index: int) -> None:
        """Begin at `timesteps[begin_index]`. Call it after `set_timesteps`, before the first step.

        Without it, the first step finds its position by its timestep. As in diffusers, a timestep that occurs
        twice is found at its second position, so a full run should call `set_begin_index(0)`.
        """
        self._require_schedule()
        if not 0 <= begin_index < len(self.timesteps):
            raise ValueError(
                f"begin_index={begin_index} must be from 0 to {len(self.timesteps) - 1}, a place in timesteps"
            )
        self._begin_index = int(begin_index)

    def index_for_timestep(self, timestep: Timestep) -> int:
        """Return the position of a timestep in the schedule; the second one where it occurs twice."""
        found = np.flatnonzero(self.timesteps == as_number(timestep))
        if len(found) == 0:
            raise ValueError(
                f"timestep {as_number(timestep):g} is not in the schedule; use an entry of "
                f"{type(self).__name__}.timesteps, which holds {_shown(self.timesteps)}"
            )
        return int(found[1] if len(found) > 1 else found[0])

    # -- the steps ---------------------------------------------------------------------------------

    def scale_model_input(self, sample: mx.array, timestep: Timestep) -> mx.array:
        """Scale the sample for the network at this timestep; most schedulers return it unchanged."""
        return sample

    def step(
        self,
        model_output: mx.array,
        timestep: Timestep,
        sample: mx.array,
        *,
        noise: NoiseSource | None = None,
    ) -> SchedulerOutput:
        """Compute the sample at the next, less noisy timestep.

        Args:
            model_output: the network's output, shape of `sample`.
            timestep: the entry of `timesteps` given to the network.
            sample: (B, ...) the sample before `scale_model_input`.
            noise: the source of noise; required if `uses_noise`.

        Raises:
            ValueError: `set_timesteps` was not called, the timestep is not the next one in the schedule,
                shapes differ, or a required noise source is missing.
        """
        raise NotImplementedError

    def add_noise(
        self,
        original_samples: mx.array,
        noise: mx.array,
        timesteps: Timestep | Sequence[int | float] | np.ndarray,
    ) -> mx.array:
        """Add noise to clean samples, to the level of timesteps.

        Args:
            original_samples: (B, ...), any float dtype.
            noise: the same shape, standard normal.
            timesteps: one for all samples, or (B,).

        Returns:
            noisy samples in the dtype of `original_samples`.
        """
        check_same_shape("noise", noise, "original_samples", original_samples)
        signal, sigma = self._noise_levels(np.atleast_1d(np.array(timesteps)))
        if len(signal) not in (1, original_samples.shape[0]):
            raise ValueError(
                f"{len(signal)} timesteps were given for {original_samples.shape[0]} samples; give "
                "one, or one for each sample"
            )
        column = (-1,) + (1,) * (original_samples.ndim - 1)
        signal, sigma = (mx.array(x.astype(np.float32)).reshape(column) for x in (signal, sigma))
        noisy = signal * original_samples.astype(mx.float32) + sigma * noise.astype(mx.float32)
        return noisy.astype(original_samples.dtype)

    # -- for subclasses ----------------------------------------------------------------------------

    def _lay_out(self, steps: int) -> None:
        """Set `timesteps`, and `sigmas` in classes that have them.

        Classes with `custom_schedules` take these as keywords, in float64.
        """
        config = self.config
        self.timesteps = spaced_timesteps(
            config.timestep_spacing, steps, config.num_train_timesteps, config.steps_offset
        ).astype(np.int64)

    def _checked_steps(self, steps: int) -> int:
        if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)):
            raise ValueError(f"num_inference_steps={steps!r} must be a whole number")
        most = _MOST_TIMESTEPS if self.repeats_timesteps else self.config.num_train_timesteps
        if not 1 <= steps <= most:
            why = "" if self.repeats_timesteps else ", the number of timesteps that the model was trained on"
            raise ValueError(f"num_inference_steps={steps} must be from 1 to {most}{why}")
        return int(steps)

    def _checked_schedule(self, name: str, values: Sequence[float] | np.ndarray) -> np.ndarray:
        """Return a custom schedule as an array of float64; ValueError where it is invalid."""
        if name not in self.custom_schedules:
            able = [cls.__name__ for cls in Scheduler.classes.values() if name in cls.custom_schedules]
            raise ValueError(
                f"{type(self).__name__} takes no {name}, only num_inference_steps; schedulers that take "
                f"{name}: {', '.join(able)}"
            )
        if self.sigma_kind() is not None and name == "timesteps":
            raise ValueError(
                f"timesteps cannot be given where the config asks for {self.sigma_kind()} sigmas, which "
                "decide them; leave them out, or make a scheduler without these sigmas by from_config"
            )
        try:
            array = np.array(values, dtype=np.float64)
        except (TypeError, ValueError):
            array = np.array(np.nan)
        least = 2 if name == "sigmas" else 1
        if array.ndim != 1 or not least <= len(array) <= _MOST_TIMESTEPS or not np.isfinite(array).all():
            raise ValueError(f"{name}={values!r} must be a list of numbers, {least} or more")
        return array

    def _check_falling(self, timesteps: np.ndarray) -> None:
        if (np.diff(timesteps) >= 0).any():
            raise ValueError(
                f"timesteps {_shown(timesteps)} must fall from each to the next for {type(self).__name__}"
            )

    def _check_range(self) -> None:
        """Raise ValueError where the schedule exceeds the tables, which hold one number for each timestep."""
        last = len(self.alphas_cumprod) - 1
        if not 0 <= self.timesteps.min() <= self.timesteps.max() <= last:
            raise ValueError(
                f"timesteps {_shown(self.timesteps)} must be from 0 to {last}, the last training timestep; "
                "use fewer steps, steps_offset=0, other timesteps, or trained_betas for each of "
                "num_train_timesteps"
            )

    def sigma_kind(self) -> str | None:
        """Return the kind of sigma spacing in the config; None in classes without one."""
        return None

    def _reset(self) -> None:
        """Reset the state of earlier steps."""

    def _noise_levels(self, timesteps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the (signal, noise) factors of `add_noise` at training timesteps."""
        total = len(self.alphas_cumprod)
        if timesteps.min() < 0 or timesteps.max() >= total or (timesteps % 1).any():
            raise ValueError(f"timesteps {_shown(timesteps)} must be whole numbers from 0 to {total - 1}")
        alphas_cumprod = self.alphas_cumprod[timesteps.astype(np.int64)].astype(np.float64)
        return np.sqrt(alphas_cumprod), np.sqrt(1 - alphas_cumprod)

    def _require_schedule(self) -> None:
        if self.num_inference_steps is None:
            raise ValueError(
                f"{type(self).__name__} has no schedule yet; call set_timesteps(num_inference_steps) first"
            )

    def _scheduled(self, timestep: Timestep) -> int:
        """Return a timestep of the schedule as an index of `alphas_cumprod`; ValueError for others."""
        self._require_schedule()
        return int(self.timesteps[self.index_for_timestep(timestep)])

    def _current_index(self, timestep: Timestep) -> int:
        """Return the position of the next step, which must be that of `timestep`; the first step sets it."""
        self._require_schedule()
        index = self._step_index
        if index is None:
            index = self._begin_index
        if index is None:
            index = self.index_for_timestep(timestep)
        if index >= len(self.timesteps):
            raise ValueError(f"all {len(self.timesteps)} steps are done; call set_timesteps to begin anew")
        if self.timesteps[index] != as_number(timestep):
            raise ValueError(
                f"timestep {as_number(timestep):g} is out of turn: the step to come is number "
                f"{index} with timestep {self.timesteps[index]:g}. Go through timesteps in order, "
                "and call set_timesteps to begin anew or set_begin_index to begin later."
            )
        self._step_index = index
        return index

    def _alpha_bar(self, timestep: int) -> float:
        """Return ᾱ at a training timestep; for timesteps below 0, that of the end of sampling."""
        if timestep >= 0:
            return float(self.alphas_cumprod[timestep])
        return 1.0 if self.config.set_alpha_to_one else float(self.alphas_cumprod[0])

    def _x0_and_epsilon(
        self, model_output: mx.array, sample: mx.array, alpha: float, sigma: float
    ) -> tuple[mx.array, mx.array]:
        """Return (x0, epsilon) of the sample alpha * x0 + sigma * epsilon from a model output."""
        if self.config.prediction_type == "sample":
            return model_output, (sample - alpha * model_output) / sigma
        if self.config.prediction_type == "v_prediction":  # v = alpha * epsilon - sigma * x0
            return alpha * sample - sigma * model_output, alpha * model_output + sigma * sample
        if alpha == 0:
            raise ValueError(
                "prediction_type='epsilon' says nothing of the clean sample at the last training "
                "timestep once rescale_betas_zero_snr has made it pure noise; use a model with "
                "'v_prediction', or timestep_spacing='leading'"
            )
        return (sample - sigma * model_output) / alpha, model_output

    def _clip_or_threshold(self, x0: mx.array) -> mx.array:
        """Clip or threshold a prediction of the clean sample, as the config says."""
        config = self.config
        if config.thresholding:
            return self._threshold(x0)
        if config.clip_sample:
            return mx.clip(x0, -config.clip_sample_range, config.clip_sample_range)
        return x0

    def _threshold(self, x0: mx.array) -> mx.array:
        config = self.config
        return dynamic_threshold(x0, config.dynamic_thresholding_ratio, config.sample_max_value)

    def _draw(self, noise: NoiseSource | None, shape: tuple[int, ...]) -> mx.array:
        if noise is None:
            raise ValueError(f"{type(self).__name__} draws noise in this step; pass noise=noise_source(seed)")
        return noise(shape).astype(mx.float32)


def _shown(values: np.ndarray) -> str:
    shown = [f"{value:g}" for value in values]
    return ", ".join(shown if len(shown) <= 12 else [*shown[:6], "...", *shown[-3:]])
