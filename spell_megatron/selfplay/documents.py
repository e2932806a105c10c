"""Clusters of documents: reading them, giving each a task, drawing them round by round."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pyarrow
import pyarrow.parquet

from spell_megatron.config.schema import Task
from spell_megatron.errors import UserError
from spell_megatron.files import MAX_FAULTS, read_json_objects
from spell_megatron.selfplay.history import Entry
from spell_megatron.selfplay.parsing import LETTERS, format_decimal
from spell_megatron.selfplay.scoring import parse_number

# Our column names, and those of the released SPELL data.
COLUMNS = {"id": "cluster_id", "documents": "documents", "source": "source"}
QUESTION_COLUMNS = {"id": "id", "documents": "documents", "source": "source"}
REFERENCE_COLUMNS = {"id": "question_id", "documents": "paragraphs", "source": "data_source"}


@dataclass(frozen=True)
class Cluster:
    """Related documents in a fixed order, and where they come from; in files of questions, a question about them."""

    id: str
    documents: tuple[str, ...]
    document_ids: tuple[str, ...]
    source: str
    task: str | None = None
    """The task that it serves; None: `data.sources` and the sampler decide."""
    question: str = ""
    answer: str = ""


def load_clusters(path: str | Path) -> list[Cluster]:
    """Read clusters from a parquet or JSON-lines file.

    Columns: `cluster_id`, `documents` (list of texts), optional `document_ids` (list, as long),
    `source` and `task`. The released SPELL files (`question_id`, `paragraphs`, `data_source`) are read too; their
    source is what stands before the first underscore. So are questions in the form
    of validation.questions: `task`, `question`, `answer`, `documents`, and optionally `id` and `source`.

    Raises:
        UserError: if the file cannot be read, or naming the first ten faults by row and column.
    """
    path = Path(path)
    rows = _read_rows(path)
    if not rows:
        raise UserError(f"The documents file {path} holds no clusters. `spell prepare` writes such files.")
    columns = COLUMNS
    if "paragraphs" in rows[0][1] and "documents" not in rows[0][1]:
        columns = REFERENCE_COLUMNS
    elif "question" in rows[0][1]:
        columns = QUESTION_COLUMNS
        rows = [(place, {"id": place} | row) for place, row in rows]
    clusters: list[Cluster] = []
    faults: list[str] = []
    first_place: dict[str, str] = {}
    for place, row in rows:
        cluster, row_faults = _parse_row(row, columns)
        if cluster and cluster.id in first_place:
            row_faults.append(f"column {columns['id']}: {cluster.id!r} is already the id of {first_place[cluster.id]}")
        elif cluster:
            first_place[cluster.id] = place
            clusters.append(cluster)
        faults += [f"{place}, {fault}" for fault in row_faults]
    if faults:
        more = f" (and {len(faults) - MAX_FAULTS} more)" if len(faults) > MAX_FAULTS else ""
        raise UserError(
            f"The documents file {path} has {len(faults)} fault(s): {'; '.join(faults[:MAX_FAULTS])}{more}. "
            "Each row needs a unique cluster_id and a non-empty list `documents` of non-empty texts; "
            "document_ids (as many), source and task are optional. Mend the rows, or write the file again with "
            "`spell prepare`."
        )
    return clusters


def _read_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a file, each with the words that tell where it stands."""
    if not path.is_file():
        raise UserError(
            f"The documents file {path} does not exist or is not a file. Set data.documents to a parquet or "
            ".jsonl file of document clusters; `spell prepare` makes one of your texts."
        )
    if path.stat().st_size == 0:
        raise UserError(f"The documents file {path} is empty. `spell prepare` makes one of your texts.")
    if path.suffix == ".parquet":
        try:
            table = pyarrow.parquet.read_table(path)
            return [(f"row {number}", row) for number, row in enumerate(table.to_pylist(), start=1)]
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"The documents file {path} cannot be read as parquet: {error}. Write it again.") from error
    if path.suffix in (".jsonl", ".json"):
        return [(f"line {number}", row) for number, row in read_json_objects(path, "documents file")]
    raise UserError(f"The documents file {path} is neither .parquet nor .jsonl. `spell prepare` writes either.")


