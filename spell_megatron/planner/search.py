"""Will a run fit its GPUs, and how long will an update take? Answered on any machine, without weights.

Parameters, gradients and optimizer state are counted, not estimated: one rank of the real model at the real number
of processes is built by Megatron itself, on a process group that is not there and a device without memory
(`backend.pretend`). Activations are a formula, because mixture-of-experts layers cannot be traced without data: it
lists what autograd keeps of every layer with the plain-torch layer spec, and tests and
`benchmarks/planner_memory.py` hold it against measured peaks. transformer-engine's fused layers keep less. Times are
estimates from FLOPs and bandwidths (`Assumptions`), not measurements.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from transformers import PretrainedConfig

from spell_megatron.config.schema import Config, ParallelConfig
from spell_megatron.training import backend
from spell_megatron.training.architecture import Architecture, architecture
from spell_megatron.training.layout import context_split, layout_faults
from spell_megatron.training.logprobs import VOCABULARY_BLOCK
from spell_megatron.training.model import build_model
from spell_megatron.training.prefix_tree import Cost
from spell_megatron.training.trainer import build_optimizer, training_cost
from spell_megatron.weights.names import hf_shapes
from spell_megatron.weights.reshard import BUCKET_BYTES


@dataclass(frozen=True)
class Gpu:
    """What a planner has to know of a GPU. Figures are the makers' (dense bfloat16, no sparsity)."""

    memory: float
    """Bytes, as the driver reports them."""
    flops: float
    """bfloat16 matrix FLOPs per second."""
    bandwidth: float
    """Bytes per second of its memory."""
    link: float
    """Bytes per second to the other GPUs of its node, one way."""


TRIES = 12
"""Layouts that `cheapest` builds."""

GPUS = {
    "A100-80G": Gpu(81920 * 2**20, 312e12, 2.04e12, 300e9),
    "H100-80G": Gpu(81559 * 2**20, 989e12, 3.35e12, 450e9),
    "H200-141G": Gpu(143771 * 2**20, 989e12, 4.8e12, 450e9),
    "B200": Gpu(183359 * 2**20, 2250e12, 8.0e12, 900e9),
}


@dataclass(frozen=True)
class Assumptions:
    """What the estimates take for granted. None of it was measured on the GPUs above by this project."""

    gpus_per_node: int = 8
    matrix_efficiency: float = 0.45
    """Share of a GPU's FLOPs that training and prefill reach."""
    memory_efficiency: float = 0.6
    """Share of a GPU's memory bandwidth that decoding reaches."""
    link_efficiency: float = 0.7
    """Share of the links' bandwidth that collectives reach; none of it is hidden behind computation."""
    network: float = 50e9
    """Bytes per second of each GPU to other nodes (400 Gbit/s)."""
    host: float = 25e9
    """Bytes per second between a GPU and the memory of its host, one way (PCIe 4)."""
    reserve: float = 3 * 2**30
    """Bytes per GPU for the CUDA context, NCCL and libraries' workspaces."""
    fragmentation: float = 0.05
    """Share of the activations lost between the allocator's blocks."""
    mixed: float = 0.5
    """Share of the questions whose answers are neither all right nor all wrong."""
    prompt: float = 1.0
    """Length of prompts over documents as a share of the longest one allowed."""
    response: float = 0.5
    """Length of questions and answers as a share of the longest one allowed."""
    judged: float = 500
    """Tokens of the verifier's prompt: instructions, question and two short answers."""
    verdict: float = 0.25
    """Length of judgments as a share of the longest one allowed. They compare two short answers; with this share the
    G judgments of each answer take about half the time of the answers, as the paper reports."""
    engine_workspace: float = 4 * 2**30
    """Bytes that an engine needs per GPU beside weights and KV cache."""


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
class Times:
    """Seconds of one step, by what takes them."""

    compute: float
    communication: float
    bubble: float
    """Pipeline stages waiting for each other."""
    prefill: float
    decode: float
    refit: float

    @property
    def update(self) -> float:
        return self.compute + self.communication + self.bubble

    @property
    def step(self) -> float:
        return self.update + self.prefill + self.decode + self.refit


@dataclass(frozen=True)
class Engine:
    """One vLLM engine, per GPU in bytes; `sequences` of the longest length fit its KV cache."""

    weights: int
    kv_per_token: int
    kv_cache: int
    sequences: float


@dataclass(frozen=True)
class Plan:
    """A layout and what it needs."""

    processes: int
    parallel: ParallelConfig
    recompute: str
    offload: bool
    memory: Memory
    times: Times
    gpu: Gpu

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.gpu.memory

    @property
    def gpu_seconds(self) -> float:
        """GPU seconds of the trainer per update."""
        return self.processes * self.times.update


