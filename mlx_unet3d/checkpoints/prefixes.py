"""Prefixes of the names of parameters and layers in files of weights and of adapters."""

# Attributes in which torch's wrappers (DDP, compile, FSDP) keep the module: they come before any part.
_WRAPPERS = frozenset(("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
# Other prefixes, in any order and nesting, and the network of a pipeline that it names.
_FRONT = {
    "model": None,
    "base_model": None,
    "unet": "unet",
    "vae": "vae",
    "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder_2",
}


def without_wrappers(key: str) -> str:
    """The key without the attributes of torch's wrappers."""
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS) or key


def unwrapped(key: str) -> tuple[str | None, str]:
    """The network that the key names in front, None where none, and the name in it."""
    parts, owner = without_wrappers(key).split("."), None
    while len(parts) > 1 and parts[0] in _FRONT:
        owner = _FRONT[parts.pop(0)] or owner
    return owner, ".".join(parts)
