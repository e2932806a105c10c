"""Settings that are each in range, but do not fit together: one function for each subject."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import get_args

from spell_megatron.config.faults import Fault
from spell_megatron.config.layout import division_faults
from spell_megatron.config.schema import Config
from spell_megatron.config.selfplay_sections import TASKS, Reward
from spell_megatron.ranks import launched_processes

_IN_METRICS = ("rate", "questioner", "responder", "verifier")
"""What stands in names of metrics where the task may stand."""


def relation_faults(config: Config) -> list[Fault]:
    """All faults between settings that are each in range."""
    return [fault for faults in SUBJECTS for fault in faults(config)]


def trains_verifier(config: Config) -> bool:
    """Whether the settings ask for judgments among the rows of an update."""
    verifier = config.selfplay.verifier
    return verifier.enabled and verifier.share > 0 and config.training.role_weights.get("verifier", 1) > 0


def run_faults(config: Config) -> Iterator[Fault]:
    """The name of the run, which names a folder."""
    name = config.run.name
    if not name.strip() or name in (".", "..") or set(name) & set("/\\\0\n"):
        yield Fault.of(
            "run.name", f"{name!r} cannot be the name of a folder. Give a name without slashes, such as my-run"
        )


def task_faults(config: Config) -> Iterator[Fault]:
    """Shares of the tasks, and the tasks of the sources."""
    shares, known = config.selfplay.tasks, config.selfplay.known_tasks
    for name in config.selfplay.own_tasks:
        if name in (*TASKS, *_IN_METRICS) or not re.fullmatch("[a-z][a-z0-9_]*", name):
            yield Fault.of(
                "selfplay.own_tasks",
                f"{name!r} cannot be the name of a task of your own. Use small letters, digits and underscores, "
                f"and none of {', '.join((*TASKS, *_IN_METRICS))}, which name something else in metrics",
            )
        elif name not in shares:
            yield Fault.of(
                "selfplay.own_tasks selfplay.tasks",
                f"the task {name} has no share in selfplay.tasks. Give it one, or 0 if only held-out questions have it",
            )
    for task in shares:
        if task not in known:
            yield Fault((f"selfplay.tasks.{task}",), _not_one_of(task, known))
    if not any(share > 0 for share in shares.values()) or any(share < 0 for share in shares.values()):
        yield Fault.of("selfplay.tasks", "shares must not be negative, and at least one must be above 0")
    active = [task for task, share in shares.items() if share > 0]
    for source, tasks in config.data.sources.items():
        if not tasks:
            yield Fault.of(
                "data.sources",
                f"the source {source!r} has no task. Name some of {', '.join(active)}, or leave the source out",
            )
        for task in tasks:
            if task not in known:
                yield Fault((f"data.sources.{source}",), _not_one_of(task, known))
            elif task not in active:
                yield Fault.of(
                    "data.sources selfplay.tasks",
                    f"the source {source!r} has the task {task}, which has no share in selfplay.tasks. "
                    "Give it a share there, or remove it here",
                )
        if len(set(tasks)) != len(tasks):
            yield Fault.of("data.sources", f"the source {source!r} names a task twice. Remove one")


def _not_one_of(value: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(value, known, 1)
    return f"{value!r} is not one of {', '.join(known)}." + (f" Did you mean {close[0]}?" if close else "")


def selfplay_faults(config: Config) -> Iterator[Fault]:
    """The questioner's reward, the number of groups, and which questions the history keeps."""
    play = config.selfplay
    if play.questioner.own_reward is None and play.questioner.reward not in get_args(Reward):
        yield Fault.of(
            "selfplay.questioner.reward", _not_one_of(play.questioner.reward, (*get_args(Reward), "MODULE:FUNCTION"))
        )
    if play.code is not None and not play.own_code:
        yield Fault.of(
            "selfplay.code",
            "no setting names code of your own. Set selfplay.rule, selfplay.own_tasks or selfplay.questioner.reward, "
            "or leave this out",
        )
    reachable = play.clusters_per_round * play.max_rounds
    if play.groups > reachable:
        yield Fault.of(
            "selfplay.groups selfplay.clusters_per_round selfplay.max_rounds",
            f"a step asks one question per cluster, and max_rounds x clusters_per_round = {play.max_rounds} x "
            f"{play.clusters_per_round} clusters cannot give {play.groups} mixed groups. Lower selfplay.groups to "
            f"{reachable} or less, or raise one of the others",
        )
    low, high = play.questioner.history_low, play.questioner.history_high
    if low >= high:
        yield Fault.of(
            "selfplay.questioner.history_low selfplay.questioner.history_high",
            f"{low} must be below selfplay.questioner.history_high ({high}), or no question ever enters the history",
        )


