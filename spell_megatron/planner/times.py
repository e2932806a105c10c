"""How long a step takes: estimates from FLOPs and bandwidths."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from spell_megatron.config.schema import Config
from spell_megatron.planner.activations import element_bytes, row_tokens
from spell_megatron.planner.gpus import Assumptions, Gpu
from spell_megatron.planner.model_size import ModelSize
from spell_megatron.planner.phases import EngineMemory
from spell_megatron.training.cost import mixers
from spell_megatron.training.layout import context_split
from spell_megatron.training.policy import Architecture
from spell_megatron.training.prefix_tree import Cost
from spell_megatron.training.stages import slowest_stage


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one step, by what takes them."""

    compute: float
    communication: float
    bubble: float
    """Pipeline stages wait for each other."""
    prefill: float
    decode: float
    push: float
    """Weights go to the engines."""
    swap: float
    """Weights and optimizer state go to host memory and come back."""
    hidden: float
    """Of the update, while engines generate: at best all of it on answers, of which most are certain before the end;
    with training.staleness on all rows."""

    @property
    def update(self) -> float:
        """Seconds of the trainer's part."""
        return self.compute + self.communication + self.bubble

    @property
    def rollout(self) -> float:
        """Seconds of the engines' part."""
        return self.prefill + self.decode

    @property
    def waiting(self) -> float:
        """Seconds of everything, one after the other."""
        return self.update + self.rollout + self.push + self.swap

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return self.waiting - self.hidden

    @property
    def one_off(self) -> float:
        """Seconds of a step with training.staleness: 1."""
        return self.waiting - min(self.update, self.rollout)


def step_times(
    model: ModelSize, config: Config, processes: int, gpu: Gpu, assume: Assumptions, engine: EngineMemory, to_host: int
) -> StepTimes:
    """Estimated seconds of one step, with prompts and responses of the assumed lengths.

    to_host: bytes of weights and optimizer state that go from each of the trainer's GPUs to host memory and back.
    """
    arch, training, parallel = model.arch, config.training, config.training.parallel
    replicas = processes // parallel.dense_ranks
    update, tokens, answers = _update_work(config, model.cost, assume)
    again = {"none": 0.0, "selective": _feed_forward_share(arch, model.cost) / 3, "full": 1 / 3}[training.recompute]
    compute = update * (1 + again) / (processes * gpu.flops * assume.matrix_efficiency)
    compute *= slowest_stage(arch, parallel.pipeline, training.tokens_per_microbatch)
    microbatches = max(1, tokens / row_tokens(config) / replicas)
    bubble = compute * (parallel.pipeline - 1) / microbatches
    communication = _communication(model, config, processes, tokens / replicas, gpu, assume)
    prefill, decode = _rollout_times(model, config, gpu, assume, engine)
    push = _push_time(model, config, processes, gpu, assume)
    early = 1.0 if training.staleness else answers / max(update, 1.0)
    share = early if overlaps(config) else 0.0
    hidden = min(share * (compute + communication + bubble), prefill + decode)
    return StepTimes(compute, communication, bubble, prefill, decode, push, 2 * to_host / assume.host, hidden)


def overlaps(config: Config) -> bool:
    """Whether the trainer works while the engines generate."""
    training = config.training
    alone = not config.rollout.colocated and training.swap in ("auto", "none")
    return (training.overlap == "auto" or training.staleness > 0) and alone and not training.moe_aux_loss


def _push_time(model: ModelSize, config: Config, processes: int, gpu: Gpu, assume: Assumptions) -> float:
    """Seconds of a push: its bytes, and vLLM's calls for each tensor.

    Every rank, or rank 0 alone, collects the weights of all ranks. Engines on the same GPUs then read them there;
    others get them over the network.
    """
    nbytes = model.parameters.all * element_bytes(config)
    seconds = model.parameters.pushed * assume.push_tensor + _collective(nbytes, processes, 1, gpu, assume)
    if config.rollout.colocated:
        return seconds
    return seconds + nbytes / (assume.network * assume.link_efficiency)


class Lengths(NamedTuple):
    """Assumed numbers of tokens."""

    prompt: float
    """Of a prompt over all documents of a cluster."""
    asked: float
    """Of the questioner's prompt."""
    checked: float
    """Of the gate's prompt."""
    response: float
    """Of a question or an answer."""
    judged: float
    """Of the verifier's prompt."""
    verdict: float
    """Of a judgment."""


