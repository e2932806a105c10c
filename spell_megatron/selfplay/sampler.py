"""Drawing clusters: each serves one task, and rounds hold the tasks in their shares."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from spell_megatron.errors import UserError
from spell_megatron.selfplay.documents import Cluster


def round_counts(sizes: Mapping[str, int], weights: Mapping[str, float], clusters_per_round: int) -> dict[str, int]:
    """How many clusters of each task a round holds.

    Each task gets the whole part of its share, at most all its clusters (`sizes`); what is left is
    handed out one at a time, larger weights first, names in alphabetical order among equals.
    """
    total = sum(weights.values())
    counts = {t: min(sizes[t], math.floor(clusters_per_round * (weights[t] / total))) for t in sorted(sizes)}
    left = min(clusters_per_round, sum(sizes.values())) - sum(counts.values())
    by_weight = sorted(counts, key=lambda task: -weights[task])
    while left > 0:
        for task in by_weight:
            if left > 0 and counts[task] < sizes[task]:
                counts[task] += 1
                left -= 1
    return counts


class ClusterSampler:
    """An endless stream of (cluster, task), made of rounds that hold the tasks in their shares.

    Every cluster serves one task for the whole run. No cluster occurs twice in a round, and each
    occurs once in every pass over its task's clusters. The stream depends on the clusters, the
    shares and the seed alone; the sampler's state is the place in it.
    """

    def __init__(
        self,
        clusters: Sequence[Cluster],
        tasks: Mapping[str, float],
        sources: Mapping[str, Sequence[str]],
        clusters_per_round: int,
        seed: int,
    ) -> None:
        """Give every cluster its task and go to the beginning of the stream.

        `tasks` maps tasks to weights (0: not used); `sources` names the tasks that the clusters of a
        source may serve (those not named serve every task). A cluster with a task of its own serves that.

        Raises:
            UserError: if a task has no clusters, or no place in a round.
        """
        self._clusters = {cluster.id: cluster for cluster in clusters}
        self._weights: dict[str, float] = {task: weight for task, weight in sorted(tasks.items()) if weight > 0}
        self._seed = seed
        self._clusters_per_round = clusters_per_round
        if not self._weights:
            raise UserError("No task has a positive share; set one in selfplay.tasks, such as {doc_general_qa: 1.0}.")
        self._partition = self._assign(sources)
        self._count_rounds()
        self._round = 0
        self._offset = 0
        self._queues: dict[str, list[str]] = {task: [] for task in self._partition}

    def _assign(self, sources: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """Cluster ids of each task: clusters that serve the same tasks are shuffled and cut evenly."""
        pools: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
        for cluster in self._clusters.values():
            served = [cluster.task] if cluster.task else sources.get(cluster.source, self._weights)
            pools[tuple(task for task in self._weights if task in served)].append(cluster.id)
        partition: dict[str, list[str]] = {task: [] for task in self._weights}
        for tasks, ids in sorted(pools.items()):
            random.Random(f"{self._seed}/partition/{','.join(tasks)}").shuffle(ids)
            for i, task in enumerate(tasks):
                partition[task] += ids[len(ids) * i // len(tasks) : len(ids) * (i + 1) // len(tasks)]
        if empty := [task for task, ids in partition.items() if not ids]:
            found = ", ".join(
                f"{n} of source {s!r}" for s, n in Counter(c.source for c in self._clusters.values()).items()
            )
            raise UserError(
                f"There are no document clusters for the task(s) {', '.join(empty)}. The documents file "
                f"holds {found or 'none'}, and every cluster serves one task only. Add clusters, name the "
                "task(s) in data.sources for a source that has some, or give the task(s) the share 0 in "
                "selfplay.tasks."
            )
        return partition

    def _count_rounds(self) -> None:
        sizes = {task: len(ids) for task, ids in self._partition.items()}
        self._counts = round_counts(sizes, self._weights, self._clusters_per_round)
        if absent := [task for task, count in self._counts.items() if count == 0]:
            raise UserError(
                f"A round of {self._clusters_per_round} cluster(s) has no place for the task(s) "
                f"{', '.join(absent)}. Raise selfplay.clusters_per_round, or the shares of these tasks "
                "in selfplay.tasks."
            )

    def _draw(self, number: int, queues: dict[str, list[str]]) -> list[tuple[str, str]]:
        """Take a round's (cluster id, task) from the queues, filling up those that run short."""
        rng = random.Random(f"{self._seed}/round/{number}")
        drawn: list[tuple[str, str]] = []
        for task, count in self._counts.items():
            queue = queues[task]
            if len(queue) < count:
                # The next pass begins. What is left of this one comes first, and at the end of the
                # next, so that no cluster occurs twice in a round.
                left = set(queue)
                ids = rng.sample(self._partition[task], len(self._partition[task]))
                queue = queue + [i for i in ids if i not in left] + [i for i in ids if i in left]
            drawn += [(cluster_id, task) for cluster_id in queue[:count]]
            queues[task] = queue[count:]
        rng.shuffle(drawn)
        return drawn

    def upcoming(self) -> Iterator[tuple[Cluster, str]]:
        """The stream from the present place on, without end. Looking ahead consumes nothing."""
        queues, number, offset = dict(self._queues), self._round, self._offset
        while True:
            for cluster_id, task in self._draw(number, queues)[offset:]:
                yield self._clusters[cluster_id], task
            number, offset = number + 1, 0

    def advance(self, n: int) -> None:
        """Consume the next n clusters of the stream."""
        self._offset += n
        size = sum(self._counts.values())
        while self._offset >= size:
            self._draw(self._round, self._queues)
            self._round += 1
            self._offset -= size

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream and the clusters' tasks, as plain JSON."""
        return {
            "seed": self._seed,
            "round": self._round,
            "offset": self._offset,
            "queues": {task: list(ids) for task, ids in self._queues.items()},
            "partition": {task: list(ids) for task, ids in self._partition.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved place.

        Raises:
            UserError: if the documents or the tasks are not those that the state was saved with.
        """
        saved = {cluster_id for ids in state["partition"].values() for cluster_id in ids}
        present = {cluster_id for ids in self._partition.values() for cluster_id in ids}
        if set(state["partition"]) != set(self._partition) or saved != present:
            raise UserError(
                f"The checkpoint was made with {len(saved)} clusters for the tasks "
                f"{', '.join(state['partition'])}, but this run has {len(present)} for "
                f"{', '.join(self._partition)} ({len(saved ^ present)} of them are not in both). Resume with "
                "the same documents file, data.sources and selfplay.tasks, or start a new run."
            )
        self._seed = state["seed"]
        self._round = state["round"]
        self._offset = state["offset"]
        self._queues = {task: list(state["queues"][task]) for task in self._partition}
        self._partition = {task: list(state["partition"][task]) for task in self._partition}
        self._count_rounds()
