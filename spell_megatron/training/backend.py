"""Device, process groups and seeds of the trainer.

`initialise` is called once per process, before a model is built. On a machine without a GPU it redirects
the few calls by which Megatron-Core reaches for CUDA (`training.cpu`); on GPUs nothing is redirected.
"""

from __future__ import annotations

import os
import random
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist

from spell_megatron import ranks
from spell_megatron.config.faults import raise_faults
from spell_megatron.config.layout import division_faults
from spell_megatron.config.schema import ParallelConfig, TrainingConfig
from spell_megatron.errors import UserError
from spell_megatron.processes.collective import TENSOR_LIMIT, from_rank_0
from spell_megatron.training.corrections import correct_megatron
from spell_megatron.training.cpu import parameters_without_memory, redirect_to_cpu
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
    else:
        torch.set_num_threads(training.threads)
        redirect_to_cpu()
    if not dist.is_initialized():
        _join(own, rank, world_size)

    from megatron.core import tensor_parallel

    from_rank_0(None)  # makes the group of messages while all ranks are here
    correct_megatron()
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
        distributed_timeout_minutes=int(TENSOR_LIMIT.total_seconds() / 60),
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

    redirect_to_cpu()
    hook = sys.excepthook
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        _make_groups(policy, parallel, create_gloo_process_groups=False)
        with torch.random.fork_rng(devices=()):
            tensor_parallel.model_parallel_cuda_manual_seed(0, force_reset_rng=True)
            with parameters_without_memory():
                yield
    finally:
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
    dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=TENSOR_LIMIT)
