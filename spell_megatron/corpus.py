"""Raw text to document clusters: what `spell prepare` does.

Text files, JSON lines and parquet tables become one parquet (or JSON lines) file of clusters, the form that
`spell_megatron.selfplay.documents.load_clusters` reads: columns `cluster_id` (string), `documents` (list of
strings), `document_ids` (list of strings, as many) and `source` (string).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from scipy.sparse import csr_matrix
from sklearn.cluster import BisectingKMeans
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
from sklearn.neighbors import NearestNeighbors

from spell_megatron.errors import UserError
from spell_megatron.selfplay.documents import Cluster, load_clusters

SCHEMA = pa.schema(
    [
        ("cluster_id", pa.string()),
        ("documents", pa.list_(pa.string())),
        ("document_ids", pa.list_(pa.string())),
        ("source", pa.string()),
    ]
)

TEXT_SUFFIXES = {".txt", ".md"}
TABLE_SUFFIXES = {".jsonl", ".parquet"}
# Tables with one of these pairs of columns hold clusters already.
CLUSTER_COLUMNS = [{"cluster_id", "documents"}, {"question_id", "paragraphs"}]

# In examples/documents, TF-IDF cosines across folders have a median of 0.03 and a 95th percentile of 0.09;
# inside a folder the median is 0.20, and every document has a neighbour above 0.1.
MIN_SIMILARITY = 0.1
NEIGHBOURS = 16
# Nearest neighbours cost the square of the number of documents: larger sets are cut into buckets first.
BUCKET = 4000


@dataclass(frozen=True)
class Document:
    """One text with where it came from; `folder` is empty unless its folder makes a cluster."""

    id: str
    text: str
    folder: str = ""


@dataclass
class Summary:
    """What `prepare` read, left out and wrote."""

    out: Path
    files: int = 0
    """Files read."""
    documents: int = 0
    """Documents met in those files, skipped ones included; pieces of a long one count once."""
    pieces: int = 0
    """More documents that came from cutting long ones."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Documents left out, by reason."""
    skipped_files: Counter[str] = field(default_factory=Counter)
    """Files left out, by reason."""
    notes: list[str] = field(default_factory=list)
    """One line per file that needs attention."""
    cluster_documents: list[int] = field(default_factory=list)
    """Documents of each cluster written."""
    cluster_words: list[int] = field(default_factory=list)
    """Words of each cluster written."""

    @property
    def clusters(self) -> int:
        return len(self.cluster_documents)

    def __str__(self) -> str:
        lines = [f"{self.out}: {self.clusters:,} clusters of {sum(self.cluster_documents):,} documents"]
        for name, sizes in (("documents", self.cluster_documents), ("words", self.cluster_words)):
            if sizes:
                lines.append(
                    f"  {name} per cluster: {min(sizes):,} to {max(sizes):,}, "
                    f"median {statistics.median(sizes):,.0f}"
                )
        if alone := self.cluster_documents.count(1):
            lines.append(f"  clusters of a single document: {alone:,} (nothing similar to it was found)")
        lines.append(
            f"  read: {self.documents:,} documents in {self.files:,} files"
            + (f"; {self.pieces:,} more by cutting long ones" if self.pieces else "")
        )
        for title, counts in (("documents", self.skipped), ("files", self.skipped_files)):
            if counts:
                named = counts.most_common(8)
                reasons = [f"{count:,} {reason}" for reason, count in named]
                if others := counts.total() - sum(count for _, count in named):
                    reasons.append(f"{others:,} for other reasons")
                lines.append(f"  {title} left out: {counts.total():,} ({', '.join(reasons)})")
        lines += [f"  note: {note}" for note in self.notes[:10]]
        if len(self.notes) > 10:
            lines.append(f"  ... and {len(self.notes) - 10:,} more notes")
        return "\n".join(lines)