def _parse_row(row: dict[str, Any], columns: Mapping[str, str]) -> tuple[Cluster | None, list[str]]:
    """The cluster of a row, and the row's faults; None if its id cannot be used."""
    faults: list[str] = []
    names = {key: f"column {name}" for key, name in columns.items()}
    missing = [columns[key] for key in ("id", "documents") if columns[key] not in row]
    if missing:
        found = ", ".join(map(str, row)) or "none"
        return None, [f"column {name} is missing (columns found: {found})" for name in missing]

    identifier = row[columns["id"]]
    if isinstance(identifier, bool) or not isinstance(identifier, str | int) or not str(identifier).strip():
        faults.append(f"{names['id']}: must be a non-empty string or an integer, not {_shown(identifier)}")
        identifier = None
    documents = row[columns["documents"]]
    if not isinstance(documents, list) or not documents:
        faults.append(f"{names['documents']}: must be a non-empty list of texts, not {_shown(documents)}")
        documents = []
    for index, document in enumerate(documents, start=1):
        if not isinstance(document, str):
            faults.append(f"{names['documents']}: document {index} is not a text but {_shown(document)}")
        elif not document.strip():
            faults.append(f"{names['documents']}: document {index} is empty")
        elif not _is_unicode(document):
            faults.append(f"{names['documents']}: document {index} has half of a surrogate pair, which is no text")
    document_ids = row.get("document_ids")
    if document_ids is None:
        document_ids = [f"{identifier}/{index}" for index in range(len(documents))]
    elif not isinstance(document_ids, list) or len(document_ids) != len(documents):
        faults.append(f"column document_ids: must be a list with one id for each of the {len(documents)} documents")
        document_ids = []
    source = row.get(columns["source"])
    if source is None:
        source = ""
    elif not isinstance(source, str):
        faults.append(f"{names['source']}: must be a string, not {_shown(source)}")
        source = ""
    task, question, answer = row.get("task"), "", ""
    if columns is QUESTION_COLUMNS:
        question = row.get("question")
        if not isinstance(question, str) or not question.strip():
            faults.append(f"column question: must be a non-empty text, not {_shown(question)}")
        try:
            answer = known_answer(task, row.get("answer"))
        except ValueError as error:
            faults.append(f"column answer: {error}")
    if (task is not None or columns is QUESTION_COLUMNS) and task not in get_args(Task):
        missing = "" if columns is QUESTION_COLUMNS else ", or missing"
        faults.append(f"column task: must be one of {', '.join(get_args(Task))}{missing}, not {_shown(task)}")
    if identifier is None:
        return None, faults
    if columns is REFERENCE_COLUMNS:
        source = source.partition("_")[0]
    texts, text_ids = tuple(map(str, documents)), tuple(map(str, document_ids))
    return Cluster(str(identifier), texts, text_ids, source, task, str(question), answer), faults


def known_answer(task: str, value: object) -> str:
    """The answer to a question in a file, as the rule check of its task takes it.

    Raises:
        ValueError: saying what the answer must be.
    """
    answer = answer_text(value)
    if not answer:
        raise ValueError(f"answer must be a text or a number, not {_shown(value)}")
    if task == "doc_mc" and answer not in tuple(LETTERS):
        raise ValueError(f"answer of doc_mc must be A, B, C or D, not {_shown(answer)}")
    if task == "docmath_qa" and parse_number(answer) is None:
        raise ValueError(f"answer of docmath_qa must be a number, not {_shown(answer)}")
    return answer


def answer_text(value: object) -> str:
    """A reference answer as text, numbers in decimals; "" for what is neither text nor number."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return format_decimal(value)
    return valid_unicode(value).strip() if isinstance(value, str) else ""


def valid_unicode(text: str) -> str:
    """A text with a question mark for each half of a surrogate pair: JSON can hold such, tokenizers refuse them."""
    return text.encode("utf-8", "replace").decode()


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def choose_context(
    rng: random.Random, n_documents: int, new_documents: int, history_entries: Sequence[Entry]
) -> tuple[int, ...]:
    """Indices, in document order, of the documents that the questioner is shown.

    All documents of remembered questions, and up to `new_documents` of the others, chosen at random:
    a cluster's context grows with every question that enters the history.
    """
    seen = {index for entry in history_entries for index in entry.documents if index < n_documents}
    unseen = [index for index in range(n_documents) if index not in seen]
    return tuple(sorted(seen | set(rng.sample(unseen, min(new_documents, len(unseen))))))


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
        self._weights = {task: weight for task, weight in sorted(tasks.items()) if weight > 0}
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
