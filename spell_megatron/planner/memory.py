"""Bytes that a run needs on its trainer ranks and engines.

Parameters, gradients and optimizer state are counted, not estimated: Megatron builds one rank of the real model at the
real number of processes, on a process group that is not there and a device without memory (`backend.pretend`).
Activations are a formula, because mixture-of-experts layers cannot be traced without data. The formula lists what
autograd keeps of every layer with the plain-torch layer spec; tests and `benchmarks/planner_memory.py` compare it with
measured peaks. transformer-engine's fused layers keep less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from spell_megatron.config.schema import Config
from spell_megatron.planner.gpus import Assumptions, Gpu
from spell_megatron.training import backend
from spell_megatron.training.cost import training_cost
from spell_megatron.training.layout import context_split
from spell_megatron.training.logprobs import VOCABULARY_BLOCK
from spell_megatron.training.model import build_model
from spell_megatron.training.optimizer import build_optimizer
from spell_megatron.training.policy import Architecture, PolicyModel
from spell_megatron.training.prefix_tree import Cost
from spell_megatron.weights.names import rules
from spell_megatron.weights.reshard import BUCKET_BYTES


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest trainer rank."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    """Kept from the forward for the backward pass, of all layers."""
    layer: int
    """Of the layer at work in the backward pass: what is computed again, and gradients on their way."""
    head: int
    """Of the vocabulary head at work, which is done before the backward pass of the layers begins."""
    step: int
    """Of the optimizer's step, when there are no activations any more: a float32 copy of what it steps (torch's AdamW;
    those of transformer-engine and apex need none)."""
    buffers: int
    reserve: int
    host: int
    """In the memory of the host, not the GPU's: activations that wait there (`training.offload`)."""

    @property
    def total(self) -> int:
        working = max(self.activations + max(self.layer, self.head), self.step)
        return self.parameters + self.gradients + self.optimizer + working + self.buffers + self.reserve


@dataclass(frozen=True)
class Engine:
    """One vLLM engine, per GPU in bytes; `sequences` of the longest length fit its KV cache."""

    weights: int
    kv_per_token: int
    kv_cache: int
    sequences: float


@dataclass(frozen=True)
class Model:
    """What the plans of a model have in common."""

    policy: PolicyModel
    cost: Cost
    parameters: int
    expert_parameters: int
    largest: int
    """Parameters of the largest Hugging Face tensor."""

    @classmethod
    def of(cls, policy: PolicyModel) -> Model:
        sizes = [(rule.expert, math.prod(shape)) for rule in rules(policy).values() for shape in rule.shapes]
        return cls(
            policy,
            training_cost(policy.arch),
            sum(size for _, size in sizes),
            sum(size for expert, size in sizes if expert is not None),
            max(size for _, size in sizes),
        )

    @property
    def arch(self) -> Architecture:
        return self.policy.arch


def row_tokens(config: Config) -> int:
    """Tokens of the longest row that the trainer may meet."""
    sampling = config.rollout.sampling
    return max(config.training.tokens_per_microbatch, sampling.max_prompt_tokens + sampling.max_response_tokens)


