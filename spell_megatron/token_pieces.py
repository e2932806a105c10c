"""Token ids of prompts by pieces: a document that stands in several prompts is tokenised once.

Most tokenizers cut a text into words before they look for tokens within each. With such a one a word ends at the end of
a line, and another begins with the letter that the next line begins with, whatever stands before and after. There a
prompt can be cut: the ids of the pieces, one after the other, are those of the whole. A document is cut out from its
beginning to its end, or from the first such line to the last.
"""

from __future__ import annotations

import re
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from spell_megatron.byte_pairs import BytePairs

MEMORY = 1 << 26
"""Tokens of documents that are remembered, at four bytes each."""

_SEAM = re.compile(r"\n(?=[^\W\d_])")
_LINES = re.compile(r"(?<=\n)(?=[^\W\d_])")
_ENDS = (
    *("", "a", "Ab", "7", "12", "é", "e\u0301", "漢", "は", "ا", "к", "²", "_", "\U0001f642", "\ufffd", "\u200b"),
    *(".", ",", "?!", "'", "'s", "I'l", '"', ")", "-", "/", "#", "`", "...", "<b>", "</text>", "\\", "$", "**"),
    *(" ", "  ", "\t", "\n", "\n\n", " \n", "\n ", "\r", "\r\n", "\u00a0", "\u2028", ". ", ".\n", "a \t", "7\n"),
)
_BEGINNINGS = ("a", "Ab", "AB", "I'm", "a7", "é", "e\u0301", "漢字", "は", "ا", "к", "A.", "s", "t's", "d", "re")


Encode = Callable[[Sequence[str]], "list[array[int]]"]
"""Gives the token ids of each of some texts by itself."""

_Cut = tuple[str, int, int]
"""A document, and which of its characters are a piece; one more than it has, if the end of its last line is one too."""


class PieceTokens:
    """Token ids of texts with documents in them.

    Args:
        encode: the tokenizer.
        fast: the tokenizers package's tokenizer behind `encode`; None if there is none. Then texts are encoded whole,
            as they are where lines that begin with a letter do not begin a word.
    """

    def __init__(self, encode: Encode, fast: Any) -> None:
        self._encode = encode
        self._known: OrderedDict[_Cut, array[int]] = OrderedDict()
        self._remembered = 0
        self.cuts = fast is not None and lines_begin_words(encode, fast)
        """Whether texts are cut."""
        self._fast = fast
        self.byte_pairs: BytePairs | None = None
        """A faster tokenizer with the same ids, if there is one, from the first text with documents on."""

    def ids(self, text: str, documents: Sequence[str]) -> array[int]:
        """Token ids of a text. `documents` stand in it in this order; those that do not are no fault."""
        if documents and self._fast is not None:
            self.byte_pairs, self._fast = BytePairs.of(self._fast), None
        pieces: list[tuple[str, _Cut | None]] = []
        done = 0
        for document in documents if self.cuts else ():
            place = text.find(document, done)
            start, stop = cut_out(document, text, place) if place >= 0 else (0, 0)
            if stop > start:
                pieces.append((text[done : place + start], None))
                done = place + stop
                pieces.append((text[place + start : done], (document, start, stop)))
        pieces.append((text[done:], None))
        known = [self._known.get(cut) if cut else None for _, cut in pieces]
        made = iter(self._ids([piece for (piece, _), ids in zip(pieces, known, strict=True) if ids is None]))
        whole: array[int] = array("i")
        for (_, cut), ids in zip(pieces, known, strict=True):
            ids = next(made) if ids is None else ids
            whole += ids
            if cut:
                self._remember(cut, ids)
        return whole

    def _ids(self, texts: Sequence[str]) -> list[array[int]]:
        """Token ids of each text, by the faster tokenizer where it can."""
        if self.byte_pairs is None:
            return self._encode(texts)
        parts = [self._quick(text) for text in texts]
        slow = iter(self._encode([part for some in parts for part in some if isinstance(part, str)]))
        made = [array("i") for _ in texts]
        for ids, some in zip(made, parts, strict=True):
            for part in some:
                ids += next(slow) if isinstance(part, str) else part
        return made

    def _quick(self, text: str) -> list[array[int] | str]:
        """A text in parts: the ids of those that the faster tokenizer takes, and the others as they are."""
        assert self.byte_pairs is not None
        whole = self.byte_pairs.ids(text)
        if whole is not None:
            return [whole]
        parts: list[array[int] | str] = []
        for line in _LINES.split(text) if self.cuts else [text]:
            ids = self.byte_pairs.ids(line)
            if ids is not None:
                parts.append(ids)
            elif parts and isinstance(parts[-1], str):
                parts[-1] += line
            else:
                parts.append(line)
        return parts

    def _remember(self, cut: _Cut, ids: array[int]) -> None:
        self._remembered += len(ids) - len(self._known.pop(cut, ()))
        self._known[cut] = ids
        while self._remembered > MEMORY and len(self._known) > 1:
            self._remembered -= len(self._known.popitem(last=False)[1])


def cut_out(document: str, text: str, place: int) -> tuple[int, int]:
    """The part of a document that can be cut out of a text, in characters of the document; (0, 0) if there is none.

    From its beginning or a later line on, to its end, with the end of the line, or to an earlier line.
    """
    first = 0 if _begins_line(text, place) else None
    if first is None and (seam := _SEAM.search(document)):
        first = seam.end()
    if first is None:
        return 0, 0
    if _begins_line(text, place + len(document) + 1):
        return first, len(document) + 1
    last = document.rfind("\n")
    while last >= first and not _SEAM.match(document, last):
        last = document.rfind("\n", 0, last)
    return (first, last + 1) if last >= first else (0, 0)


def _begins_line(text: str, place: int) -> bool:
    """Whether a line begins at a place, with a letter."""
    return place > 0 and bool(_SEAM.match(text, place - 1))


def lines_begin_words(encode: Encode, fast: Any) -> bool:
    """Whether a text can be cut before every line that begins with a letter, and its ids are those of both pieces.

    It can if the tokenizer cuts texts into words there, and if neither the words nor the ids on one side depend on the
    other side. Pairs of lines that end and begin in many ways try both.
    """
    if fast.pre_tokenizer is None:  # tokens may then reach across lines, and which do depends on the whole text
        return False
    spelled = [_SEAM.search(str(token.content)) for token in fast.get_added_tokens_decoder().values()]
    if any(spelled):
        return False
    pairs = list(_pairs())
    lefts, rights = encode([left for left, _ in pairs]), encode([right for _, right in pairs])
    wholes = encode([left + right for left, right in pairs])
    return all(whole == left + right for whole, left, right in zip(wholes, lefts, rights, strict=True)) and all(
        _words(fast, left + right) == _words(fast, left) + _words(fast, right) for left, right in pairs
    )


def _pairs() -> Iterator[tuple[str, str]]:
    """Lines, and how the next one begins."""
    for end in _ENDS:
        for beginning in _BEGINNINGS:
            yield f"The lamp{end}\n", beginning
        yield f"{end}\n", "Lamps are lit. \n"


def _words(fast: Any, text: str) -> list[str]:
    """The words into which a tokenizer cuts a text."""
    normal = fast.normalizer.normalize_str(text) if fast.normalizer else text
    return [word for word, _ in fast.pre_tokenizer.pre_tokenize_str(normal)]
