"""Parts and groups: budgets, coverage, and the same result again."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from spell_megatron.corpus.grouping import group_similar, hierarchical_kmeans


def unit(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    vectors = rng.normal(size=shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@settings(max_examples=40)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 2**31), st.floats(-1, 1))
def test_every_row_is_in_one_group_within_the_budget(n, most, seed, least):
    rng = np.random.default_rng(seed)
    vectors = unit(rng, (n, 5))
    vectors[rng.random(n) < 0.1] = 0
    sizes = rng.integers(1, 50, (n, 2))
    limits = [100, 70]
    groups = list(group_similar(vectors, sizes, limits, most, least, seed))
    assert sorted(row for group in groups for row in group) == list(range(n))
    for group in groups:
        assert group == sorted(group) and len(group) <= most and (sizes[group].sum(axis=0) <= limits).all()
        assert len(group) == 1 or np.abs(vectors[group]).sum(axis=1).all()  # zero: like no other


def test_groups_are_the_families_where_these_are_clear():
    rng = np.random.default_rng(1)
    centres = unit(rng, (50, 32))
    labels = np.repeat(np.arange(50), 6)
    rng.shuffle(labels)
    vectors = centres[labels] + 0.05 * rng.normal(size=(300, 32)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    groups = list(group_similar(vectors, np.ones((300, 1), int), [10**6], 6, 0.5, 0))
    assert sorted(groups) == sorted(np.flatnonzero(labels == label).tolist() for label in range(50))


def test_parts_hold_all_rows_once_and_like_with_like():
    rng = np.random.default_rng(2)
    centres = unit(rng, (40, 16))
    labels = rng.integers(0, 40, 3000)
    vectors = centres[labels] + 0.02 * rng.normal(size=(3000, 16)).astype(np.float32)
    parts = list(hierarchical_kmeans(vectors, 200, 7))
    assert max(map(len, parts)) <= 200 and sorted(np.concatenate(parts)) == list(range(3000))
    pure = sum(np.bincount(labels[part], minlength=40) for part in parts)
    assert pure.sum() == 3000
    # A family of 75 fits into a part: most families are in one.
    together = [max((labels[part] == label).sum() for part in parts) == (labels == label).sum() for label in range(40)]
    assert sum(together) >= 32
    again = list(hierarchical_kmeans(vectors, 200, 7))
    assert all((a == b).all() for a, b in zip(parts, again, strict=True))


def test_equal_rows_are_cut_evenly():
    parts = list(hierarchical_kmeans(np.ones((500, 4), np.float32), 60, 0))
    assert max(map(len, parts)) <= 60 and sorted(np.concatenate(parts)) == list(range(500))
    assert list(hierarchical_kmeans(np.ones((0, 4), np.float32), 60, 0)) == []
