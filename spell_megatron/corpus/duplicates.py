"""Texts that repeat others: near-duplicates by MinHash, and overlap with evaluation sets by word sequences."""

from __future__ import annotations

import functools
import json
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from zlib import crc32

import numpy as np

from spell_megatron.corpus.reading import table_rows
from spell_megatron.corpus.texts import words
from spell_megatron.errors import UserError

PERMUTATIONS = 128
"""As in the paper."""
SHINGLE_WORDS = 5
"""Two documents are compared by their sets of five-word sequences."""
EVALUATION_SUFFIXES = {".jsonl", ".json", ".parquet", ".zip"}

# Odd numbers: x -> a x mod 2^64 is a permutation, whose upper bits order the shingles (multiply-shift).
_FACTORS = np.random.default_rng(1).integers(0, 2**64, PERMUTATIONS, dtype=np.uint64) | np.uint64(1)
_CHUNK = 4096
_NEAR = 8
# Three standard errors of an estimate at 0.8.
_DOUBT = 0.11


def word_hashes(of: Sequence[str]) -> np.ndarray:
    """One number per word [words], uint64."""
    return np.fromiter(map(crc32, map(str.encode, of)), np.uint64, len(of))


def sequences(hashes: np.ndarray, n: int) -> np.ndarray:
    """Hashes of all sequences of n words, in order [max(0, words - n + 1)], uint64.

    Args:
        hashes: the text's `word_hashes`.
    """
    count = max(0, len(hashes) - n + 1)
    return _fold([hashes[i : i + count] for i in range(n)])


def _fold(parts: Sequence[np.ndarray]) -> np.ndarray:
    """One hash of several numbers, elementwise; their order counts."""
    result = np.zeros(len(parts[0]), np.uint64)
    for part in parts:
        result = (result ^ part) * np.uint64(0x9E3779B97F4A7C15)
        result ^= result >> np.uint64(29)
    return result


def signature(hashes: np.ndarray) -> np.ndarray:
    """MinHash of a text's five-word sequences [PERMUTATIONS], uint32; a shorter text counts as one sequence.

    The share of equal places of two signatures estimates the Jaccard similarity J of the sets, with standard
    error sqrt(J (1 - J) / 128) (Broder 1997).

    Args:
        hashes: the text's `word_hashes`.
    """
    shingles = sequences(hashes, min(SHINGLE_WORDS, max(1, len(hashes))))
    least = np.full(PERMUTATIONS, 2**64 - 1, np.uint64)
    for start in range(0, len(shingles), _CHUNK):
        permuted = shingles[start : start + _CHUNK, None] * _FACTORS
        np.minimum(least, permuted.min(axis=0), out=least)
    return (least >> np.uint64(32)).astype(np.uint32)


def near_duplicates(signatures: np.ndarray, threshold: float, shingles: Callable[[int], np.ndarray]) -> np.ndarray:
    """For every document the earlier one that it repeats, or itself [documents], int64.

    A document repeats an earlier one, which itself is kept, if the Jaccard similarity of their five-word sequences is
    at least the threshold. Those that are compared share a band of their signatures (locality-sensitive hashing,
    Leskovec et al., Mining of Massive Datasets, 3.4): with 16 bands of 8 places, as for 0.8, 95 % of the pairs at
    the threshold do, and 99.4 % of those at 0.85. Where signatures leave doubt, the sequences themselves decide.

    Args:
        signatures: [documents, PERMUTATIONS]; may be mapped from a file.
        threshold: least similarity, between 0 and 1.
        shingles: gives a document's hashes of five-word sequences (`sequences`), in any order.
    """
    original = np.arange(len(signatures))
    first, second = _candidates(signatures, threshold)
    distinct = functools.lru_cache(256)(lambda document: np.unique(shingles(document)))
    for pairs in np.split(np.arange(len(second)), np.flatnonzero(np.diff(second)) + 1):
        if not len(pairs):
            continue
        document = second[pairs[0]]
        # A candidate that is itself left out stands for the one that it repeats.
        earlier = np.unique(original[first[pairs]])
        estimates = (signatures[earlier] == signatures[document]).mean(axis=1)
        for other, estimate in zip(earlier.tolist(), estimates.tolist(), strict=True):
            if estimate < threshold - _DOUBT:
                continue
            if estimate < threshold + _DOUBT:
                common = len(np.intersect1d(distinct(other), distinct(int(document)), assume_unique=True))
                if common < threshold * (len(distinct(other)) + len(distinct(int(document))) - common):
                    continue
            original[document] = other
            break
    return original


