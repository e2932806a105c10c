"""CPU tensors that pretend to be on a GPU, and operations that refuse to mix them with others.

The memory of a tensor is marked when the tensor is made on the device "cuda" or moved there, and so are the results of
operations on marked tensors. `Tensor.device` of marked ones is `cuda:0`. As on a GPU, an operation takes tensors of one
device, except single numbers, indices on the CPU, and copies from one to the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
COPIES = ("copy_", "_to_copy", "_copy_from", "_foreach_copy_")


def on_gpu(tensor: Tensor) -> bool | None:
    """None: torch has made the tensor by itself, in a backward pass, on the device of what it is for."""
    return getattr(_memory(tensor), "pretends", None)


def mark(made: Any, gpu: bool) -> None:
    for tensor in tree_flatten(made)[0]:
        if isinstance(tensor, Tensor):
            _memory(tensor).pretends = gpu


def _memory(tensor: Tensor) -> torch.UntypedStorage:
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # inside vmap
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.untyped_storage()


class Operations(TorchDispatchMode):
    """Marks results, and refuses mixtures."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        name = func._schema.name.split("::")[1]
        known = [tensor for tensor in tensors if on_gpu(tensor) is not None]
        gpu = any(map(on_gpu, known))
        if name in COPIES:
            gpu, known = bool(on_gpu(tensors[0])), [tensor for tensor in known[:1] if tensor is tensors[0]]
        elif gpu:
            for tensor in known:
                index = name.startswith("index") and tensor is not tensors[0] and not tensor.is_floating_point()
                if not (on_gpu(tensor) or index or not tensor.dim()):
                    shapes = [(tuple(tensor.shape), on_gpu(tensor), tensor.dtype) for tensor in tensors]
                    raise RuntimeError(f"{func} takes tensors of a GPU and of a CPU: {shapes}")
        result = func(*args, **kwargs)
        # A number that is on the CPU says nothing of what it is combined with.
        if gpu or len(known) == len(tensors) > 0 or any(tensor.dim() for tensor in known):
            unmarked = [x for x in tree_flatten((result, tensors))[0] if isinstance(x, Tensor) and on_gpu(x) is None]
            mark(unmarked, gpu)
        return result


class Devices(TorchFunctionMode):
    """Lets `Tensor.device`, `to`, `cuda`, `cpu` and factories speak of the GPU."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if isinstance(func, torch._ops.OpOverload):  # called by `Operations`
            return func(*args, **kwargs)
        if func == Tensor.device.__get__:
            return GPU if on_gpu(args[0]) else CPU
        name = getattr(func, "__name__", "")
        moves = [x for x in (*args, *kwargs.values()) if _device(x)]
        if name in ("cuda", "cpu"):
            return _moved(args[0], name == "cuda")
        if not moves:
            if name in ("to", "type") and len(args) > 1 and isinstance(args[1], Tensor):
                return _moved(func(*args, **kwargs), on_gpu(args[1]))
            result = func(*args, **kwargs)
            # What the program makes without naming a device is on the CPU.
            if not any(isinstance(x, Tensor) for x in tree_flatten((args, kwargs))[0]):
                mark([x for x in tree_flatten(result)[0] if isinstance(x, Tensor) and on_gpu(x) is None], False)
            return result
        gpu = _device(moves[0]) == "cuda"
        args = tuple(CPU if _device(x) else x for x in args)
        kwargs = {key: CPU if _device(x) else x for key, x in kwargs.items()}
        result = func(*args, **kwargs)
        if name == "to":
            return _moved(result, gpu)
        mark(result, gpu)
        return result


def _device(value: Any) -> str:
    """ "cuda" or "cpu" if it is a device of that type, else ""."""
    if isinstance(value, torch.device):
        return value.type if value.type in ("cuda", "cpu") else ""
    return value.split(":")[0] if isinstance(value, str) and value.split(":")[0] in ("cuda", "cpu") else ""


def _moved(tensor: Tensor, gpu: bool) -> Tensor:
    if bool(on_gpu(tensor)) == gpu:
        return tensor
    copy = tensor.clone()
    mark(copy, gpu)
    return copy


def _from_numpy(array: Any, made: Any = torch.from_numpy) -> Tensor:
    tensor = made(array)
    mark(tensor, False)
    return tensor


torch.from_numpy = _from_numpy  # modes do not see it
