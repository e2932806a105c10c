"""The document clusters: what the tasks need, and enough of them."""

from __future__ import annotations

import copy
import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from spell_megatron.checkpoint.folder import read_state
from spell_megatron.config.schema import Config
from spell_megatron.errors import UserError
from spell_megatron.preflight.findings import Findings
from spell_megatron.selfplay.documents import Cluster
from spell_megatron.selfplay.sampler import ClusterSampler


def check_documents(found: Findings, config: Config, clusters: Sequence[Cluster]) -> ClusterSampler | None:
    """The clusters have what the tasks need; what divides them among the tasks, None if that is not known."""
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
    if unknown:
        return None
    return found.attempt(
        "data.sources data.documents selfplay.tasks selfplay.clusters_per_round",
        lambda: ClusterSampler(clusters, play.tasks, config.data.sources, play.clusters_per_round, config.run.seed),
    )


def of_each_task(sampler: ClusterSampler) -> Mapping[str, Sequence[str]]:
    """The ids of the clusters of each task."""
    return sampler.state_dict()["partition"]


def check_same_documents(found: Findings, sampler: ClusterSampler, checkpoint: Path) -> None:
    """The clusters and tasks are those that a checkpoint was made with."""
    with suppress(UserError, KeyError, TypeError):  # a damaged one is told elsewhere
        state = read_state(checkpoint)["selfplay"]["sampler"]
        found.attempt(
            "data.documents data.sources selfplay.tasks", lambda: copy.deepcopy(sampler).load_state_dict(state)
        )


def check_enough(found: Findings, config: Config, clusters: int) -> None:
    """A step can come to its groups with this number of clusters."""
    play = config.selfplay
    reachable = play.max_rounds * min(clusters, play.clusters_per_round)
    if play.groups > reachable:
        found.fault(
            "selfplay.groups data.documents selfplay.max_rounds",
            f"a step asks one question per cluster, and max_rounds = {play.max_rounds} rounds over {clusters} "
            f"clusters can never come to {play.groups} mixed groups. Lower it to {reachable} or less, or add documents",
        )
    elif play.groups > clusters:
        found.warn(
            f"selfplay.groups = {play.groups} is more than the {clusters} document "
            "clusters, so an update holds several questions about the same documents"
        )
