"""From raw documents to usable pieces: each document is cleaned, kept or left out for a reason, and cut."""

from __future__ import annotations

import functools
import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from spell_megatron.corpus import reading
from spell_megatron.corpus.duplicates import signature
from spell_megatron.corpus.evaluation_sets import EvaluationSets
from spell_megatron.corpus.input_tables import LacksColumn, UnusableFile, holds_clusters
from spell_megatron.corpus.options import Options
from spell_megatron.corpus.pieces import PieceWriter
from spell_megatron.corpus.reading import Counts, Document, File
from spell_megatron.corpus.table import row_of, write_table
from spell_megatron.corpus.texts import clean, split_text, words
from spell_megatron.corpus.web_text import web_fault
from spell_megatron.corpus.word_sequences import word_hashes
from spell_megatron.corpus.workers import ordered_map
from spell_megatron.encodings import printable
from spell_megatron.errors import UserError
from spell_megatron.monitoring.progress import Progress
from spell_megatron.selfplay.documents import Cluster, load_clusters, read_clusters
from spell_megatron.tokenizer import PolicyTokenizer

PARALLEL_BYTES = 32 * 2**20
"""Smaller inputs are read by this process alone, because worker processes take seconds to start."""
_BATCH_DOCUMENTS, _BATCH_CHARS = 256, 4_000_000


@dataclass(frozen=True)
class Examined:
    """What became of one document: a reason to leave it out (`fault`), or its pieces."""

    document: Document
    """Without its text."""
    fault: str = ""
    digest: bytes = b""
    """Equal for documents that differ only in white space, and in how accents are written."""
    signature: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint32))
    pieces: Sequence[tuple[str, int]] = ()
    """Text and number of tokens of each."""


def examine_files(
    folder: Path,
    files: Sequence[File],
    evaluation: EvaluationSets | None,
    options: Options,
    counts: Counts,
    progress: Progress,
) -> bool:
    """Write the pieces of usable documents, their signatures, the given clusters, and the counts.

    Returns:
        Whether any document or given cluster is usable.

    Raises:
        UserError: all tables lack the column of texts or of quality, or two given clusters have the same id.
    """
    given: dict[str, Cluster] = {}
    examine = functools.partial(_examine_batch, options=options, evaluation=evaluation)
    size = sum(file.path.stat().st_size for file in files)
    batches = _batches(_documents(files, given, evaluation, options, counts))
    with progress.stage("reading") as advance:
        results = ordered_map(examine, batches, options.workers if size > PARALLEL_BYTES else 1)
        documents = _write_pieces(folder, results, counts, advance)
    if given:
        write_table(map(row_of, given.values()), folder / "clusters.parquet")
    (folder / "counts.json").write_text(json.dumps(vars(counts)))
    return bool(documents or given)


def load_counts(folder: Path) -> Counts:
    saved = json.loads((folder / "counts.json").read_bytes())
    return Counts(**saved | {name: Counter(saved[name]) for name in ("skipped", "skipped_files")})


def load_given_clusters(folder: Path) -> list[Cluster]:
    """The clusters that the inputs held already and that are passed through."""
    path = folder / "clusters.parquet"
    return load_clusters(path) if path.exists() else []


def _documents(
    files: Sequence[File],
    given: dict[str, Cluster],
    evaluation: EvaluationSets | None,
    options: Options,
    counts: Counts,
) -> Iterator[Document]:
    """The documents of all files; clusters that the files hold go to `given`.

    A file that cannot be used is counted and named, unless all tables lack the column.
    """
    lacking: list[LacksColumn] = []
    for file in files:
        try:
            if file.is_table and holds_clusters(file.path):
                _take_clusters(file.path, given, evaluation, options, counts)
            else:
                yield from reading.read_documents(
                    file, options.text_column, options.quality_column, options.min_quality, counts
                )
            counts.files += 1
        except UnusableFile as fault:
            counts.skipped_files[fault.kind] += 1
            counts.notes.append(printable(fault))
            lacking += [fault] if isinstance(fault, LacksColumn) else []
    if lacking and len(lacking) == sum(file.is_table for file in files):
        raise lacking[0]


