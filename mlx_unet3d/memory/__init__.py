"""Memory: what a video will take, and the settings with which it fits."""

from .limits import apply_limits, available, parse_memory
from .networks import Network, Networks, read_networks
from .planner import Plan, Settings, Stage, Video, plan, step_work
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