def trainer_memory(model: Model, config: Config, processes: int, assume: Assumptions) -> Memory:
    """Bytes of the fullest of `processes` trainer ranks on GPUs: the first or the last pipeline stage."""
    stages = config.training.parallel.pipeline
    ranks = {0, processes - processes // stages}
    found = [_rank_memory(model, config, rank, processes, assume) for rank in ranks]
    return replace(max(found, key=lambda m: m.total), host=max(m.host for m in found))


def _rank_memory(model: Model, config: Config, rank: int, processes: int, assume: Assumptions) -> Memory:
    arch, stages = model.arch, config.training.parallel.pipeline
    parameters, gradients, optimizer, layers = counted_memory(model.policy, config, rank, processes)
    stage = rank * stages // processes
    tokens = row_tokens(config)
    kept, layer = stage_activations(arch, config, layers, tokens, stages - stage, gpu=True)
    head = head_bytes(arch, config, tokens) if stage == stages - 1 else 0
    largest = model.largest * element_bytes(config)
    return Memory(
        parameters,
        gradients,
        optimizer,
        *(int(part * (1 + assume.fragmentation)) for part in (kept, layer, head)),
        step_bytes(config, optimizer),
        2 * max(BUCKET_BYTES, largest),
        int(assume.reserve),
        offloaded_bytes(arch, config, layers, tokens, stages - stage, gpu=True),
    )


def counted_memory(policy: PolicyModel, config: Config, rank: int, processes: int) -> tuple[int, int, int, range]:
    """Bytes of parameters, gradients and optimizer state of one rank, and the layers that it holds.

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
        return parameters, gradients, copies * sum(p.nbytes for p in stepped), layers


def stage_activations(
    arch: Architecture, config: Config, layers: range, tokens: int, microbatches: int, gpu: bool
) -> tuple[int, int]:
    """Bytes of activations that a pipeline stage keeps at most, and of those of the layer at work.

    Args:
        layers: those of the stage.
        tokens: of each row.
        microbatches: how many the stage has begun and not yet gone back through.
        gpu: torch's fused RMSNorm of GPUs, which keeps its input alone; on CPUs its parts keep float32 copies.
    """
    training = config.training
    own = math.ceil(tokens / training.parallel.context)
    kept = whole = largest_feed_forward = 0
    for layer in layers:
        attention, feed_forward = layer_activations(arch, config, arch.moe_layers[layer], own, gpu)
        whole = max(whole, attention + feed_forward)
        if training.recompute == "full":
            kept += 0 if training.offload else own * arch.hidden * element_bytes(config) // training.parallel.tensor
        elif training.recompute == "selective":
            kept += attention
        else:
            kept += attention + feed_forward
        largest_feed_forward = max(largest_feed_forward, feed_forward)
    again = {"full": whole, "selective": largest_feed_forward, "none": 0}[training.recompute]
    moe = any(arch.moe_layers[layer] for layer in layers)
    return microbatches * kept, again + _passing(arch, config, moe, own)


def offloaded_bytes(
    arch: Architecture, config: Config, layers: range, tokens: int, microbatches: int, gpu: bool
) -> int:
    """Bytes of a stage's activations in the memory of its host (`training.offload`): inputs of layers and final norm.

    Args: those of `stage_activations`; gpu: of pinned memory, which torch allocates in powers of two.
    """
    training = config.training
    if not training.offload:
        return 0
    own = math.ceil(tokens / training.parallel.context)
    one = own * arch.hidden * element_bytes(config) // training.parallel.tensor
    if gpu:
        one = 1 << (one - 1).bit_length()
    return microbatches * (len(layers) + (arch.layers - 1 in layers)) * one


def layer_activations(arch: Architecture, config: Config, moe: bool, tokens: int, gpu: bool) -> tuple[int, int]:
    """Bytes that the backward pass of a layer needs of its attention (with both norms) and of its feed-forward.

    Args:
        tokens: those of this context-parallel rank.
    """
    size, tensor = element_bytes(config), config.training.parallel.tensor
    expert_tensor = config.training.parallel.expert_tensor
    hidden = arch.hidden / tensor  # sequence parallelism cuts the residual stream and what the norms keep
    queries = arch.heads * arch.head_dim / tensor
    keys = max(arch.groups / tensor, 1) * arch.head_dim
    normed = size if gpu else 8  # per element: the input, or float32 copies of input and result
    attention = 2 * (hidden * normed + 4 / tensor + hidden * size)  # norms, and the inputs of the layers after them
    mixed = (queries + 2 * keys) * size
    if arch.qk_norm:
        attention += (queries + keys) * normed + 4 * (queries + keys) / arch.head_dim
    attention += mixed
    attention += 4 * arch.head_dim * size  # cosine and sine, twice
    attention += (2 * queries + keys) * size + 4 * queries / arch.head_dim  # query, key, output; log-sum-exp
    swapping, groups = context_split(arch, config.training.parallel)
    spread = math.lcm(max(arch.groups // tensor, 1), swapping) * arch.head_dim
    attention += 2 * (groups * spread - keys) * size  # copies of keys and values, and those of other ranks
    if moe:
        width = arch.expert_ffn / expert_tensor
        copies = arch.experts_per_token * expert_tensor / tensor
        feed_forward = copies * (arch.hidden + 6 * width) * size + arch.experts * 5 / tensor + 20 * copies
    else:
        feed_forward = 5 * arch.ffn / tensor * size
    return int(attention * tokens), int(feed_forward * tokens)


def _passing(arch: Architecture, config: Config, moe: bool, tokens: int) -> int:
    """Bytes of gradients and intermediate results on their way through the layer at work (fitted to measurements)."""
    size, parallel = element_bytes(config), config.training.parallel
    passing = 3 * arch.hidden / parallel.tensor
    if moe:
        width = arch.expert_ffn / parallel.expert_tensor
        copies = arch.experts_per_token * parallel.expert_tensor / parallel.tensor
        sent = parallel.expert * parallel.expert_tensor > 1  # what the dispatcher sends and receives, there and back
        passing += copies * (3 * width + (6 if sent else 2) * arch.hidden)
    else:
        passing += 3 * arch.ffn / parallel.tensor
    return int(passing * size * tokens)


def head_bytes(arch: Architecture, config: Config, tokens: int) -> int:
    """Bytes of the vocabulary head at work on a row of which `tokens` may all predict (an upper bound): the gradient
    of the hidden states, one chunk of float32 logits, and what a block of the vocabulary needs beside them."""
    parallel, sampling, size = config.training.parallel, config.rollout.sampling, element_bytes(config)
    own = math.ceil(tokens / parallel.context)
    predicting = min(own, config.selfplay.group_size * sampling.max_response_tokens)
    chunk, vocabulary = min(config.training.logprob_chunk, predicting), math.ceil(arch.vocabulary / parallel.tensor)
    block = min(VOCABULARY_BLOCK, vocabulary)
    forward = 4 * chunk * block  # exponentials
    # Gradients of all hidden states and of a chunk's; a block's logits or their gradient in the model's type.
    backward = own * arch.hidden * size + chunk * arch.hidden * (4 + size) + chunk * block * size
    if size < 4:  # the product of that gradient and the hidden states, which CPUs copy to add it up in float32
        backward += max(chunk, block) * arch.hidden * (size + 4)
    gathered = own * arch.hidden * size if parallel.tensor > 1 else 0
    return 4 * chunk * vocabulary + gathered + max(forward, backward)


def step_bytes(config: Config, optimizer: int) -> int:
    """Bytes that torch's AdamW needs for a step, given those of its state: one of its two or three float32 copies."""
    return optimizer // (3 if config.model.dtype == "bfloat16" else 2)


def element_bytes(config: Config) -> int:
    return 2 if config.model.dtype == "bfloat16" else 4


def engine_memory(model: Model, config: Config, gpu: Gpu, assume: Assumptions) -> Engine:
    """Memory of a vLLM engine per GPU."""
    from spell_megatron.rollout.engines import longest_sequence

    arch, tensor, size = model.arch, config.rollout.tensor_parallel, element_bytes(config)
    weights = model.parameters * size // tensor
    per_token = int(2 * arch.layers * max(arch.groups / tensor, 1) * arch.head_dim * size)
    cache = int(gpu.memory * config.rollout.gpu_memory_utilization - weights - assume.engine_workspace)
    return Engine(weights, per_token, cache, max(cache, 0) / per_token / longest_sequence(config))
