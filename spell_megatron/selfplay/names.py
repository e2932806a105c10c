"""Whether the names in a question stand in the documents that it was asked about."""

from __future__ import annotations

import re
from collections.abc import Sequence

from spell_megatron.selfplay.characters import canonical
from spell_megatron.selfplay.texts import words

_TOKEN = re.compile(r"[^\W\d_][\w.'-]*")
_ABBREVIATION = 5


def unknown_names(question: str, documents: Sequence[str]) -> list[str]:
    """The words of a question that start with a capital inside a sentence, and stand in none of the documents.

    Case and punctuation do not count, nor a genitive's s. Short words in capitals alone (USD, CAGR) pass: they stand
    for common words more often than for names. Scripts without capitals have no names here.
    """
    text = canonical(question)
    found = [
        token[0]
        for token in _TOKEN.finditer(text)
        if token[0][0].isupper() and not _is_short(token[0]) and not _begins_sentence(text[: token.start()])
    ]
    known = {_stem(word) for document in documents for word in words(document).split()}
    return [name for name in found if not all(_stem(word) in known for word in words(name).split())]


def _is_short(word: str) -> bool:
    """Whether it is an initial or an abbreviation."""
    letters = word.replace(".", "")
    return len(letters) == 1 or (len(letters) <= _ABBREVIATION and letters.isupper())


def _begins_sentence(before: str) -> bool:
    """Whether a sentence or a quotation begins after this text, where every word has a capital."""
    words_before = before.rstrip()
    return not words_before or words_before[-1] in '.:?!"(' or "\n" in before[len(words_before) :]


def _stem(word: str) -> str:
    return word.removesuffix("'s").removesuffix("'")