def prepare(
    inputs: Sequence[Path],
    out: Path,
    *,
    documents_per_cluster: int = 8,
    max_cluster_chars: int = 48_000,
    max_document_chars: int = 8000,
    min_document_chars: int = 200,
    text_column: str = "text",
    source: str = "documents",
    seed: int = 0,
) -> Summary:
    """Turn files and folders into one .parquet or .jsonl file of document clusters.

    Text files (.txt, .md, or no extension) are one document each. Every row of a .jsonl or .parquet table is
    one document (column `text_column`), or one cluster if the table has the columns `cluster_id` and
    `documents`; such clusters are passed through as they are. Text files that share a sub-folder of an input
    folder make a cluster; all other documents are grouped by similarity (`group_similar`). Documents longer
    than `max_document_chars` are cut (`split_text`); documents shorter than `min_document_chars` and
    repetitions are left out. No cluster made here gets more than `documents_per_cluster` documents or
    `max_cluster_chars` characters: a folder with more becomes several clusters.

    `out` appears only when it is complete. The same inputs, options and seed give the same file.

    Raises:
        UserError: for missing inputs, tables without the column, options that contradict each other, an
            output that cannot be written, and when nothing usable is found.
    """
    inputs, out = [Path(path) for path in inputs], Path(out)
    _check_options(
        inputs, out, documents_per_cluster, max_cluster_chars, max_document_chars, min_document_chars
    )
    summary = Summary(out)
    folders: dict[str, list[Document]] = {}
    ready: dict[str, Cluster] = {}
    seen: set[bytes] = set()
    with _progress() as progress:
        files = _find_files(inputs, out, summary)
        task = progress.add_task("reading", total=len(files))
        for path, name, folder in files:
            summary.files += 1
            if path.suffix.lower() in TABLE_SUFFIXES and _is_clustered(path):
                for cluster in load_clusters(path):
                    if cluster.id in ready:
                        raise UserError(
                            f"{path}: the cluster id {cluster.id!r} was already in an earlier input. "
                            "Give each cluster an id of its own."
                        )
                    ready[cluster.id] = cluster
                    summary.documents += len(cluster.documents)
            else:
                for document in _read_documents(path, name, folder, text_column, summary):
                    summary.documents += 1
                    pieces = _usable_pieces(document, min_document_chars, max_document_chars, seen, summary)
                    folders.setdefault(document.folder, []).extend(pieces)
            progress.advance(task)

        loose = folders.pop("", [])
        # A document alone in its folder says nothing about what belongs together.
        for folder in [folder for folder, documents in folders.items() if len(documents) == 1]:
            loose += folders.pop(folder)
        if not loose and not folders and not ready:
            raise UserError(_nothing_usable(inputs, summary))

        limits = {"max_documents": documents_per_cluster, "max_chars": max_cluster_chars, "seed": seed}
        task = progress.add_task("grouping", total=len(folders) + 1)
        groups: list[tuple[str, list[Document]]] = []
        for folder, documents in sorted(folders.items()):
            parts = group_similar([d.text for d in documents], min_similarity=0.0, **limits)
            for number, part in enumerate(parts, 1):
                groups.append(
                    (folder if len(parts) == 1 else f"{folder}-{number}", [documents[i] for i in part])
                )
            progress.advance(task)
        parts = group_similar([d.text for d in loose], min_similarity=MIN_SIMILARITY, **limits)
        groups += [(f"{source}-{n:05d}", [loose[i] for i in part]) for n, part in enumerate(parts, 1)]
        progress.advance(task)

        def clusters() -> Iterator[Cluster]:
            yield from ready.values()
            taken = set(ready)
            for cluster_id, documents in groups:
                cluster_id = _unused(cluster_id, taken)
                taken.add(cluster_id)
                yield Cluster(
                    cluster_id, tuple(d.text for d in documents), tuple(d.id for d in documents), source
                )

        _write(clusters(), out, summary)
    return summary


