"""Letters of options: the letter with which a text begins."""

from __future__ import annotations

import re

from spell_megatron.selfplay.characters import canonical
from spell_megatron.selfplay.latex import without_latex

LETTERS = "ABCD"
MAX_LENGTH = 200

_HEAD = re.compile(
    r"(?:[\s*_`:\"'$({\[—-]|(?:(?:the|letter|option|choice|answer|candidate)\b\.?(?![A-Za-z]))|"
    r"(?:therefore|thus|hence|then|indeed|clearly|definitely|likely|probably|most likely|simply|just|actually)\b,?)*",
    re.IGNORECASE,
)
# A letter is one on its own: not part of a word, a name or an abbreviation.
_LETTER = re.compile(r"([A-Ha-h])(?![\w+#]|['.-]\w)")
_CLOSES = re.compile(r"[*_`\"')}\]$]*")
# After a letter: another one, so that the text names several.
_SEVERAL = re.compile(
    r"[*_`\"')}\]$]*\s*(?:(?P<comma>[,;])|/|&|\+|,?\s*\(?(?:and|or)\b)\s*\(?(?:(?:both|also|maybe|perhaps|possibly)\s+)?"
    r"(?:(?:option|choice)\s+)?[*_`\"'({\[$]*[A-H](?![\w+#]|['.-]\w)(?(comma)(?!\s+(?:is|was|has|does|cannot)\b))"
)
_SEVERAL_AHEAD = re.compile(r"(?:both|either|neither|none|all|any|not|no|unknown|cannot)\b", re.IGNORECASE)
# A capital A before an ordinary word is an article, but for the words that go on after a letter.
_ORDINARY_WORD = re.compile(
    r" +(?!(?:because|since|as|for|due|which|is|was|given|from|in|based|according|with|by|that|where|while|and|or|if|"
    r"so|but|though|although|rather|instead|not|per|after|only|here)\b)[a-z]"
)


def letter_at(text: str) -> str | None:
    """The letter, A to D, with which a text begins: alone, in brackets or before the option's text.

    "" if the text names several letters, none of them, or one that is no option. None if it says something else.
    """
    text = without_latex(canonical(text[:MAX_LENGTH]))
    head = _HEAD.match(text)
    start = head.end() if head else 0
    if _SEVERAL_AHEAD.match(text, start):
        return "" if not re.match(r"not\b", text[start:], re.IGNORECASE) else None
    found = _LETTER.match(text, start)
    if not found:
        return None
    letter, rest = found[1], text[found.end() :]
    bracketed = text[:start].rstrip("*_`\"'$ ").endswith(("(", "[", "{")) or rest.startswith((")", "]"))
    if _SEVERAL.match(rest):
        return ""
    if not bracketed and not _stands_alone(letter, rest):
        return None
    return letter.upper() if letter.upper() in LETTERS else ""


def _stands_alone(letter: str, rest: str) -> bool:
    """Whether a letter without brackets is no word of a sentence: a lower-case letter or an A might be one."""
    if letter.islower():
        return re.match(r"[*_`\"'$]*\s*(?:$|[\n.:;,])", rest) is not None
    return letter != "A" or not _ORDINARY_WORD.match(rest)


_ALONE = re.compile(
    r"[\s*_#>`$]*(?:(?:option|choice|answer)\b\s*:?\s*)?[*_(\[{`$\"]*([A-D])[*_)\]}.`$\"]*", re.IGNORECASE
)
_WITH_TEXT = re.compile(r"[*_]*[(\[]?([A-D])[)\].:][*_]* [^\n]*")
_CALLED_RIGHT = re.compile(
    r"(?<!nor )(?<!or )(?<!and )(?<![\w'])[(\[]?([A-D])[)\]]?[*_\"]*\s+(?:is|must be|would be)\s+"
    r"(?:\w+ly\s+|therefore\s+)?"
    r"(?:the\s+)?(?:only\s+)?(?:(?:correct|right|best)(?:\s+(?:answer|option|choice|one)\b|\s*[.!*]|$)|answer\s*[.!*]|answer$)"
    r"|\b(?:choose|pick|select)\s+(?:option\s+|choice\s+)?[(\[*_\"]*([A-D])[)\]*_\"]*(?=[\s.,;:!]|$)"
)


def letter_alone(text: str) -> str | None:
    """The letter that a text without a phrase gives: alone in the last or first line, or called the right one."""
    text = text.strip()
    for line in (text.rpartition("\n")[2], text.partition("\n")[0]):
        if found := _ALONE.fullmatch(without_latex(canonical(line[:MAX_LENGTH]))):
            return found[1].upper()
    if found := _WITH_TEXT.fullmatch(canonical(text[:MAX_LENGTH])):
        return found[1]
    *_, called = None, *_CALLED_RIGHT.finditer(text[-10 * MAX_LENGTH :])
    return (called[1] or called[2]) if called else None
