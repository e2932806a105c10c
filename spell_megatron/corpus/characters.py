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


FAR = "\U00010000-\U0010ffff"
"""All characters that the four classes at the end leave out: a class with many ranges among them is slow."""

FAR_MARKS = "\U00011100-\U00011102\U00011127-\U00011134\U0001e944-\U0001e94a"
"""The marks among them that living languages need (Chakma, Adlam)."""


def _of_unicode() -> tuple[str, str, str, str]:
    """The four classes below, of the Unicode that Python knows."""
    marks: list[str] = []
    invisible: list[str] = []
    signs: list[str] = []
    other_forms: list[str] = []
    # without Chinese characters and Korean syllables, which are in none
    codes = (*range(0x80, 0x3400), *range(0xA000, 0xAC00), *range(0xD7B0, 0xD800), *range(0xF900, 0x10000))
    for character in map(chr, codes):
        category = unicodedata.category(character)
        form = unicodedata.normalize("NFKC", character)
        if category[0] == "M":
            marks.append(character)
        elif character == "\u0640" or (category == "Cf" and character != "\u200b"):
            invisible.append(character)
        elif form != character and any(map(str.isalnum, form)):
            (signs if category == "So" and len(form) > 1 else other_forms).append(character)
        elif character == "İ" or unicodedata.name(character, "").startswith("HANGUL"):
            other_forms.append(character)
    return _class(marks), _class(invisible), _class(signs), _class(other_forms)


MARKS, INVISIBLE, SIGNS, OTHER_FORMS = _of_unicode()
"""MARKS: accents, vowel signs and so on, which belong to the letter before. INVISIBLE: characters of a word that nobody
sees (soft hyphens, joiners, directions), and the one that lengthens Arabic words. The blank without width is none: it
separates words. SIGNS, such as ™, whose compatibility forms are several letters. OTHER_FORMS: letters and digits that
are the same as others (wide, joined, of PDF files), parts of Korean syllables, and the letter whose small form is two
characters."""
