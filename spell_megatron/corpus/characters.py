"""Kinds of characters in all scripts, as the insides of [classes] of regular expressions."""

from __future__ import annotations

import unicodedata

UNSPACED = (
    "\u0e01-\u0e30\u0e32-\u0e33\u0e40-\u0e46"  # Thai
    "\u0e81-\u0eb0\u0eb2-\u0eb3\u0ebd\u0ec0-\u0ec6\u0edc-\u0edf"  # Lao
    "\u1000-\u102a\u103f\u1050-\u1055\u105a-\u105d\u1061\u1065-\u1066\u106e-\u1070\u1075-\u1081\u108e"  # Burmese
    "\u1780-\u17b3"  # Khmer
    "\u3005-\u3007\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff"  # Japanese
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003fffd"  # Chinese
)
"""Letters of scripts that are written without blanks between words."""

SENTENCE_ENDS = (
    "\u061f\u06d4"  # ? and full stop of Arabic and Urdu
    "\u0589"  # Armenian
    "\u0964\u0965"  # danda of Devanagari and its relatives
    "\u104a\u104b"  # Burmese
    "\u1362\u1367\u1368"  # Ethiopic
    "\u17d4\u17d5"  # Khmer
    "\u203c\u203d\u2047-\u2049"  # double ! and ?
    "\u3002\uff01\uff0e\uff1f\uff61"  # Chinese and Japanese
)
"""Signs that end a sentence also where no blank follows. Thai and Lao have none. (After . ! ? a blank must follow.)"""

CLOSING = "\"'”’»›)\\]｣」』】》〉）］｝"
"""What may stand between the end of a sentence and the next sentence."""

CLAUSE_ENDS = "\u060c\u061b\u3001\uff0c\uff1b\uff1a\u200b\u0f0b"
"""Commas and the like after which no blank need follow; the invisible and the Tibetan separators of words."""


def _class(characters: list[str]) -> str:
    """The inside of a class, with ranges."""
    ranges: list[list[int]] = []
    for code in map(ord, characters):
        if ranges and code == ranges[-1][1] + 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in ranges)


# Of the characters beyond U+FFFF only these: a class with many ranges there is slow. Chakma, Adlam, choice of glyphs.
_BEYOND = "\U00011100-\U00011102\U00011127-\U00011134\U0001e944-\U0001e94a\U000e0100-\U000e01ef"


def _of_unicode() -> tuple[str, str, str]:
    """(marks, invisible characters, signs that stand for letters) of the Unicode that Python knows."""
    marks, invisible, signs = [], ["\u00ad"], []
    for character in map(chr, range(0x300, 0x10000)):
        match unicodedata.category(character):
            case "Mn" | "Mc" | "Me":
                marks.append(character)
            case "Cf" if character != "\u200b":  # which separates words
                invisible.append(character)
            case "So" if len(form := unicodedata.normalize("NFKC", character)) > 1 and any(map(str.isalnum, form)):
                signs.append(character)
            case _ if character == "\u0640":  # lengthens Arabic words
                invisible.append(character)
    return _class(marks) + _BEYOND, _class(invisible), _class(signs)


def _plain() -> str:
    codes = (*range(0xAD), *range(0xAE, 0x300), *range(0x2010, 0x2028), *range(0x2030, 0x205F), *range(0x20A0, 0x20C0))
    forms = {character: unicodedata.normalize("NFKC", character) for character in map(chr, codes)}
    return _class([one for one, form in forms.items() if form == one or not any(map(str.isalnum, form))])


PLAIN = _plain()
"""Letters of Europe and common punctuation whose compatibility forms are no other letters or digits; no marks."""

MARKS, INVISIBLE, SIGNS = _of_unicode()
"""Accents, vowel signs and so on, which belong to the letter before; characters of a word that nobody sees (soft
hyphens, joiners, directions); signs such as ™, which compatibility forms would turn into several letters."""
