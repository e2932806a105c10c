"""Whether quotes stand in the documents that they are taken from."""

from __future__ import annotations

from collections.abc import Sequence

from spell_megatron.selfplay.texts import words

MIN_WORDS = 3
"""A shorter quote proves nothing: its words may stand anywhere."""


def quotes_found(quotes: Sequence[str], documents: Sequence[str]) -> int:
    """How many of some quotes stand in a document word for word. Case, punctuation and line breaks do not count."""
    texts = [f" {words(document)} " for document in documents]
    found = 0
    for quote in map(words, quotes):
        found += len(quote.split()) >= MIN_WORDS and any(f" {quote} " in text for text in texts)
    return found
