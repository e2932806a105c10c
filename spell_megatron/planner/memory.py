"""Bytes that a run needs on its trainer ranks and engines.

Parameters, gradients and optimizer state are counted, not estimated: Megatron builds one rank of the real model at the
real number of processes, with a pretended process group and a device without memory (`backend.pretend`).
`planner.activations` estimates the rest.
"""

from __future__ import annotations

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
from spell_megatron.planner.gpus import Assumptions, Gpu
from spell_megatron.planner.model_size import ModelSize
from spell_megatron.training import backend
from spell_megatron.training.model import build_model
from spell_megatron.training.optimizer import build_optimizer
from spell_megatron.training.policy import PolicyModel
from spell_megatron.weights.buckets import BUCKET_BYTES


@dataclass(frozen=True)
class TrainerMemory:
    """Bytes on the fullest trainer rank, by what takes them."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    """What all layers keep from the forward for the backward pass."""
    layer: int
    """What the layer at work needs in the backward pass: activations computed again, and gradients."""
    head: int
    """What the vocabulary head needs. Its backward pass ends before the backward pass of the layers begins."""
    step: int
    """What the optimizer's step needs, when no activations are left: torch's AdamW makes a float32 copy of what it
    steps. The optimizers of transformer-engine and apex do not."""
    buffers: int
    """Weights on their way to the engines."""
    reserve: int
    host: int
    """Bytes in the host's memory, not the GPU's: activations that wait there (`training.offload`)."""

    @property
    def total(self) -> int:
        """Bytes of GPU memory at the peak."""
        working = max(self.activations + max(self.layer, self.head), self.step)
        return self.parameters + self.gradients + self.optimizer + working + self.buffers + self.reserve


class CountedMemory(NamedTuple):
    """Bytes that Megatron allocates on a trainer rank before the first update, and the rank's layers."""

    parameters: int
    gradients: int
    optimizer: int
    layers: range


@dataclass(frozen=True)
class EngineMemory:
    """Bytes per GPU of one vLLM engine."""

    weights: int
    kv_per_token: int
    kv_cache: int
    sequences: float
    """Number of sequences of the longest length that fit the KV cache."""


def trainer_memory(model: ModelSize, config: Config, processes: int, assume: Assumptions) -> TrainerMemory:
    """Memory of the fullest of `processes` trainer ranks on GPUs: the first or the last pipeline stage."""
    stages = config.training.parallel.pipeline
    ranks = {0, processes - processes // stages}
    found = [_rank_memory(model, config, rank, processes, assume) for rank in ranks]
    return replace(max(found, key=lambda m: m.total), host=max(m.host for m in found))


def _rank_memory(model: ModelSize, config: Config, rank: int, processes: int, assume: Assumptions) -> TrainerMemory:
    arch, stages = model.arch, config.training.parallel.pipeline
    counted = counted_memory(model.policy, config, rank, processes)
    stage = rank * stages // processes
    waiting = stages - stage  # microbatches between their forward and backward pass
    tokens = row_tokens(config)
    kept, layer = stage_activations(arch, config, counted.layers, tokens, waiting, gpu=True)
    head = head_bytes(arch, config, tokens) if stage == stages - 1 else 0
    scattered = 1 + assume.fragmentation
    return TrainerMemory(
        parameters=counted.parameters,
        gradients=counted.gradients,
        optimizer=counted.optimizer,
        activations=int(kept * scattered),
        layer=int(layer * scattered),
        head=int(head * scattered),
        step=step_bytes(config, counted.optimizer),
        buffers=2 * max(BUCKET_BYTES, model.parameters.largest_tensor * element_bytes(config)),
        reserve=int(assume.reserve),
        host=offloaded_bytes(arch, config, counted.layers, tokens, waiting, gpu=True),
    )


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
        copies = 3 if config.model.dtype == "bfloat16" else 2  # two moments and, for bfloat16, float32 weights
        first = get_transformer_layer_offset(model.config)
        layers = range(first, first + len(model.decoder.layers))
        return CountedMemory(parameters, gradients, copies * sum(p.nbytes for p in stepped), layers)


def step_bytes(config: Config, optimizer: int) -> int:
    """Bytes that torch's AdamW needs for a step if its state takes `optimizer` bytes: one of its float32 copies."""
    return optimizer // (3 if config.model.dtype == "bfloat16" else 2)


def engine_memory(model: ModelSize, config: Config, gpu: Gpu, assume: Assumptions) -> EngineMemory:
    """Memory of a vLLM engine, per GPU."""
    arch, tensor, size = model.arch, config.rollout.tensor_parallel, element_bytes(config)
    weights = model.parameters.all * size // tensor
    per_token = int(2 * arch.layers * max(arch.groups / tensor, 1) * arch.head_dim * size)
    cache = int(gpu.memory * config.rollout.gpu_memory_utilization - weights - assume.engine_workspace)
    return EngineMemory(weights, per_token, cache, max(cache, 0) / per_token / config.rollout.sampling.longest_sequence)
