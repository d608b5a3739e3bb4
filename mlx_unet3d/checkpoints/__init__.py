"""Files <-> parameters: look-up, formats, names and layouts, loading and saving."""

from .config import ModelConfig, read_json
from .describe import describe
from .headers import Deferred, Header, TensorInfo, load_tensors, read_header, read_tensor, write_safetensors
from .hub import Hub, takes_hub
from .layouts import file_shapes, parameter_layouts, to_diffusers, to_mlx
from .pickles import read_pickle
from .source import DEMO, find_folder, read_component_config
from .storage import checksum
from .weight_files import pickle_files, weight_files

__all__ = [
    "DEMO",
    "Deferred",
    "Header",
    "Hub",
    "ModelConfig",
    "TensorInfo",
    "checksum",
    "describe",
    "file_shapes",
    "find_folder",
    "load_tensors",
    "parameter_layouts",
    "pickle_files",
    "read_component_config",
    "read_header",
    "read_json",
    "read_pickle",
    "read_tensor",
    "takes_hub",
    "to_diffusers",
    "to_mlx",
    "weight_files",
    "write_safetensors",
]
