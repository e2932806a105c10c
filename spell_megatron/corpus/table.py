"""The table of clusters that `spell prepare` writes and `selfplay.documents.load_clusters` reads."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from spell_megatron.selfplay.documents import Cluster

SCHEMA = pa.schema(
    [
        ("cluster_id", pa.string()),
        ("documents", pa.list_(pa.string())),
        ("document_ids", pa.list_(pa.string())),
        ("source", pa.string()),
        ("task", pa.string()),
    ]
)
_ROWS = 500


def write_table(rows: Iterable[dict[str, Any]], path: Path, lines: bool = False) -> None:
    """Write clusters as parquet, or as JSON lines."""
    if lines:
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        return
    with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        rows = iter(rows)
        while batch := list(itertools.islice(rows, _ROWS)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, SCHEMA))


def row_of(cluster: Cluster) -> dict[str, Any]:
    """The table's row of a cluster."""
    return {
        "cluster_id": cluster.id,
        "documents": list(cluster.documents),
        "document_ids": list(cluster.document_ids),
        "source": cluster.source,
        "task": cluster.task,
    }
