"""Gopher's rules on poor web text."""

from __future__ import annotations

import random

import pytest

from spell_megatron.corpus.texts import words
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
