"""Which GPUs each server gets, and by which transport weights reach it."""

from __future__ import annotations

import os
from typing import Literal

from spell_megatron.errors import UserError
from spell_megatron.rollout.transports.gloo import GLOO
from spell_megatron.rollout.transports.ipc import IPC
from spell_megatron.rollout.transports.nccl import NCCL
from spell_megatron.rollout.transports.transport import Transport

Device = Literal["auto", "cpu", "cuda"]


def place(
    replicas: int, tensor_parallel: int, device: Device, trainers: int, colocated: bool = False
) -> tuple[list[list[str]], Transport]:
    """GPUs of each server on this machine, and the transport of its weights.

    Servers take the GPUs that the trainer leaves free. If trainer and engines both need all of them, they share them.

    Args:
        replicas: servers to place.
        tensor_parallel: GPUs of each server.
        device: where the run's processes run (run.device).
        trainers: trainer processes on this machine; each takes one GPU, the first ones.
        colocated: share the trainer's GPUs also where others are free (rollout.colocated).

    Raises:
        UserError: there are not enough GPUs.
    """
    gpus = [] if device == "cpu" else _visible_gpus()
    if not gpus:
        return [[] for _ in range(replicas)], GLOO
    engines = replicas * tensor_parallel
    if _together(len(gpus), engines, trainers, colocated):
        return _shares(gpus, replicas, tensor_parallel), IPC
    free = gpus[trainers:]
    if len(free) >= engines and not (colocated and trainers):
        return _shares(free, replicas, tensor_parallel), NCCL
    remedy = "Lower rollout.replicas or rollout.tensor_parallel, use fewer trainer processes"
    if not colocated:
        remedy += ", or start engines on other machines and name them in rollout.urls"
    raise UserError(
        f"This machine shows {len(gpus)} GPU(s): {trainers} for the trainer leave {max(0, len(free))} for "
        f"{replicas} engine(s) of {tensor_parallel} GPU(s). {remedy}."
    )


def shares_gpus(engines: int, device: Device, trainers: int, colocated: bool) -> bool:
    """Whether `place` gives the servers of this machine, which need `engines` GPUs, those of the trainer."""
    gpus = [] if device == "cpu" else _visible_gpus()
    return bool(gpus) and _together(len(gpus), engines, trainers, colocated)


def transport_here(engines: int, device: Device, trainers: int, colocated: bool) -> Transport:
    """The transport that `place` chooses, also where there are too few GPUs."""
    return IPC if shares_gpus(engines, device, trainers, colocated) else transport_elsewhere(device)


def gpu_memory() -> int:
    """Bytes of the first GPU, as the driver reports them; takes no memory of it, which torch would."""
    from vllm.platforms import current_platform

    return current_platform.get_device_total_memory(0)


def _together(gpus: int, engines: int, trainers: int, colocated: bool) -> bool:
    return gpus >= trainers == engines and (colocated or gpus == trainers)


def transport_elsewhere(device: Device) -> Transport:
    """The transport to engines that share no GPU with the trainer, such as those of other machines."""
    return NCCL if device != "cpu" and _visible_gpus() else GLOO


def _shares(gpus: list[str], replicas: int, each: int) -> list[list[str]]:
    return [gpus[i * each : (i + 1) * each] for i in range(replicas)]


def _visible_gpus() -> list[str]:
    import torch

    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        return [str(index) for index in range(torch.cuda.device_count())]
    return [name for name in names.split(",") if name] if torch.cuda.is_available() else []
