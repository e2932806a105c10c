"""Whether the documents fit into prompts: what is too long is dropped, question by question, while a run goes on."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from functools import cached_property

from spell_megatron.config.schema import Config
from spell_megatron.evaluation.questions import HeldOutQuestion
from spell_megatron.preflight.engine_model import position_limit
from spell_megatron.preflight.findings import Findings
from spell_megatron.preflight.token_counts import document_tokens
from spell_megatron.selfplay.documents import Cluster
from spell_megatron.selfplay.prompts import PromptSet
from spell_megatron.tokenizer import PolicyTokenizer

_LIMIT = "rollout.sampling.max_prompt_tokens"
_QUESTION = 64
"""Tokens for a question, in advice."""


class PromptLengths:
    """Tokens of prompts about a run's documents, from the documents' own tokens and those of the instructions."""

    def __init__(self, config: Config, prompts: PromptSet, tokenizer: PolicyTokenizer) -> None:
        self._config, self._prompts, self._tokenizer = config, prompts, tokenizer
        self._instructions: dict[tuple[str, str, int], int] = {}

    def instructions(self, role: str, task: str, documents: int = 1) -> int:
        """Tokens of a prompt of the questioner or the responder about empty documents."""
        key = role, task, documents
        if key not in self._instructions:
            empty = [""] * documents
            asks = role == "questioner"
            prompts = self._prompts
            text = prompts.questioner(task, empty, (), "A") if asks else prompts.responder(task, "", empty)
            self._instructions[key] = len(self._tokenizer.prompt_ids(text))
        return self._instructions[key]

    @cached_property
    def roles(self) -> tuple[str, ...]:
        """The roles whose prompts hold documents."""
        return ("responder", "questioner") if self._config.selfplay.questioner.enabled else ("responder",)

    def needed(self, task: str, cluster: Cluster, tokens: Sequence[int]) -> int:
        """Longest prompt that a question about a cluster cannot do without.

        The responder sees all documents, and the questioner at least one. `tokens`: of each document.
        """
        answer = self.instructions("responder", task, len(tokens)) + sum(tokens)
        answer += self._tokenizer.count(cluster.question)
        ask = self.instructions("questioner", task) + min(tokens) if "questioner" in self.roles else 0
        return max(answer, ask)


def check_prompt_lengths(
    found: Findings,
    config: Config,
    clusters: Sequence[Cluster],
    of_task: Mapping[str, Sequence[str]],
    lengths: PromptLengths,
    tokenizer: PolicyTokenizer,
    room: int,
) -> int:
    """The clusters fit into prompts; returns how many do.

    Args:
        of_task: the ids of the clusters of each task.
        room: longest prompt for which the model has positions, beside a response.
    """
    limit, file = config.rollout.sampling.max_prompt_tokens, config.data.documents
    if short := {task: n for task in of_task if (n := _least(lengths, task)) > limit}:
        found.fault(
            f"{_LIMIT} selfplay.prompts",
            f"{limit} is less than the instructions of the prompt set {config.selfplay.prompts!r} take without any "
            f"document: {', '.join(f'{tokens} for {task}' for task, tokens in short.items())}. Raise it, or choose "
            "another prompt set",
        )
        return len(clusters)
    tokens = document_tokens(file, [c.documents for c in clusters], tokenizer, config.model.path)
    known = {cluster.id: (cluster, counts) for cluster, counts in zip(clusters, tokens, strict=True)}
    needed = {task: [lengths.needed(task, *known[name]) for name in ids] for task, ids in of_task.items()}
    everything = [n for members in needed.values() for n in members]
    long = [n for n in everything if n > limit]
    if not long:
        return len(everything)
    takes = f"{min(long):,}" if min(long) == max(long) else f"{min(long):,} to {max(long):,}"
    text = (
        f"{len(long)} of {len(everything)} clusters in {file} are longer than {_LIMIT} = {limit}: with the "
        f"instructions they take {takes} tokens"
    )
    # What prompts of eight documents, the most that `spell prepare` puts into a cluster by itself, leave for them.
    left = max(1, limit - max(lengths.instructions("responder", task, 8) for task in of_task) - _QUESTION)
    remedy = _remedy(config, left, max(long) + _QUESTION, room)
    if len(long) == len(everything):
        found.fault(
            f"{_LIMIT} data.documents", f"{text}, so no question could be answered and nothing trained. {remedy}"
        )
        return len(everything)
    found.warn(f"{text}. No questions are asked about them. {remedy}")
    if hopeless := [task for task, members in needed.items() if min(members) > limit]:
        found.warn(f"all clusters of {' and '.join(hopeless)} are longer, so this task is never trained")
    return len(everything) - len(long)


def _least(lengths: PromptLengths, task: str) -> int:
    return max(lengths.instructions(role, task) for role in lengths.roles)


def _remedy(config: Config, left: int, wanted: int, room: int) -> str:
    """How clusters and prompts come to fit: `left` tokens of documents do, `wanted` would be the longest prompt."""
    model = shlex.quote(str(config.model.path))
    prepare = f"Prepare shorter clusters (spell prepare … --max-cluster-tokens {left} --tokenizer {model})"
    if wanted > room:
        return f"{prepare}. The model has positions for prompts of up to {room}"
    return f"{prepare}, or raise {_LIMIT} to {wanted}"


def check_held_out_lengths(
    found: Findings,
    config: Config,
    questions: Sequence[HeldOutQuestion],
    lengths: PromptLengths,
    tokenizer: PolicyTokenizer,
) -> None:
    """The held-out questions fit into prompts."""
    file, limit = config.validation.questions, config.rollout.sampling.max_prompt_tokens
    if file is None or not questions:
        return
    tokens = document_tokens(file, [question.documents for question in questions], tokenizer, config.model.path)
    long = [
        question
        for question, counts in zip(questions, tokens, strict=True)
        if lengths.instructions("responder", question.task, len(counts)) + sum(counts) > limit
    ]
    if long:
        found.warn(
            f"{len(long)} of {len(questions)} questions in {file} have prompts longer than {_LIMIT} = {limit}, which "
            "lose their middle"
        )


def prompt_room(config: Config, hf_config: object) -> int:
    """Longest prompt for which a model has positions, beside the longest response."""
    sampling = config.rollout.sampling
    return position_limit(hf_config)[0] - (sampling.longest_sequence - sampling.max_prompt_tokens)