def _take_clusters(
    path: Path, given: dict[str, Cluster], evaluation: EvaluationSets | None, options: Options, counts: Counts
) -> None:
    """Add the clusters of a file that are kept to `given`; rows that are no clusters are counted and named."""
    try:
        clusters, faults = read_clusters(path)
    except UserError as error:
        raise UnusableFile("damaged", str(error)) from error
    if faults:
        counts.documents += len(faults)
        counts.skipped["in rows that are no clusters"] += len(faults)
        counts.notes.append(printable(f"{path}: faults: {len(faults)}; the first: {faults[0]}"))
    for cluster in clusters:
        if cluster.id in given:
            raise UserError(
                f"{path}: the cluster id {cluster.id!r} was already in an earlier input. "
                "Give each cluster an id of its own."
            )
        counts.documents += len(cluster.documents)
        if fault := _fault_of_cluster(cluster, evaluation, options):
            counts.skipped[fault] += len(cluster.documents)
        else:
            given[cluster.id] = cluster


def _fault_of_cluster(cluster: Cluster, evaluation: EvaluationSets | None, options: Options) -> str:
    """Why a given cluster is left out; "" if it is kept."""
    if evaluation:
        for text in cluster.documents:
            if fault := evaluation.overlap(word_hashes(words(text))):
                return f"in clusters with a document {fault}"
    if options.tokenizer and options.max_cluster_tokens:
        count = _tokenizer(options.tokenizer).count
        if sum(count(text) + 1 for text in cluster.documents) > options.max_cluster_tokens:  # a line end after each
            return f"in given clusters of more than {options.max_cluster_tokens} tokens"
    return ""


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    chars = 0
    for document in documents:
        batch.append(document)
        chars += len(document.text)
        if len(batch) == _BATCH_DOCUMENTS or chars > _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    yield batch  # also an empty one: what comes before it has been counted


def _examine_batch(batch: Sequence[Document], options: Options, evaluation: EvaluationSets | None) -> list[Examined]:
    return [_examine(document, options, evaluation) for document in batch]


def _examine(document: Document, options: Options, evaluation: EvaluationSets | None) -> Examined:
    text = clean(document.text)
    origin = Document(document.id, "", document.folder)  # the raw text need not travel back
    if not text:
        return Examined(origin, "empty")
    if len(text) < options.min_document_chars:
        return Examined(origin, f"shorter than {options.min_document_chars} characters")
    if options.drop_long and len(text) > options.max_document_chars:
        return Examined(origin, f"longer than {options.max_document_chars} characters")
    tokens = words(text)
    if options.web_filters and (fault := web_fault(text, tokens)):
        return Examined(origin, fault)
    hashes = word_hashes(tokens or [text])  # without any word, only an equal text is a repetition
    if evaluation and (fault := evaluation.overlap(hashes)):
        return Examined(origin, fault)
    same = unicodedata.normalize("NFC", " ".join(text.split()))
    digest = hashlib.blake2b(same.encode(), digest_size=16).digest()
    return Examined(origin, "", digest, signature(hashes), _cut(text, options))


def _cut(text: str, options: Options) -> list[tuple[str, int]]:
    """The pieces of a text with their numbers of tokens, 0 without a tokenizer."""
    pieces = split_text(text, options.max_document_chars)
    if not options.tokenizer or not options.max_cluster_tokens:
        return [(piece, 0) for piece in pieces if piece]
    count = _tokenizer(options.tokenizer).count
    pieces = [piece for part in pieces for piece in split_text(part, options.max_cluster_tokens - 1, count)]
    return [(piece, count(piece)) for piece in pieces if piece]


@functools.lru_cache(1)
def _tokenizer(folder: Path) -> PolicyTokenizer:
    return PolicyTokenizer(folder)


def _write_pieces(
    folder: Path, results: Iterable[list[Examined]], counts: Counts, advance: Callable[[int], None]
) -> int:
    """Write the pieces and signatures of the documents that are kept; returns how many these are."""
    seen: set[bytes] = set()
    document = 0
    with PieceWriter.open(folder) as pieces, (folder / "signatures").open("wb") as signatures:
        for batch in results:
            rows = []
            for result in batch:
                fault = result.fault or ("repeated" if result.digest in seen else "")
                if fault:
                    counts.skipped[fault] += 1
                    continue
                seen.add(result.digest)
                signatures.write(result.signature.tobytes())
                origin = result.document
                for number, (text, tokens) in enumerate(result.pieces, 1):
                    name = origin.id if len(result.pieces) == 1 else f"{origin.id}#{number}"
                    rows.append((document, name, origin.folder, text, len(text), tokens))
                document += 1
            pieces.write(rows)
            advance(counts.documents)
    return document
