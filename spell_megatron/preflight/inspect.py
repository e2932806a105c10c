"""What can be known to go wrong before any model is loaded: files, the model's limits, ports, disks.

`spell_megatron.config` checks the settings by themselves; this folder checks them against the machine. It writes
nothing and loads no weights.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spell_megatron.checkpoint.folder import latest
from spell_megatron.checkpoint.fork import kept_step
from spell_megatron.config.faults import involves
from spell_megatron.config.relations import trains_verifier
from spell_megatron.config.schema import Config
from spell_megatron.config.selfplay_sections import SelfPlayConfig
from spell_megatron.preflight.documents import check_documents, check_enough, check_same_documents, of_each_task
from spell_megatron.preflight.engines import check_engine_urls, check_kernels, check_ports
from spell_megatron.preflight.findings import Findings
from spell_megatron.preflight.machine import (
    capability,
    check_disk,
    check_packages,
    check_run_folder,
    check_trainer,
)
from spell_megatron.preflight.model import check_heads, check_lengths, check_model_folder, check_resumed_model
from spell_megatron.preflight.own_code import check_own_code
from spell_megatron.preflight.resume import steps_fault
from spell_megatron.selfplay.documents import Cluster, load_clusters
from spell_megatron.selfplay.prompts import PromptSet
from spell_megatron.selfplay.sampler import ClusterSampler

if TYPE_CHECKING:
    from spell_megatron.evaluation.questions import HeldOutQuestion
    from spell_megatron.tokenizer import PolicyTokenizer
    from spell_megatron.training.policy import PolicyModel


def inspect(
    config: Config,
    resume: Path | None = None,
    known_faulty: Collection[str] = (),
    restarted: bool = False,
    begin_with: tuple[Path, int] | None = None,
) -> Findings:
    """Check a configuration against this machine.

    Args:
        resume: folder of the run to be continued.
        known_faulty: keys that are known to be wrong already; faults that involve them are left out.
        restarted: Slurm has queued the job again, which was ended before its first checkpoint, so that the run's
            folder may hold results.
        begin_with: (folder of another run, its step) with whose checkpoint a new run begins.
    """
    found = Findings()
    check_run_folder(found, config.run, resume, restarted)
    check_packages(found, config)
    known_tasks = config.selfplay.known_tasks
    clusters = found.attempt("data.documents", lambda: load_clusters(config.data.documents, known_tasks))
    sampler = check_documents(found, config, clusters) if clusters else None
    of_task = of_each_task(sampler) if sampler else {}
    prompts = check_prompts(found, config.selfplay, check_own_code(found, config.selfplay))
    check_verifier(found, config)
    questions = held_out_questions(found, config.validation.questions, known_tasks)
    policy, tokenizer = check_model_folder(found, config.model.path, config.model.dtype)
    usable = len(clusters or ())
    if clusters and prompts and policy and tokenizer:
        usable = check_texts(found, config, clusters, of_task, questions, prompts, policy, tokenizer)
    if clusters:
        check_enough(found, config, usable)
    if policy is not None:
        check_lengths(found, config, policy)
        check_heads(found, config, policy.arch)
        check_kernels(found, config.rollout, policy.arch.experts > 0, capability(config))
    check_resumed(found, config, policy, sampler, resume is not None, begin_with)
    check_engine_urls(found, config.rollout.urls)
    check_ports(found, config.rollout)
    check_trainer(found, config)
    if policy is not None:
        check_disk(found, config, policy)
    found.faults = [fault for fault in found.faults if not involves(fault, known_faulty)]
    return found


def check_resumed(
    found: Findings,
    config: Config,
    policy: PolicyModel | None,
    sampler: ClusterSampler | None,
    goes_on: bool,
    begin_with: tuple[Path, int] | None,
) -> None:
    """The checkpoint that the run goes on from, or begins with, is complete, of this model and documents, and not its
    last."""
    checkpoint = None
    if begin_with is not None:
        checkpoint = found.attempt("run.name", lambda: kept_step(*begin_with))
    elif goes_on:
        checkpoint = found.attempt("run.name", lambda: latest(config.run.output_dir / config.run.name))
    if checkpoint is None:
        return
    if fault := steps_fault(config, checkpoint, new=begin_with is not None):
        found.faults.append(fault)
    if policy is not None:
        check_resumed_model(found, checkpoint, policy)
    if sampler is not None:
        check_same_documents(found, sampler, checkpoint)


def check_prompts(found: Findings, play: SelfPlayConfig, own: Mapping[str, Path] | None) -> PromptSet | None:
    """The prompts of all roles and tasks can be read; None if not, or if a task is not known.

    `own`: the folders of the user's own tasks; None if these cannot be used.
    """
    if own is None or not set(play.tasks) <= set(play.known_tasks):
        return None
    return found.attempt(
        "selfplay.prompts selfplay.questioner.quotes selfplay.own_tasks",
        lambda: PromptSet.load(play.prompts, play.questioner.quotes, own),
    )


def check_verifier(found: Findings, config: Config) -> None:
    """An update has room for a group of judgments."""
    play = config.selfplay
    answers = play.groups * play.group_size
    if trains_verifier(config) and play.verifier.share * answers < play.votes:
        found.warn(
            f"selfplay.verifier.share = {play.verifier.share:g} of the {answers} answers of an update is less than "
            f"one group of {play.votes} judgments, so the verifier is never trained. Raise it to "
            f"{math.ceil(100 * play.votes / answers) / 100:g} or more, or ask for more selfplay.groups"
        )


def held_out_questions(found: Findings, file: Path | None, tasks: Sequence[str]) -> Sequence[HeldOutQuestion]:
    """The questions in the file of held-out ones; none if there is none, or it cannot be read."""
    if file is None:
        return ()
    from spell_megatron.evaluation.questions import load_questions

    return found.attempt("validation.questions", lambda: load_questions(file, tasks=tasks)) or ()


def check_texts(
    found: Findings,
    config: Config,
    clusters: Sequence[Cluster],
    of_task: Mapping[str, Sequence[str]],
    questions: Sequence[HeldOutQuestion],
    prompts: PromptSet,
    policy: PolicyModel,
    tokenizer: PolicyTokenizer,
) -> int:
    """Documents and held-out questions fit into prompts; returns how many clusters do."""
    from spell_megatron.preflight import prompt_lengths

    lengths = prompt_lengths.PromptLengths(config, prompts, tokenizer)
    room = prompt_lengths.prompt_room(config, policy.hf_config)

    def check() -> int:
        prompt_lengths.check_held_out_lengths(found, config, questions, lengths, tokenizer)
        if not of_task:
            return len(clusters)
        return prompt_lengths.check_prompt_lengths(found, config, clusters, of_task, lengths, tokenizer, room)

    usable = found.attempt("model.path", check)  # a chat template may not take what it is given
    return len(clusters) if usable is None else usable
