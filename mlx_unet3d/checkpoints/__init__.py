"""Files <-> parameters: look-up, formats, names and layouts, loading and saving."""

from .config import ModelConfig, read_json
from .describe import describe
from .headers import Deferred, Header, TensorInfo, load_tensors, read_header, read_tensor, write_safetensors
from .layouts import file_shapes, parameter_layouts, to_diffusers, to_mlx
from .pickles import read_pickle
from .source import DEMO, find_folder, pickle_files, read_component_config, weight_files
from .storage import checksum

__all__ = [
    "DEMO",
    "Deferred",
    "Header",
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
    "to_diffusers",
    "to_mlx",
    "weight_files",
    "write_safetensors",
]
