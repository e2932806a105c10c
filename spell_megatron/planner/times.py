"""Seconds of a step: estimates from FLOPs and bandwidths."""

from __future__ import annotations

import math
from dataclasses import dataclass

from spell_megatron.config.schema import Config
from spell_megatron.planner.gpus import Assumptions, Gpu
from spell_megatron.planner.memory import Model, element_bytes, engine_memory, row_tokens
from spell_megatron.training.layout import context_split
from spell_megatron.training.policy import Architecture
from spell_megatron.training.prefix_tree import Cost


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


def step_times(model: Model, config: Config, processes: int, gpu: Gpu, assume: Assumptions) -> Times:
    """Estimated seconds of one step, with prompts and responses of the assumed lengths."""
    arch, training, parallel = model.arch, config.training, config.training.parallel
    replicas = processes // parallel.dense_ranks
    update, tokens = _update_work(config, model.cost, assume)
    again = {"none": 0.0, "selective": _feed_forward_share(arch, model.cost) / 3, "full": 1 / 3}[training.recompute]
    compute = update * (1 + again) / (processes * gpu.flops * assume.matrix_efficiency)
    microbatches = max(1, tokens / row_tokens(config) / replicas)
    bubble = compute * (parallel.pipeline - 1) / microbatches
    communication = _communication(model, config, processes, tokens / replicas, gpu, assume)
    prefill, decode = _rollout_times(model, config, gpu, assume)
    refit = model.parameters * element_bytes(config) / (assume.network * assume.link_efficiency)
    return Times(compute, communication, bubble, prefill, decode, refit)


def _tree(cost: Cost, prompt: float, response: float, count: int) -> tuple[float, float]:
    """(FLOPs of forward and backward, tokens) of a prompt with `count` responses."""
    tokens = prompt + count * response
    pairs = prompt**2 / 2 + count * (response * prompt + response**2 / 2)
    return cost.token * tokens + cost.pair * pairs + cost.source * count * response, tokens


def assumed_lengths(config: Config, assume: Assumptions) -> tuple[float, float, float, float]:
    """Assumed tokens of (prompt over documents, response, prompt of the verifier, verdict)."""
    sampling = config.rollout.sampling
    response = assume.response * sampling.max_response_tokens
    verdict = assume.verdict * (sampling.max_verdict_tokens or sampling.max_response_tokens)
    return assume.prompt * sampling.max_prompt_tokens, response, assume.judged, verdict


def _update_work(config: Config, cost: Cost, assume: Assumptions) -> tuple[float, float]:
    """(FLOPs, tokens) of the rows of an update, as `selfplay.batch.compose` puts it together."""
    play = config.selfplay
    prompt, response, judged, verdict = assumed_lengths(config, assume)
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
    arch, parallel, size = model.arch, config.training.parallel, element_bytes(config)
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
    copies_of_experts = processes // parallel.expert_ranks
    if config.training.offload:
        total += 2 * own * arch.hidden * size / tensor * layers / assume.host
    total += seconds(dense / tensor / pipeline * (4 + size), copies_of_dense, tensor)
    total += seconds(experts / expert / expert_tensor / pipeline * (4 + size), copies_of_experts, expert)
    return total


def _rollout_times(model: Model, config: Config, gpu: Gpu, assume: Assumptions) -> tuple[float, float]:
    """Seconds of prefill and of decoding."""
    play, rollout = config.selfplay, config.rollout
    prompt, response, judged, verdict = assumed_lengths(config, assume)
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
