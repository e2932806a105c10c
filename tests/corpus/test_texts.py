"""Words, cuts by tokens, and Gopher's rules."""

from __future__ import annotations

import random

import pytest

from spell_megatron.corpus.texts import split_text, words
from spell_megatron.corpus.web_text import web_fault

# Different sentences of ordinary English.
PEOPLE = "farmer teacher sailor doctor painter baker miller lawyer singer printer".split()
THINGS = "boat letter garden window barrel ladder candle bridge basket kettle".split()
VERBS = "found carried painted repaired bought returned hid measured sold admired".split()


def prose(sentences: int = 20, seed: int = 0) -> str:
    rng = random.Random(seed)
    return " ".join(
        f"The {rng.choice(PEOPLE)} with {rng.randrange(10, 99)} years of {rng.choice(THINGS)} work {rng.choice(VERBS)} "
        f"that old {rng.choice(THINGS)}."
        for _ in range(sentences)
    )


def test_words():
    assert words("It's a\tTEST_case: naïve 3.14!") == ["it", "s", "a", "test", "case", "naïve", "3", "14"]
    assert words("東京タワーは333m、high") == list("東京タワ") + ["ー", "は", "333m", "high"]
    assert words("--- !!!") == []


def test_cuts_by_another_length():
    text = prose(30)
    pieces = split_text(text, 25, lambda piece: len(piece.split()))
    assert max(len(piece.split()) for piece in pieces) <= 25 and " ".join(pieces).split() == text.split()
    assert split_text("x", 0, lambda piece: 5) == ["x"]  # what cannot be cut stays


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda text: text, ""),
        (lambda text: text[:200], "fewer than 50"),
        (lambda text: " ".join("antidisestablishmentarianism" for _ in range(60)), "unusual length"),
        (lambda text: text.replace(".", " # # #"), "many #"),
        (lambda text: "\n".join(f"- {line}." for line in text.split(".") if line), "bullet points"),
        (lambda text: text.replace(". ", "...\n"), "end in ..."),
        (lambda text: text + " 12" * 200, "few words of letters"),
        (lambda text: " ".join(w for w in text.split() if w.lower() not in ("the", "of", "with", "that")), "stop"),
        (lambda text: "\n\n".join([text] * 3), "repeats"),
        (lambda text: text + " Buy now and save money today." * 40, "repeats"),
    ],
)
def test_poor_web_text_is_told_from_prose(change, fault):
    text = change(prose())
    found = web_fault(text, words(text))
    assert (fault in found) if fault else found == ""
