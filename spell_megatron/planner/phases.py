"""What is on a GPU when: while engines generate, in an update, in a push, and while a checkpoint is saved.

Trainer and engines have GPUs of their own, or they share them and work in turn. Then each gives up its memory while the
other works: engines sleep, and what `training.swap` names leaves the trainer's GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from spell_megatron.config.schema import Config
from spell_megatron.planner.activations import element_bytes
from spell_megatron.planner.gpus import Assumptions
from spell_megatron.planner.memory import TrainerMemory
from spell_megatron.planner.model_size import ModelSize
from spell_megatron.rollout.server import ALONE

MOST = 0.92
"""Largest share of a shared GPU that the plan gives to an engine. It is vLLM's own default."""


class Phase(NamedTuple):
    """Bytes on a GPU at the peak of a phase."""

    name: str
    trainer: int
    engine: int

    @property
    def total(self) -> int:
        return self.trainer + self.engine


@dataclass(frozen=True)
class EngineMemory:
    """Bytes per GPU of one vLLM engine."""

    share: float
    """Of the GPU's memory, that the engine may use (vLLM's --gpu-memory-utilization)."""
    weights: int
    kv_per_token: int
    kv_cache: int
    sequences: float
    """Number of sequences of the longest length that fit the KV cache."""


class HostMemory(NamedTuple):
    """Bytes of a node's memory."""

    swapped: int
    """Pinned: what leaves the trainer's GPUs while engines generate."""
    offloaded: int
    """Pinned: activations (`training.offload`)."""
    saved: int
    """A checkpoint that is being saved."""
    processes: int
    """Processes of trainer and engines by themselves."""

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return self.swapped + max(self.offloaded, self.saved) + self.processes


def left_on_gpu(config: Config, memory: TrainerMemory) -> int:
    """Bytes that a trainer rank holds on its GPU while engines generate on it."""
    return memory.state


def engine_share(config: Config, memory: TrainerMemory, gpu_memory: float) -> float:
    """Share of a GPU's memory that an engine may use: the one that is set, or what the trainer leaves of its GPU."""
    if config.rollout.gpu_memory_utilization is not None:
        return config.rollout.gpu_memory_utilization
    if not config.rollout.colocated:
        return ALONE
    left = gpu_memory - memory.reserve - left_on_gpu(config, memory)
    return max(0.0, min(MOST, math.floor(100 * left / gpu_memory) / 100))


def engine_memory(
    model: ModelSize, config: Config, share: float, gpu_memory: float, assume: Assumptions
) -> EngineMemory:
    """Memory of a vLLM engine, per GPU."""
    arch, tensor, size = model.arch, config.rollout.tensor_parallel, element_bytes(config)
    weights = model.parameters.all * size // tensor
    per_token = int(2 * arch.layers * max(arch.groups / tensor, 1) * arch.head_dim * size)
    cache = int(gpu_memory * share - weights - assume.engine_workspace)
    longest = config.rollout.sampling.longest_sequence
    return EngineMemory(share, weights, per_token, cache, max(cache, 0) / per_token / longest)


def trainer_phases(
    config: Config, memory: TrainerMemory, engine: EngineMemory, gpu_memory: float, assume: Assumptions
) -> Iterator[Phase]:
    """The phases of a trainer's GPU."""
    shared = config.rollout.colocated
    asleep = int(assume.engine_asleep) if shared else 0
    awake = int(gpu_memory * engine.share) if shared else 0
    yield Phase("update", memory.reserve + memory.state + memory.working, asleep)
    yield Phase("push", memory.reserve + memory.state + memory.buffers, asleep + engine.weights * shared)
    yield Phase("checkpoint", memory.reserve + memory.state + memory.gather, awake)
    if shared:
        yield Phase("generate", memory.reserve + left_on_gpu(config, memory), awake)


def host_memory(config: Config, memory: TrainerMemory, processes: int, assume: Assumptions) -> HostMemory:
    """Memory of a node that is full of trainer ranks."""
    ranks = min(assume.gpus_per_node, processes)
    return HostMemory(
        swapped=0,
        offloaded=ranks * memory.offloaded,
        saved=ranks * memory.saved,
        processes=int(ranks * assume.process * (2 if config.rollout.colocated else 1)),
    )
