"""Repetitions, against exact sets of word sequences."""

from __future__ import annotations

import random

import numpy as np
import pytest

from spell_megatron.corpus.duplicates import PERMUTATIONS, near_duplicates, signature
from spell_megatron.corpus.texts import words
from spell_megatron.corpus.word_sequences import sequences, word_hashes


def jaccard(a: list[str], b: list[str]) -> float:
    """The oracle: similarity of the sets of five-word sequences."""
    sets = [{tuple(text[i : i + 5]) for i in range(len(text) - 4)} for text in (a, b)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def text(rng: random.Random, length: int = 200) -> list[str]:
    return [f"w{rng.randrange(5000)}" for _ in range(length)]


def edit(rng: random.Random, given: list[str], share: float) -> list[str]:
    return [f"w{rng.randrange(5000)}" if rng.random() < share else word for word in given]


def found(texts: list[list[str]], threshold: float) -> np.ndarray:
    signatures = np.stack([signature(word_hashes(text)) for text in texts])
    return near_duplicates(signatures, threshold, lambda number: sequences(word_hashes(texts[number]), 5))


def brute_force(texts: list[list[str]], threshold: float) -> list[int]:
    """For each text the first kept one that it is like, or itself."""
    original: list[int] = []
    for number, own in enumerate(texts):
        kept = (i for i in range(number) if original[i] == i)
        original.append(next((i for i in kept if jaccard(texts[i], own) >= threshold), number))
    return original


def test_signatures_estimate_the_similarity_of_sets():
    rng = random.Random(0)
    errors = []
    for _ in range(150):
        a = text(rng)
        b = edit(rng, a, rng.uniform(0, 0.15))
        exact = jaccard(a, b)
        estimate = float((signature(word_hashes(a)) == signature(word_hashes(b))).mean())
        errors.append((estimate - exact) / max(1e-9, (exact * (1 - exact) / PERMUTATIONS) ** 0.5))
    # In standard errors: the mean of 150 within 4/sqrt(150), none beyond 5, the spread about 1.
    assert abs(np.mean(errors)) < 4 / 150**0.5 and max(map(abs, errors)) < 5 and 0.8 < np.std(errors) < 1.2


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
def test_near_duplicates_against_brute_force(threshold):
    rng = random.Random(int(100 * threshold))
    texts = [text(rng) for _ in range(60)]
    most = 1 - threshold
    for _ in range(240):
        texts.append(edit(rng, rng.choice(texts), rng.uniform(0, most / 3)))
    rng.shuffle(texts)
    original, oracle = found(texts, threshold), brute_force(texts, threshold)
    removed = {i for i, first in enumerate(original) if first != i}
    expected = {i for i, first in enumerate(oracle) if first != i}
    for i in removed:  # nothing is left out wrongly, and what stands for it is there
        assert jaccard(texts[original[i]], texts[i]) >= threshold and original[original[i]] == original[i] < i
    assert len(removed & expected) >= 0.95 * len(expected) > 20
    missed = [max(jaccard(texts[i], texts[j]) for j in range(i) if j not in removed) for i in expected - removed]
    assert all(similarity < threshold + 0.07 for similarity in missed)


def test_similarity_is_not_transitive():
    """Of a chain of small changes, documents too far from those that stay stay too."""
    rng = random.Random(4)
    chain = [text(rng, 400)]
    for step in range(1, 12):
        chain.append([f"x{i}" if 8 * step <= i < 8 * step + 8 else w for i, w in enumerate(chain[-1])])
    assert jaccard(chain[0], chain[1]) > 0.9 > 0.8 > 0.7 > jaccard(chain[0], chain[-1])
    assert found(chain, 0.8).tolist() == brute_force(chain, 0.8)
    assert len(set(found(chain, 0.8))) > 1


def test_a_large_family_leaves_one():
    rng = random.Random(5)
    first = text(rng, 500)
    family = [first] + [edit(rng, first, 0.002) for _ in range(1500)]
    assert found(family, 0.8).tolist() == [0] * 1501


def test_short_and_wordless_texts():
    texts = [words(t) for t in ("one two", "one two", "one", "three four five six", "one two three four")]
    assert found(texts, 0.8).tolist() == [0, 0, 2, 3, 4]
    assert near_duplicates(np.zeros((0, PERMUTATIONS), np.uint32), 0.8, lambda n: np.zeros(0)).tolist() == []