def assumed_lengths(config: Config, assume: Assumptions) -> Lengths:
    """The lengths of prompts and responses that the estimates assume."""
    sampling, questioner = config.rollout.sampling, config.selfplay.questioner
    prompt = assume.prompt * sampling.max_prompt_tokens
    shown = assume.documents  # those of all questions before: in the long run all
    if not questioner.history or questioner.history_documents == "none":
        shown = questioner.new_documents
    elif questioner.history_documents == "new":
        shown = (1 + questioner.history) * questioner.new_documents
    checked = shown + config.selfplay.gate.distractors
    return Lengths(
        prompt=prompt,
        asked=prompt * min(1, shown / assume.documents),
        checked=prompt * min(1, checked / assume.documents),
        response=assume.response * sampling.max_response_tokens,
        judged=assume.judged,
        verdict=assume.verdict * (sampling.max_verdict_tokens or sampling.max_response_tokens),
    )


def _tree(cost: Cost, prompt: float, response: float, count: int) -> tuple[float, float]:
    """(FLOPs of forward and backward, tokens) of a prompt with `count` responses."""
    tokens = prompt + count * response
    pairs = prompt**2 / 2 + count * (response * prompt + response**2 / 2)
    return cost.token * tokens + cost.pair * pairs + cost.source * count * response, tokens


def _update_work(config: Config, cost: Cost, assume: Assumptions) -> tuple[float, float, float]:
    """(FLOPs, tokens, FLOPs of the answers) of the rows of an update, as `selfplay.batch.compose` puts it together."""
    play, lengths = config.selfplay, assumed_lengths(config, assume)
    weights = config.training.role_weights
    answered = play.groups * (weights.get("responder", 1) > 0)
    asked = play.groups * (1 + play.negatives_per_positive) * play.questioner.enabled
    asked *= weights.get("questioner", 1) > 0
    judged = play.groups * play.group_size * play.verifier.share / play.votes * play.verifier.enabled
    judged *= weights.get("verifier", 1) > 0
    parts = [
        (answered, _tree(cost, lengths.prompt, lengths.response, play.group_size)),
        (asked, _tree(cost, lengths.asked, lengths.response, 1)),
        (judged, _tree(cost, lengths.judged, lengths.verdict, play.votes)),
    ]
    work = [n * flops for n, (flops, _) in parts]
    return sum(work), sum(n * tokens for n, (_, tokens) in parts), work[0]


def _feed_forward_share(arch: Architecture, cost: Cost) -> float:
    """Share of the feed-forwards in the FLOPs of a token's linear layers."""
    return 1 - 6.0 * mixers(arch) / cost.token


def _communication(
    model: ModelSize, config: Config, processes: int, tokens: float, gpu: Gpu, assume: Assumptions
) -> float:
    """Seconds of collectives per update of a replica that computes `tokens`, per rank and not overlapped."""
    own = tokens / config.training.parallel.context
    return (
        _attention_exchange(model.arch, config, own, gpu, assume)
        + _expert_exchange(model.arch, config, own, gpu, assume)
        + _stage_and_host_exchange(model.arch, config, own, assume)
        + _gradient_exchange(model, config, processes, gpu, assume)
    )


def _collective(nbytes: float, ranks: int, stride: int, gpu: Gpu, assume: Assumptions) -> float:
    """Seconds of a collective in which each rank sends or receives about `nbytes`, of which its own share stays.

    `stride` is the distance between the ranks that take part: it tells whether they are on one node.
    """
    inside = ranks * stride <= assume.gpus_per_node
    speed = (gpu.link if inside else min(assume.network, gpu.link)) * assume.link_efficiency
    return nbytes * (ranks - 1) / ranks / speed


def _forwards(config: Config) -> int:
    """How often an update computes each layer forward."""
    return 2 if config.training.recompute == "full" else 1