def split_text(text: str, limit: int) -> list[str]:
    """Cut a text into pieces of at most `limit` characters, of similar length.

    The text is halved until it fits. A cut goes to the best kind of boundary in the middle half (heading,
    blank line, line, sentence, word), to the one nearest the middle.
    """
    if len(text) <= limit:
        return [text]
    middle = len(text) // 2
    cut = middle
    for boundary in (r"\n(?=#)", r"\n[ \t]*\n", r"\n", r"(?<=[.!?])\s", r"\s"):
        matches = re.compile(boundary).finditer(text, len(text) // 4, len(text) - len(text) // 4)
        if places := [match.end() for match in matches if 0 < match.end() < len(text)]:
            cut = min(places, key=lambda place: abs(place - middle))
            break
    return split_text(text[:cut].strip("\n"), limit) + split_text(text[cut:].strip("\n"), limit)


def group_similar(
    texts: Sequence[str], *, max_documents: int, max_chars: int, min_similarity: float, seed: int
) -> list[list[int]]:
    """Group texts by TF-IDF cosine similarity; returns sorted indices, groups in order of their first text.

    Starts with every text alone and joins the most similar pairs of groups (cosine of their mean vectors),
    round by round, as long as the union has at most `max_documents` texts and `max_chars` characters and the
    similarity is at least `min_similarity`. More than 4,000 texts are first cut into buckets by bisecting
    k-means.
    """
    if sum(map(len, texts)) <= max_chars and len(texts) <= max_documents and min_similarity <= 0:
        return [list(range(len(texts)))] if texts else []
    if not texts:
        return []
    counts = HashingVectorizer(stop_words="english", alternate_sign=False, norm=None).transform(texts)
    vectors = TfidfTransformer(sublinear_tf=True).fit_transform(counts)
    buckets = [np.arange(len(texts))]
    if len(texts) > BUCKET:
        vectors = vectors[:, np.unique(vectors.indices)]  # k-means centres are dense
        labels = BisectingKMeans(
            -(-2 * len(texts) // BUCKET), bisecting_strategy="largest_cluster", random_state=seed
        ).fit_predict(vectors)
        buckets = [np.flatnonzero(labels == label) for label in range(labels.max() + 1)]
    groups: list[list[int]] = []
    for bucket in buckets:
        lengths = [len(texts[i]) for i in bucket]
        for members in _join_pairs(vectors[bucket], lengths, max_documents, max_chars, min_similarity):
            groups.append(sorted(int(bucket[i]) for i in members))
    return sorted(groups)


def _join_pairs(
    vectors: csr_matrix, lengths: Sequence[int], max_documents: int, max_chars: int, min_similarity: float
) -> list[list[int]]:
    groups = [[i] for i in range(len(lengths))]
    while len(groups) > 1:
        # The sum of the members' vectors points where their mean does, and cosine ignores the length.
        rows = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
        columns = np.concatenate(groups)
        membership = csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(groups), len(lengths)))
        sums = membership @ vectors
        neighbours = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(groups) - 1), metric="cosine").fit(sums)
        distances, indices = neighbours.kneighbors()
        pairs = sorted(
            (round(float(distance), 9), min(i, j), max(i, j))
            for i, (row, near) in enumerate(zip(distances, indices.tolist(), strict=True))
            for distance, j in zip(row, near, strict=True)
            if 1 - distance >= min_similarity
        )
        joined: set[int] = set()
        unions = []
        for _, i, j in pairs:
            union = groups[i] + groups[j]
            if i in joined or j in joined or len(union) > max_documents:
                continue
            if sum(lengths[k] for k in union) > max_chars:
                continue
            joined |= {i, j}
            unions.append(union)
        if not unions:
            break
        groups = unions + [group for i, group in enumerate(groups) if i not in joined]
    return groups


def _check_options(
    inputs: Sequence[Path],
    out: Path,
    documents_per_cluster: int,
    max_cluster_chars: int,
    max_document_chars: int,
    min_document_chars: int,
) -> None:
    faults = [f"there is no {path}" for path in inputs if not path.exists()]
    faults += [
        f"{path} is neither a file nor a folder"
        for path in inputs
        if path.exists() and not path.is_file() and not path.is_dir()
    ]
    if not inputs:
        faults.append("there are no inputs; name files or folders")
    if out.suffix not in TABLE_SUFFIXES:
        faults.append(f"the output {out} must end in .parquet or .jsonl")
    elif out.is_dir():
        faults.append(f"the output {out} is a folder")
    if documents_per_cluster < 1:
        faults.append(f"documents per cluster must be at least 1, not {documents_per_cluster}")
    if not 1 <= min_document_chars <= max_document_chars <= max_cluster_chars:
        faults.append(
            "characters must be 1 <= min_document_chars <= max_document_chars <= max_cluster_chars, not "
            f"{min_document_chars}, {max_document_chars}, {max_cluster_chars}"
        )
    if faults:
        raise UserError("Cannot prepare documents: " + "; ".join(faults) + ".")


