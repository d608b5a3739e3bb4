"""Memory: predict what a video takes, and choose the settings with which it fits."""

from .limits import apply_limits, available, parse_memory
from .networks import Network, Networks, read_networks
from .planner import plan, step_work
from .plans import Plan, Settings, Stage, Video
from .roofline import Work

__all__ = [
    "Network",
    "Networks",
    "Plan",
    "Settings",
    "Stage",
    "Video",
    "Work",
    "apply_limits",
    "available",
    "parse_memory",
    "plan",
    "read_networks",
    "step_work",
]
