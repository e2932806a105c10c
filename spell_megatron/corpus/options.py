"""The options of `spell prepare`; each field is one on the command line."""

# Imported by the command line, which answers at once: no heavy imports here.

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from spell_megatron.config.selfplay_sections import Task
from spell_megatron.errors import UserError

DEFAULT_CLUSTER_CHARS = 48_000


def _option(default: Any, group: str, metavar: str, help: str) -> Any:
    return field(default=default, metadata={"group": group, "metavar": metavar, "help": help})


@dataclass(frozen=True)
class Options:
    """How documents become clusters. Fields that are None or empty switch their step off.

    Raises:
        UserError: naming all faults at once.
    """

    text_column: str = _option("text", "reading", "NAME", "column of .jsonl and .parquet tables that holds the text")
    min_document_chars: int = _option(200, "filters", "N", "shorter documents are left out")
    max_document_chars: int = _option(8000, "filters", "N", "longer documents are cut")
    drop_long: bool = _option(
        False, "filters", "", "leave out documents longer than --max-document-chars, do not cut them"
    )
    quality_column: str = _option("", "filters", "NAME", "column of tables that holds a quality score")
    min_quality: float = _option(1.0, "filters", "X", "documents with a lower score in --quality-column are left out")
    web_filters: bool = _option(
        False, "filters", "", "leave out what looks like poor web text, by the rules of Gopher (for English)"
    )
    near_duplicates: float = _option(
        0.8,
        "filters",
        "X",
        "a document whose 5-word sequences are this similar (Jaccard) to an earlier one's is "
        "left out; 1: only exact repetitions are",
    )
    decontaminate: tuple[Path, ...] = _option(
        (),
        "filters",
        "FILE",
        "evaluation set (.jsonl, .json, .parquet, a .zip or a folder of them); documents that "
        "share words in sequence with it are left out; may be given again",
    )
    overlap_words: int = _option(13, "filters", "N", "length of a sequence shared with an evaluation set")
    embedding_model: str = _option(
        "",
        "clusters",
        "MODEL",
        "group by the vectors of this embedding model (folder or name), run by vLLM; without it by TF-IDF and SVD",
    )
    embedding_url: str = _option(
        "",
        "clusters",
        "URL",
        "OpenAI-compatible server that has --embedding-model, such as http://localhost:8000/v1; "
        "its key is taken from SPELL_API_KEY",
    )
    embedding_chars: int = _option(8000, "clusters", "N", "characters of a document that the model is given")
    min_similarity: float | None = _option(
        None,
        "clusters",
        "X",
        "least cosine of vectors that are grouped (default 0.1 for up to 128 documents, 0.3 for "
        "more, 0.5 with --embedding-model)",
    )
    documents_per_cluster: int = _option(8, "clusters", "N", "most documents of a cluster")
    min_cluster_documents: int = _option(1, "clusters", "N", "clusters of fewer documents are left out")
    max_cluster_chars: int | None = _option(
        None,
        "clusters",
        "N",
        f"most characters of a cluster (default {DEFAULT_CLUSTER_CHARS} without --max-cluster-tokens)",
    )
    max_cluster_tokens: int | None = _option(
        None, "clusters", "N", "most tokens of a cluster; longer documents are cut"
    )
    tokenizer: Path | None = _option(
        None,
        "clusters",
        "MODEL",
        "model whose tokenizer counts for --max-cluster-tokens: folder, or ORG/NAME[@REVISION] of the hub",
    )
    max_clusters: int | None = _option(None, "clusters", "N", "of more clusters, this many are kept, drawn by the seed")
    source: str = _option("documents", "clusters", "NAME", "value of the clusters' `source` column")
    tasks: tuple[str, ...] = _option(
        (),
        "clusters",
        "TASK[,TASK]",
        f"give each cluster one of these tasks ({', '.join(get_args(Task))}), in equal "
        "parts; without it training does so",
    )
    seed: int = _option(0, "clusters", "N", "seed of every random choice")
    workers: int = _option(
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "running",
        "N",
        "processes that work on a large corpus; the result does not depend on it",
    )

    @property
    def cluster_chars(self) -> int | None:
        """Most characters of a cluster; None: only tokens count."""
        if self.max_cluster_chars is None and self.max_cluster_tokens is None:
            return DEFAULT_CLUSTER_CHARS
        return self.max_cluster_chars

    def __post_init__(self) -> None:
        faults = [
            f"--{name.replace('_', '-')} must be at least 1, not {value}"
            for name in (
                "documents_per_cluster", "min_cluster_documents", "overlap_words", "embedding_chars", "workers",
                "max_clusters", "max_cluster_tokens",
            )
            if (value := getattr(self, name)) is not None and value < 1
        ]  # fmt: skip
        chars = [self.min_document_chars, self.max_document_chars]
        chars += [] if self.cluster_chars is None else [self.cluster_chars]
        if chars != sorted(chars) or chars[0] < 1:
            faults.append(
                "characters must be 1 <= --min-document-chars <= --max-document-chars <= --max-cluster-chars, not "
                + ", ".join(map(str, chars))
            )
        if self.min_cluster_documents > self.documents_per_cluster >= 1:
            faults.append(
                f"--min-cluster-documents {self.min_cluster_documents} is more than --documents-per-cluster "
                f"{self.documents_per_cluster}"
            )
        if not 0 < self.near_duplicates <= 1:
            faults.append(f"--near-duplicates must be above 0 and at most 1, not {self.near_duplicates}")
        if self.min_similarity is not None and not -1 <= self.min_similarity <= 1:
            faults.append(f"--min-similarity must be between -1 and 1, not {self.min_similarity}")
        if (self.max_cluster_tokens is None) != (self.tokenizer is None):
            faults.append("--max-cluster-tokens and --tokenizer go together")
        if self.embedding_url and not self.embedding_model:
            faults.append("--embedding-url needs --embedding-model, the name of the model at that server")
        if unknown := [task for task in self.tasks if task not in get_args(Task)]:
            faults.append(f"--tasks knows {', '.join(get_args(Task))}, not {', '.join(unknown)}")
        if len(set(self.tasks)) < len(self.tasks):
            faults.append("--tasks names a task twice")
        if faults:
            raise UserError("Cannot prepare documents: " + "; ".join(faults) + ".")
