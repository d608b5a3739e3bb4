"""Files <-> parameters: look-up, formats, names and layouts, loading and saving."""

from .config import ModelConfig, read_json
from .describe import describe
from .headers import Header, TensorInfo, load_tensors, read_header, write_safetensors
from .layouts import file_shapes, parameter_layouts, to_diffusers, to_mlx
from .pretrained import PretrainedModel
from .source import find_folder, read_component_config, weight_files
from .storage import checksum

__all__ = [
    "Header",
    "ModelConfig",
    "PretrainedModel",
    "TensorInfo",
    "checksum",
    "describe",
    "file_shapes",
    "find_folder",
    "load_tensors",
    "parameter_layouts",
    "read_component_config",
    "read_header",
    "read_json",
    "to_diffusers",
    "to_mlx",
    "weight_files",
    "write_safetensors",
]
