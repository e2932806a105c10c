"""Clusters of documents, and the files that hold them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spell_megatron.config.selfplay_sections import TASKS
from spell_megatron.errors import UserError
from spell_megatron.files import MAX_FAULTS, json_lines
from spell_megatron.parquet import DamagedError, parquet_rows
from spell_megatron.selfplay.references import known_answer, shown, valid_unicode

# Names of the columns: in our files of clusters, in files of questions, and in the released SPELL data.
COLUMNS = {"id": "cluster_id", "documents": "documents", "source": "source"}
QUESTION_COLUMNS = {"id": "id", "documents": "documents", "source": "source"}
REFERENCE_COLUMNS = {"id": "question_id", "documents": "paragraphs", "source": "data_source"}
_READ = {
    *COLUMNS.values(), *QUESTION_COLUMNS.values(), *REFERENCE_COLUMNS.values(),
    "document_ids", "task", "question", "answer",
}  # fmt: skip


@dataclass(frozen=True)
class Cluster:
    """Related documents in a fixed order.

    Attributes:
        document_ids: one for each document.
        source: where the documents come from; `data.sources` names its tasks.
        task: the only task that the cluster serves; None: `data.sources` and the sampler decide.
        question, answer: a question about the documents, if the file holds questions; otherwise empty.
    """

    id: str
    documents: tuple[str, ...]
    document_ids: tuple[str, ...]
    source: str
    task: str | None = None
    question: str = ""
    answer: str = ""


def load_clusters(path: str | Path, tasks: Sequence[str] = TASKS) -> list[Cluster]:
    """Read clusters from a parquet or JSON-lines file.

    `tasks` are those that a row may name. Three kinds of files are read:

    * clusters: `cluster_id`, `documents` (list of texts); optional are `document_ids` (list of the same length),
      `source` and `task`;
    * questions, as validation.questions has them: `task`, `question`, `answer`, `documents`; optional are `id` and
      `source`;
    * the released SPELL data: `question_id`, `paragraphs`, `data_source`. The source is the part before the first
      underscore.

    Raises:
        UserError: the file cannot be read, or rows have faults. It names the first ten by row and column.
    """
    path = Path(path)
    clusters, faults = read_clusters(path, tasks)
    if faults:
        more = f" (and {len(faults) - MAX_FAULTS} more)" if len(faults) > MAX_FAULTS else ""
        raise UserError(
            f"The documents file {path} has {len(faults)} fault(s): {'; '.join(faults[:MAX_FAULTS])}{more}. "
            "Each row needs a unique cluster_id and a non-empty list `documents` of non-empty texts; "
            "document_ids (as many), source and task are optional. Correct the rows, or write the file again with "
            "`spell prepare`."
        )
    if not clusters:
        raise UserError(f"The documents file {path} holds no clusters. `spell prepare` writes such files.")
    return clusters


def read_clusters(path: Path, tasks: Sequence[str] = TASKS) -> tuple[list[Cluster], list[str]]:
    """(clusters of the rows without faults, faults of the others) of a file as `load_clusters` reads it.

    Raises:
        UserError: the file cannot be read.
    """
    clusters: list[Cluster] = []
    faults: list[str] = []
    first_place: dict[str, str] = {}
    columns: Mapping[str, str] = {}
    for place, row, wrong in _read_rows(path):
        if not isinstance(row, dict):
            faults.append(f"{place} {wrong or 'is not a JSON object'}")
            continue
        columns = columns or _columns(row)
        cluster, row_faults = _parse_row({"id": place} | row if columns is QUESTION_COLUMNS else row, columns, tasks)
        row_faults += [f"column {wrong}: holds bytes that are not UTF-8"] if wrong in _READ else []
        if cluster and cluster.id in first_place:
            row_faults.append(f"column {columns['id']}: {cluster.id!r} is already the id of {first_place[cluster.id]}")
        elif cluster:
            first_place[cluster.id] = place
            clusters += [] if row_faults else [cluster]
        faults += [f"{place}, {fault}" for fault in row_faults]
    return clusters, faults


def _columns(row: Mapping[str, Any]) -> Mapping[str, str]:
    """The names of the columns of a file with this first row."""
    if "paragraphs" in row and "documents" not in row:
        return REFERENCE_COLUMNS
    return QUESTION_COLUMNS if "question" in row else COLUMNS


def _read_rows(path: Path) -> Iterator[tuple[str, Any, str]]:
    """(place, row, fault) of the rows of a file.

    The place is such as `line 3`. The fault says what a line is not, or names a column of the row that is not UTF-8.
    """
    if not path.is_file():
        raise UserError(
            f"The documents file {path} does not exist or is not a file. Set data.documents to a parquet or "
            ".jsonl file of document clusters; `spell prepare` makes one of your texts."
        )
    if path.stat().st_size == 0:
        raise UserError(f"The documents file {path} is empty. `spell prepare` makes one of your texts.")
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            for number, row, wrong in parquet_rows(path):
                yield f"row {number}", row, next((name for name in wrong if name in _READ), "")
        elif suffix in (".jsonl", ".json"):
            for number, value, fault in json_lines(path):
                yield f"line {number}", value, fault
        else:
            raise UserError(f"The documents file {path} is neither .parquet nor .jsonl. `spell prepare` writes either.")
    except DamagedError as error:
        raise UserError(f"The documents file {path} cannot be read as parquet: {error}. Write it again.") from error
    except OSError as error:
        raise UserError(f"The documents file {path} cannot be read: {error.strerror}. Correct its name.") from error


def _parse_row(
    row: dict[str, Any], columns: Mapping[str, str], tasks: Sequence[str]
) -> tuple[Cluster | None, list[str]]:
    """The cluster of a row, and the row's faults; None if its id cannot be used."""
    missing = [columns[key] for key in ("id", "documents") if columns[key] not in row]
    if missing:
        found = ", ".join(map(str, row)) or "none"
        return None, [f"column {name} is missing (columns found: {found})" for name in missing]
    faults: list[str] = []
    identifier = row[columns["id"]]
    if (
        isinstance(identifier, bool)
        or not isinstance(identifier, str | int)
        or not str(identifier).strip()
        or not _is_unicode(str(identifier))
    ):
        faults.append(f"column {columns['id']}: must be a non-empty string or an integer, not {shown(identifier)}")
        identifier = None
    documents = _documents(row[columns["documents"]], columns["documents"], faults)
    document_ids = _document_ids(row.get("document_ids"), identifier, len(documents), faults)
    source = _source(row.get(columns["source"]), columns["source"], faults)
    if columns is REFERENCE_COLUMNS:
        source = source.partition("_")[0]
    asked = columns is QUESTION_COLUMNS
    question, answer = _question(row, faults) if asked else ("", "")
    task = row.get("task")
    if (task is not None or asked) and task not in tasks:
        absent = "" if asked else ", or missing"
        faults.append(f"column task: must be one of {', '.join(tasks)}{absent}, not {shown(task)}")
    if identifier is None:
        return None, faults
    return Cluster(str(identifier), documents, document_ids, source, task, question, answer), faults


