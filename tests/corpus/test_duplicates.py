"""Repetitions and overlaps, against exact sets of word sequences."""

from __future__ import annotations

import json
import random
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spell_megatron.corpus.duplicates import (
    PERMUTATIONS,
    evaluation_sequences,
    near_duplicates,
    sequences,
    shared_sequence,
    signature,
    word_hashes,
)
from spell_megatron.corpus.texts import words
from spell_megatron.errors import UserError


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


@given(st.lists(st.sampled_from("abc"), max_size=40), st.integers(1, 6))
def test_sequences_are_equal_exactly_where_words_are(letters, n):
    grams = [tuple(letters[i : i + n]) for i in range(len(letters) - n + 1)]
    hashes = sequences(word_hashes(letters), n)
    assert len(hashes) == len(grams)
    assert [[a == b for b in grams] for a in grams] == (hashes[:, None] == hashes).tolist()


# Evaluation sets

PHRASE = "the quick brown fox jumps over a lazy dog while seven cats look on"  # 14 words


def write_set(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_overlap_is_found_wherever_the_text_stands(tmp_path, suffix):
    rows = [
        {"id": 1, "question": "Too short to look for?", "context": {"titles": ["a"], "parts": [["x y z", PHRASE]]}},
        {"id": 2, "question": " ".join(f"q{i}" for i in range(13)), "context": None},
    ]
    other = write_set(tmp_path / f"b{suffix}", [{"text": " ".join(f"other{i}" for i in range(20))}])
    known, owners = evaluation_sequences([write_set(tmp_path / f"a{suffix}", rows), other], 13)
    assert len(known) == 2 + 1 + 8 and (np.diff(known.astype(object)) > 0).all()

    def owner(text):
        place = shared_sequence(word_hashes(words(text)), 13, known)
        return None if place is None else int(owners[place])

    assert owner("And then " + PHRASE + ", they said.") == 0
    assert owner("THE quick, brown\nfox -- jumps over a (lazy) dog; while seven cats look!") == 0  # 13 of 14
    assert owner(PHRASE.removeprefix("the quick ")) is None  # 12
    assert owner(PHRASE.replace("lazy", "sleepy")) is None
    assert owner("so " + " ".join(f"Q{i}" for i in range(13))) == 0
    assert owner(" ".join(f"other{i}" for i in range(3, 19))) == 1
    assert owner("") is None


@pytest.mark.parametrize("content", ["\ufeff{}\r\n\r\n{}", "{}\n", "\ufeff \n[{}]", "[\n{},\n{}\n]", "{}"])
@pytest.mark.parametrize("name", ["a.json", "a.JSON", "a.jsonl"])
def test_json_files_of_either_kind(name, content, tmp_path):
    """Files of the hub named .json hold a list of rows, or a row a line."""
    if name == "a.jsonl" and "[" in content:
        pytest.skip("no JSON lines")
    row = json.dumps({"question": PHRASE})
    (tmp_path / name).write_text(content.replace("{}", row), encoding="utf-8")
    known, _ = evaluation_sequences([tmp_path / name], 13)
    assert len(known) == 2
    assert shared_sequence(word_hashes(words("So " + PHRASE)), 13, known) is not None


def test_an_archive_is_read_as_the_files_in_it(tmp_path):
    """LongBench comes as one: data.zip holds data/hotpotqa.jsonl and others."""
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/hotpotqa.jsonl", json.dumps({"context": PHRASE}))
        archive.writestr("../data/short.json", "[]")
        archive.writestr("data/README.md", "[a link](to) " * 20)
    known, owners = evaluation_sequences([tmp_path / "data.zip"], 13)
    assert len(known) == 2 and set(owners) == {0}
    assert shared_sequence(word_hashes(words("So " + PHRASE)), 13, known) is not None
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr("data/a.jsonl", "{broken")
    with pytest.raises(UserError, match=r"bad.zip: not a readable archive .*a.jsonl: line 1 is not JSON"):
        evaluation_sequences([tmp_path / "bad.zip"], 13)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.zip", b"PK", "a.zip: not a readable archive"),
        ("a.jsonl", b'{"q": "one two three"}\n', "a.jsonl: no text of 13 words"),
        ("a.jsonl", b'{"q": "x"}\n{broken\n', "a.jsonl: line 2 is not JSON"),
        ("a.json", b"[1, ", "a.json: not a readable JSON file"),
        ("a.json", b'{"q": "x"}\n{broken\n', "a.json: line 2 is not JSON"),
        ("a.parquet", b"PAR1", "a.parquet: not a readable parquet file"),
    ],
)
def test_bad_evaluation_sets(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        evaluation_sequences([tmp_path / name], 13)
