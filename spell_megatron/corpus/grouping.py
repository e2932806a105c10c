"""Vectors to groups of similar documents within a budget."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import numpy as np

from spell_megatron.corpus.embedding import unit

# Joining pairs costs the square of a part's size; much smaller parts would cut through more families.
PART = 1000
_BRANCHES = 32
_NEIGHBOURS = 16
_CHUNK = 65_536


def group_similar(
    vectors: np.ndarray,
    sizes: np.ndarray,
    limits: Sequence[int],
    max_documents: int,
    min_similarity: float,
    seed: int,
) -> Iterator[list[int]]:
    """Groups of similar documents, each within the budget: sorted row numbers, every row in one group.

    Hierarchical k-means cuts the documents into parts of at most 1,000. Inside a part each document starts alone,
    and the most similar pairs of groups (cosine of their mean vectors) are joined, round by round, as long as the
    union keeps within the budget and the similarity is at least `min_similarity`.

    Args:
        vectors: [documents, dimensions], of length 1 (or 0: like no other); may be mapped from a file.
        sizes: what counts against the limits [documents, limits], such as characters and tokens.
        limits: most of each in a group.
        max_documents: most documents of a group.
    """
    for part in hierarchical_kmeans(vectors, PART, seed):
        rows = np.asarray(vectors[part], np.float32)
        for members in _join_pairs(rows, sizes[part], np.asarray(limits), max_documents, min_similarity):
            yield sorted(part[members].tolist())


def hierarchical_kmeans(vectors: np.ndarray, most: int, seed: int) -> Iterator[np.ndarray]:
    """Parts of at most `most` rows: k-means over all, and again over each part that is too large.

    A level's centres are learnt from a sample of 256 rows for each.
    """
    from sklearn.cluster import KMeans

    waiting = [np.arange(len(vectors))]
    while waiting:
        part = waiting.pop()
        if len(part) <= most:
            if len(part):
                yield part
            continue
        branches = min(_BRANCHES, -(-2 * len(part) // most))
        rng = np.random.default_rng([seed, len(part), int(part[0])])
        sample = np.sort(rng.choice(part, min(len(part), 256 * branches), replace=False))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Number of distinct clusters")  # equal texts are no fault
            means = KMeans(branches, n_init=1, max_iter=50, random_state=seed).fit(vectors[sample])
        labels = np.concatenate([means.predict(vectors[part[i : i + _CHUNK]]) for i in range(0, len(part), _CHUNK)])
        inner = [part[labels == label] for label in range(branches)]
        if max(map(len, inner)) == len(part):  # all alike: there is nothing to cut by
            inner = np.array_split(part, branches)
        waiting += reversed(inner)


def _join_pairs(
    vectors: np.ndarray, sizes: np.ndarray, limits: np.ndarray, max_documents: int, min_similarity: float
) -> list[list[int]]:
    groups = [[i] for i in range(len(vectors))]
    # The sum of the members' vectors points where their mean does.
    sums, sizes = vectors.astype(np.float32), sizes.copy()
    while len(groups) > 1:
        means = unit(sums)
        similarity = means @ means.T
        np.fill_diagonal(similarity, -np.inf)
        near = min(_NEIGHBOURS, len(groups) - 1)
        neighbours = np.argpartition(-similarity, near - 1, axis=1)[:, :near]
        first = np.repeat(np.arange(len(groups)), near)
        second = neighbours.ravel()
        values = similarity[first, second]
        known = np.linalg.norm(sums, axis=1) > 0
        counts = np.array([len(group) for group in groups])
        fits = (sizes[first] + sizes[second] <= limits).all(axis=1) & (counts[first] + counts[second] <= max_documents)
        fits &= (values >= min_similarity) & known[first] & known[second]
        first, second, values = first[fits], second[fits], values[fits]
        low, high = np.minimum(first, second), np.maximum(first, second)
        joined: set[int] = set()
        pairs = []
        for place in np.lexsort((high, low, -values)):
            i, j = int(low[place]), int(high[place])
            if i not in joined and j not in joined:
                joined |= {i, j}
                pairs.append((i, j))
        if not pairs:
            break
        alone = [i for i in range(len(groups)) if i not in joined]
        left, right = np.array(pairs).T
        groups = [groups[i] + groups[j] for i, j in pairs] + [groups[i] for i in alone]
        sums = np.concatenate([sums[left] + sums[right], sums[alone]])
        sizes = np.concatenate([sizes[left] + sizes[right], sizes[alone]])
    return groups
