"""Progress bars of pipelines: shown in a terminal or notebook unless a call says otherwise."""

import inspect
import sys
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm


def is_shown(progress: bool | None) -> bool:
    """Return `progress`, and for None True where somebody looks: stderr is a terminal, or this a notebook."""
    if progress is not None:
        return bool(progress)
    stderr = sys.stderr  # None under pythonw
    return in_notebook() or (stderr is not None and stderr.isatty())


def in_notebook() -> bool:
    """Return True in a Jupyter kernel; IPython in a terminal is a terminal."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and "IPKernelApp" in shell.config


def progress_bar(shown: bool, options: Mapping[str, Any] | None = None, **own: Any) -> tqdm:
    """Return a bar of `tqdm.auto`, a widget in notebooks; `options` take the place of the bar's `own`."""
    if not shown:
        return tqdm(disable=True)
    from tqdm.auto import tqdm as best  # imports asyncio, which costs more than a run of no bars

    return best(**{**own, **(options or {}), "disable": False})


def checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of tqdm; TypeError for unknown ones."""
    known = inspect.signature(tqdm.__init__).parameters
    for name in options:
        if name not in known:
            raise TypeError(f"set_progress_bar_config takes no {name}: give arguments of tqdm")
    return dict(options)