def _documents(documents: Any, column: str, faults: list[str]) -> tuple[str, ...]:
    if not isinstance(documents, list) or not documents:
        faults.append(f"column {column}: must be a non-empty list of texts, not {shown(documents)}")
        return ()
    for index, document in enumerate(documents, start=1):
        if not isinstance(document, str):
            faults.append(f"column {column}: document {index} is not a text but {shown(document)}")
        elif not document.strip():
            faults.append(f"column {column}: document {index} is empty")
        elif not _is_unicode(document):
            faults.append(f"column {column}: document {index} has half of a surrogate pair, which is no text")
    return tuple(map(str, documents))


def _document_ids(document_ids: Any, identifier: object, count: int, faults: list[str]) -> tuple[str, ...]:
    if document_ids is None:
        return tuple(f"{identifier}/{index}" for index in range(count))
    if not isinstance(document_ids, list) or len(document_ids) != count:
        faults.append(f"column document_ids: must be a list with one id for each of the {count} documents")
        return ()
    return tuple(valid_unicode(str(name)) for name in document_ids)


def _source(source: Any, column: str, faults: list[str]) -> str:
    if isinstance(source, str) and _is_unicode(source):
        return source
    if source is not None:
        faults.append(f"column {column}: must be a string, not {shown(source)}")
    return ""


def _question(row: Mapping[str, Any], faults: list[str]) -> tuple[str, str]:
    """The question of a row and its answer."""
    question, answer = row.get("question"), ""
    if not isinstance(question, str) or not question.strip():
        faults.append(f"column question: must be a non-empty text, not {shown(question)}")
    try:
        answer = known_answer(str(row.get("task")), row.get("answer"))
    except ValueError as error:
        faults.append(f"column answer: {error}")
    return valid_unicode(str(question)), answer


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
