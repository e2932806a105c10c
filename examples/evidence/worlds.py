"""The worlds that the experiments can be played in: their files, and what their documents answer.

`quickstart` is the quick start's. `rich` has longer questions, and two names for everything (examples/evidence/rich).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import fictional_world  # noqa: E402
import make_quickstart_corpus  # noqa: E402
import make_rich_corpus  # noqa: E402
import rich_questions  # noqa: E402
import rich_world  # noqa: E402

CLUSTERS = 300
"""Clusters of a world that the experiments train on."""

Answers = Callable[[str], Collection[str] | None]
"""From a question to all right answers that some documents give; None if they do not answer it."""


@dataclass(frozen=True)
class World:
    """A world by its files and its oracle.

    Attributes:
        oracle: the answers of a cluster's documents.
        training_questions: from a number of clusters to one question with its right answer for each.
        names: all names of what an answer means. With more than one, right answers can fail the rule check.
    """

    config: Path
    policy: Path
    heldout: Path
    documents: Path
    clusters: Callable[[int], list[list]]
    training_questions: Callable[[int], list[dict]]
    oracle: Callable[[list], Answers]
    names: Callable[[str], Collection[str]]
    synonyms: bool

    def answers(self) -> dict[str, Answers]:
        """The oracle of each cluster that is trained on, by the cluster's id."""
        ids = pq.read_table(self.documents, columns=["cluster_id"])["cluster_id"].to_pylist()[:CLUSTERS]
        return {i: self.oracle(cluster) for i, cluster in zip(ids, self.clusters(CLUSTERS), strict=True)}


def _facts(cluster: list[fictional_world.Entity]) -> Answers:
    facts = {fact.text: (fact.answer,) for fact in fictional_world.questions(cluster)}
    return facts.get


def _names(answer: str) -> Collection[str]:
    value = rich_world.value_of(answer)
    return (answer,) if value is None else rich_world.forms(value)


EXAMPLES = ROOT / "examples"
QUICKSTART, RICH = EXAMPLES / "quickstart", EXAMPLES / "evidence" / "rich"
WORLDS = {
    "quickstart": World(
        config=EXAMPLES / "quickstart.yaml",
        policy=QUICKSTART / "policy",
        heldout=QUICKSTART / "heldout.jsonl",
        documents=QUICKSTART / "documents.parquet",
        clusters=make_quickstart_corpus.training_clusters,
        training_questions=make_quickstart_corpus.training_questions,
        oracle=_facts,
        names=lambda answer: (answer,),
        synonyms=False,
    ),
    "rich": World(
        config=EXAMPLES / "evidence" / "rich.yaml",
        policy=RICH / "policy",
        heldout=RICH / "heldout.jsonl",
        documents=RICH / "documents.parquet",
        clusters=make_rich_corpus.training_clusters,
        training_questions=make_rich_corpus.training_questions,
        oracle=lambda cluster: rich_questions.Oracle(cluster).answerable,
        names=_names,
        synonyms=True,
    ),
}
