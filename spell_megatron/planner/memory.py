"""Bytes that a run needs on its trainer ranks, by what takes them.

Parameters, gradients and optimizer state are counted, not estimated: Megatron builds one rank of the real model at the
real number of processes, with a pretended process group and a device without memory (`backend.pretend`). The search for
layouts uses a formula for them. `planner.activations` estimates the rest, and `planner.phases` says what is there when.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from spell_megatron.config.schema import Config
from spell_megatron.planner.activations import (
    element_bytes,
    head_bytes,
    offloaded_bytes,
    row_tokens,
    stage_activations,
)
from spell_megatron.planner.gpus import Assumptions
from spell_megatron.planner.model_size import ModelSize
from spell_megatron.training import backend
from spell_megatron.training.model import build_model
from spell_megatron.training.optimizer import build_optimizer
from spell_megatron.training.optimizer_on_host import PIECE_BYTES
from spell_megatron.training.policy import PolicyModel
from spell_megatron.training.stages import stage_layers
from spell_megatron.weights.buckets import BUCKET_BYTES


@dataclass(frozen=True)
class TrainerMemory:
    """Bytes on the fullest trainer rank, by what takes them."""

    parameters: int
    gradients: int
    optimizer: int
    """On the GPU: not with `training.optimizer.offload`."""
    activations: int
    """What all layers keep from the forward for the backward pass."""
    layer: int
    """What the layer at work needs in the backward pass: activations computed again, and gradients."""
    head: int
    """What the vocabulary head needs. Its backward pass ends before the backward pass of the layers begins."""
    step: int
    """What the optimizer's step needs, when no activations are left: torch's AdamW makes a float32 copy of what it
    steps. The optimizers of transformer-engine and apex do not. A state in host memory comes in pieces."""
    buffers: int
    """Weights on their way to the engines, at the least: a push uses what is free (`weights.buckets`)."""
    gather: int
    """What a checkpoint gathers of the optimizer's state at a time: one of its three float32 parts, of all ranks that
    share a parameter, before it goes to host memory."""
    reserve: int
    offloaded: int
    """Bytes in the host's memory, not the GPU's: activations that wait there (`training.offload`)."""
    saved: int
    """Bytes in the host's memory while a checkpoint is saved: weights and the gathered state of the optimizer."""
    kept: int
    """Bytes in the host's memory, not the GPU's: the optimizer's state (`training.optimizer.offload`)."""

    @property
    def state(self) -> int:
        """Bytes of weights, gradients and optimizer state."""
        return self.parameters + self.gradients + self.optimizer

    @property
    def working(self) -> int:
        """Bytes that an update needs at its peak besides the state."""
        return max(self.activations + max(self.layer, self.head), self.step)


class CountedMemory(NamedTuple):
    """Bytes that Megatron allocates on a trainer rank before the first update, and the rank's layers."""

    parameters: int
    gradients: int
    optimizer: int
    layers: range


Count = Callable[[ModelSize, Config, int, int], CountedMemory]
"""`count` or `estimate`."""


