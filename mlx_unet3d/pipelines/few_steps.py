"""The sampler, steps and guidance that LoRAs were distilled for.

Names of files, folders and repositories tell them; T2V-Turbo's is told by its tensors. Sources: `demo.py` of
MCM (Zhai et al. 2024, arXiv:2406.06890), `app_ms.py` of T2V-Turbo (arXiv:2405.18750), and the model cards of
LCM-LoRA (arXiv:2311.05556), Hyper-SD (arXiv:2404.13686) and SDXL-Lightning (arXiv:2402.13929).
"""

import re
from pathlib import PurePath
from typing import TYPE_CHECKING

from ..schedulers import scheduler_from_config
from .motion_training import STEPS, Training

if TYPE_CHECKING:
    from .calls import VideoPipeline

_MCM = re.compile(
    r"(?<![a-z])mcm(?![a-z])|(modelscopet2v|animatediff)-(webvid|laion|anime|real|3d-cartoon)", re.I
)
_PEFT = re.compile(r"adapter_model\.(safetensors|bin)")
_LCM_LORA = re.compile(r"(?<![a-z])lcm[-_]?lora", re.I)
_HYPER = re.compile(r"hyper[-_]?sd", re.I)
_WITH_GUIDANCE = re.compile(r"cfg", re.I)
_LIGHTNING = re.compile(r"sdxl[-_]?lightning", re.I)

MCM = Training(
    "a motion consistency model (MCM)",
    "LCMScheduler",
    dict(timestep_scaling=4.0),
    dict(num_inference_steps=4, guidance_scale=1.0),
)
T2V_TURBO = Training(
    "T2V-Turbo",
    "LCMScheduler",
    dict(distilled_spacing="strided"),
    dict(num_inference_steps=4, guidance_scale=7.5),
)
LCM_LORA = Training("LCM-LoRA", "LCMScheduler", {}, dict(num_inference_steps=4, guidance_scale=1.0))


def training_of_lora(source: str, file: str) -> Training | None:
    """Return the few steps that a LoRA was distilled for, told by names; None where they say nothing.

    Args:
        source: the file, folder or hub id as given; its last two names count, OWNER/NAME or FOLDER/FILE.
        file: the name of the file.
    """
    called = "/".join((*PurePath(source).parts[-2:], file))
    if _PEFT.fullmatch(file) and _MCM.search(called):
        return MCM
    if _LCM_LORA.search(called):
        return LCM_LORA
    found = STEPS.search(called)
    if found is None or int(found[1]) < 1:
        return None
    recommended = dict(num_inference_steps=int(found[1]), guidance_scale=1.0)
    if _LIGHTNING.search(called):
        return Training(
            "SDXL-Lightning", "EulerDiscreteScheduler", dict(timestep_spacing="trailing"), recommended
        )
    if not _HYPER.search(called):
        return None
    if recommended["num_inference_steps"] == 1:
        return Training("Hyper-SD", "TCDScheduler", {}, recommended)
    if _WITH_GUIDANCE.search(file):  # those that were distilled to be guided by a negative prompt
        del recommended["guidance_scale"]
    return Training("Hyper-SD", "DDIMScheduler", dict(timestep_spacing="trailing"), recommended)


def sample_as(pipe: "VideoPipeline", training: Training, scheduler: str | None = None) -> str:
    """Give a pipeline the sampler of a training, or another one on its schedule, and recommend its steps and
    guidance; returns what it was given, for a message."""
    config = pipe.scheduler.config.to_dict() | dict(training.settings)
    pipe.scheduler = scheduler_from_config(config, scheduler or training.scheduler)
    pipe.recommended = training.recommend(pipe.recommended)
    said = [f"sampled by {type(pipe.scheduler).__name__}"]
    names = {"num_inference_steps": "steps", "guidance_scale": "guidance"}
    said += [f"{names[name]} {value:g}" for name, value in training.recommended.items()]
    return f"{training.title}, {', '.join(said)}"
