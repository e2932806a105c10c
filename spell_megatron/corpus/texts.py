"""Texts of documents: cleaning, words, and cutting."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

from spell_megatron.corpus.characters import (
    CLAUSE_ENDS,
    CLOSING,
    FAR,
    FAR_MARKS,
    INVISIBLE,
    MARKS,
    OTHER_FORMS,
    SENTENCE_ENDS,
    SIGNS,
    UNSPACED,
)
from spell_megatron.corpus.controls import without_controls

_ANY_MARK = MARKS + FAR_MARKS
_PLAIN_WORD = re.compile(r"[^\W_]+")
_WORD = re.compile(rf"[^\W_{UNSPACED}]+(?:[{_ANY_MARK}]+[^\W_{UNSPACED}]*)*|[{UNSPACED}][{_ANY_MARK}]*")
_UNSPACED, _MARK = re.compile(f"[{UNSPACED}]"), re.compile(f"[{_ANY_MARK}]")
_INVISIBLE, _SIGN = re.compile(f"[{INVISIBLE}]+"), re.compile(f"[{SIGNS}]+")
_VARYING = re.compile(f"[{MARKS}{OTHER_FORMS}{FAR}]")
_SPECIAL = re.compile(f"[{MARKS}{OTHER_FORMS}{FAR}{INVISIBLE}{SIGNS}{UNSPACED}]")
_SENTENCE_END = rf"(?<=[.!?])\s|(?<=[{SENTENCE_ENDS}])[{SENTENCE_ENDS}{CLOSING}]*\s?"
_BOUNDARIES = [
    re.compile(p)
    for p in (r"\n(?=#)", r"\n[ \t]*\n", r"\n", _SENTENCE_END, rf"\s|(?<=[{CLAUSE_ENDS}])")
]  # fmt: skip


def clean(text: str) -> str:
    """Newlines as \\n, at most two blank lines in a row, and what control characters mean in their place."""
    # JSON can hold lone surrogates, which UTF-8 cannot.
    text = without_controls(text.encode("utf-8", "replace").decode())
    text = "\n".join(line.rstrip(" \t") for line in text.split("\n"))
    return re.sub(r"\n{4,}", "\n\n\n", text).strip()


def words(text: str) -> list[str]:
    """The words of a text in lower case, to compare texts by.

    A word is letters and digits with the marks on them. Equal words need not be equal bytes: accents may be written as
    characters of their own, letters joined or wide; soft hyphens and other invisible characters are not there. Where a
    script has no blanks between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese), every letter is a word.
    """
    if text.isascii() or not _SPECIAL.search(text):
        return _PLAIN_WORD.findall(text.lower())
    text = _SIGN.sub(" ", _INVISIBLE.sub("", text))
    if _VARYING.search(text):
        text = unicodedata.normalize("NFKC", text)
    return _WORD.findall(text.lower())


def count_words(text: str) -> int:
    """Number of words as a reader counts them: what stands between blanks; without blanks between words, `words`."""
    parts = text.split()
    if text.isascii() or not _UNSPACED.search(text):
        return len(parts)
    return sum(len(words(part)) if _UNSPACED.search(part) else 1 for part in parts)


def split_text(text: str, limit: int, length: Callable[[str], int] = len) -> list[str]:
    """Cut a text into pieces of at most `limit` characters (or what `length` counts), of similar length.

    The text is halved until it fits. A cut goes to the best kind of boundary in the middle half (heading,
    blank line, line, sentence, word), to the one nearest the middle.
    """
    if len(text) <= 1 or length(text) <= limit:
        return [text]
    middle = len(text) // 2
    cut = _before_marks(text, middle)
    for boundary in _BOUNDARIES:
        matches = boundary.finditer(text, len(text) // 4, len(text) - len(text) // 4)
        if places := [match.end() for match in matches if 0 < match.end() < len(text)]:
            cut = min(places, key=lambda place: abs(place - middle))
            break
    halves = text[:cut].strip("\n"), text[cut:].strip("\n")
    return [piece for half in halves for piece in split_text(half, limit, length)]


def _before_marks(text: str, place: int) -> int:
    """The nearest place before that separates no letter from its marks; `place` if there is none."""
    nearest = place
    while nearest > 0 and (_MARK.match(text, nearest) or _joined(text, nearest)):
        nearest -= 1
    return nearest or place


def _joined(text: str, place: int) -> bool:
    """Whether an invisible joiner holds the characters at a place together."""
    return "\u200d" in text[place - 1 : place + 1]