def _candidates(signatures: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (earlier, later) of documents that share a band and may be similar enough, sorted by the later one."""
    n = len(signatures)
    rows = _band_rows(threshold)
    pairs = np.zeros(0, np.int64)
    for start in range(0, PERMUTATIONS, rows):
        keys = _fold(np.asarray(signatures[:, start : start + rows], np.uint64).T)
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        opens = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))
        run_start = np.repeat(opens, np.diff(np.append(opens, n)))
        # Each is compared with the first that has the same band and with the few before it, not with all: a band
        # of thousands (one licence in every file) is one family.
        found = [(order[run_start], order)]
        found += [(order[:-d], order[d:]) for d in range(1, min(_NEAR, n - 1) + 1)]
        same = [run_start < np.arange(n)] + [keys[d:] == keys[:-d] for d in range(1, min(_NEAR, n - 1) + 1)]
        codes = [b[mask] * n + a[mask] for (a, b), mask in zip(found, same, strict=True)]
        pairs = np.union1d(pairs, np.concatenate(codes))
    second, first = np.divmod(pairs, n)
    alike = [np.zeros(0, bool)]
    for i in range(0, len(pairs), _CHUNK):
        equal = signatures[first[i : i + _CHUNK]] == signatures[second[i : i + _CHUNK]]
        alike.append(equal.mean(axis=1) >= threshold - _DOUBT)
    mask = np.concatenate(alike)
    return first[mask], second[mask]


def _band_rows(threshold: float) -> int:
    """Places per band: as many as still let 90 % of the pairs at the threshold share one of the bands."""
    for rows in (32, 16, 8, 4, 2):
        if 1 - (1 - threshold**rows) ** (PERMUTATIONS // rows) >= 0.9:
            return rows
    return 1


# ------------------------------------------------------------------------------------ evaluation sets


def evaluation_sequences(files: Sequence[Path], n: int) -> tuple[np.ndarray, np.ndarray]:
    """All sequences of n words in evaluation sets: sorted hashes [sequences], and the number of each one's file.

    All strings count, wherever they stand in a row: questions, answers, contexts.

    Args:
        files: .jsonl, .json (a list of rows, or one a line), .parquet, or a .zip archive of such files.

    Raises:
        UserError: if a file cannot be read, or holds no text of n words.
    """
    hashes = np.zeros(0, np.uint64)
    owners = np.zeros(0, np.uint16)
    for number, path in enumerate(files):
        parts = [sequences(word_hashes(words(text)), n) for row in _evaluation_rows(path) for text in _strings(row)]
        own = np.unique(np.concatenate(parts)) if parts else np.zeros(0, np.uint64)
        if not len(own):
            raise UserError(
                f"{path}: no text of {n} words is in this evaluation set, so nothing can overlap with it. Give a file "
                "with questions or contexts, or a smaller --overlap-words."
            )
        hashes, where = np.unique(np.concatenate([hashes, own]), return_index=True)
        owners = np.concatenate([owners, np.full(len(own), number, np.uint16)])[where]
    return hashes, owners


def shared_sequence(hashes: np.ndarray, n: int, known: np.ndarray) -> int | None:
    """Place in `known` of the first sequence of n words that a text shares with it; None: there is none.

    Args:
        hashes: the text's `word_hashes`.
        known: sorted hashes, from `evaluation_sequences`.
    """
    own = sequences(hashes, n)
    places = np.minimum(np.searchsorted(known, own), len(known) - 1)
    shared = np.flatnonzero(known[places] == own)
    return int(places[shared[0]]) if len(shared) else None


def _evaluation_rows(path: Path) -> Iterator[object]:
    if path.suffix.lower() == ".zip":
        try:
            with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as folder:
                for name in archive.namelist():
                    if Path(name).suffix.lower() in EVALUATION_SUFFIXES - {".zip"}:
                        yield from _evaluation_rows(Path(archive.extract(name, folder)))
        except (zipfile.BadZipFile, OSError, RuntimeError, UserError) as error:  # RuntimeError: it has a password
            raise UserError(f"{path}: not a readable archive ({error}).") from error
        return
    if path.suffix.lower() == ".json":
        try:
            data = path.read_bytes()
            yield json.loads(data)
            return
        except (OSError, ValueError, RecursionError) as error:
            if isinstance(error, OSError) or not data.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
                raise UserError(f"{path}: not a readable JSON file ({error}).") from error
            # else it may have one row a line
    for number, row in table_rows(path):
        if row is None:
            raise UserError(f"{path}: line {number} is not JSON. Mend the evaluation set, or leave it out.")
        yield row


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