@dataclass(frozen=True)
class Model:
    """What the plans of a model have in common."""

    hf_config: PretrainedConfig
    arch: Architecture
    cost: Cost
    parameters: int
    expert_parameters: int
    largest: int
    """Parameters of the largest Hugging Face tensor."""

    @classmethod
    def of(cls, hf_config: PretrainedConfig) -> Model:
        sizes = {name: math.prod(shape) for name, shape in hf_shapes(hf_config).items()}
        return cls(
            hf_config,
            architecture(hf_config),
            training_cost(hf_config),
            sum(sizes.values()),
            sum(size for name, size in sizes.items() if ".mlp.experts." in name),
            max(sizes.values()),
        )


# ---------------------------------------------------------------------------------------- memory


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
    parameters, gradients, optimizer, layers = counted_memory(model.hf_config, config, rank, processes)
    stage = rank * stages // processes
    tokens = row_tokens(config)
    kept, layer = stage_activations(arch, config, layers, tokens, stages - stage, gpu=True)
    head = head_bytes(arch, config, tokens) if stage == stages - 1 else 0
    largest = model.largest * _element(config)
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


def counted_memory(
    hf_config: PretrainedConfig, config: Config, rank: int, processes: int
) -> tuple[int, int, int, range]:
    """Bytes of parameters, gradients and optimizer state of one rank, and the layers that it holds.

    Megatron builds them on a device without memory. The optimizer's two moments, which it makes at the first
    update, have the size and type of the parameters that it steps.
    """
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    with backend.pretend(config, rank, processes), torch.device("meta"):
        model = build_model(hf_config, config)
        ddp, optimizer = build_optimizer(config, model, gloo=False)
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
            kept += 0 if training.offload else own * arch.hidden * _element(config) // training.parallel.tensor
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
    one = own * arch.hidden * _element(config) // training.parallel.tensor
    if gpu:
        one = 1 << (one - 1).bit_length()
    return microbatches * (len(layers) + (arch.layers - 1 in layers)) * one


def layer_activations(arch: Architecture, config: Config, moe: bool, tokens: int, gpu: bool) -> tuple[int, int]:
    """Bytes that the backward pass of a layer needs of its attention (with both norms) and of its feed-forward.

    Args:
        tokens: those of this context-parallel rank.
    """
    size, tensor = _element(config), config.training.parallel.tensor
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
    size, parallel = _element(config), config.training.parallel
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
    parallel, sampling, size = config.training.parallel, config.rollout.sampling, _element(config)
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


def _element(config: Config) -> int:
    return 2 if config.model.dtype == "bfloat16" else 4


def engine_memory(model: Model, config: Config, gpu: Gpu, assume: Assumptions) -> Engine:
    """Memory of a vLLM engine per GPU."""
    from spell_megatron.rollout.engines import longest_sequence

    arch, tensor, size = model.arch, config.rollout.tensor_parallel, _element(config)
    weights = model.parameters * size // tensor
    per_token = int(2 * arch.layers * max(arch.groups / tensor, 1) * arch.head_dim * size)
    cache = int(gpu.memory * config.rollout.gpu_memory_utilization - weights - assume.engine_workspace)
    return Engine(weights, per_token, cache, max(cache, 0) / per_token / longest_sequence(config))


# ---------------------------------------------------------------------------------------- time


def step_times(model: Model, config: Config, processes: int, gpu: Gpu, assume: Assumptions) -> Times:
    """Estimated seconds of one step, with prompts and responses of the assumed lengths."""
    arch, training, parallel = model.arch, config.training, config.training.parallel
    replicas = processes // (parallel.tensor * parallel.pipeline * parallel.context)
    update, tokens = _update_work(config, model.cost, assume)
    again = {"none": 0.0, "selective": _feed_forward_share(arch, model.cost) / 3, "full": 1 / 3}[training.recompute]
    compute = update * (1 + again) / (processes * gpu.flops * assume.matrix_efficiency)
    microbatches = max(1, tokens / row_tokens(config) / replicas)
    bubble = compute * (parallel.pipeline - 1) / microbatches
    communication = _communication(model, config, processes, tokens / replicas, gpu, assume)
    prefill, decode = _rollout_times(model, config, gpu, assume)
    refit = model.parameters * _element(config) / (assume.network * assume.link_efficiency)
    return Times(compute, communication, bubble, prefill, decode, refit)


