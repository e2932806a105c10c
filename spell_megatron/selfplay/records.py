"""The JSON object in a questioner's text, also where its form has slips that leave no doubt about what is meant."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import Any

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")

_BLOCK = re.compile(r"```[ \t]*+(\w*+)(.*?)```", re.DOTALL)
_LANGUAGES = ("json", "json5", "jsonc")
# Where an object may begin that stands in no fence, or in one that a question's text or nothing closes.
_OBJECT = re.compile(r'\{\s*["“”](?:question|options|answer)["“”]', re.IGNORECASE)
_CURLY = str.maketrans("“”", '""')
MAX_OBJECTS = 8
_IN_LIST = re.compile(r"(?:\[|\}\s*,)\s*$")

_STRING = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|$)', re.DOTALL)
_STRING_OR_COMMA = re.compile(rf"{_STRING.pattern}|,(?=\s*[}}\]])", re.DOTALL)
# What is no escape of JSON is LaTeX. So are \b and \f, which no text needs, and \n, \r and \t in these words.
_LATEX = r"(?:neq?|nu|nabla|not|rho|right\w*|times|text\w*|tfrac|theta|tau|tan)(?![A-Za-z])"
_BACKSLASH = re.compile(
    rf'\\(?:(?P<escape>["\\/]|u[0-9a-fA-F]{{4}}|(?!{_LATEX})[nrt])|(?P<other>.|$))',
    re.DOTALL,
)


def read_record(text: str) -> dict[str, Any]:
    """The record in a text; {} without one.

    It is the last fenced block that is JSON; in a block marked as json, anything but an object is no record. Without
    such a block it is the last object with a question, options or an answer, or else the whole text. Commas after the
    last item, line breaks in strings, curly quotes and backslashes of LaTeX are forgiven.
    """
    text = CONTROL.sub("", text)
    for language, block in reversed(_BLOCK.findall(text)):
        if language and language.lower() not in _LANGUAGES:
            continue
        value = _decoded(block)
        if isinstance(value, dict):
            return value
        if language and value is not None:
            return {}
    for place in list(_OBJECT.finditer(text))[: -MAX_OBJECTS - 1 : -1]:
        if not _IN_LIST.search(text, max(0, place.start() - 20), place.start()):
            value = _decoded(text[place.start() :], whole=False)
            if isinstance(value, dict):
                return value
    value = _decoded(text)
    return value if isinstance(value, dict) else {}


def _decoded(text: str, whole: bool = True) -> Any:
    """The JSON value of a text, or (not `whole`) the one that it begins with; None if there is none."""
    text = _STRING_OR_COMMA.sub(lambda part: "" if part[0] == "," else _BACKSLASH.sub(_kept, part[0]), text.strip())
    decoder = json.JSONDecoder(strict=False)
    for form in (text, text.translate(_CURLY)) if "“" in text else (text,):
        with suppress(ValueError, RecursionError):  # RecursionError: nested too deeply
            return decoder.decode(form) if whole else decoder.raw_decode(form)[0]
    return None


def _kept(escape: re.Match[str]) -> str:
    return escape[0] if escape["escape"] else "\\" + escape[0]
