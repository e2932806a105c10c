"""Documents that nearly repeat others, found by MinHash."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from spell_megatron.corpus.pieces import Pieces
from spell_megatron.corpus.texts import words
from spell_megatron.corpus.word_sequences import fold, sequences, word_hashes

PERMUTATIONS = 128
"""As in the paper."""
SHINGLE_WORDS = 5
"""Two documents are compared by their sets of five-word sequences."""

# Odd numbers: x -> a x mod 2^64 is a permutation, whose upper bits order the shingles (multiply-shift).
_FACTORS = np.random.default_rng(1).integers(0, 2**64, PERMUTATIONS, dtype=np.uint64) | np.uint64(1)
_CHUNK = 4096
_NEAR = 8
# Three standard errors of an estimate at 0.8.
_DOUBT = 0.11


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


def find_near_duplicates(folder: Path, pieces: Pieces, signatures: Path, threshold: float) -> None:
    """Write for each document the one that it repeats (`original.npy`), and the pieces that stay (`kept.npy`).

    Args:
        signatures: file of the documents' `signature`s, one after another.
        threshold: least similarity; 1: documents that are not equal stay.
    """
    matrix = np.fromfile(signatures, np.uint32).reshape(-1, PERMUTATIONS)
    document = pieces.column("document")  # in rising order
    original = np.arange(len(matrix))

    def shingles(number: int) -> np.ndarray:
        rows = range(*np.searchsorted(document, [number, number + 1]))
        return sequences(word_hashes(words(" ".join(pieces.values("text", rows)))), SHINGLE_WORDS)

    if threshold < 1:
        original = near_duplicates(matrix, threshold, shingles)
    np.save(folder / "original.npy", original)
    np.save(folder / "kept.npy", np.flatnonzero(original[document] == document))


def near_duplicates(signatures: np.ndarray, threshold: float, shingles: Callable[[int], np.ndarray]) -> np.ndarray:
    """For every document the earlier one that it repeats, or itself `[documents]`, int64.

    A document repeats an earlier one that is kept if the Jaccard similarity of their five-word sequences is at least
    the threshold. Two documents are compared if they share a band of their signatures (locality-sensitive hashing,
    Leskovec et al., Mining of Massive Datasets, 3.4). With 16 bands of 8 places, as for 0.8, 95 % of the pairs at the
    threshold share one, and 99.4 % of the pairs at 0.85. Where signatures leave doubt, the sequences themselves decide.

    Args:
        signatures: [documents, PERMUTATIONS]; may be mapped from a file.
        threshold: least similarity, between 0 and 1.
        shingles: gives a document's hashes of five-word sequences (`sequences`), in any order.
    """
    original = np.arange(len(signatures))
    first, second = _candidates(signatures, threshold)
    distinct = functools.lru_cache(256)(lambda document: np.unique(shingles(document)))

    def similar(a: int, b: int, estimate: float) -> bool:
        if estimate < threshold - _DOUBT or estimate >= threshold + _DOUBT:
            return estimate > threshold
        common = len(np.intersect1d(distinct(a), distinct(b), assume_unique=True))
        return common >= threshold * (len(distinct(a)) + len(distinct(b)) - common)

    for pairs in np.split(np.arange(len(second)), np.flatnonzero(np.diff(second)) + 1):
        if not len(pairs):
            continue
        document = int(second[pairs[0]])
        # A candidate that is itself left out stands for the one that it repeats.
        earlier = np.unique(original[first[pairs]])
        estimates = (signatures[earlier] == signatures[document]).mean(axis=1)
        repeated = (
            a
            for a, estimate in zip(earlier.tolist(), estimates.tolist(), strict=True)
            if similar(a, document, estimate)
        )
        original[document] = next(repeated, document)
    return original


def _candidates(signatures: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (earlier, later) of documents that share a band and may be similar enough, sorted by the later one."""
    n = len(signatures)
    rows = _band_rows(threshold)
    pairs = np.zeros(0, np.int64)
    for start in range(0, PERMUTATIONS, rows):
        keys = fold(list(np.asarray(signatures[:, start : start + rows], np.uint64).T))
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
