"""The model card of a converted checkpoint: where it comes from, under which licence, how to use it."""

import math
import re
from collections import Counter
from pathlib import Path

import mlx_unet3d
from mlx_unet3d import __version__
from mlx_unet3d.checkpoints import DEMO, checksum
from mlx_unet3d.checkpoints.source import inside_hub

from .kinds import kind_of
from .plan import CheckpointPlan, ComponentPlan

_FRONT = 2**16  # characters of a card in which its front matter is looked for
# One licence or a list, and the name of one that the hub does not know; links within the source lead nowhere.
_LICENCE = re.compile(
    r"^(?:license(?:_name)?:[ \t]*(?:\S.*|(?:\n[ \t]*-[ \t].*)+)|license_link:[ \t]*[\"']?https?://.*)$", re.M
)


def model_card(plan: CheckpointPlan, layout: str) -> str:
    """Return a `README.md` with the hub's front matter and the licence of the source's card, if it has
    one."""
    front = [f"library_name: {layout}", f"pipeline_tag: {_task(plan)}"]
    front += _licence(plan.folder)
    if plan.source != DEMO and not Path(plan.source).expanduser().exists():
        front.append(f"base_model: {inside_hub(plan.source)[0]}")
    rows = []
    for component in plan.components:
        parameters = sum(math.prod(tensor.shape) for tensor in component.tensors)
        files = ", ".join(path.name for path in component.files)
        rows.append(
            f"| {component.title} | {parameters:,} | {_weights(component)} | {component.nbytes / 1e9:.2f} GB "
            f"| {files} | `{checksum(component.files)}` |"
        )
    return "\n".join(
        [
            "---",
            *front,
            "---",
            "",
            f"Converted from {_name(plan)} by mlx-unet3d {__version__}, {layout} layout.",
            "",
            "| network | parameters | weights | size | read from | fingerprint |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            "```python",
            "import mlx_unet3d",
            "",
            _use(plan),
            "```",
            "",
            "The fingerprint is that of `mlx_unet3d.checkpoints.checksum`, of the files that were read.",
            "",
        ]
    )


def _task(plan: CheckpointPlan) -> str:
    """Return the hub's name of the model's task."""
    takes_images = any(kind_of(component.cls).from_image for component in plan.components)
    return "image-to-video" if takes_images else "text-to-video"


def _use(plan: CheckpointPlan) -> str:
    """Return the line that loads the model: as a pipeline if this package has it, or else its first
    network."""
    name = "" if plan.index is None else str(plan.index.get("_class_name")).replace("SDPipeline", "Pipeline")
    if hasattr(mlx_unet3d, name):
        return f'pipe = mlx_unet3d.{name}.from_pretrained("this-folder")'
    first = plan.components[0]
    folder = f'"this-folder", subfolder="{first.name}"' if first.name else '"this-folder"'
    return f"model = mlx_unet3d.{first.cls.__name__}.from_pretrained({folder})"


def _weights(component: ComponentPlan) -> str:
    """Return the dtypes, and the share and settings of quantized parameters."""
    counts: Counter[str] = Counter()
    for tensor in component.tensors:
        own = tensor.quantization
        kind = str(tensor.dtype).removeprefix("mlx.core.") if own is None else f"{own.mode}, {own.bits} bits"
        counts[kind] += math.prod(tensor.shape)
    if len(counts) == 1:
        return next(iter(counts))
    total = sum(counts.values())
    return "; ".join(f"{kind}: {count / total:.1%}" for kind, count in counts.most_common())


def _name(plan: CheckpointPlan) -> str:
    """Return the hub id with its commit, or the name of the file or folder without its location."""
    local = Path(plan.source).expanduser()
    if local.exists():
        return f"the {'file' if local.is_file() else 'folder'} `{local.resolve().name}`"
    commit = next((part for part in plan.folder.parts if re.fullmatch(r"[0-9a-f]{40}", part)), None)
    return f"`{plan.source}`" + (f" at `{commit}`" if commit else "")


def _licence(folder: Path) -> list[str]:
    """Return the lines about the licence in the source's card."""
    card = folder / "README.md"
    if not card.is_file():
        return []
    with card.open(encoding="utf-8", errors="replace") as file:
        front = re.match(r"---\n(.*?)\n---", file.read(_FRONT), re.S)
    return [match[0] for match in _LICENCE.finditer(front[1])] if front else []
