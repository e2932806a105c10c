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
from spell_megatron.training.policy import Architecture
from spell_megatron.training.swap import Left, left

MOST = 0.92
"""Largest share of a shared GPU that the plan gives to an engine. It is vLLM's own default."""
BLOCK = 16
"""Tokens of a block of vLLM's KV cache. A window begins and ends within blocks."""


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
    kv_per_sequence: int
    """Besides: states of gated delta nets, and windows of attention."""
    kv_cache: int
    sequences: float
    """Number of sequences of the longest length that fit the KV cache."""


class HostMemory(NamedTuple):
    """Bytes of a node's memory."""

    swapped: int
    """Pinned: what leaves the trainer's GPUs while engines generate."""
    optimizer: int
    """Pinned: the optimizer's state (`training.optimizer.offload`)."""
    offloaded: int
    """Pinned: activations (`training.offload`)."""
    saved: int
    """A checkpoint that is being saved."""
    processes: int
    """Processes of trainer and engines by themselves."""
    total: int
    """At the peak."""


def leaving(config: Config, memory: TrainerMemory, pushing: bool = False) -> Left:
    """Bytes that leave a trainer's GPU while engines generate on it, or while it pushes its weights to them."""
    what = config.training.swap
    if what == "auto":
        what = "all" if config.rollout.colocated else "none"
    if what == "all" and pushing:
        what = "state"
    return left(what, memory.parameters, memory.gradients, memory.optimizer)


def staying(config: Config, memory: TrainerMemory, pushing: bool = False) -> int:
    """Bytes that stay on a trainer's GPU while engines generate on it, or while it pushes its weights to them."""
    return memory.reserve + memory.state - leaving(config, memory, pushing).gpu


def engine_share(config: Config, memory: TrainerMemory, gpu_memory: float) -> float:
    """Share of a GPU's memory that an engine may use: the one that is set, or what the trainer leaves of its GPU."""
    if config.rollout.gpu_memory_utilization is not None:
        return config.rollout.gpu_memory_utilization
    if not config.rollout.colocated:
        return ALONE
    room = gpu_memory - staying(config, memory)
    return max(0.0, min(MOST, math.floor(100 * room / gpu_memory) / 100))


def engine_memory(
    model: ModelSize, config: Config, share: float, gpu_memory: float, assume: Assumptions
) -> EngineMemory:
    """Memory of a vLLM engine, per GPU."""
    arch, tensor, size = model.arch, config.rollout.tensor_parallel, element_bytes(config)
    weights = model.parameters.all * size // tensor
    if config.rollout.quantization == "fp8":
        vocabulary = (1 if arch.tied else 2) * arch.vocabulary * arch.hidden  # stays as it is
        weights -= (size - 1) * (model.parameters.all - vocabulary) // tensor
    windowed = sum(arch.window_layers)
    layer = 2 * max(arch.groups / tensor, 1) * arch.head_dim * size
    per_token = int(layer * (arch.layers - sum(arch.delta_layers) - windowed))
    longest = config.rollout.sampling.longest_sequence
    per_sequence = int(layer * windowed * min(arch.window + BLOCK, longest)) + _state_bytes(arch, size) // tensor
    cache = int(gpu_memory * share - weights - assume.engine_workspace)
    sequences = max(cache, 0) / (per_token * longest + per_sequence)
    return EngineMemory(share, weights, per_token, per_sequence, cache, sequences)


def _state_bytes(arch: Architecture, size: int) -> int:
    """Bytes of a sequence's states in an engine: float32 ones of gated delta nets, and what their convolutions see."""
    if (net := arch.delta_net) is None:
        return 0
    state = 4 * net.heads * net.key_dim * net.value_dim + (net.width - 1) * net.channels * size
    return sum(arch.delta_layers) * state


def trainer_phases(
    config: Config, memory: TrainerMemory, engine: EngineMemory, gpu_memory: float, assume: Assumptions
) -> Iterator[Phase]:
    """The phases of a trainer's GPU in their order in a step."""
    shared = config.rollout.colocated
    asleep = int(assume.engine_asleep) if shared else 0
    yield Phase("update", memory.reserve + memory.state + memory.working, asleep)
    yield Phase("checkpoint", memory.reserve + memory.state + memory.gather, asleep)
    yield Phase("push", staying(config, memory, pushing=True) + memory.buffers, asleep + engine.weights * shared)
    if shared:
        yield Phase("generate", staying(config, memory), int(gpu_memory * engine.share))


def host_memory(config: Config, memory: TrainerMemory, processes: int, assume: Assumptions) -> HostMemory:
    """Memory of a node that is full of trainer ranks."""
    ranks = min(assume.gpus_per_node, processes)
    swapped, optimizer, offloaded, saved = (
        ranks * nbytes for nbytes in (leaving(config, memory).host, memory.kept, memory.offloaded, memory.saved)
    )
    itself = int(ranks * assume.process * (2 if config.rollout.colocated else 1))
    # Pinned memory is kept for the next time. A checkpoint is being saved between updates, or beside them.
    turns = offloaded + saved if config.checkpoint.asynchronous else max(offloaded, saved)
    return HostMemory(swapped, optimizer, offloaded, saved, itself, swapped + optimizer + turns + itself)
