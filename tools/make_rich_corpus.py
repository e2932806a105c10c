"""Write the corpus of the rich world: document clusters to train on and held-out questions.

    python tools/make_rich_corpus.py [--out examples/evidence/rich]

`documents.parquet` has the columns of `spell prepare` and no questions. `heldout.jsonl` has one question per line over
clusters of their own: id, task, question, answer, aliases (the other names of the answer), documents, and what a reader
of results may want to know: operation (how amounts are combined) and needed (the entities whose documents are needed).
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from corpus_files import write_files
from rich_questions import GENERAL, MATH, Question, chains, draw_question
from rich_world import Entity, make_cluster

SIZES = range(4, 9)
"""Documents per cluster."""


def training_clusters(count: int) -> list[list[Entity]]:
    """Clusters without two equal documents anywhere; the first ones are the same whatever the count."""
    rng = random.Random("rich documents")
    seen: set[str] = set()
    clusters: list[list[Entity]] = []
    while len(clusters) < count:
        cluster = make_cluster(rng, rng.choice(SIZES))
        texts = {entity.text for entity in cluster}
        if not texts & seen:
            seen |= texts
            clusters.append(cluster)
    return clusters


def heldout_questions(count: int, exclude: set[str]) -> list[dict]:
    """One question per cluster, tasks in turn, over clusters without any document in `exclude`."""
    rng = random.Random("rich held out")
    rows: list[dict] = []
    while len(rows) < count:
        cluster = make_cluster(rng, rng.choice(SIZES))
        question = draw_question(rng, chains(cluster), (GENERAL, MATH)[len(rows) % 2])
        if question is not None and not any(entity.text in exclude for entity in cluster):
            rows.append(_row(f"heldout-{len(rows):04d}", question, cluster))
    return rows


def training_questions(count: int) -> list[dict]:
    """One question with its right answer over each of the first `count` training clusters.

    Tasks are taken in turn, as far as the documents of a cluster have an answer of that kind.
    """
    rng = random.Random("rich questions")
    rows = []
    for number, cluster in enumerate(training_clusters(count)):
        every = chains(cluster)
        tasks = (GENERAL, MATH) if number % 2 == 0 else (MATH, GENERAL)
        question = next(filter(None, (draw_question(rng, every, task) for task in tasks)))
        rows.append(_row(f"training-{number:05d}", question, cluster))
    return rows


def _row(identifier: str, question: Question, cluster: list[Entity]) -> dict:
    return {
        "id": identifier,
        "task": question.task,
        "question": question.text,
        "answer": question.answers[0],
        "aliases": list(question.answers[1:]),
        "documents": [entity.text for entity in cluster],
        "operation": question.operation,
        "needed": list(question.documents),
    }


def write_corpus(out: Path, clusters: int, heldout: int) -> None:
    """Write both files into the folder `out`."""
    training = training_clusters(clusters)
    rows = heldout_questions(heldout, {entity.text for cluster in training for entity in cluster})
    write_files(out, "rich", training, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "examples" / "evidence" / "rich")
    parser.add_argument("--clusters", type=int, default=300)
    parser.add_argument("--heldout", type=int, default=500)
    options = parser.parse_args()
    write_corpus(options.out, options.clusters, options.heldout)


if __name__ == "__main__":
    main()
