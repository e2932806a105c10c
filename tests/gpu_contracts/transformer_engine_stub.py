"""Lets transformer-engine's own Python files be imported and its layers be built without a GPU.

Import this module before Megatron-Core, with transformer-engine's files on the path. Its compiled extension is replaced
by a module whose names are there for annotations and defaults; none can be called but Adam, with zero gradients.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

# transformer-engine then loads no compiled library.
os.environ |= {"NVTE_PROJECT_BUILDING": "1", "NVTE_RELEASE_BUILD": "0", "NVTE_FRAMEWORK": "pytorch"}


class _Names(type):
    """The metaclass of classes that have every name; what is behind a name is such a class again."""

    def __getattr__(cls, name: str) -> _Names:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(cls, name, _Names(name, (), {}))
        return getattr(cls, name)

    def __call__(cls, *args: object, **kwargs: object) -> None:
        raise RuntimeError(f"transformer-engine's compiled {cls.__name__} was called")

    def __int__(cls) -> int:
        return 0


class _Extension(ModuleType):
    def __getattr__(self, name: str) -> _Names:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, _Names.__new__(_Names, name, (), {}))
        return getattr(self, name)

    @staticmethod
    def multi_tensor_adam(chunk_size: int, overflow: object, lists: list, *options: object) -> None:
        """An update that moves nothing."""
        assert not any(gradient.any() for gradient in lists[0])


_extension = _Extension("transformer_engine_torch")
_extension.__spec__ = importlib.machinery.ModuleSpec("transformer_engine_torch", None)
sys.modules["transformer_engine_torch"] = _extension
# Its export to ONNX needs a package that nothing here uses.
sys.modules["transformer_engine.pytorch.onnx_extensions"] = MagicMock()

# The part of transformer-engine that would load the extension comes first, without the rest.
_package = ModuleType("transformer_engine")
_package.__path__ = importlib.util.find_spec("transformer_engine").submodule_search_locations
sys.modules["transformer_engine"] = _package
_common = importlib.import_module("transformer_engine.common")
_common.load_framework_extension = lambda framework: None
del sys.modules["transformer_engine"]
importlib.import_module("transformer_engine").common = _common


def pretend_a_gpu() -> None:
    """Answer what transformer-engine asks about the GPU when it builds a layer; tensors stay in memory of the CPU.

    Call it after `redirect_to_cpu`.
    """
    import torch
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    gpu = SimpleNamespace(name="H100", major=9, minor=0, multi_processor_count=132)
    torch.cuda.get_device_capability = lambda device=None: (gpu.major, gpu.minor)
    torch.cuda.get_device_properties = lambda device=None: gpu
    initialise = TransformerEngineBaseModule.__init__

    def initialise_on_a_gpu(self, *args, **kwargs) -> None:
        without, torch.cuda.is_available = torch.cuda.is_available, lambda: True
        try:
            initialise(self, *args, **kwargs)
        finally:
            torch.cuda.is_available = without

    TransformerEngineBaseModule.__init__ = initialise_on_a_gpu
