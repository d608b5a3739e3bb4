"""What all schedulers share: configuration, schedule position, predictions, noising, files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import mlx.core as mx
import numpy as np

from ..atomic import write_text
from .arrays import SchedulerOutput, Timestep, as_number, check_same_shape, dynamic_threshold
from .config import FOREIGN_KEYS, SchedulerConfig, argument_names, split_config
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

CONFIG_NAME = "scheduler_config.json"
_MOST_TIMESTEPS = 10**6  # a thousand are usual; the tables hold a number for each


class Scheduler:
    """Base of the samplers: turns a network's outputs into ever less noisy samples.

    Use: `set_timesteps(n)`; begin with noise times `init_noise_sigma` (or `set_begin_index(i)` and
    `add_noise` to begin from a sample at `timesteps[i]`); then for each `t` in `timesteps`, call
    the network on `scale_model_input(sample, t)` and give its output to `step`.

    Samples may have any shape (B, ...) and any float dtype. The arithmetic is float32; results come back in
    the sample's dtype. A scheduler keeps state between steps, and `set_timesteps` begins anew.

    Attributes:
        config: the constructor arguments, a `SchedulerConfig`.
        timesteps: (n,) what to give to the network, falling; before `set_timesteps`, all of training.
        num_inference_steps: the n of `set_timesteps`, or None before.
        alphas_cumprod: (T,) float32, the share of signal variance ᾱ at each training timestep.
    """

    order: ClassVar[int] = 1
    """Entries of `timesteps` for one step of strength in video-to-video."""
    uses_eta: ClassVar[bool] = False
    """Whether `step` takes `eta`."""
    prediction_types: ClassVar[tuple[str, ...]] = ("epsilon", "sample", "v_prediction")
    beta_schedules: ClassVar[tuple[str, ...]] = BETA_SCHEDULES

    classes: ClassVar[dict[str, type[Scheduler]]] = {}
    """The scheduler classes by name."""

    config: SchedulerConfig

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if hasattr(vars(cls).get("__init__"), "__wrapped__"):  # made by `configured`: no mere base
            Scheduler.classes[cls.__name__] = cls

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
            if betas.shape != (total,):
                raise ValueError(
                    f"trained_betas has shape {betas.shape}; it must hold one value for each of "
                    f"the num_train_timesteps={total}"
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

    def __repr__(self) -> str:
        return repr(self.config)

    # -- the schedule ------------------------------------------------------------------------------

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation of the noise that sampling begins with."""
        return 1.0

    @property
    def uses_noise(self) -> bool:
        """Whether `step` draws noise, and so must be given a `noise` source (DDIM with eta > 0 does too)."""
        return False

    @property
    def step_index(self) -> int | None:
        """The position in `timesteps` of the step to come, once the first step has fixed it.

        It stays None in DDIM, DDPM and PNDM, which go by the timestep alone.
        """
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The position at which sampling begins, if `set_begin_index` was called."""
        return self._begin_index

    def set_timesteps(self, num_inference_steps: int) -> None:
        """Lay out a schedule of `num_inference_steps` steps, and forget all earlier steps.

        Raises:
            ValueError: not a whole number from 1 to `num_train_timesteps`.
        """
        total = self.config.num_train_timesteps
        if isinstance(num_inference_steps, bool) or not isinstance(num_inference_steps, (int, np.integer)):
            raise ValueError(f"num_inference_steps={num_inference_steps!r} must be a whole number")
        if not 1 <= num_inference_steps <= total:
            raise ValueError(
                f"num_inference_steps={num_inference_steps} must be from 1 to {total}, the number "
                "of timesteps that the model was trained on"
            )
        self._lay_out(int(num_inference_steps))
        self.num_inference_steps = int(num_inference_steps)
        self._step_index = None
        self._begin_index = None
        self._reset()

    def set_begin_index(self, begin_index: int) -> None:
        """Begin at `timesteps[begin_index]`. Call it after `set_timesteps`, before the first step.

        Without it the first step finds its place by its timestep. Where the schedule holds a
        timestep twice that is the second place, as in diffusers, so a full run should call
        `set_begin_index(0)`.
        """
        self._require_schedule()
        if not 0 <= begin_index < len(self.timesteps):
            raise ValueError(
                f"begin_index={begin_index} must be from 0 to {len(self.timesteps) - 1}, a place in timesteps"
            )
        self._begin_index = int(begin_index)

    def index_for_timestep(self, timestep: Timestep) -> int:
        """The place of a timestep in the schedule; the second one where it stands twice."""
        found = np.flatnonzero(self.timesteps == as_number(timestep))
        if len(found) == 0:
            raise ValueError(
                f"timestep {as_number(timestep):g} is not in the schedule; use an entry of "
                f"{type(self).__name__}.timesteps, which holds {_shown(self.timesteps)}"
            )
        return int(found[1] if len(found) > 1 else found[0])

    # -- the steps ---------------------------------------------------------------------------------

    def scale_model_input(self, sample: mx.array, timestep: Timestep) -> mx.array:
        """The sample as the network wants it at this timestep; most schedulers return it as it is."""
        return sample

    def step(
        self,
        model_output: mx.array,
        timestep: Timestep,
        sample: mx.array,
        *,
        noise: NoiseSource | None = None,
    ) -> SchedulerOutput:
        """Take the sample one step down in noise.

        Args:
            model_output: the network's output, shape of `sample`.
            timestep: the entry of `timesteps` that the network saw.
            sample: (B, ...) the sample before `scale_model_input`.
            noise: where noise is drawn from; must be given if `uses_noise`.

        Raises:
            ValueError: no `set_timesteps` before, a timestep that is not (next) in the schedule,
                shapes that differ, or no noise source where one is needed.
        """
        raise NotImplementedError

    def add_noise(
        self,
        original_samples: mx.array,
        noise: mx.array,
        timesteps: Timestep | Sequence[int | float] | np.ndarray,
    ) -> mx.array:
        """Bring clean samples to the noise level of timesteps.

        Args:
            original_samples: (B, ...), any float dtype.
            noise: the same shape, standard normal.
            timesteps: one for all samples, or (B,).

        Returns:
            the noisy samples, in the dtype of `original_samples`.
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

    # -- for the samplers --------------------------------------------------------------------------

    def _lay_out(self, steps: int) -> None:
        """Set `timesteps` (and what goes with them)."""
        config = self.config
        self.timesteps = spaced_timesteps(
            config.timestep_spacing, steps, config.num_train_timesteps, config.steps_offset
        ).astype(np.int64)

    def _reset(self) -> None:
        """Forget what earlier steps left behind."""

    def _noise_levels(self, timesteps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(signal, noise) factors of `add_noise` at training timesteps."""
        total = self.config.num_train_timesteps
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
        """A timestep that stands somewhere in the schedule, as an index of `alphas_cumprod`."""
        self._require_schedule()
        return int(self.timesteps[self.index_for_timestep(timestep)])

    def _current_index(self, timestep: Timestep) -> int:
        """The place of the step to come, which must be that of `timestep`; fixed by the first step."""
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
        """ᾱ at a training timestep; that of the end of sampling where the timestep is below 0."""
        if timestep >= 0:
            return float(self.alphas_cumprod[timestep])
        return 1.0 if self.config.set_alpha_to_one else float(self.alphas_cumprod[0])

    def _x0_and_epsilon(
        self, model_output: mx.array, sample: mx.array, alpha: float, sigma: float
    ) -> tuple[mx.array, mx.array]:
        """What a model output says of the sample alpha * x0 + sigma * epsilon: (x0, epsilon)."""
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
        """Hold a prediction of the clean sample in range, as the config says."""
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

    def _check_choice(self, name: str, choices: Sequence[Any]) -> None:
        value = self.config.get(name, choices[0])
        if value not in choices:
            raise ValueError(
                f"{type(self).__name__} has no {name}={value!r}; it has " + ", ".join(map(repr, choices))
            )

    def _refuse(self, name: str, allowed: Any, reason: str) -> None:
        """Say no to an argument of the diffusers class that has one value here."""
        value = self.config[name]
        if value != allowed:
            raise ValueError(
                f"{type(self).__name__} does not support {name}={value!r}, only {allowed!r}: {reason}"
            )

    # -- files -------------------------------------------------------------------------------------

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **overrides: Any) -> Self:
        """A scheduler of this class from the config of any other, as diffusers does it.

        Args:
            config: another scheduler's `config`, or a dict as read from scheduler_config.json.
            overrides: arguments of this class that go before those of the config.

        Only arguments that were given to the other scheduler pass on; where it ran on defaults this
        class takes its own. (So a DDIM config that does not spell `timestep_spacing` makes a
        "linspace" DPM-Solver.) Arguments of other scheduler classes are carried along without
        effect; names that no scheduler has are left out with a warning.

        Raises:
            TypeError: an override is no argument of this class.
        """
        own = argument_names(cls)
        strange = sorted(overrides.keys() - own)
        if strange:
            raise TypeError(
                f"{cls.__name__} has no argument {', '.join(strange)}; it has {', '.join(sorted(own))}"
            )
        known = FOREIGN_KEYS.union(*map(argument_names, Scheduler.classes.values()))
        arguments, carried = split_config(config, own, known, cls.__name__)
        scheduler = cls(**{**arguments, **overrides})
        scheduler.config = scheduler.config.carrying(carried)
        return scheduler

    @classmethod
    def from_pretrained(
        cls, path_or_id: str | os.PathLike[str], *, subfolder: str | None = None, **hub: Any
    ) -> Self:
        """A scheduler of this class from the scheduler_config.json in a folder or hub repository.

        Args:
            path_or_id: a folder, or a hub id.
            subfolder: "scheduler" where `path_or_id` is a whole pipeline.
            hub: `revision`, `token`, `cache_dir`, `local_files_only`.
        """
        from ..checkpoints import read_component_config

        config = read_component_config(path_or_id, CONFIG_NAME, subfolder=subfolder, **hub)
        return cls.from_config(config)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write scheduler_config.json, which diffusers reads too, into a folder (made if need be)."""
        target = Path(folder) / CONFIG_NAME
        target.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.config.to_dict(), indent=2, sort_keys=True) + "\n"
        write_text(target, text)


def _shown(values: np.ndarray) -> str:
    shown = [f"{value:g}" for value in values]
    return ", ".join(shown if len(shown) <= 12 else [*shown[:6], "...", *shown[-3:]])
