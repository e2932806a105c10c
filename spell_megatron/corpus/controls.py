"""Control characters of terminals, printers and word processors, as the text that they mean."""

from __future__ import annotations

import re

_KINDS = "\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufeff"
_ANY, _CONTROL = re.compile(f"[{_KINDS}\xad]"), re.compile(f"\xad\n?|[{_KINDS}]")
_RETURNS = re.compile(r"\r+\n?")
# Colours and movements; titles and links, which end with BEL or ESC \; character sets; keypad and the like.
_ESCAPE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b\n]*(?:\x07|\x1b\\)?|\x1b[ -/]+[0-~]|\x1b[78=>]")
# Vertical tabs are the soft line breaks of slides; NEL is the line end of mainframes; FS, GS and RS part records.
_BREAKS = dict.fromkeys("\x0b\x1c\x1d\x1e\x85\u2028", "\n") | {"\f": "\n\n", "\u2029": "\n\n", "\x1f": " "}
# Characters of Windows that were read as if they were Latin-1. (They have … where Latin-1 has NEL.)
_WINDOWS = {chr(byte): bytes([byte]).decode("cp1252", "ignore") for byte in range(0x80, 0xA0)}
_MEANING = _WINDOWS | _BREAKS


def without_controls(text: str) -> str:
    """A text with line ends as \\n, and without control characters.

    Line and page breaks of every kind become line ends. What was printed over (NAME in bold or underlined, by
    backspaces) is there once. Escape sequences, soft hyphens, byte order marks and other controls go. Joiners inside
    words stay: they belong to the spelling.
    """
    if "\r" in text:
        # A copy that took a line end for two characters has made \r\r\n of \r\n.
        text = _RETURNS.sub(lambda found: "\n" if found[0].endswith("\n") else "\n" * len(found[0]), text)
    if not _ANY.search(text):
        return text
    if "\x1b" in text:
        text = _ESCAPE.sub("", text)
    if "\b" in text:
        text = "\n".join(_printed(line) if "\b" in line else line for line in text.split("\n"))
    return _CONTROL.sub(lambda control: _MEANING.get(control[0], ""), text)


def _printed(line: str) -> str:
    """A line as paper shows it: a backspace goes back by one place, and what is printed there later wins.

    An underscore under a letter, before or after it, does not count.
    """
    cells: list[str] = []
    place = 0
    for character in line:
        if character == "\b":
            place = max(0, place - 1)
            continue
        if place == len(cells):
            cells.append(character)
        elif character != "_" or cells[place] == " ":
            cells[place] = character
        place += 1
    return "".join(cells)
