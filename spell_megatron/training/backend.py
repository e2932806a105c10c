"""Device, process groups and seeds of the trainer, and all that Megatron-Core needs to run without a GPU.

`initialise` is called once per process, before a model is built. On a machine without a GPU it redirects
the few calls by which Megatron-Core reaches for CUDA (`_redirect_to_cpu`); on GPUs nothing is redirected.
"""

from __future__ import annotations

import functools
import logging
import os
import random
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from torch.optim import Optimizer

from spell_megatron import ranks
from spell_megatron.config.faults import raise_faults
from spell_megatron.config.layout import division_faults
from spell_megatron.config.schema import ParallelConfig, TrainingConfig
from spell_megatron.errors import UserError
from spell_megatron.training.layout import context_levels
from spell_megatron.training.policy import PolicyModel


def initialise(policy: PolicyModel, training: TrainingConfig, device: str = "auto", seed: int = 0) -> torch.device:
    """Join the process group, lay out Megatron's parallel groups and seed this process.

    Ranks and addresses come from torchrun (RANK, WORLD_SIZE, MASTER_ADDR, ...), from `srun` (SLURM_PROCID,
    ...), or, with neither, this is a single process. The default process group is gloo on CPUs and nccl
    on GPUs; one that exists already is used as it is.

    Args:
        policy: the model that is to be trained; it decides how context-parallel ranks are grouped.
        training: `parallel` and `threads` of it are read.
        device: "cpu", "cuda" or "auto", which takes CUDA where there is a GPU.
        seed: of the random states of Python, NumPy, torch and Megatron.

    Returns:
        The device that this rank's model and batches live on.

    Raises:
        UserError: CUDA was asked for and there is none, the layout does not fit the number of processes,
            or the address of rank 0 is unknown.
    """
    own = _device(device)
    rank, world_size, local_rank = ranks.launched() or ranks.ALONE
    raise_faults(division_faults(training.parallel, world_size), "the layout of the trainer")
    if own.type == "cuda":
        own = torch.device("cuda", local_rank)
        torch.cuda.set_device(own)
        # Overlap of communication and computation with tensor parallelism relies on one hardware queue.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    else:
        torch.set_num_threads(training.threads)
        _redirect_to_cpu()
    if not dist.is_initialized():
        _join(own, rank, world_size)

    from megatron.core import tensor_parallel

    _make_groups(policy, training.parallel)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return own


def shutdown() -> None:
    """Leave all process groups; `initialise` may be called again after it."""
    if not dist.is_initialized():
        return
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def _make_groups(policy: PolicyModel, parallel: ParallelConfig, **options: bool) -> None:
    """Megatron's process groups of a layout."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        hierarchical_context_parallel_sizes=context_levels(policy.arch, parallel) if parallel.context > 1 else None,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        **options,
    )


@contextmanager
def pretend(policy: PolicyModel, parallel: ParallelConfig, rank: int, world_size: int) -> Iterator[None]:
    """One rank of a layout on a process group that is not there.

    Models built inside have the shapes and shardings of that rank, and no memory (device "meta"). Nothing may
    be computed with them.
    """
    from megatron.core import tensor_parallel
    from torch.testing._internal.distributed.fake_pg import FakeStore

    _redirect_to_cpu()
    device, hook = torch.cuda.current_device, sys.excepthook
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        _make_groups(policy, parallel, create_gloo_process_groups=False)
        with torch.random.fork_rng(devices=()):
            tensor_parallel.model_parallel_cuda_manual_seed(0, force_reset_rng=True)
            torch.cuda.current_device = lambda: torch.device("meta")
            yield
    finally:
        torch.cuda.current_device = device
        shutdown()
        sys.excepthook = hook  # torch prefixes every line of an error with a rank, once more for each group


def _device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "run.device is cuda, but torch sees no GPU on this machine. Set run.device to cpu or auto, or "
            "install a CUDA build of torch and check that `nvidia-smi` lists a GPU."
        )
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def _join(device: torch.device, rank: int, world_size: int) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    if world_size == 1:
        # gloo finds its address through the host's name, which a laptop or container may not resolve.
        interfaces = {name for _, name in socket.if_nameindex()}
        if "lo" in interfaces:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    if "MASTER_ADDR" not in os.environ:
        if ranks.on_several_nodes():
            raise UserError(
                "This process is one of several on several nodes, but MASTER_ADDR is not set, so that it "
                "cannot find rank 0. Export MASTER_ADDR (address of the first trainer node) and MASTER_PORT "
                "in the job script."
            )
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    if "MASTER_PORT" not in os.environ:
        # Every rank must name the same port, so it follows from the job; several steps do not meet.
        job = int(ranks.slurm_job() or 0)
        os.environ["MASTER_PORT"] = str(20000 + (job * 7 + ranks.slurm_step()) % 10000)
    dist.init_process_group(backend, rank=rank, world_size=world_size)


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
def _redirect_to_cpu() -> None:
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
    * `moe_utils.te_general_gemm`: 0.16 leaves the name undefined without transformer-engine.
    * `maybe_move_tensor_to_cpu`: turns only CUDA tensors into the numpy arrays its callers expect.
    * gather and reduce-scatter of unequal parts: gloo has neither (expert tensor parallelism).
    * dynamo is switched off: compiling the small fused functions takes longer than CPU runs save.

    torch's own AdamW takes the place of apex's; two faults of Megatron's distributed optimizer with it are
    mended too (`_mend_distributed_optimizer`).
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
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = _as_numpy
    mappings._gather_along_first_dim = _uneven_gather(mappings._gather_along_first_dim)
    mappings._reduce_scatter_along_first_dim = _uneven_reduce_scatter(mappings._reduce_scatter_along_first_dim)
    _mend_distributed_optimizer()


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


def _mend_distributed_optimizer() -> None:
    """Let Megatron's distributed optimizer load the state of torch's AdamW.

    Its fully reshardable format holds no `step` per parameter although loading asks for one, and after
    loading all parameters share one `step` tensor, which AdamW then advances once per parameter.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    set_state = DistributedOptimizer._set_main_param_and_optimizer_states
    load = DistributedOptimizer.load_state_dict

    def set_state_with_step(self, model_param, tensors):
        if "step" not in tensors:
            group, order = self.model_param_group_index_map[model_param]
            state = self.optimizer.state.get(self.optimizer.param_groups[group]["params"][order], {})
            if "step" in state:
                tensors = {**tensors, "step": state["step"].clone()}
        return set_state(self, model_param, tensors)

    def load_with_own_steps(self, state_dict):
        result = load(self, state_dict)
        optimizer: Optimizer = self.optimizer
        for state in optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()
        return result

    DistributedOptimizer._set_main_param_and_optimizer_states = set_state_with_step
    DistributedOptimizer.load_state_dict = load_with_own_steps
