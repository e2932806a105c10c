"""Hashes of words, and of sequences of words."""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

import numpy as np


def word_hashes(words: Sequence[str]) -> np.ndarray:
    """One hash per word `[words]`, uint64."""
    return np.fromiter(map(crc32, map(str.encode, words)), np.uint64, len(words))


def sequences(hashes: np.ndarray, n: int) -> np.ndarray:
    """Hashes of all sequences of n words, in order `[max(0, words - n + 1)]`, uint64.

    Args:
        hashes: the text's `word_hashes`.
    """
    count = max(0, len(hashes) - n + 1)
    return fold([hashes[i : i + count] for i in range(n)])


def fold(parts: Sequence[np.ndarray]) -> np.ndarray:
    """One hash of several numbers, elementwise `[length of each part]`, uint64; their order counts."""
    result = np.zeros(len(parts[0]), np.uint64)
    for part in parts:
        result = (result ^ part) * np.uint64(0x9E3779B97F4A7C15)
        result ^= result >> np.uint64(29)
    return result
