"""Characters that readers take for the same, written as one."""

from __future__ import annotations

import re
import unicodedata

_SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹"
_DIGITS = str.maketrans(_SUPERSCRIPTS + "⁻", "0123456789-")
_EXPONENT = re.compile(f"⁻?[{_SUPERSCRIPTS}]+")
_MIXED_FRACTION = re.compile("(?<=[0-9])(?=[¼-¾⅐-⅞])")

_SAME = {
    **dict.fromkeys(map(ord, "‐‑‒–−⁻﹣"), "-"),
    **dict.fromkeys(map(ord, "‘’‚‛ʼ′＇"), "'"),
    **dict.fromkeys(map(ord, "“”„‟«»″"), '"'),
    **dict.fromkeys(map(ord, "∙⋅"), "·"),
    ord("∕"): "/",
    ord("⁄"): "/",
    **dict.fromkeys(map(ord, "™®©"), None),
    # Without width: soft hyphen, joiners, marks of direction.
    **dict.fromkeys([0xAD, *range(0x200B, 0x2010), *range(0x202A, 0x202F), 0x2060, 0xFEFF], None),
}


def canonical(text: str) -> str:
    """The text with one form of each character: composed, of usual width, with plain dashes, quotes and blanks.

    An exponent keeps its meaning (10³ -> 10^3), and so does a fraction (1½ -> 1 1/2). An em dash stays: it is no minus.
    """
    if text.isascii():
        return text
    text = _EXPONENT.sub(lambda digits: "^" + digits[0].translate(_DIGITS), text)
    text = _MIXED_FRACTION.sub(" ", text).translate(_SAME)
    return unicodedata.normalize("NFKC", text).translate(_SAME)
