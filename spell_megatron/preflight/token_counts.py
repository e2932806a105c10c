"""Tokens of the documents in a file, counted once for each tokenizer and remembered in the user's cache."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from spell_megatron.files import write_text
from spell_megatron.monitoring.progress import PatientConsole, Progress
from spell_megatron.tokenizer import PolicyTokenizer, tokenizer_files

_BATCH = 256
"""Documents that are counted at a time."""


def document_tokens(
    file: Path, groups: Sequence[Sequence[str]], tokenizer: PolicyTokenizer, model: Path
) -> list[list[int]]:
    """Number of tokens of each document by itself, group by group.

    Args:
        file: holds the documents of the groups, in this order.
        tokenizer: of the folder `model`.
    """
    remembered = _cache() / f"{_fingerprint(file, model)}.json"
    with suppress(OSError, ValueError):
        known = json.loads(remembered.read_text(encoding="utf-8"))
        if [len(counts) for counts in known] == [len(group) for group in groups]:
            return known
    counts = _counted([document for group in groups for document in group], tokenizer)
    result = [[next(counts) for _ in group] for group in groups]
    with suppress(OSError):  # a home that cannot be written
        remembered.parent.mkdir(parents=True, exist_ok=True)
        write_text(remembered, json.dumps(result))
    return result


def _counted(documents: Sequence[str], tokenizer: PolicyTokenizer) -> Iterator[int]:
    with Progress(console=PatientConsole(stderr=True)).stage("counting tokens", len(documents)) as advance:
        for start in range(0, len(documents), _BATCH):
            yield from tokenizer.counts(documents[start : start + _BATCH])
            advance(min(start + _BATCH, len(documents)))


def _cache() -> Path:
    """Where counts are remembered: $XDG_CACHE_HOME, or else ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "spell_megatron" / "tokens"


def _fingerprint(file: Path, model: Path) -> str:
    """A word that changes with the file's content and with how the tokenizer cuts texts."""
    import transformers

    digest = hashlib.sha256(transformers.__version__.encode())
    extras = ("merges.txt", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json")
    for path in (file, *(model / name for name in (*tokenizer_files(model), *extras))):
        if path.is_file():
            with path.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
        digest.update(path.name.encode())
    return digest.hexdigest()
