"""Stands in for torchvision in engines on CPUs whose Python has none: it can be imported, and holds no functions.

vLLM's module for Qwen3.5 also has the models that see images, and imports transformers' code for images with it. Of
torchvision there is not a build for every CPU build of torch, and one for CUDA cannot be imported beside them.
"""

import enum
import sys
import types

__version__ = "0"

InterpolationMode = enum.Enum("InterpolationMode", "NEAREST NEAREST_EXACT BILINEAR BICUBIC BOX HAMMING LANCZOS")


def _module(name: str, **content: object) -> types.ModuleType:
    module = types.ModuleType(f"{__name__}.{name}")
    module.__dict__.update(content)
    sys.modules[module.__name__] = module
    return module


io = _module("io", ImageReadMode=None, decode_image=None)
transforms = _module(
    "transforms",
    InterpolationMode=InterpolationMode,
    functional=_module("transforms.functional", pil_to_tensor=None),
    v2=_module("transforms.v2", functional=_module("transforms.v2.functional")),
)
