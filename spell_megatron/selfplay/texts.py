"""Texts as answers: whether one contains another, word by word, as something that it claims."""

from __future__ import annotations

import re

from spell_megatron.selfplay.characters import canonical

# A reference of more characters is no short phrase: only an equal text matches it.
MAX_LENGTH = 1000

_ARTICLES = ("a", "an", "the")
_POLAR = ("yes", "no")

_SCRIPT_WITHOUT_BLANKS = re.compile("([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")
_THOUSANDS = re.compile(r"(?<![0-9.,])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9]|,[0-9])")
_IN_RANGE = re.compile(r"(?<=[0-9]) ?[-—] ?(?=[0-9])")
_NUMBER_WORDS = re.compile(
    r"\b((?:twen|thir|for|fif|six|seven|eigh|nine)ty)[ -](?=(?:one|two|three|four|five|six|seven|eight|nine)\b)"
)
_PERCENT = re.compile(r"(?<=[0-9])\s*(?:percent|per cent)\b")
_SIGNED_CURRENCY = re.compile(r"(?<![\w)])-[$€£¥](?=[.0-9])")
_INITIALS = re.compile(r"(?<![^\W_])([^\W\d_])\.\s+(?=[^\W\d_]\.)")
_JOINED = re.compile(r"(?<=[^\W\d_])(?:\.|'(?!s\b))(?=[^\W\d_])")
_WORD = re.compile(
    r"(?:(?<![\w)])-)?(?:[0-9]+(?:\.[0-9]+)*|\.[0-9]+)(?:[-/:][0-9]+(?:\.[0-9]+)*)*[^\W_]*"  # 5, 1914-18, 3/4, 90s
    r"|[^\W_]+(?:'s\b)?[+#]*"  # Ada, Ada's, C++
    r"|,"
)

# Between the words of a phrase there may be articles and commas; after each there may be a genitive's s.
_GAP = "(?:'s)? (?:(?:a|an|the|,) )*"
_NEGATED = re.compile(
    r"(?:^| )(?:not|never|nor|neither|cannot|except|unlike|than|no longer|instead of|other than|anything but|"
    r"(?:is|was|are|were|does|did|do|ca)nt)(?: (?:be|a|an|the|in|at|on|by|from|to|of|for|with))* $"
)
_OR_BEFORE = re.compile(r"(?:^| )or (?:(?:a|an|the) )*$")
_OR_AFTER = re.compile(
    r"(?: ,(?! (?:which|who|whose|where|when|because|since|as|in|on|at|with)\b)(?: [^ ,]+){1,3})*(?: ,)? or (?!so\b)"
)


_DELETED = re.compile(r"\*|</?answer>|<｜Assistant｜>|<｜end▁of▁sentence｜>")
_LIST_MARK = re.compile(r"\s*(?:[0-9]+[.)]|[-•])\s+")
_REFUSAL = re.compile(r"not\s+(?:the\s+|in\s+|at\s+|on\s+)?[\"'“]?[A-Z0-9]")
# The end of a sentence after which another one begins; what is short before a full stop may be an abbreviation.
_SENTENCE_END = re.compile(
    r"(?:(?<=[^\W\d_]{4})(?<!\bProf)(?<!\bCorp)(?<!\bCapt)(?<!\bDept)|(?<=[0-9)\]\"'”]))[.!?][\"'”)]*(?=\s+[A-Z(])"
)


def text_at(content: str) -> str | None:
    """The text that a statement's content begins with: the first sentence of its line. None if it says nothing.

    That the answer is *not* something says nothing yet.
    """
    line = _DELETED.sub("", content.partition("\n")[0])
    mark = _LIST_MARK.match(line)
    end = _SENTENCE_END.search(line, mark.end() if mark else 0)
    answer = line[: end.end() if end else None].strip('. \t\r"“”`')
    if not answer or "insert answer here" in answer or _REFUSAL.match(answer):
        return None
    return answer


def words(text: str) -> str:
    """The words and commas of a text in lower case, with one blank between them.

    Other punctuation, quotes and signs of currency and percent are left out. Dots and apostrophes within words join
    them (U.S. -> us, J. R. R. -> jrr, O'Brien -> obrien). Numbers keep point and minus. A range, a ratio or a date
    is one word. Of scripts without blanks, every character is a word.
    """
    text = _SCRIPT_WITHOUT_BLANKS.sub(r" \1 ", canonical(text).casefold().replace("i̇", "i").replace("&", " and "))
    text = _NUMBER_WORDS.sub(r"\1", text)
    text = _IN_RANGE.sub("-", _THOUSANDS.sub(lambda number: number[0].replace(",", ""), text))
    text = _SIGNED_CURRENCY.sub("-", _PERCENT.sub("", _JOINED.sub("", _INITIALS.sub(r"\1.", text))))
    return " ".join(_WORD.findall(text))


def normalize_text(text: str) -> str:
    """The words of a text without commas and articles. The last word is no article ("Hepatitis A")."""
    every = [word for word in words(text).split() if word != ","]
    return " ".join([word for word in every[:-1] if word not in _ARTICLES] + every[-1:])


def cover_exact_match(prediction: str, reference: str) -> bool:
    """Whether the prediction claims what the reference says: all its words in one piece, articles aside.

    What is negated, or only one of several alternatives, is not claimed. Of a reference like "no", the first such word
    of the prediction decides. A reference without words matches nothing.
    """
    expected = normalize_text(reference)
    if not expected or expected in _ARTICLES or len(expected) > MAX_LENGTH:
        return bool(expected) and normalize_text(prediction) == expected
    found = words(prediction)
    if expected in _POLAR:
        return next((word for word in found.split() if word in _POLAR), None) == expected
    phrase = re.compile(rf"(?<!\S){_GAP.join(map(_genitive, expected.split()))}(?:'s)?(?!\S)")
    return any(_claimed(found, match.start(), match.end()) for match in phrase.finditer(found))


def _genitive(word: str) -> str:
    """A pattern of a word, whose final s may be a genitive's."""
    stem = word.removesuffix("s").removesuffix("'")
    return re.escape(word) if stem == word else rf"{re.escape(stem)}'?s"


def _claimed(text: str, start: int, end: int) -> bool:
    """Whether what stands at a place in `words` is claimed there: neither negated nor one of several alternatives."""
    before, after = text[max(0, start - 60) : start], text[end : end + 200]
    return not (_NEGATED.search(before) or _OR_BEFORE.search(before) or _OR_AFTER.match(after))
