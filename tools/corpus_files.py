"""The files of a fictional corpus: clusters to train on, and held-out questions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq


class Document(Protocol):
    """An entity, and what its document says."""

    @property
    def name(self) -> str: ...

    @property
    def text(self) -> str: ...


def write_files(
    out: Path, source: str, clusters: Sequence[Sequence[Document]], heldout: Sequence[Mapping[str, Any]]
) -> None:
    """Write `documents.parquet`, with the columns of `spell prepare`, and `heldout.jsonl` into the folder `out`.

    Args:
        source: of all clusters; their ids begin with it.
    """
    ids = [f"{source}-{number:05d}" for number in range(len(clusters))]
    table = pa.table(
        {
            "cluster_id": ids,
            "document_ids": [[f"{i}/{one.name}" for one in cluster] for i, cluster in zip(ids, clusters, strict=True)],
            "documents": [[one.text for one in cluster] for cluster in clusters],
            "source": [source] * len(clusters),
        }
    )
    out.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, out / "documents.parquet", compression="zstd")
    (out / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in heldout), encoding="utf-8")
