"""Where a response states its answer: after a phrase such as "the answer is", or in a box."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice

from spell_megatron.selfplay.keywords import from_the_end

# Who states more than this many answers that cannot be read states none.
MAX_STATEMENTS = 50
MAX_PLACES = 1000
MAX_BOX = 1000

_KEYS = ("answer", "option", "choice", "letter", "答案", r"\boxed")
_PHRASE = re.compile(
    r"(?:answers?(?![^\W_])[\"'*_`]*(?:\s+(?:choice|option|letter)(?![^\W_]))?|option|choice|letter)"
    r"(?:\s+here\b|,[^,.:;?!\n]{1,40},|\s*\([^()\n]{1,40}\)|\s+(?:to|for|of|in)\s[^.:;?!\n]{0,80}?)?[\s*_`]*"
    r"(?:(?:is|are|was|were|equals)\b|(?:would|should|must|will|may|might|could)\s+be\b|[:：=—]|(?<=<answer)>)"
    r"|答案[\s*_`]*(?:是|为|為|[:：])",
    re.IGNORECASE,
)
_UNQUALIFIED = re.compile(r"(?<![^\W_])(?<!\")$|\{\s*\"$")  # a quote before it only as in {"answer": 7}
_QUALIFIED = re.compile(r"(?:correct|right|best|final)\s+$", re.IGNORECASE)
_HEADING = re.compile(r"answer[*_ \t]*(?=\n)", re.IGNORECASE)
_BEFORE_HEADING = re.compile(r"(?:^|\n)[#*_ \t]*(?:(?:final|correct)\s)?$", re.IGNORECASE)
_BOX = re.compile(r"\\boxed\s*\{")
# The words before a phrase that make it no statement: a reason, a condition, a thought.
_UNCLAIMED = re.compile(
    r"\b(?:since|because|as|if|whether|why|how|when|unless|until|to|suppose|supposing|assume|assuming|say)\s+"
    r"(?:(?:the|my|our|this|that|its|an?|correct|right|final|best|only)\s+)*$",
    re.IGNORECASE,
)
# What makes "the answer is" a remark about the answer.
_REMARK = re.compile(
    r"\s*(?:(?:(?:based|founded|built)\s+(?:up)?on|(?:supported|given|confirmed|explained)\s+(?:by|in)|(?:derived|taken|"
    r"obtained)\s+from|(?:found|stated|contained|mentioned)\s+in|consistent\s+with|rounded\s+to)\b|"
    r"(?:in)?correct\s*[.,!;]|right\s*[.,!;]|wrong\s*[.,!;]|clear\s*[.,!;]|n't\b)",
    re.IGNORECASE,
)
_LEAD = re.compile(r"(?:[\s*_`:：]|(?:as follows|the following)\s*:)*", re.IGNORECASE)
_CONTRAST = re.compile(r"\s*not\s[^.;\n]{1,200}?[\s,]but\s+(?:rather\s+|instead\s+)?", re.IGNORECASE)


def statements(text: str) -> Iterator[tuple[str, bool]]:
    """What follows each phrase and what stands in each closed box, with whether it is a box; the last one first.

    Phrases that only give a reason or make a supposition come after all others.
    """
    unclaimed = []
    until = len(text)
    for start, end, is_box in islice(_places(text), MAX_STATEMENTS):
        content = _box(text[end : end + MAX_BOX]) if is_box else _after_phrase(text, end, until)
        reason = None if is_box else _UNCLAIMED.search(text, max(0, start - 60), start)
        if reason:
            until = reason.start()  # what is stated before ends here
        if content is not None and reason:
            unclaimed.append(content)
        elif content is not None:
            yield content, is_box
    yield from ((content, False) for content in unclaimed)


# "Bergen is the correct answer." A reader looks there if nothing else states an answer.
_CALLED_RIGHT = re.compile(
    r"(?:^|[.!?\n]\s*)(?:(?:so|thus|therefore|hence|consequently|clearly|finally)\b,?\s*)?"
    r"(?!(?:this|that|it|what|which|who|here|there|neither|not|if)\b)([^,;:.!?\n]{1,80}?)\s+is\s+(?:therefore\s+|clearly\s+)?"
    r"the\s+(?:(?:correct|right|final)\s+)?answer\s*(?:[.!*]|$)",
    re.IGNORECASE,
)
MAX_END = 2000


def called_right(text: str) -> str | None:
    """What the end of a text calls the answer, in a sentence that ends with that word; None if there is no such."""
    *_, found = None, *_CALLED_RIGHT.finditer(text[-MAX_END:])
    return found[1] if found else None


def _places(text: str) -> Iterator[tuple[int, int, bool]]:
    """Where each phrase or box begins, where what it states begins, and whether it is a box; the last one first."""
    for start, key in islice(from_the_end(text, _KEYS), MAX_PLACES):
        before = text[max(0, start - 30) : start]
        if key == r"\boxed":
            if box := _BOX.match(text, start):
                yield start, box.end(), True
        elif key == "答案" or (_QUALIFIED if key != "answer" else _UNQUALIFIED).search(before):
            phrase = _PHRASE.match(text, start) or (_BEFORE_HEADING.search(before) and _HEADING.match(text, start))
            if phrase:
                yield start, phrase.end(), False


def _after_phrase(text: str, end: int, until: int) -> str | None:
    """What a phrase that ends there states, up to a place; None for a remark about the answer."""
    if _REMARK.match(text, end):
        return None
    lead = _LEAD.match(text, end)
    start = lead.end() if lead else end
    contrast = _CONTRAST.match(text, start)
    return text[contrast.end() if contrast else start : until]


def _box(text: str) -> str | None:
    """The text up to the brace that closes one opened just before it; None if it stays open."""
    depth = 1
    for brace in re.finditer(r"[{}]", text):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[: brace.start()]
    return None
