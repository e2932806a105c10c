"""Which pieces make which clusters: the pieces of a folder together, all others by similarity."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from spell_megatron.corpus import embedding
from spell_megatron.corpus.grouping import group_similar
from spell_megatron.corpus.options import Options
from spell_megatron.corpus.pieces import Pieces
from spell_megatron.monitoring.progress import Progress


@dataclass(frozen=True)
class Plan:
    """Which pieces are in folders, and which have to be grouped by similarity; all are row numbers."""

    folders: dict[str, np.ndarray]
    """Rows of each folder, in alphabetical order of the folders."""
    loose: np.ndarray
    """Rows that are in no folder, or alone in theirs."""
    embedded: np.ndarray
    """Sorted rows that need a vector: the loose rows, and the rows of folders too large for one cluster."""
    sizes: np.ndarray
    """What counts toward the limits `[rows, limits]`: characters, tokens or both."""
    limits: list[int]

    def fits(self, rows: np.ndarray, documents: int) -> bool:
        """Whether rows fit into one cluster of at most so many documents."""
        return len(rows) <= documents and bool((self.sizes[rows].sum(axis=0) <= self.limits).all())


def plan_clusters(pieces: Pieces, kept: np.ndarray, options: Options) -> Plan:
    by_folder: dict[str, list[int]] = {}
    for row, folder in zip(kept.tolist(), pieces.folders(kept), strict=True):
        by_folder.setdefault(folder, []).append(row)
    alone = by_folder.pop("", [])
    # A document alone in its folder says nothing about what belongs together.
    for folder in [folder for folder, rows in by_folder.items() if len(rows) == 1]:
        alone += by_folder.pop(folder)
    sizes, limits = [], []
    if options.cluster_chars:
        sizes.append(pieces.column("characters"))
        limits.append(options.cluster_chars)
    if options.max_cluster_tokens:
        sizes.append(pieces.column("tokens") + 1)  # a line end comes between two documents
        limits.append(options.max_cluster_tokens)
    folders = {folder: np.array(rows) for folder, rows in sorted(by_folder.items())}
    loose = np.array(sorted(alone), np.int64)
    plan = Plan(folders, loose, loose, np.stack(sizes, axis=1), limits)
    large = [rows for rows in folders.values() if not plan.fits(rows, options.documents_per_cluster)]
    return replace(plan, embedded=np.sort(np.concatenate([loose, *large])))


def write_clusters(folder: Path, plan: Plan, vectors: Path, options: Options, progress: Progress) -> None:
    """Write the clusters as [id, rows]: folders in alphabetical order, then groups in order of their first text.

    Args:
        vectors: file of the vectors of `plan.embedded`; it need not exist if these are none.
    """
    matrix = np.load(vectors, mmap_mode="r") if len(plan.embedded) else np.zeros((0, 0), np.float32)
    clusters: list[tuple[str, list[int]]] = []
    with progress.stage("grouping", len(plan.embedded)) as advance, threadpool_limits(1):
        similar = _Similar(plan, matrix, options, advance)
        for name, rows in plan.folders.items():
            if plan.fits(rows, options.documents_per_cluster):
                clusters.append((name, rows.tolist()))
                continue
            parts = similar.groups(rows, -1.0)
            names = [name] if len(parts) == 1 else [f"{name}-{n}" for n in range(1, len(parts) + 1)]
            clusters += zip(names, parts, strict=True)
        if len(plan.loose):
            parts = similar.groups(plan.loose, _least_similarity(len(plan.embedded), options))
            clusters += [(f"{options.source}-{n:05d}", part) for n, part in enumerate(parts, 1)]
    (folder / "groups.json").write_text(json.dumps(clusters))


class _Similar:
    """Groups rows by their vectors, and counts the rows that it has grouped."""

    def __init__(self, plan: Plan, matrix: np.ndarray, options: Options, advance: Callable[[int], None]) -> None:
        self._plan, self._matrix, self._options, self._advance = plan, matrix, options, advance
        self._done = 0

    def groups(self, rows: np.ndarray, least: float) -> list[list[int]]:
        """Groups of rows whose similarity is at least `least`, in order of their first row."""
        plan, matrix, options = self._plan, self._matrix, self._options
        if len(rows) < len(plan.embedded):
            matrix = matrix[np.searchsorted(plan.embedded, rows)]
        groups = []
        for members in group_similar(
            matrix, plan.sizes[rows], plan.limits, options.documents_per_cluster, least, options.seed
        ):
            groups.append(rows[members].tolist())
            self._done += len(members)
            self._advance(self._done)
        return sorted(groups)


def _least_similarity(documents: int, options: Options) -> float:
    """The user's --min-similarity, or else what separates related documents from others.

    The defaults were measured on several real corpora. In fewer dimensions all documents come nearer to each other:
    0.3 there groups as 0.1 does with all words.
    """
    if options.min_similarity is not None:
        return options.min_similarity
    if options.embedding_model:
        return 0.5
    return 0.1 if documents <= embedding.DIMENSIONS else 0.3
