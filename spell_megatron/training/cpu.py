"""All that Megatron-Core needs to run without a GPU. Nothing here is used on GPUs."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


class _NoStream:
    """Stands for a CUDA stream: work on a CPU is done in order."""

    cuda_stream = 0

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def record_event(self, event: object = None) -> _NoEvent:
        return _NoEvent()

    def synchronize(self) -> None:
        pass

    def __enter__(self) -> _NoStream:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


class _NoEvent:
    """Stands for a CUDA event: whatever it marks has already happened."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def record(self, stream: object = None) -> None:
        pass

    def wait(self, stream: object = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: object) -> float:
        return 0.0


class _TypeName(str):
    """Name of a CPU tensor type that also equals its CUDA name, as Megatron's optimizers compare it."""

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) or "torch.cuda." + self.rsplit(".", 1)[-1] == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


@functools.cache
def redirect_to_cpu() -> None:
    """Redirect Megatron-Core's device calls to the CPU, once per process.

    What is redirected, and which part of Megatron-Core needs it:

    * `torch.cuda.is_available`: no; a run on CPUs stays there on a machine that has a GPU too.
    * `torch.cuda.current_device`: the device of every parameter and buffer that Megatron allocates.
    * streams, events, `synchronize`: DDP's overlap, token dispatchers and timers create them. They stay
      classes, because annotations use them.
    * random state (`manual_seed`, `get_rng_state`, `set_rng_state` and the two helpers of
      `tensor_parallel.random`): the tracker that forks random states for tensor parallelism and recompute.
    * tensor factories with device "cuda" or `pin_memory`: gradient buffers, norms and loss counters.
    * `Tensor.cuda`, `Module.cuda`: DDP, optimizer and schedules.
    * `Tensor.type`: optimizers look for the name "torch.cuda.FloatTensor".
    * `maybe_move_tensor_to_cpu`: turns only CUDA tensors into the numpy arrays its callers expect.
    * gather and reduce-scatter of unequal parts: gloo has neither (expert tensor parallelism).
    * dynamo is switched off: compiling the small fused functions takes longer than CPU runs save.
    """
    import torch._dynamo.config
    import torch.utils._device

    cpu = torch.device("cpu")
    torch._dynamo.config.disable = True
    cuda = torch.cuda
    cuda.is_available = lambda: False
    cuda.current_device = lambda: cpu
    cuda.Stream, cuda.Event = _NoStream, _NoEvent
    cuda.current_stream = cuda.default_stream = lambda device=None: _NoStream()
    cuda.stream = lambda stream: stream if stream is not None else _NoStream()
    cuda.synchronize = lambda device=None: None
    cuda.manual_seed = torch.default_generator.manual_seed
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, device=None: torch.set_rng_state(state)

    # torch collects the factories that `with torch.device(...)` diverts on first use: the originals.
    torch.utils._device._device_constructors()
    for name in ("tensor", "zeros", "ones", "empty", "full", "arange", "zeros_like", "empty_like"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.type = _named_like_cuda(torch.Tensor.type)

    from megatron.core.tensor_parallel import mappings
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    megatron_random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    # Its warning that a fork moved the CPU's random state: here that state is the device's, and meant to move.
    logging.getLogger(megatron_random.__name__).setLevel(logging.ERROR)
    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = _as_numpy
    mappings._gather_along_first_dim = _uneven_gather(mappings._gather_along_first_dim)
    mappings._reduce_scatter_along_first_dim = _uneven_reduce_scatter(mappings._reduce_scatter_along_first_dim)


@contextmanager
def parameters_without_memory() -> Iterator[None]:
    """Let Megatron allocate parameters on the device "meta"."""
    device = torch.cuda.current_device
    torch.cuda.current_device = lambda: torch.device("meta")
    try:
        yield
    finally:
        torch.cuda.current_device = device


def _on_cpu(factory):
    @functools.wraps(factory)
    def wrapped(*args, **kwargs):
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return wrapped


def _named_like_cuda(original):
    def type_(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        return _TypeName(result) if isinstance(result, str) else result

    return type_


def _as_numpy(tensor, as_numpy: bool = False, record_stream: bool = False):
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _uneven_gather(original):
    def gather(input_, group, output_split_sizes=None, use_global_buffer=False):
        if output_split_sizes is None or group.size() == 1:
            return original(input_, group, output_split_sizes, use_global_buffer)
        sizes = [int(size) for size in output_split_sizes]
        padded = input_.new_zeros((max(sizes), *input_.shape[1:]))
        padded[: input_.size(0)] = input_
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes)])

    return gather


def _uneven_reduce_scatter(original):
    def reduce_scatter(input_, group, input_split_sizes=None, use_global_buffer=False):
        if input_split_sizes is None or group.size() == 1:
            return original(input_, group, input_split_sizes, use_global_buffer)
        total = input_.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total.split([int(size) for size in input_split_sizes])[group.rank()].contiguous()

    return reduce_scatter