def _find_files(inputs: Sequence[Path], out: Path, summary: Summary) -> list[tuple[Path, str, str]]:
    """Files to read as (path, name for document ids, folder that makes a cluster or ""), in a fixed order."""
    found: list[tuple[Path, str, str]] = []
    taken: set[Path] = {out.resolve()}
    folder_inputs = [path for path in inputs if path.is_dir()]

    def add(path: Path, name: str, folder: str) -> None:
        if path.resolve() in taken:
            return
        taken.add(path.resolve())
        if not path.is_file():
            summary.skipped_files["broken links and special files"] += 1
            return
        suffix = _extension(path)
        if suffix in TABLE_SUFFIXES:
            found.append((path, name, ""))
        elif suffix in TEXT_SUFFIXES or not suffix:
            found.append((path, name, folder))
        else:
            summary.skipped_files[f"{suffix} (not a format read here)"] += 1

    for given in inputs:
        if given.is_file():
            add(given, given.name if len(inputs) == 1 else str(given), "")
            continue
        # Two inputs may hold folders of the same name.
        prefix = Path(given.name) if len(folder_inputs) > 1 else Path()
        for where, subfolders, names in os.walk(given):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            inside = Path(where).relative_to(given)
            for name in sorted(names):
                if name.startswith("."):
                    continue
                if inside == Path() and subfolders and Path(name).stem.upper() == "README":
                    summary.skipped_files["README beside sub-folders"] += 1
                    continue
                folder = "" if inside == Path() else (prefix / inside).as_posix()
                add(Path(where) / name, (prefix / inside / name).as_posix(), folder)
    return found


def _extension(path: Path) -> str:
    """`.txt` of `a.TXT`; nothing for `GPL-3` and `Apache-2.0`, whose last part is a version number."""
    return path.suffix.lower() if re.search(r"[A-Za-z]", path.suffix) else ""


def _read_documents(
    path: Path, name: str, folder: str, text_column: str, summary: Summary
) -> Iterator[Document]:
    if path.suffix.lower() not in TABLE_SUFFIXES:
        text = _read_text(path, summary)
        if text is not None:
            yield Document(name, text, folder)
        return
    for number, value in _column(path, text_column, summary):
        if isinstance(value, str):
            yield Document(f"{name}:{number}", value)
        else:
            summary.documents += 1
            summary.skipped[f"without a text in {text_column!r}"] += 1