def _attention_exchange(arch: Architecture, config: Config, own: float, gpu: Gpu, assume: Assumptions) -> float:
    """Seconds of tensor and context parallelism for a rank with `own` tokens."""
    parallel, size, forwards = config.training.parallel, element_bytes(config), _forwards(config)
    tensor, layers = parallel.tensor, arch.layers / parallel.pipeline
    # Sequence parallelism: a gather before and a scatter after each part of a layer; backward gathers inputs again.
    parts = 2 * layers - sum(arch.moe_layers) / parallel.pipeline
    total = _collective(own * arch.hidden * size * parts * (2 * forwards + 3), tensor, 1, gpu, assume)
    swapping, groups = context_split(arch, parallel)
    keys = math.lcm(max(arch.groups // tensor, 1), swapping)
    swapped = (2 * arch.heads / tensor + 2 * keys) * arch.head_dim
    total += _collective(own * swapped * size * layers * (forwards + 1), swapping, tensor, gpu, assume)
    gathered = groups * 2 * keys * arch.head_dim
    return total + _collective(own * gathered * size * layers * (forwards + 1), groups, tensor * swapping, gpu, assume)


def _expert_exchange(arch: Architecture, config: Config, own: float, gpu: Gpu, assume: Assumptions) -> float:
    """Seconds in which a rank's `own` tokens go to their experts and back."""
    parallel, expert_tensor = config.training.parallel, config.training.parallel.expert_tensor
    copies = arch.experts_per_token * expert_tensor / parallel.tensor
    passes = 2 * sum(arch.moe_layers) / parallel.pipeline * (_forwards(config) + 1)
    nbytes = own * copies * arch.hidden * element_bytes(config) * passes
    between = _collective(nbytes, parallel.expert, expert_tensor, gpu, assume)
    return between + _collective(nbytes, expert_tensor, 1, gpu, assume)


def _stage_and_host_exchange(arch: Architecture, config: Config, own: float, assume: Assumptions) -> float:
    """Seconds in which activations of `own` tokens pass between pipeline stages, and to the host and back."""
    parallel = config.training.parallel
    nbytes = 2 * own * arch.hidden * element_bytes(config) / parallel.tensor
    total = 0.0
    if parallel.pipeline > 1:
        total += nbytes / (assume.network * assume.link_efficiency)
    if config.training.offload:
        total += nbytes * arch.layers / parallel.pipeline / assume.host
    return total


def _gradient_exchange(model: ModelSize, config: Config, processes: int, gpu: Gpu, assume: Assumptions) -> float:
    """Seconds in which data-parallel ranks add up float32 gradients and gather the new weights."""
    parallel, each = config.training.parallel, 4 + element_bytes(config)
    dense = model.dense_parameters / parallel.tensor / parallel.pipeline * each
    experts = model.parameters.experts / parallel.expert_ranks * each
    dense_copies = processes // (parallel.tensor * parallel.pipeline)
    expert_copies = processes // parallel.expert_ranks
    return _collective(dense, dense_copies, parallel.tensor, gpu, assume) + _collective(
        experts, expert_copies, parallel.expert, gpu, assume
    )


def _rollout_times(
    model: ModelSize, config: Config, gpu: Gpu, assume: Assumptions, engine: EngineMemory
) -> tuple[float, float]:
    """(seconds of prefill, seconds of decoding) of the engines."""
    play, rollout = config.selfplay, config.rollout
    prompt, asked, checked, response, judged, verdict = assumed_lengths(config, assume)
    questions, asks = play.groups / assume.mixed, play.questioner.enabled
    checks = play.gate.answers if play.gate.enabled and asks else 0
    grounding = play.grounding.samples if play.grounding.enabled and asks else 0
    judgments = play.group_size * play.votes * play.verifier.enabled
    prompts = [(1, prompt), (asks, asked), (play.group_size * play.verifier.enabled, judged)]
    prompts.append((checks if play.gate.shuffle else min(checks, 1), checked))
    forward = sum(count * _tree(model.cost, length, 0, 0)[0] for count, length in prompts)
    gpus = rollout.replicas * rollout.tensor_parallel
    prefill = questions * forward / 3 / (gpus * gpu.flops * assume.matrix_efficiency)
    # Answers to one question share the prompt's cache, but each of them reads it. Judgments see no documents.
    kinds = (
        (play.group_size * response, prompt / play.group_size + response, prompt + response / 2),
        (asks * response, asked + response, asked + response / 2),
        (checks * response, checked + response, checked + response / 2),
        (grounding * response + judgments * verdict, judged + verdict, judged + verdict / 2),
    )
    seconds = 0.0
    for tokens, kept, read in kinds:
        each = engine.kv_per_token * kept + engine.kv_per_sequence
        sequences = min(rollout.concurrency, max(engine.kv_cache, 0) / each)
        if sequences < 1:
            return prefill, math.inf
        nbytes = engine.weights + sequences * (engine.kv_per_token * read + engine.kv_per_sequence)
        per_second = sequences * gpu.bandwidth * assume.memory_efficiency / nbytes
        seconds += questions * tokens / (per_second * rollout.replicas)
    return prefill, seconds
