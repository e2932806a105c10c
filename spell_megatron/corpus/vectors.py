"""The vectors by which pieces are grouped, computed part by part, so that a run that was stopped continues."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from spell_megatron.corpus import embedding
from spell_megatron.corpus.options import Options
from spell_megatron.corpus.pieces import Pieces
from spell_megatron.files import appearing_file
from spell_megatron.monitoring.progress import Progress

PARALLEL_TEXTS = 10_000
"""Fewer texts are counted by this process alone, because worker processes take seconds to start."""
_PART = 1024


def write_vectors(folder: Path, pieces: Pieces, rows: np.ndarray, options: Options, progress: Progress) -> None:
    """Write the vectors of some pieces to `vectors.npy` `[rows, dimensions]`.

    Parts that an earlier run has left in the folder are not computed again.
    """
    parts = [rows[i : i + _PART] for i in range(0, len(rows), _PART)]
    missing = [number for number in range(len(parts)) if not _file(folder, number).exists()]
    batches = (pieces.values("text", parts[number].tolist()) for number in missing)
    vectors = _embed(pieces, rows, batches, options)
    # Sums of several threads come out differently from run to run.
    with progress.stage("embedding", len(rows)) as advance, threadpool_limits(1):
        for number, part in zip(missing, vectors, strict=False):
            _save(_file(folder, number), part)
            advance(min(len(rows), (number + 1) * _PART))
    if parts:
        _join(folder, len(parts), len(rows))


def _embed(pieces: Pieces, rows: np.ndarray, batches: Iterator[list[str]], options: Options) -> Iterator[np.ndarray]:
    if not options.embedding_model:
        places = np.linspace(0, len(rows) - 1, min(embedding.SAMPLE, len(rows))).astype(int)
        sample = rows[places]
        chunks = (pieces.values("text", sample[i : i + _PART].tolist()) for i in range(0, len(sample), _PART))
        workers = options.workers if len(rows) > PARALLEL_TEXTS else 1
        return embedding.embed_words(chunks, batches, workers, options.seed)
    shortened = ([text[: options.embedding_chars] for text in batch] for batch in batches)
    if options.embedding_url:
        return embedding.embed_by_server(shortened, options.embedding_url, options.embedding_model)
    return embedding.embed_by_vllm(shortened, options.embedding_model)


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number}.npy"


def _save(path: Path, array: np.ndarray) -> None:
    with appearing_file(path) as partial, partial.open("wb") as file:
        np.save(file, array)


def _join(folder: Path, parts: int, rows: int) -> None:
    first = np.load(_file(folder, 0), mmap_mode="r")
    joined = np.lib.format.open_memmap(folder / "vectors.npy", "w+", np.float32, (rows, first.shape[1]))
    for number in range(parts):
        joined[number * _PART : (number + 1) * _PART] = np.load(_file(folder, number))
    joined.flush()
    for number in range(parts):
        _file(folder, number).unlink()