def _read_text(path: Path, summary: Summary) -> str | None:
    try:
        data = path.read_bytes()
    except OSError as error:
        summary.skipped_files["unreadable"] += 1
        summary.notes.append(f"{path}: {error.strerror}")
        return None
    text = data.decode("utf-8-sig", errors="replace")
    bad = text.count("�")
    if b"\0" in data or bad > max(10, len(text) // 100):
        summary.skipped_files["not UTF-8 text"] += 1
        summary.notes.append(f"{path}: not UTF-8 text, left out; convert it with iconv")
        return None
    if bad:
        summary.notes.append(f"{path}: bytes that are not UTF-8: {bad}, replaced by U+FFFD")
    return text


def _parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file ({error}).") from error


def _column(path: Path, column: str, summary: Summary) -> Iterator[tuple[int, object]]:
    """(row number from 1, value of the column) of a .jsonl or .parquet file, read piece by piece."""
    if path.suffix.lower() == ".parquet":
        table = _parquet(path)
        _check_column(path, column, table.schema_arrow.names)
        number = 0
        try:
            for batch in table.iter_batches(batch_size=256, columns=[column]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield number, value
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: damaged after row {number} ({error}). Write the file again.") from error
        return
    checked = False
    bad = 0
    for number, row in _json_rows(path):
        if not isinstance(row, dict):
            bad += 1
            summary.documents += 1
            summary.skipped["not a JSON object"] += 1
            continue
        if not checked:
            _check_column(path, column, row)
            checked = True
        yield number, row.get(column)
    if bad:
        summary.notes.append(f"{path}: {bad} lines are not JSON objects")


def _check_column(path: Path, column: str, columns: Iterable[str]) -> None:
    columns = list(columns)
    if column not in columns:
        raise UserError(
            f"{path}: there is no column {column!r}. The columns are {', '.join(columns)}. Name the one "
            "that holds the text with --text-column (or give the table the columns cluster_id and "
            "documents if its rows are clusters)."
        )


def _json_rows(path: Path) -> Iterator[tuple[int, object]]:
    """(line number, value) of each non-empty line; None for lines that are not JSON."""
    try:
        lines = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}. Make the file readable or leave it out.") from error
    with lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, None


def _is_clustered(path: Path) -> bool:
    if path.suffix.lower() == ".parquet":
        columns = set(_parquet(path).schema_arrow.names)
    else:
        columns = set(next((row for _, row in _json_rows(path) if isinstance(row, dict)), ()))
    return any(pair <= columns for pair in CLUSTER_COLUMNS)


def _clean(text: str) -> str:
    """Newlines as \\n, at most two blank lines in a row, and no control characters (form feeds, escapes)."""
    # JSON can hold lone surrogates, which UTF-8 cannot.
    text = text.encode("utf-8", "replace").decode()
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\f", "\n\n")
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{4,}", "\n\n\n", text).strip()


def _usable_pieces(
    document: Document, min_chars: int, max_chars: int, seen: set[bytes], summary: Summary
) -> list[Document]:
    text = _clean(document.text)
    if not text:
        summary.skipped["empty"] += 1
        return []
    if len(text) < min_chars:
        summary.skipped[f"shorter than {min_chars} characters"] += 1
        return []
    digest = hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()
    if digest in seen:
        summary.skipped["repeated"] += 1
        return []
    seen.add(digest)
    pieces = [piece for piece in split_text(text, max_chars) if piece]
    summary.pieces += len(pieces) - 1
    if len(pieces) == 1:
        return [Document(document.id, pieces[0], document.folder)]
    return [
        Document(f"{document.id}#{number}", piece, document.folder) for number, piece in enumerate(pieces, 1)
    ]


def _unused(cluster_id: str, taken: set[str]) -> str:
    number, candidate = 1, cluster_id
    while candidate in taken:
        number += 1
        candidate = f"{cluster_id}~{number}"
    return candidate


def _nothing_usable(inputs: Sequence[Path], summary: Summary) -> str:
    reasons = [f"{count} documents {reason}" for reason, count in summary.skipped.items()]
    reasons += [f"{count} files {reason}" for reason, count in summary.skipped_files.items()]
    return (
        "No usable documents in "
        + ", ".join(map(str, inputs))
        + ": "
        + ("; ".join(reasons) if reasons else "there are no files")
        + ". Documents are .txt, .md, .jsonl and "
        ".parquet files, and UTF-8 files without an extension."
    )


def _write(clusters: Iterable[Cluster], out: Path, summary: Summary) -> None:
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        rows = (_row(cluster, summary) for cluster in clusters)
        if out.suffix == ".jsonl":
            with partial.open("w", encoding="utf-8") as lines:
                lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        else:
            with pq.ParquetWriter(partial, SCHEMA, compression="zstd") as writer:
                while batch := list(itertools.islice(rows, 500)):
                    writer.write_batch(pa.RecordBatch.from_pylist(batch, SCHEMA))
        os.replace(partial, out)
    except OSError as error:
        raise UserError(f"Cannot write {out}: {error.strerror}. Name another --out or make room.") from error
    finally:
        if partial.parent.is_dir():
            partial.unlink(missing_ok=True)


def _row(cluster: Cluster, summary: Summary) -> dict[str, str | list[str]]:
    summary.cluster_documents.append(len(cluster.documents))
    summary.cluster_words.append(sum(len(text.split()) for text in cluster.documents))
    return {
        "cluster_id": cluster.id,
        "documents": list(cluster.documents),
        "document_ids": list(cluster.document_ids),
        "source": cluster.source,
    }


@contextmanager
def _progress() -> Iterator[Progress]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield progress
