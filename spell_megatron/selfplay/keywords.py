"""Key words of a text, found from its end: an answer and a decision stand last, so a long text is hardly read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def from_the_end(text: str, words: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Each place of one of some words (in lower case) in a text, in any case; the last one first."""
    text = text.replace("İ", "I").lower()  # the only letter that gets longer in lower case
    places = {word: text.rfind(word) for word in words}
    while (word := max(places, key=lambda word: places[word])) and places[word] >= 0:
        yield places[word], word
        places[word] = text.rfind(word, 0, places[word])
