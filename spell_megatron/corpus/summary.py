"""What `spell prepare` tells of a corpus: lines to read, and statistics in a JSON file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from spell_megatron import __version__
from spell_megatron.corpus.options import Options
from spell_megatron.corpus.reading import Counts
from spell_megatron.plural import counted


@dataclass
class Summary:
    """What `prepare` read, left out and wrote; `str` gives the lines that are printed."""

    out: Path
    counts: Counts
    left_out_clusters: Counter[str] = field(default_factory=Counter)
    """Clusters left out, by reason."""
    cluster_documents: list[int] = field(default_factory=list)
    """Documents of each cluster written."""
    cluster_words: list[int] = field(default_factory=list)
    """Words of each cluster written."""
    cluster_tokens: list[int] = field(default_factory=list)
    """Tokens of each cluster written; empty without a tokenizer."""
    tasks: Counter[str] = field(default_factory=Counter)
    """Clusters written for each task; "none" counts those without one."""
    sources: Counter[str] = field(default_factory=Counter)
    """Clusters written of each source."""

    @property
    def clusters(self) -> int:
        return len(self.cluster_documents)

    @property
    def _sizes(self) -> dict[str, list[int]]:
        return {"documents": self.cluster_documents, "words": self.cluster_words, "tokens": self.cluster_tokens}

    def __str__(self) -> str:
        counts = self.counts
        lines = [
            f"{self.out}: {counted(self.clusters, 'cluster')} of {counted(sum(self.cluster_documents), 'document')}"
        ]
        for name, sizes in self._sizes.items():
            if sizes:
                lines.append(f"  {name} per cluster: {min(sizes):,} to {max(sizes):,}, median {np.median(sizes):,.0f}")
        if alone := self.cluster_documents.count(1):
            lines.append(f"  clusters of a single document: {alone:,} (nothing similar to it was found)")
        if set(self.tasks) - {"none"}:
            shown = [f"{count:,} {task}" for task, count in sorted(self.tasks.items())]
            lines.append(f"  tasks: {', '.join(shown)}")
        lines.append(
            f"  read: {counted(counts.documents, 'document')} in {counted(counts.files, 'file')}"
            + (f"; {counts.pieces:,} more by cutting long ones" if counts.pieces else "")
        )
        for title, reasons in (
            ("documents", counts.skipped),
            ("files", counts.skipped_files),
            ("clusters", self.left_out_clusters),
        ):
            if reasons:
                named = reasons.most_common(8)
                shown = [f"{count:,} {reason}" for reason, count in named]
                if others := reasons.total() - sum(count for _, count in named):
                    shown.append(f"{others:,} for other reasons")
                lines.append(f"  {title} left out: {reasons.total():,} ({', '.join(shown)})")
        lines += [f"  note: {note}" for note in counts.notes[:10]]
        if len(counts.notes) > 10:
            lines.append(f"  ... and {counted(len(counts.notes) - 10, 'more note')}")
        return "\n".join(lines)

    def statistics(self, inputs: Sequence[Path], options: Options) -> dict[str, Any]:
        """All of it, with the options, for a JSON file."""
        settings = {name: value for name, value in asdict(options).items() if name != "workers"}
        return {
            "spell_megatron": __version__,
            "inputs": [str(path) for path in inputs],
            "options": settings,
            "read": {
                "files": self.counts.files,
                "documents": self.counts.documents,
                "pieces_of_long_documents": self.counts.pieces,
            },
            "documents_left_out": dict(self.counts.skipped.most_common()),
            "files_left_out": dict(self.counts.skipped_files.most_common()),
            "clusters_left_out": dict(self.left_out_clusters),
            "notes": self.counts.notes,
            "clusters": self.clusters,
            "documents": sum(self.cluster_documents),
            "clusters_of_each_task": dict(sorted(self.tasks.items())),
            "clusters_of_each_source": dict(sorted(self.sources.items())),
            "per_cluster": {name: _distribution(sizes) for name, sizes in self._sizes.items() if sizes},
        }


def _distribution(sizes: Sequence[int]) -> dict[str, float]:
    places = {"min": 0, "p10": 10, "median": 50, "p90": 90, "max": 100}
    values = {name: round(float(np.percentile(sizes, place)), 1) for name, place in places.items()}
    return values | {"mean": round(float(np.mean(sizes)), 1), "total": sum(sizes)}


def statistics_path(out: Path) -> Path:
    """Where the statistics of a corpus stand: corpus.parquet has corpus.statistics.json."""
    return out.with_suffix(".statistics.json")
