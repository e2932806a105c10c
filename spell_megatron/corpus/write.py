"""The output of `spell prepare`: which clusters are kept, their tasks, and the two files."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from spell_megatron.corpus.options import Options
from spell_megatron.corpus.pieces import Pieces
from spell_megatron.corpus.summary import Summary, statistics_path
from spell_megatron.corpus.table import row_of, write_table
from spell_megatron.corpus.texts import count_words
from spell_megatron.errors import UserError
from spell_megatron.files import appearing_file
from spell_megatron.selfplay.documents import Cluster

Groups = Sequence[tuple[str, list[int]]]
"""Names of new clusters, each with the rows of its pieces."""


def write(
    given: Sequence[Cluster],
    groups: Groups,
    pieces: Pieces,
    inputs: Sequence[Path],
    options: Options,
    summary: Summary,
) -> None:
    """Choose among the clusters, give them tasks, and write them with their statistics, which go to the summary too.

    Raises:
        UserError: no cluster has enough documents.
    """
    # A number stands for a cluster: the given ones come first, then the groups.
    chosen = _choose(
        [len(cluster.documents) for cluster in given] + [len(rows) for _, rows in groups], options, summary
    )
    without = [n for n in chosen if n >= len(given) or given[n].task is None]
    rows = _rows(given, groups, chosen, _tasks(without, options), pieces, options)
    out = summary.out
    with appearing_file(out) as table, appearing_file(statistics_path(out)) as statistics:
        write_table(_counted(rows, summary), table, lines=out.suffix == ".jsonl")
        if options.tokenizer:
            new = (n - len(given) for n in chosen if n >= len(given))
            summary.cluster_tokens += [sum(pieces.values("tokens", groups[n][1])) for n in new]
        text = json.dumps(summary.statistics(inputs, options), indent=2, ensure_ascii=False, default=str) + "\n"
        statistics.write_bytes(text.encode("utf-8", "backslashreplace"))  # names of files need not be UTF-8


def _choose(sizes: Sequence[int], options: Options, summary: Summary) -> list[int]:
    """Numbers of the clusters that are kept, of all with these sizes."""
    chosen = [n for n, size in enumerate(sizes) if size >= options.min_cluster_documents]
    if few := len(sizes) - len(chosen):
        summary.left_out_clusters[f"with fewer than {options.min_cluster_documents} documents"] = few
    if options.max_clusters is not None and len(chosen) > options.max_clusters:
        summary.left_out_clusters[f"beyond {options.max_clusters}"] = len(chosen) - options.max_clusters
        chosen = sorted(random.Random(f"{options.seed}/clusters").sample(chosen, options.max_clusters))
    if not chosen:
        raise UserError(
            f"No cluster has {options.min_cluster_documents} documents. Give a smaller --min-cluster-documents or "
            "--min-similarity, or more documents."
        )
    return chosen


def _tasks(numbers: list[int], options: Options) -> dict[int, str]:
    """The options' tasks in equal parts for clusters without one; none if the options name none."""
    random.Random(f"{options.seed}/tasks").shuffle(numbers)
    tasks: dict[int, str] = {}
    for i, task in enumerate(options.tasks):
        part = numbers[len(numbers) * i // len(options.tasks) : len(numbers) * (i + 1) // len(options.tasks)]
        tasks |= dict.fromkeys(part, task)
    return tasks


def _rows(
    given: Sequence[Cluster],
    groups: Groups,
    chosen: Sequence[int],
    tasks: Mapping[int, str],
    pieces: Pieces,
    options: Options,
) -> Iterator[dict[str, Any]]:
    taken = {cluster.id for cluster in given}
    for number in chosen:
        if number < len(given):
            cluster = given[number]
            yield row_of(cluster) | {"task": cluster.task or tasks.get(number)}
            continue
        name, members = groups[number - len(given)]
        name = _unused(name, taken)
        taken.add(name)
        yield {
            "cluster_id": name,
            "documents": pieces.values("text", members),
            "document_ids": pieces.values("id", members),
            "source": options.source,
            "task": tasks.get(number),
        }


def _unused(cluster_id: str, taken: set[str]) -> str:
    number, candidate = 1, cluster_id
    while candidate in taken:
        number += 1
        candidate = f"{cluster_id}~{number}"
    return candidate


def _counted(rows: Iterator[dict[str, Any]], summary: Summary) -> Iterator[dict[str, Any]]:
    """The rows as they are; the summary counts them as they pass."""
    for row in rows:
        summary.cluster_documents.append(len(row["documents"]))
        summary.cluster_words.append(sum(map(count_words, row["documents"])))
        summary.tasks[row["task"] or "none"] += 1
        summary.sources[row["source"]] += 1
        yield row