def verifier_faults(config: Config) -> Iterator[Fault]:
    """Which judgments the verifier is trained on."""
    play, verifier = config.selfplay, config.selfplay.verifier
    low, high = verifier.agreement_low, verifier.agreement_high
    if not 0 <= low <= high <= 1:
        yield Fault.of(
            "selfplay.verifier.agreement_low selfplay.verifier.agreement_high",
            f"0 <= agreement_low ({low}) <= agreement_high ({high}) <= 1 must hold. They are shares of votes",
        )
    if not trains_verifier(config):
        return
    untrained = "Set selfplay.verifier.share to 0 if the verifier is not to be trained"
    shares = {k / valid for valid in range(1, play.votes + 1) for k in range((valid + 1) // 2, valid + 1)}
    if play.votes > 1 and low <= high and not any(low <= share <= high for share in shares):
        yield Fault.of(
            "selfplay.verifier.votes selfplay.group_size selfplay.verifier.agreement_low "
            "selfplay.verifier.agreement_high",
            f"among {play.votes} judgments the majority's share is never between agreement_low ({low}) and "
            f"agreement_high ({high}), so the verifier would never be trained. Ask for more judgments, or move the "
            f"limits apart. {untrained}",
        )
    if play.votes == 1 and not verifier.require_rule_agreement:
        yield Fault.of(
            "selfplay.verifier.require_rule_agreement selfplay.verifier.votes",
            "a single judgment that need not agree with the rule check is rewarded whatever it says. Set "
            f"require_rule_agreement to true, or ask for more judgments. {untrained}",
        )


def optimizer_faults(config: Config) -> Iterator[Fault]:
    """AdamW and the learning rate."""
    optimizer, steps = config.training.optimizer, config.run.steps
    if not all(0 <= beta < 1 for beta in optimizer.betas):
        yield Fault.of(
            "training.optimizer.betas",
            f"{list(optimizer.betas)} must both lie in [0, 1). The usual values are [0.9, 0.999]",
        )
    if optimizer.min_lr > optimizer.lr:
        yield Fault.of(
            "training.optimizer.min_lr training.optimizer.lr",
            f"{optimizer.min_lr} is above training.optimizer.lr ({optimizer.lr}). Lower it",
        )
    if steps and optimizer.warmup_steps >= steps:
        yield Fault.of(
            "training.optimizer.warmup_steps run.steps",
            f"{optimizer.warmup_steps} warm-up updates leave no other updates of run.steps = {steps}. Lower it",
        )
    if optimizer.offload and not optimizer.distributed and config.checkpoint.asynchronous:
        yield Fault.of(
            "training.optimizer.offload training.optimizer.distributed checkpoint.asynchronous",
            "the state would be stepped while another process saves it. Set training.optimizer.distributed to true, or "
            "checkpoint.asynchronous to false",
        )


def loss_faults(config: Config) -> Iterator[Fault]:
    """Clipping, importance weights and the weights of the roles."""
    training, top_p = config.training, config.rollout.sampling.top_p
    if training.clip_low >= 1:
        yield Fault.of(
            "training.clip_low",
            f"{training.clip_low} must be below 1: 1 - clip_low is the lower limit of a ratio of probabilities. "
            "Lower it",
        )
    if training.importance_sampling == "sequence" and top_p != 1:
        yield Fault.of(
            "training.importance_sampling rollout.sampling.top_p",
            f"with top_p = {top_p} the engine gives each token a higher probability than the trainer does. Over a "
            "whole response these ratios multiply to a weight near 0. Set top_p to 1, or importance_sampling to token",
        )
    for role, weight in training.role_weights.items():
        if weight < 0:
            yield Fault.of("training.role_weights", f"{role} has weight {weight}. Use 0 or more")
    if not any(training.role_weights.get(role, 1) for role in ("questioner", "responder", "verifier")):
        yield Fault.of(
            "training.role_weights", "all roles have weight 0, so nothing would be trained. Give one of them 1"
        )


def staleness_faults(config: Config) -> Iterator[Fault]:
    """Whether the trainer can work during the next rollout, on rows that older weights wrote."""
    training = config.training
    if not training.staleness:
        return
    if training.importance_sampling != "token":
        yield Fault.of(
            "training.staleness training.importance_sampling",
            "rows that are one update old need a weight for each token. Set training.importance_sampling to token, or "
            "training.staleness to 0",
        )
    if config.rollout.colocated:
        yield Fault.of(
            "training.staleness rollout.colocated",
            "trainer and engines would work at the same time, but on shared GPUs each has its turn. Set "
            "training.staleness to 0, or rollout.colocated to false",
        )
    if training.swap in ("state", "all"):
        yield Fault.of(
            "training.staleness training.swap",
            f"the trainer works during rollouts, but swap: {training.swap} takes its state off the GPUs then. Set "
            "training.swap to none, or training.staleness to 0",
        )
    if training.moe_aux_loss:
        yield Fault.of(
            "training.staleness training.moe_aux_loss",
            "with an auxiliary loss the whole update waits for the end of the rollout, so nothing would be gained. Set "
            "training.moe_aux_loss to 0, or training.staleness to 0",
        )


def training_faults(config: Config) -> Iterator[Fault]:
    """What the trainer keeps in memory, and how its processes are divided into groups."""
    training, parallel = config.training, config.training.parallel
    if training.offload and training.recompute != "full":
        yield Fault.of(
            "training.offload training.recompute",
            f"with recompute: {training.recompute} every layer keeps much more than its input, and all of it would "
            "move to host memory. Set training.recompute to full, or training.offload to false",
        )
    if training.moe_dispatcher == "allgather" and parallel.pipeline > 1:
        yield Fault.of(
            "training.moe_dispatcher training.parallel.pipeline",
            "Megatron-Core's all-gather needs rows of one length, but a pipeline passes on microbatches of different "
            "lengths. Use alltoall, or pipeline = 1",
        )
    yield from division_faults(parallel, launched_processes() or parallel.processes)


def rollout_faults(config: Config) -> Iterator[Fault]:
    """The GPUs and ports of the engines, and the type in which they compute."""
    rollout, processes = config.rollout, launched_processes() or config.training.parallel.processes
    if rollout.colocated and rollout.urls:
        yield Fault.of(
            "rollout.colocated rollout.urls",
            "the engines of rollout.urls run already, on GPUs that the run does not choose. Leave out either",
        )
    elif rollout.colocated and processes != rollout.replicas * rollout.tensor_parallel:
        yield Fault.of(
            "rollout.colocated rollout.replicas rollout.tensor_parallel training.parallel.processes",
            f"each GPU has one trainer process and belongs to one engine, but there are {processes} trainer processes, "
            f"and replicas x tensor_parallel = {rollout.replicas} x {rollout.tensor_parallel} GPUs of engines. Make "
            "both numbers equal, or set colocated to false",
        )
    if rollout.quantization == "fp8" and config.model.dtype != "bfloat16":
        yield Fault.of(
            "rollout.quantization model.dtype",
            f"vLLM quantises weights in bfloat16 to float8, not in {config.model.dtype}. Set model.dtype to bfloat16, "
            "or rollout.quantization to none",
        )
    if rollout.base_port is not None and rollout.base_port + rollout.replicas - 1 > 65535:
        yield Fault.of(
            "rollout.base_port rollout.replicas",
            f"{rollout.replicas} servers that start at port {rollout.base_port} would pass port 65535. Lower base_port",
        )


def validation_faults(config: Config) -> Iterator[Fault]:
    """Whether there is something to validate with."""
    if config.validation.every and config.validation.questions is None:
        yield Fault.of(
            "validation.every validation.questions",
            "there is nothing to validate with. Name a file of held-out questions in validation.questions",
        )


SUBJECTS = (
    run_faults,
    task_faults,
    selfplay_faults,
    verifier_faults,
    optimizer_faults,
    loss_faults,
    staleness_faults,
    training_faults,
    rollout_faults,
    validation_faults,
)