def _tree(cost: Cost, prompt: float, response: float, count: int) -> tuple[float, float]:
    """(FLOPs of forward and backward, tokens) of a prompt with `count` responses."""
    tokens = prompt + count * response
    pairs = prompt**2 / 2 + count * (response * prompt + response**2 / 2)
    return cost.token * tokens + cost.pair * pairs + cost.source * count * response, tokens


def _lengths(config: Config, assume: Assumptions) -> tuple[float, float, float, float]:
    """Assumed tokens of (prompt over documents, response, prompt of the verifier, verdict)."""
    sampling = config.rollout.sampling
    response = assume.response * sampling.max_response_tokens
    verdict = assume.verdict * (sampling.max_verdict_tokens or sampling.max_response_tokens)
    return assume.prompt * sampling.max_prompt_tokens, response, assume.judged, verdict


def _update_work(config: Config, cost: Cost, assume: Assumptions) -> tuple[float, float]:
    """(FLOPs, tokens) of the rows of an update, as `selfplay.batch.compose` puts it together."""
    play = config.selfplay
    prompt, response, judged, verdict = _lengths(config, assume)
    parts = [
        (play.groups, _tree(cost, prompt, response, play.group_size)),
        (play.groups * (1 + play.negatives_per_positive), _tree(cost, prompt, response, 1)),
        (
            play.groups * play.group_size * play.verifier.share / play.votes,
            _tree(cost, judged, verdict, play.votes),
        ),
    ]
    return sum(n * flops for n, (flops, _) in parts), sum(n * tokens for n, (_, tokens) in parts)


def _feed_forward_share(arch: Architecture, cost: Cost) -> float:
    """Share of the feed-forwards in the FLOPs of a token's linear layers."""
    attention = 6.0 * arch.layers * arch.hidden * arch.head_dim * (2 * arch.heads + 2 * arch.groups)
    return 1 - attention / cost.token


