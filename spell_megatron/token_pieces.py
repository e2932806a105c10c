"""Token ids of prompts by pieces: a document that stands in several prompts is tokenised once.

Most tokenizers cut a text into words before they look for tokens within each. With such a one a word ends at the end of
a line, and another begins with the letter that the next line begins with, whatever stands before and after. There a
prompt can be cut: the ids of the pieces, one after the other, are those of the whole. A document is cut out from the
first such line to the last.
"""

from __future__ import annotations

import re
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

MEMORY = 1 << 26
"""Tokens of documents that are remembered, at four bytes each."""

_SEAM = re.compile(r"\n(?=[^\W\d_])")
_ENDS = (
    *("", "a", "Ab", "7", "12", "é", "e\u0301", "漢", "は", "ا", "к", "²", "_", "\U0001f642", "\ufffd", "\u200b"),
    *(".", ",", "?!", "'", "'s", "I'l", '"', ")", "-", "/", "#", "`", "...", "<b>", "</text>", "\\", "$", "**"),
    *(" ", "  ", "\t", "\n", "\n\n", " \n", "\n ", "\r", "\r\n", "\u00a0", "\u2028", ". ", ".\n", "a \t", "7\n"),
)
_BEGINNINGS = ("a", "Ab", "AB", "I'm", "a7", "é", "e\u0301", "漢字", "は", "ا", "к", "A.", "s", "t's", "d", "re")


Encode = Callable[[Sequence[str]], "list[array[int]]"]
"""Gives the token ids of each of some texts by itself."""


class _Piece(NamedTuple):
    """A part of a text; with `inside`, the inner part of a document."""

    text: str
    inside: bool


class PieceTokens:
    """Token ids of texts with documents in them.

    Args:
        encode: the tokenizer.
        fast: the tokenizers package's tokenizer behind `encode`; None if there is none. Then texts are encoded whole,
            as they are where lines that begin with a letter do not begin a word.
    """

    def __init__(self, encode: Encode, fast: Any) -> None:
        self._encode = encode
        self._known: OrderedDict[str, array[int]] = OrderedDict()  # of documents' inner parts
        self._remembered = 0
        self.cuts = fast is not None and lines_begin_words(encode, fast)
        """Whether texts are cut."""

    def ids(self, text: str, documents: Sequence[str]) -> array[int]:
        """Token ids of a text. `documents` stand in it in this order; those that do not are no fault."""
        pieces: list[_Piece] = []
        done = 0
        for document in documents if self.cuts else ():
            place = text.find(document, done)
            inner = inner_part(document) if place >= 0 else slice(0)
            if inner.stop:
                pieces += [_Piece(text[done : place + inner.start], False), _Piece(document, True)]
                done = place + inner.stop
        pieces.append(_Piece(text[done:], False))
        ids = {piece: self._known[piece.text] for piece in pieces if piece.inside and piece.text in self._known}
        new = [piece for piece in dict.fromkeys(pieces) if piece not in ids]
        texts = [text[inner_part(text)] if inside else text for text, inside in new]
        ids.update(zip(new, self._encode(texts), strict=True))
        whole: array[int] = array("i")
        for piece in pieces:
            whole += ids[piece]
            if piece.inside:
                self._remember(piece.text, ids[piece])
        return whole

    def _remember(self, document: str, ids: array[int]) -> None:
        self._remembered += len(ids) - len(self._known.pop(document, ()))
        self._known[document] = ids
        while self._remembered > MEMORY and len(self._known) > 1:
            self._remembered -= len(self._known.popitem(last=False)[1])


def inner_part(document: str) -> slice:
    """The part of a document from its first line that begins with a letter, but for the first line, to its last."""
    first, last = _SEAM.search(document), document.rfind("\n")
    while first and last >= first.end():
        if _SEAM.match(document, last):
            return slice(first.end(), last + 1)
        last = document.rfind("\n", 0, last)
    return slice(0)


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
