"""Raw text to document clusters: what `spell prepare` does, stage by stage.

Text files, JSON lines and parquet tables become one parquet (or JSON lines) file of clusters, the form that
`spell_megatron.selfplay.documents.load_clusters` reads: columns `cluster_id` (string), `documents` (list of
strings), `document_ids` (list of strings, as many), `source` and `task` (strings; the task may be missing).

Each stage leaves its result in a hidden folder beside the output, so that a run that was stopped goes on from
there. Texts are mapped from a file, never all in memory.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from threadpoolctl import threadpool_limits

from spell_megatron import __version__
from spell_megatron.corpus import duplicates, embedding, reading
from spell_megatron.corpus.grouping import group_similar
from spell_megatron.corpus.options import Options
from spell_megatron.corpus.reading import Counts, Document, File
from spell_megatron.corpus.summary import Summary, statistics_path
from spell_megatron.corpus.texts import clean, split_text, web_fault, words
from spell_megatron.corpus.work_folder import WorkFolder
from spell_megatron.corpus.workers import ordered_map
from spell_megatron.errors import UserError
from spell_megatron.files import appearing_file
from spell_megatron.monitoring.progress import Progress
from spell_megatron.selfplay.documents import Cluster, load_clusters
from spell_megatron.tokenizer import PolicyTokenizer

SCHEMA = pa.schema(
    [
        ("cluster_id", pa.string()),
        ("documents", pa.list_(pa.string())),
        ("document_ids", pa.list_(pa.string())),
        ("source", pa.string()),
        ("task", pa.string()),
    ]
)
_PIECES = pa.schema(
    [
        ("document", pa.int64()),
        ("id", pa.string()),
        ("folder", pa.string()),
        ("text", pa.string()),
        ("characters", pa.int64()),
        ("tokens", pa.int64()),
    ]
)
# Processes take seconds to start: smaller inputs are read by this one alone.
PARALLEL_BYTES, PARALLEL_TEXTS = 32 * 2**20, 10_000
_BATCH_DOCUMENTS, _BATCH_CHARS = 256, 4_000_000
_EMBED_TEXTS = 1024


def prepare(inputs: Sequence[Path], out: Path, options: Options = Options()) -> Summary:
    """Turn files and folders into one .parquet or .jsonl file of document clusters.

    Text files (.txt, .md, or no extension) are one document each. Every row of a .jsonl or .parquet table is one
    document, or one cluster if the table has the columns `cluster_id` and `documents`; such clusters are passed
    through as they are, unless they overlap with an evaluation set or have too many tokens. Documents are filtered,
    those that repeat others are left out, long ones are cut. Text files that share a sub-folder of an input folder
    make a cluster; all other documents are grouped by similarity (`grouping.group_similar`).

    `out` and the statistics beside it (`statistics_path`) appear only when they are complete. The same inputs and
    options give the same bytes, also when a run was killed and started again.

    Raises:
        UserError: for missing or damaged inputs, tables without the column, an output that cannot be written, an
            embedding server that does not answer, and when nothing usable is found.
    """
    inputs, out = [Path(path) for path in inputs], Path(out)
    evaluation = _check(inputs, out, options)
    counts = Counts()
    files = reading.find_files(inputs, [out, statistics_path(out)], counts)
    progress = Progress(console=Console(stderr=True))
    with WorkFolder.open(out, _fingerprint(files, evaluation, options), progress) as work:
        known = None
        if evaluation:
            known = work.stage("evaluation sets", lambda folder: _read_evaluation(folder, evaluation, options))
        read = work.stage(
            "reading", lambda folder: _read(folder, files, inputs, evaluation, known, options, counts, progress)
        )
        counts = _load_counts(read)
        pieces = pa.ipc.open_file(pa.memory_map(str(read / "pieces.arrow"))).read_all()
        unique = work.stage("near-duplicates", lambda folder: _find_near_duplicates(folder, read, options, progress))
        original, kept = np.load(unique / "original.npy"), np.load(unique / "kept.npy")
        if repeated := int((original != np.arange(len(original))).sum()):
            counts.skipped["near-duplicates"] += repeated
        counts.pieces = len(kept) - (len(original) - repeated)
        plan = _plan_groups(pieces, kept, options)
        vectors = work.stage("embedding", lambda folder: _embed(folder, pieces, plan.embedded, options, progress))
        groups = work.stage("grouping", lambda folder: _group(folder, pieces, plan, vectors, options, progress))
        ready = read / "clusters.parquet"
        summary = _write(
            load_clusters(ready) if ready.exists() else [],
            json.loads((groups / "groups.json").read_bytes()),
            pieces,
            inputs,
            options,
            Summary(out, counts),
        )
        work.finished = True
    return summary


def _check(inputs: Sequence[Path], out: Path, options: Options) -> list[Path]:
    """Look for what can be found wrong before any work; returns the files of evaluation sets."""
    given = [*inputs, *options.decontaminate]
    faults = [f"there is no {path}" for path in given if not path.exists()]
    faults += [
        f"{path} is neither a file nor a folder"
        for path in given
        if path.exists() and not path.is_file() and not path.is_dir()
    ]
    if not inputs:
        faults.append("there are no inputs; name files or folders")
    if out.suffix not in reading.TABLE_SUFFIXES:
        faults.append(f"the output {out} must end in .parquet or .jsonl")
    elif out.is_dir():
        faults.append(f"the output {out} is a folder")
    evaluation: list[Path] = []
    for path in options.decontaminate:
        files = [path]
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix.lower() in duplicates.EVALUATION_SUFFIXES)
            if not files:
                faults.append(f"{path} holds no evaluation sets (.jsonl, .json, .parquet, .zip)")
        elif path.exists() and path.suffix.lower() not in duplicates.EVALUATION_SUFFIXES:
            faults.append(f"the evaluation set {path} must end in .jsonl, .json, .parquet or .zip")
        evaluation += files
    if options.tokenizer:
        try:
            PolicyTokenizer(options.tokenizer)
        except UserError as error:
            faults.append(f"--tokenizer: {error}".rstrip("."))
    if faults:
        raise UserError("Cannot prepare documents: " + "; ".join(faults) + ".")
    return evaluation


def _fingerprint(files: Sequence[File], evaluation: Sequence[Path], options: Options) -> str:
    """A word that changes with the inputs, the options and the program."""
    facts: list[Any] = [__version__, np.__version__]
    facts += [[name, str(value)] for name, value in asdict(options).items() if name != "workers"]
    for path, name in [(file.path, file.name) for file in files] + [(path, "") for path in evaluation]:
        status = path.stat()
        facts.append([str(path), name, status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps(facts).encode("utf-8", "surrogatepass")).hexdigest()


# ---------------------------------------------------------------------------------------- reading


def _read_evaluation(folder: Path, files: Sequence[Path], options: Options) -> None:
    hashes, owners = duplicates.evaluation_sequences(files, options.overlap_words)
    np.save(folder / "hashes.npy", hashes)
    np.save(folder / "owners.npy", owners)


@dataclass(frozen=True)
class _Examined:
    """What one document came to: a reason to leave it out, or its pieces."""

    document: Document
    fault: str = ""
    digest: bytes = b""
    signature: np.ndarray | None = None
    pieces: Sequence[tuple[str, int]] = ()
    """Text and number of tokens of each."""


def _read(
    folder: Path,
    files: Sequence[File],
    inputs: Sequence[Path],
    evaluation: Sequence[Path],
    known: Path | None,
    options: Options,
    counts: Counts,
    progress: Progress,
) -> None:
    """Write the pieces of usable documents, their signatures, the clusters passed through, and the counts."""
    size = sum(file.path.stat().st_size for file in files)
    ready: dict[str, Cluster] = {}
    examine = functools.partial(_examine, options=options, evaluation=tuple(evaluation), known=known)
    seen: set[bytes] = set()
    document = 0
    with (
        progress.stage("reading") as advance,
        pa.ipc.new_file(str(folder / "pieces.arrow"), _PIECES) as pieces,
        (folder / "signatures").open("wb") as signatures,
    ):
        batches = _batches(_raw_documents(files, ready, known, evaluation, options, counts))
        for results in ordered_map(examine, batches, options.workers if size > PARALLEL_BYTES else 1):
            rows = []
            for result in results:
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
            if rows:
                pieces.write_batch(pa.record_batch([list(column) for column in zip(*rows, strict=True)], _PIECES))
            advance(counts.documents)
    if not document and not ready:
        raise UserError(_nothing_usable(inputs, counts))
    if ready:
        _write_table(map(_row, ready.values()), folder / "clusters.parquet")
    (folder / "counts.json").write_text(json.dumps(vars(counts)))


def _load_counts(folder: Path) -> Counts:
    saved = json.loads((folder / "counts.json").read_bytes())
    return Counts(**saved | {name: Counter(saved[name]) for name in ("skipped", "skipped_files")})


def _raw_documents(
    files: Sequence[File],
    ready: dict[str, Cluster],
    known: Path | None,
    evaluation: Sequence[Path],
    options: Options,
    counts: Counts,
) -> Iterator[Document]:
    """Documents of all files; clusters go to `ready`."""
    for file in files:
        counts.files += 1
        if not (file.is_table and reading.holds_clusters(file.path)):
            yield from reading.read_documents(
                file, options.text_column, options.quality_column, options.min_quality, counts
            )
            continue
        for cluster in load_clusters(file.path):
            if cluster.id in ready:
                raise UserError(
                    f"{file.path}: the cluster id {cluster.id!r} was already in an earlier input. "
                    "Give each cluster an id of its own."
                )
            counts.documents += len(cluster.documents)
            overlaps = (
                _overlap(duplicates.word_hashes(words(text)), options, known, evaluation) for text in cluster.documents
            )
            if fault := next(filter(None, overlaps), ""):
                counts.skipped[f"in clusters with a document {fault}"] += len(cluster.documents)
            elif options.tokenizer and _tokens(cluster.documents, options.tokenizer) > options.max_cluster_tokens:
                counts.skipped[f"in given clusters of more than {options.max_cluster_tokens} tokens"] += len(
                    cluster.documents
                )
            else:
                ready[cluster.id] = cluster


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


def _examine(
    batch: Sequence[Document], options: Options, evaluation: Sequence[Path], known: Path | None
) -> list[_Examined]:
    return [_examine_one(document, options, evaluation, known) for document in batch]


def _examine_one(document: Document, options: Options, evaluation: Sequence[Path], known: Path | None) -> _Examined:
    text = clean(document.text)
    origin = Document(document.id, "", document.folder)  # the raw text need not travel back
    if not text:
        return _Examined(origin, "empty")
    if len(text) < options.min_document_chars:
        return _Examined(origin, f"shorter than {options.min_document_chars} characters")
    if options.drop_long and len(text) > options.max_document_chars:
        return _Examined(origin, f"longer than {options.max_document_chars} characters")
    tokens = words(text)
    if options.web_filters and (fault := web_fault(text, tokens)):
        return _Examined(origin, fault)
    hashes = duplicates.word_hashes(tokens or [text])  # without any word, only an equal text is a repetition
    if fault := _overlap(hashes, options, known, evaluation):
        return _Examined(origin, fault)
    pieces = split_text(text, options.max_document_chars)
    if options.tokenizer:
        count = _tokenizer(options.tokenizer).count
        pieces = [piece for part in pieces for piece in split_text(part, options.max_cluster_tokens - 1, count)]
        sized = [(piece, count(piece)) for piece in pieces if piece]
    else:
        sized = [(piece, 0) for piece in pieces if piece]
    digest = hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()
    return _Examined(origin, "", digest, duplicates.signature(hashes), sized)


def _overlap(hashes: np.ndarray, options: Options, known: Path | None, evaluation: Sequence[Path]) -> str:
    """The reason to leave out a text that shares words with an evaluation set; "" if there is none."""
    if known is None:
        return ""
    all_hashes, owners = _evaluation(known)
    place = duplicates.shared_sequence(hashes, options.overlap_words, all_hashes)
    if place is None:
        return ""
    return f"sharing {options.overlap_words} words with {evaluation[owners[place]].name}"


@functools.lru_cache(1)
def _evaluation(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    hashes, owners = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("hashes", "owners"))
    return hashes.view(np.ndarray), owners.view(np.ndarray)  # searching a np.memmap is slower


def _tokens(texts: Iterable[str], tokenizer: Path) -> int:
    """Tokens of texts with a line end after each."""
    return sum(_tokenizer(tokenizer).count(text) + 1 for text in texts)


@functools.lru_cache(1)
def _tokenizer(folder: Path) -> PolicyTokenizer:
    return PolicyTokenizer(folder)


def _nothing_usable(inputs: Sequence[Path], counts: Counts) -> str:
    reasons = [f"{count} documents {reason}" for reason, count in counts.skipped.items()]
    reasons += [f"{count} files {reason}" for reason, count in counts.skipped_files.items()]
    return (
        "No usable documents in "
        + ", ".join(map(str, inputs))
        + ": "
        + ("; ".join(reasons) if reasons else "there are no files")
        + ". Documents are .txt, .md, .jsonl and "
        ".parquet files, and UTF-8 files without an extension."
    )


# ---------------------------------------------------------------------------------------- grouping


def _find_near_duplicates(folder: Path, read: Path, options: Options, progress: Progress) -> None:
    """Write for each document the one that it repeats, and the pieces of those that stay."""
    signatures = np.fromfile(read / "signatures", np.uint32).reshape(-1, duplicates.PERMUTATIONS)
    pieces = pa.ipc.open_file(pa.memory_map(str(read / "pieces.arrow"))).read_all()
    document = pieces["document"].to_numpy()  # in rising order
    original = np.arange(len(signatures))
    if options.near_duplicates < 1:

        def shingles(number: int) -> np.ndarray:
            rows = range(*np.searchsorted(document, [number, number + 1]))
            text = " ".join(_values(pieces["text"], rows))
            return duplicates.sequences(duplicates.word_hashes(words(text)), duplicates.SHINGLE_WORDS)

        with progress.stage("near-duplicates"):
            original = duplicates.near_duplicates(signatures, options.near_duplicates, shingles)
    np.save(folder / "original.npy", original)
    np.save(folder / "kept.npy", np.flatnonzero(original[document] == document))


@dataclass(frozen=True)
class _Plan:
    """Which pieces make which clusters, and which have to be grouped by similarity; all are row numbers."""

    folders: dict[str, np.ndarray]
    loose: np.ndarray
    embedded: np.ndarray
    """Sorted rows that need a vector."""
    sizes: np.ndarray
    """What counts against the limits [rows, limits]."""
    limits: list[int]


def _plan_groups(pieces: pa.Table, kept: np.ndarray, options: Options) -> _Plan:
    folders: dict[str, list[int]] = {}
    for row, folder in zip(kept.tolist(), pieces["folder"].take(pa.array(kept)).to_pylist(), strict=True):
        folders.setdefault(folder, []).append(row)
    loose = folders.pop("", [])
    # A document alone in its folder says nothing about what belongs together.
    for folder in [folder for folder, rows in folders.items() if len(rows) == 1]:
        loose += folders.pop(folder)
    sizes, limits = [], []
    if options.cluster_chars:
        sizes.append(pieces["characters"].to_numpy())
        limits.append(options.cluster_chars)
    if options.max_cluster_tokens:
        sizes.append(pieces["tokens"].to_numpy() + 1)  # a line end comes between two documents
        limits.append(options.max_cluster_tokens)
    sizes = np.stack(sizes, axis=1)
    arrays = {folder: np.array(rows) for folder, rows in sorted(folders.items())}
    large = [rows for rows in arrays.values() if not _fits(sizes[rows], limits, options.documents_per_cluster)]
    loose = np.array(sorted(loose), np.int64)
    return _Plan(arrays, loose, np.sort(np.concatenate([loose, *large])), sizes, limits)


def _fits(sizes: np.ndarray, limits: Sequence[int], documents: int) -> bool:
    return len(sizes) <= documents and bool((sizes.sum(axis=0) <= limits).all())


def _embed(folder: Path, pieces: pa.Table, rows: np.ndarray, options: Options, progress: Progress) -> None:
    """Write the vectors of some pieces, part by part; parts that a killed run has left are not made again."""
    parts = [rows[i : i + _EMBED_TEXTS] for i in range(0, len(rows), _EMBED_TEXTS)]
    missing = [number for number in range(len(parts)) if not (folder / f"{number}.npy").exists()]

    def texts(rows: np.ndarray) -> list[str]:
        return _values(pieces["text"], rows.tolist())

    batches = (texts(parts[number]) for number in missing)
    if options.embedding_model:
        batches = ([text[: options.embedding_chars] for text in batch] for batch in batches)
        if options.embedding_url:
            vectors = embedding.embed_by_server(batches, options.embedding_url, options.embedding_model)
        else:
            vectors = embedding.embed_by_vllm(batches, options.embedding_model)
    else:
        places = np.linspace(0, len(rows) - 1, min(embedding.SAMPLE, len(rows))).astype(int)
        sample = rows[places]
        chunks = (texts(sample[i : i + _EMBED_TEXTS]) for i in range(0, len(sample), _EMBED_TEXTS))
        workers = options.workers if len(rows) > PARALLEL_TEXTS else 1
        vectors = embedding.embed_words(chunks, batches, workers, options.seed)
    # Sums of several threads come out differently from run to run.
    with progress.stage("embedding", len(rows)) as advance, threadpool_limits(1):
        for number, part in zip(missing, vectors, strict=False):
            _save(folder / f"{number}.npy", part)
            advance(min(len(rows), (number + 1) * _EMBED_TEXTS))
    if parts:
        first = np.load(folder / "0.npy", mmap_mode="r")
        shape = len(rows), first.shape[1]
        joined = np.lib.format.open_memmap(folder / "vectors.npy", "w+", np.float32, shape)
        for number in range(len(parts)):
            joined[number * _EMBED_TEXTS : (number + 1) * _EMBED_TEXTS] = np.load(folder / f"{number}.npy")
        joined.flush()
        for number in range(len(parts)):
            (folder / f"{number}.npy").unlink()


def _save(path: Path, array: np.ndarray) -> None:
    partial = path.with_suffix(".partial.npy")
    np.save(partial, array)
    partial.rename(path)


def _group(folder: Path, pieces: pa.Table, plan: _Plan, vectors: Path, options: Options, progress: Progress) -> None:
    """Write the clusters as [id, rows]: folders in alphabetical order, then groups in order of their first text."""
    matrix = np.load(vectors / "vectors.npy", mmap_mode="r") if len(plan.embedded) else None
    done = 0

    def similar(rows: np.ndarray, least: float) -> list[list[int]]:
        nonlocal done
        own = matrix if len(rows) == len(plan.embedded) else matrix[np.searchsorted(plan.embedded, rows)]
        groups = []
        for members in group_similar(
            own, plan.sizes[rows], plan.limits, options.documents_per_cluster, least, options.seed
        ):
            groups.append(rows[members].tolist())
            done += len(members)
            advance(done)
        return sorted(groups)

    clusters: list[tuple[str, list[int]]] = []
    with progress.stage("grouping", len(plan.embedded)) as advance, threadpool_limits(1):
        for name, rows in plan.folders.items():
            if _fits(plan.sizes[rows], plan.limits, options.documents_per_cluster):
                clusters.append((name, rows.tolist()))
                continue
            parts = similar(rows, -1.0)
            names = [name] if len(parts) == 1 else [f"{name}-{n}" for n in range(1, len(parts) + 1)]
            clusters += zip(names, parts, strict=True)
        if len(plan.loose):
            parts = similar(plan.loose, _least_similarity(len(plan.embedded), options))
            clusters += [(f"{options.source}-{n:05d}", part) for n, part in enumerate(parts, 1)]
    (folder / "groups.json").write_text(json.dumps(clusters))


def _least_similarity(documents: int, options: Options) -> float:
    """Where the user says nothing: what tells related documents from others, measured on several real corpora.

    In fewer dimensions all documents come nearer to each other: 0.3 there groups as 0.1 does with all words.
    """
    if options.min_similarity is not None:
        return options.min_similarity
    if options.embedding_model:
        return 0.5
    return 0.1 if documents <= embedding.DIMENSIONS else 0.3


# ---------------------------------------------------------------------------------------- writing


def _write(
    ready: Sequence[Cluster],
    groups: Sequence[tuple[str, list[int]]],
    pieces: pa.Table,
    inputs: Sequence[Path],
    options: Options,
    summary: Summary,
) -> Summary:
    """Choose among the clusters, give them tasks, and write them with their statistics."""
    # Numbers stand for clusters: the ready ones, then the groups.
    sizes = [len(cluster.documents) for cluster in ready] + [len(rows) for _, rows in groups]
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
    tasks: dict[int, str] = {}
    if options.tasks:
        without = [n for n in chosen if n >= len(ready) or ready[n].task is None]
        random.Random(f"{options.seed}/tasks").shuffle(without)
        for i, task in enumerate(options.tasks):
            part = without[len(without) * i // len(options.tasks) : len(without) * (i + 1) // len(options.tasks)]
            tasks |= dict.fromkeys(part, task)

    def rows() -> Iterator[dict[str, Any]]:
        taken = {cluster.id for cluster in ready}
        for number in chosen:
            if number < len(ready):
                cluster = ready[number]
                row = _row(cluster) | {"task": cluster.task or tasks.get(number)}
            else:
                name, members = groups[number - len(ready)]
                name = _unused(name, taken)
                taken.add(name)
                row = {
                    "cluster_id": name,
                    "documents": _values(pieces["text"], members),
                    "document_ids": _values(pieces["id"], members),
                    "source": options.source,
                    "task": tasks.get(number),
                }
                if options.tokenizer:
                    summary.cluster_tokens.append(sum(_values(pieces["tokens"], members)))
            summary.cluster_documents.append(len(row["documents"]))
            summary.cluster_words.append(sum(len(text.split()) for text in row["documents"]))
            summary.tasks[row["task"] or "none"] += 1
            summary.sources[row["source"]] += 1
            yield row

    out = summary.out
    with appearing_file(out) as table, appearing_file(statistics_path(out)) as statistics:
        _write_table(rows(), table, lines=out.suffix == ".jsonl")
        text = json.dumps(summary.statistics(inputs, options), indent=2, ensure_ascii=False, default=str) + "\n"
        statistics.write_bytes(text.encode("utf-8", "backslashreplace"))  # names of files need not be UTF-8
    return summary


def _values(column: pa.ChunkedArray, rows: Iterable[int]) -> list[Any]:
    # Not `take`, which joins all chunks of a column first: that would read the whole file for each cluster.
    return [column[row].as_py() for row in rows]


def _write_table(rows: Iterable[dict[str, Any]], path: Path, lines: bool = False) -> None:
    if lines:
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        return
    rows = iter(rows)
    with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        while batch := list(itertools.islice(rows, 500)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, SCHEMA))


def _row(cluster: Cluster) -> dict[str, Any]:
    return {
        "cluster_id": cluster.id,
        "documents": list(cluster.documents),
        "document_ids": list(cluster.document_ids),
        "source": cluster.source,
        "task": cluster.task,
    }


def _unused(cluster_id: str, taken: set[str]) -> str:
    number, candidate = 1, cluster_id
    while candidate in taken:
        number += 1
        candidate = f"{cluster_id}~{number}"
    return candidate