def _communication(model: Model, config: Config, processes: int, tokens: float, gpu: Gpu, assume: Assumptions) -> float:
    """Seconds of collectives per update of a replica that computes `tokens`, per rank and not overlapped."""
    arch, parallel, size = model.arch, config.training.parallel, _element(config)
    tensor, context, pipeline = parallel.tensor, parallel.context, parallel.pipeline
    expert, expert_tensor = parallel.expert, parallel.expert_tensor
    forwards = 2 if config.training.recompute == "full" else 1
    own = tokens / context
    layers = arch.layers / pipeline
    sparse = sum(arch.moe_layers) / pipeline

    def seconds(nbytes: float, ranks: int, stride: int) -> float:
        """Of a collective in which each rank sends or receives about `nbytes` (of which its own share stays)."""
        inside = ranks * stride <= assume.gpus_per_node
        speed = (gpu.link if inside else min(assume.network, gpu.link)) * assume.link_efficiency
        return nbytes * (ranks - 1) / ranks / speed

    # Sequence parallelism: a gather before and a scatter after each part of a layer; backward gathers inputs again.
    parts = 2 * layers - sparse
    total = seconds(own * arch.hidden * size * parts * (2 * forwards + 3), tensor, 1)
    swapping, groups = context_split(arch, parallel)
    keys = math.lcm(max(arch.groups // tensor, 1), swapping)
    exchanged = (2 * arch.heads / tensor + 2 * keys) * arch.head_dim
    total += seconds(own * exchanged * size * layers * (forwards + 1), swapping, tensor)
    gathered = groups * 2 * keys * arch.head_dim
    total += seconds(own * gathered * size * layers * (forwards + 1), groups, tensor * swapping)
    copies = arch.experts_per_token * expert_tensor / tensor
    total += seconds(own * copies * arch.hidden * size * 2 * sparse * (forwards + 1), expert, expert_tensor)
    total += seconds(own * copies * arch.hidden * size * 2 * sparse * (forwards + 1), expert_tensor, 1)
    if pipeline > 1:
        total += 2 * own * arch.hidden * size / tensor / (assume.network * assume.link_efficiency)
    experts = model.expert_parameters
    dense = model.parameters - experts
    copies_of_dense = processes // (tensor * pipeline)
    copies_of_experts = processes // (expert * expert_tensor * pipeline)
    if config.training.offload:
        total += 2 * own * arch.hidden * size / tensor * layers / assume.host
    total += seconds(dense / tensor / pipeline * (4 + size), copies_of_dense, tensor)
    total += seconds(experts / expert / expert_tensor / pipeline * (4 + size), copies_of_experts, expert)
    return total


def _rollout_times(model: Model, config: Config, gpu: Gpu, assume: Assumptions) -> tuple[float, float]:
    """Seconds of prefill and of decoding."""
    play, rollout = config.selfplay, config.rollout
    prompt, response, judged, verdict = _lengths(config, assume)
    questions = play.groups / assume.mixed
    engine = engine_memory(model, config, gpu, assume)
    forward = 2 * _tree(model.cost, prompt, 0, 0)[0] + play.group_size * _tree(model.cost, judged, 0, 0)[0]
    gpus = rollout.replicas * rollout.tensor_parallel
    prefill = questions * forward / 3 / (gpus * gpu.flops * assume.matrix_efficiency)
    # Answers to one question share the prompt's cache, but each of them reads it. Judgments see no documents.
    shared = prompt / play.group_size
    kinds = (
        (questions * (1 + play.group_size) * response, shared + response, prompt + response / 2),
        (questions * (response + play.group_size * play.votes * verdict), judged + verdict, judged + verdict / 2),
    )
    seconds = 0.0
    for tokens, kept, read in kinds:
        sequences = min(rollout.concurrency, max(engine.kv_cache, 0) / (engine.kv_per_token * kept))
        if sequences < 1:
            return prefill, math.inf
        nbytes = engine.weights + sequences * engine.kv_per_token * read
        per_second = sequences * gpu.bandwidth * assume.memory_efficiency / nbytes
        seconds += tokens / (per_second * rollout.replicas)
    return prefill, seconds


# ---------------------------------------------------------------------------------------- search


def plan(model: Model, config: Config, processes: int, gpu: Gpu, assume: Assumptions) -> Plan:
    """What the layout of `config` needs on `processes` GPUs."""
    return Plan(
        processes,
        config.training.parallel,
        config.training.recompute,
        config.training.offload,
        trainer_memory(model, config, processes, assume),
        step_times(model, config, processes, gpu, assume),
        gpu,
    )


def cheapest(model: Model, config: Config, processes: int, gpu: Gpu, assume: Assumptions) -> Iterator[Plan]:
    """Plans of other layouts on the same GPUs, those with the fastest updates first; ends after the first that fits.

    Tried are all layouts of powers of two (tensor parallelism inside a node) whose memory, roughly, is within the
    GPU's; at most TRIES of them are built.
    """
    arch = model.arch
    found = []
    modes = (("none", False), ("selective", False), ("full", False), ("full", True))
    for parallel in _layouts(arch, processes, assume):
        for recompute, offload in modes:
            update = {"parallel": parallel, "recompute": recompute, "offload": offload}
            other = config.model_copy(update={"training": config.training.model_copy(update=update)})
            if _rough_bytes(model, other, processes, assume) <= gpu.memory:
                times = step_times(model, other, processes, gpu, assume)
                found.append((times.update, len(found), other))
    for _, _, other in sorted(found, key=lambda entry: entry[:2])[:TRIES]:
        tried = plan(model, other, processes, gpu, assume)
        yield tried
        if tried.fits:
            return


def _layouts(arch: Architecture, processes: int, assume: Assumptions) -> Iterator[ParallelConfig]:
    powers = [2**i for i in range(processes.bit_length())]
    experts = powers if arch.experts else [1]
    for tensor in powers:
        for pipeline in powers:
            for context in powers:
                for expert in experts:
                    for expert_tensor in {1, tensor} if arch.experts else {1}:
                        layout = ParallelConfig(
                            processes=processes,
                            tensor=tensor,
                            pipeline=pipeline,
                            context=context,
                            expert=expert,
                            expert_tensor=expert_tensor,
                        )
                        if (
                            tensor <= assume.gpus_per_node
                            and processes % (tensor * pipeline * context) == 0
                            and processes % (expert * expert_tensor * pipeline) == 0
                            and not any(layout_faults(arch, layout))
                        ):
                            yield layout


def _rough_bytes(model: Model, config: Config, processes: int, assume: Assumptions) -> float:
    """Memory of a rank without building it; a little less than what `trainer_memory` counts."""
    arch, parallel = model.arch, config.training.parallel
    experts = model.expert_parameters
    dense = model.parameters - experts
    own_dense = dense / parallel.tensor / parallel.pipeline
    own_experts = experts / parallel.expert / parallel.expert_tensor / parallel.pipeline
    state = (own_dense + own_experts) * (_element(config) + 4)
    shards = processes if config.training.optimizer.distributed else 1
    state += 12 * (dense + experts) / parallel.pipeline / (shards / parallel.pipeline if shards > 1 else 1)
    tokens, layers = row_tokens(config), range(arch.layers // parallel.pipeline)
    activations = stage_activations(arch, config, layers, tokens, parallel.pipeline, gpu=True)
    return state + sum(activations) + assume.reserve


# ---------------------------------------------------------------------------------------- report

GIB = 2**30


def describe(plan: Plan) -> str:
    """A layout in one line: sizes above 1, data-parallel replicas, recompute and offload."""
    parallel = plan.parallel
    sizes = [
        f"{name} {getattr(parallel, name)}"
        for name in ("tensor", "pipeline", "context", "expert", "expert_tensor")
        if getattr(parallel, name) > 1
    ]
    replicas = plan.processes // (parallel.tensor * parallel.pipeline * parallel.context)
    return ", ".join([*sizes, f"data {replicas}", f"recompute {plan.recompute}", *["offload"] * plan.offload])


def report(model: Model, config: Config, plan: Plan, name: str, assume: Assumptions) -> Iterator[str]:
    """The plan in lines of text; `name` is the GPU's."""
    arch, sampling, gpu = model.arch, config.rollout.sampling, plan.gpu
    count = model.parameters
    idle = model.expert_parameters * (1 - arch.experts_per_token / arch.experts) if arch.experts else 0
    at_work = f", {(count - idle) / 1e9:.2f} billion at work per token" if idle else ""
    yield f"model     {count:,} parameters{at_work}"
    rows = f"rows of up to {row_tokens(config):,} tokens"
    yield f"trainer   {plan.processes} x {name}: {describe(plan)}; {rows}"
    notes = {
        "parameters": "counted on a rank of the real model",
        "gradients": "counted; float32",
        "optimizer": "counted; AdamW" + (" with float32 weights" if config.model.dtype == "bfloat16" else ""),
        "activations": "formula for the plain-torch layers, routing balanced",
        "layer": "formula: gradients of the layer at work, and what is computed again",
        "head": "formula: the vocabulary head at work, in turn with the layer: the larger one counts",
        "step": "torch's AdamW at work, when the three above are gone",
        "buffers": "weights on their way to the engines",
        "reserve": "assumed: CUDA context, NCCL, workspaces",
    }
    for part, note in notes.items():
        yield f"  {part:12} {getattr(plan.memory, part) / GIB:8.2f} GiB   {note}"
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    room = f"of {gpu.memory / GIB:.2f} on the fullest rank: {verdict}"
    yield f"  {'total':12} {plan.memory.total / GIB:8.2f} GiB   {room}"
    if plan.offload:
        host = plan.memory.host / GIB
        node = min(assume.gpus_per_node, plan.processes)
        yield f"  {'host':12} {host:8.2f} GiB   of pinned host memory; {node * host:.2f} on a node of {node} such ranks"
    engine = engine_memory(model, config, gpu, assume)
    yield f"engines   {config.rollout.replicas} x {config.rollout.tensor_parallel} {name}"
    yield f"  {'weights':12} {engine.weights / GIB:8.2f} GiB   per GPU"
    yield (
        f"  {'KV cache':12} {engine.kv_cache / GIB:8.2f} GiB   {engine.kv_per_token / 1024:.1f} KiB per token and GPU: "
        f"{engine.sequences:.1f} sequences of the longest length, more where prompts are shared"
    )
    times = plan.times
    yield (
        f"step      about {_duration(times.step)}: rollout {_duration(times.prefill + times.decode)} "
        f"(prefill {_duration(times.prefill)}, decoding {_duration(times.decode)}), update {_duration(times.update)} "
        f"(computing {_duration(times.compute)}, exchanging {_duration(times.communication)}, pipeline waiting "
        f"{_duration(times.bubble)}), weights to the engines {_duration(times.refit)}"
    )
    yield (
        f"assumed   prompts of {assume.prompt * sampling.max_prompt_tokens:,.0f} and responses of "
        f"{assume.response * sampling.max_response_tokens:,.0f} tokens (judgments of "
        f"{assume.verdict * (sampling.max_verdict_tokens or sampling.max_response_tokens):,.0f}), "
        f"{assume.mixed:.0%} of the questions mixed; "
        f"{assume.matrix_efficiency:.0%} of {gpu.flops / 1e12:.0f} TFLOP/s, {assume.memory_efficiency:.0%} of "
        f"{gpu.bandwidth / 1e12:.2f} TB/s in decoding, {assume.link_efficiency:.0%} of {gpu.link / 1e9:.0f} GB/s in "
        f"nodes of {assume.gpus_per_node} and {assume.network / 1e9:.0f} GB/s between them"
        f"{f', {assume.host / 1e9:.0f} GB/s to the host' if plan.offload else ''}, nothing overlapped"
    )


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "for ever"
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