def trainer_memory(
    model: ModelSize, config: Config, processes: int, assume: Assumptions, counting: Count | None = None
) -> TrainerMemory:
    """Memory of the fullest of `processes` trainer ranks on GPUs: of the first or the last pipeline stage, or of any
    stage of a hybrid model, whose stages have different numbers of layers.

    counting: how weights, gradients and optimizer state are found; None: `count`.
    """
    stages = config.training.parallel.pipeline
    ends = range(stages) if model.arch.delta_net else sorted({0, stages - 1})
    ranks = [stage * processes // stages for stage in ends]
    found = [_rank_memory(model, config, rank, processes, assume, counting or count) for rank in ranks]
    fullest = max(found, key=lambda m: m.state + m.working)
    names = ("offloaded", "saved", "kept", "gather", "buffers")
    return replace(fullest, **{name: max(getattr(memory, name) for memory in found) for name in names})


def _rank_memory(
    model: ModelSize, config: Config, rank: int, processes: int, assume: Assumptions, counting: Count
) -> TrainerMemory:
    arch, stages = model.arch, config.training.parallel.pipeline
    counted = counting(model, config, rank, processes)
    stage = rank * stages // processes
    waiting = stages - stage  # microbatches between their forward and backward pass
    tokens = row_tokens(config)
    kept, layer = stage_activations(arch, config, counted.layers, tokens, waiting, gpu=True)
    head = head_bytes(arch, config, tokens) if stage == stages - 1 else 0
    gather, saved = _checkpoint_bytes(model, config, stage, processes)
    scattered = 1 + assume.fragmentation
    on_host = counted.optimizer if config.training.optimizer.offload else 0
    piece = min(on_host, PIECE_BYTES)
    return TrainerMemory(
        parameters=counted.parameters,
        gradients=counted.gradients,
        optimizer=counted.optimizer - on_host,
        activations=int(kept * scattered),
        layer=int(layer * scattered),
        head=int(head * scattered),
        step=piece + step_bytes(config, piece) if on_host else step_bytes(config, counted.optimizer),
        buffers=2 * max(BUCKET_BYTES, model.parameters.largest_tensor * element_bytes(config)),
        gather=gather,
        reserve=int(assume.reserve),
        offloaded=offloaded_bytes(arch, config, counted.layers, tokens, waiting, gpu=True),
        saved=counted.parameters + saved,
        kept=on_host,
    )


def count(model: ModelSize, config: Config, rank: int, processes: int) -> CountedMemory:
    """Weights, gradients and optimizer state of a rank, as Megatron builds it."""
    return counted_memory(model.policy, config, rank, processes)


def estimate(model: ModelSize, config: Config, rank: int, processes: int) -> CountedMemory:
    """What `count` finds but for padding, by a formula; takes no time."""
    parallel = config.training.parallel
    stage = rank * parallel.pipeline // processes
    parts = model.rank_parameters(config.training, stage)
    stepped = sum(size / sharers for size, sharers in zip(parts, _sharers(config, processes), strict=True))
    size = element_bytes(config)
    return CountedMemory(
        size * sum(parts),
        4 * sum(parts),
        int(4 * _copies(config) * stepped),
        stage_layers(model.arch, parallel.pipeline, config.training.tokens_per_microbatch)[stage],
    )


def _sharers(config: Config, processes: int) -> tuple[int, int]:
    """Ranks that share the optimizer state of (a parameter outside of experts, one of an expert)."""
    parallel = config.training.parallel
    if not config.training.optimizer.distributed:
        return 1, 1
    return processes // (parallel.tensor * parallel.pipeline), processes // parallel.expert_ranks


def _copies(config: Config) -> int:
    """Float32 numbers of optimizer state per parameter: two moments and, for bfloat16, the weight."""
    return 3 if config.model.dtype == "bfloat16" else 2


def _checkpoint_bytes(model: ModelSize, config: Config, stage: int, processes: int) -> tuple[int, int]:
    """Bytes that a checkpoint takes of the optimizer's state on a rank of a stage: (on the GPU, in host memory).

    Megatron's "fully reshardable" state: of each group of parameters (experts, and all others), one part of the state
    after the other is gathered on the GPUs of all ranks that share it, copied to host memory and joined there.
    """
    parts = model.rank_parameters(config.training, stage)
    if not config.training.optimizer.distributed:
        return 0, 4 * _copies(config) * sum(parts)
    shared = tuple(zip(parts, _sharers(config, processes), strict=True))
    gather = max(4 * size + 4 * size // sharers if sharers > 1 else 0 for size, sharers in shared)
    joining = max(8 * size + 12 * size // sharers for size, sharers in shared)
    return gather, 12 * sum(parts) + joining


def counted_memory(policy: PolicyModel, config: Config, rank: int, processes: int) -> CountedMemory:
    """Parameters, gradients and optimizer state of one trainer rank.

    Megatron builds them on a device without memory. The optimizer's two moments, which it makes at the first
    update, have the size and type of the parameters that it steps.
    """
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    with backend.pretend(policy, config.training.parallel, rank, processes), torch.device("meta"):
        model = build_model(policy, config.training)
        ddp, optimizer = build_optimizer(model, config.training.optimizer, gloo=False)
        parameters = sum(p.nbytes for p in model.parameters())
        gradients = sum(b.grad_data.nbytes for b in ddp.buffers + ddp.expert_parallel_buffers)
        stepped = [
            p
            for part in getattr(optimizer, "chained_optimizers", [optimizer])
            if part.optimizer is not None
            for group in part.optimizer.param_groups
            for p in group["params"]
        ]
        first = get_transformer_layer_offset(model.config)
        layers = range(first, first + len(model.decoder.layers))
        return CountedMemory(parameters, gradients, _copies(config) * sum(p.nbytes for p in stepped), layers)


def step_bytes(config: Config, optimizer: int) -> int:
    """Bytes that torch's AdamW needs for a step if its state takes `optimizer` bytes: one of its float32 copies."""
    return optimizer // _copies(config)
