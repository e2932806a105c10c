"""Write the corpus of the quick start: document clusters to train on and held-out questions.

    python tools/make_quickstart_corpus.py [--out examples/quickstart]

`documents.parquet` has the columns of `spell prepare` (cluster_id, document_ids, documents, source) and no
questions. `heldout.jsonl` has one question per line (id, task, question, answer, documents) over clusters of
their own: no document of it is in the parquet file. Both tasks and both kinds of question (one hop, two
hops) occur there as `fictional_world.draw_question` draws them, which is also how the seed policy was
taught to ask. It prints how often a reader would be right who does not look whose value it takes.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from corpus_files import write_files
from fictional_world import (
    GENERAL,
    MATH,
    Entity,
    Fact,
    draw_question,
    make_cluster,
    questions,
    relation_baseline,
)

SIZES = (7, 8, 9)
"""Documents per cluster."""


def training_clusters(count: int, seed: int = 0) -> list[list[Entity]]:
    """Clusters without two equal documents anywhere."""
    rng = random.Random(f"documents {seed}")
    seen: set[str] = set()
    clusters = []
    while len(clusters) < count:
        cluster = make_cluster(rng, rng.choice(SIZES))
        texts = {entity.text for entity in cluster}
        if not texts & seen:
            seen |= texts
            clusters.append(cluster)
    return clusters


def heldout_questions(count: int, exclude: set[str], seed: int = 0) -> tuple[list[dict], float]:
    """One question per cluster, tasks in turn, clusters without any document in `exclude`.

    Also returns the share that `relation_baseline` would answer.
    """
    rng = random.Random(f"held out {seed}")
    rows: list[dict] = []
    baseline = 0.0
    while len(rows) < count:
        cluster = make_cluster(rng, rng.choice(SIZES))
        fact = draw_question(rng, questions(cluster), (GENERAL, MATH)[len(rows) % 2])
        if fact is None or any(entity.text in exclude for entity in cluster):
            continue
        baseline += relation_baseline(cluster, fact) / count
        rows.append(_row(f"heldout-{len(rows):04d}", fact, cluster))
    return rows, baseline


def training_questions(count: int, seed: int = 0) -> list[dict]:
    """One question with its right answer over each of the first `count` training clusters.

    Tasks are taken in turn, as far as the documents of a cluster have an answer of that kind.
    """
    rng = random.Random(f"questions {seed}")
    rows = []
    for number, cluster in enumerate(training_clusters(count)):
        tasks = (GENERAL, MATH) if number % 2 == 0 else (MATH, GENERAL)
        fact = next(filter(None, (draw_question(rng, questions(cluster), task) for task in tasks)))
        rows.append(_row(f"training-{number:05d}", fact, cluster))
    return rows


def _row(identifier: str, fact: Fact, cluster: list[Entity]) -> dict:
    return {
        "id": identifier,
        "task": fact.task,
        "question": fact.text,
        "answer": fact.answer,
        "documents": [entity.text for entity in cluster],
    }


def write_corpus(out: Path, clusters: int, heldout: int) -> None:
    """Write both files into the folder `out`."""
    training = training_clusters(clusters)
    rows, baseline = heldout_questions(heldout, {entity.text for cluster in training for entity in cluster})
    write_files(out, "fiction", training, rows)
    print(f"any value of the asked relation: {baseline:.1%} of {heldout} questions right")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "examples" / "quickstart")
    parser.add_argument("--clusters", type=int, default=2000)
    parser.add_argument("--heldout", type=int, default=500)
    options = parser.parse_args()
    write_corpus(options.out, options.clusters, options.heldout)


if __name__ == "__main__":
    main()
