"""What can be known to go wrong before any model is loaded: files, the model's limits, ports, disks.

`spell_megatron.config` checks the settings by themselves; this folder checks them against the machine. It writes
nothing and loads no weights.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from spell_megatron.config.faults import involves
from spell_megatron.config.relations import trains_verifier
from spell_megatron.config.schema import Config
from spell_megatron.preflight.engines import check_engine_urls, check_ports
from spell_megatron.preflight.findings import Findings
from spell_megatron.preflight.machine import check_disk, check_packages, check_run_folder, check_trainer
from spell_megatron.preflight.model import check_heads, check_lengths, check_model_folder, check_resumed_model
from spell_megatron.selfplay.documents import Cluster, load_clusters
from spell_megatron.selfplay.prompts import PromptSet
from spell_megatron.selfplay.sampler import ClusterSampler


def inspect(
    config: Config, resume: Path | None = None, known_faulty: Collection[str] = (), restarted: bool = False
) -> Findings:
    """Check a configuration against this machine.

    Args:
        resume: folder of the run to be continued.
        known_faulty: keys that are known to be wrong already; faults that involve them are left out.
        restarted: Slurm has queued the job again, which was ended before its first checkpoint, so that the run's
            folder may hold results.
    """
    found = Findings()
    check_run_folder(found, config.run, resume, restarted)
    check_packages(found, config)
    clusters = found.attempt("data.documents", lambda: load_clusters(config.data.documents))
    if clusters is not None:
        check_documents(found, config, clusters)
    found.attempt(
        "selfplay.prompts selfplay.questioner.quotes",
        lambda: PromptSet.load(config.selfplay.prompts, config.selfplay.questioner.quotes),
    )
    check_verifier(found, config)
    check_held_out_questions(found, config.validation.questions)
    policy = check_model_folder(found, config.model.path, config.model.dtype)
    if policy is not None:
        check_lengths(found, config, policy)
        check_heads(found, config, policy.arch)
        if resume is not None:
            check_resumed_model(found, config.run.output_dir / config.run.name, policy)
    check_engine_urls(found, config.rollout.urls)
    check_ports(found, config.rollout)
    check_trainer(found, config)
    if policy is not None:
        check_disk(found, config, policy)
    found.faults = [fault for fault in found.faults if not involves(fault, known_faulty)]
    return found


def check_documents(found: Findings, config: Config, clusters: Sequence[Cluster]) -> None:
    """The document clusters have what the tasks need, and are enough."""
    play, file = config.selfplay, config.data.documents
    if not play.questioner.enabled and not clusters[0].question:
        found.fault(
            "selfplay.questioner.enabled data.documents",
            f"the questioner is off, and {file} has no questions. Give a file whose rows have task, question, answer "
            "and documents, or turn the questioner on",
        )
    sources = Counter(cluster.source for cluster in clusters)
    unknown = [source for source in config.data.sources if source not in sources]
    for source in unknown:
        close = difflib.get_close_matches(source, sources, 1)
        hint = f"Did you mean {close[0]!r}?" if close else f"The file has {', '.join(map(repr, sources))}."
        found.fault("data.sources", f"no cluster of {file} has the source {source!r}. {hint}")
    if not unknown:
        found.attempt(
            "data.sources data.documents selfplay.tasks selfplay.clusters_per_round",
            lambda: ClusterSampler(clusters, play.tasks, config.data.sources, play.clusters_per_round, config.run.seed),
        )
    reachable = play.max_rounds * min(len(clusters), play.clusters_per_round)
    if play.groups > reachable:
        found.fault(
            "selfplay.groups data.documents selfplay.max_rounds",
            f"a step asks one question per cluster, and max_rounds = {play.max_rounds} rounds over {len(clusters)} "
            f"clusters can never come to {play.groups} mixed groups. Lower it to {reachable} or less, or add documents",
        )
    elif play.groups > len(clusters):
        found.warn(
            f"selfplay.groups = {play.groups} is more than the {len(clusters)} document "
            "clusters, so an update holds several questions about the same documents"
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


def check_held_out_questions(found: Findings, questions: Path | None) -> None:
    """The file of held-out questions can be read."""
    if questions is not None:
        from spell_megatron.evaluation.questions import load_questions

        found.attempt("validation.questions", lambda: load_questions(questions))
