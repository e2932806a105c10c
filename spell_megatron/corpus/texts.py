"""Texts of documents: cleaning, words, and cutting."""

from __future__ import annotations

import re
from collections.abc import Callable

# Chinese and Japanese are written without spaces: each of their characters counts as a word.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[^\W_{_UNSPACED}]+|[{_UNSPACED}]")
_BOUNDARIES = [re.compile(p) for p in (r"\n(?=#)", r"\n[ \t]*\n", r"\n", r"(?<=[.!?])\s", r"\s")]


def clean(text: str) -> str:
    """Newlines as \\n, at most two blank lines in a row, and no control characters (form feeds, escapes)."""
    # JSON can hold lone surrogates, which UTF-8 cannot.
    text = text.encode("utf-8", "replace").decode()
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\f", "\n\n")
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)
    text = "\n".join(line.rstrip(" \t") for line in text.split("\n"))
    return re.sub(r"\n{4,}", "\n\n\n", text).strip()


def words(text: str) -> list[str]:
    """The words of a text in lower case; every Chinese or Japanese character is one."""
    return _WORD.findall(text.lower())


def split_text(text: str, limit: int, length: Callable[[str], int] = len) -> list[str]:
    """Cut a text into pieces of at most `limit` characters (or what `length` counts), of similar length.

    The text is halved until it fits. A cut goes to the best kind of boundary in the middle half (heading,
    blank line, line, sentence, word), to the one nearest the middle.
    """
    if len(text) <= 1 or length(text) <= limit:
        return [text]
    middle = len(text) // 2
    cut = middle
    for boundary in _BOUNDARIES:
        matches = boundary.finditer(text, len(text) // 4, len(text) - len(text) // 4)
        if places := [match.end() for match in matches if 0 < match.end() < len(text)]:
            cut = min(places, key=lambda place: abs(place - middle))
            break
    halves = text[:cut].strip("\n"), text[cut:].strip("\n")
    return [piece for half in halves for piece in split_text(half, limit, length)]
