"""LaTeX of short answers, written plainly: what stands in a box, or between signs of mathematics."""

from __future__ import annotations

import re

_WORDS = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt)|mbox|textsf|operatorname\*?)\s*\{([^{}]*)\}"
)
_SIGNS = {
    r"\times": "*",
    r"\cdot": "*",
    r"\ast": "*",
    r"\div": "/",
    r"\approx": "≈",
    r"\simeq": "≈",
    r"\sim": "~",
    r"\pm": "±",
    r"\le": "<",
    r"\leq": "<",
    r"\lt": "<",
    r"\ge": ">",
    r"\geq": ">",
    r"\gt": ">",
    r"\degree": "°",
    r"\circ": "°",
    r"\pounds": "£",
    r"\euro": "€",
    r"\to": "=",
    r"\rightarrow": "=",
    r"\dfrac": r"\frac",
    r"\tfrac": r"\frac",
    r"\frac": r"\frac",
}
_INVISIBLE = {
    r"\left",
    r"\right",
    r"\displaystyle",
    r"\quad",
    r"\qquad",
    r"\bf",
    r"\rm",
    r"\it",
    r"\bigl",
    r"\bigr",
    r"\big",
    r"\Big",
}
_SHORT_FRACTION = re.compile(r"\\[dt]?frac\s*([0-9])\s*([0-9])(?![0-9])")
_DEGREES = re.compile(r"\^\s*\{?\s*°\s*\}?")
_COMMAND = re.compile(r"\\[A-Za-z]+|\\.", re.DOTALL)


def without_latex(text: str) -> str:
    r"""The text with words, signs and spaces of LaTeX written plainly.

    `\frac`, braces and `^` stay: they are part of the arithmetic that `arithmetic` reads. So do unknown commands.
    """
    if "\\" not in text:
        return text.replace("{,}", ",")
    for _ in range(3):  # words may stand in words
        text = _WORDS.sub(r" \1 ", text)
    text = _COMMAND.sub(_plain, _SHORT_FRACTION.sub(r"\\frac{\1}{\2}", text.replace("{,}", ",")))
    return _DEGREES.sub("°", text)


def _plain(command: re.Match[str]) -> str:
    name = command[0]
    if name in _SIGNS:
        return f" {_SIGNS[name]} " if name not in (r"\circ", r"\degree") else _SIGNS[name]
    if name in _INVISIBLE or name in (r"\,", r"\;", r"\:", r"\ "):
        return " "
    if name == r"\!":
        return ""
    if name in (r"\(", r"\)", r"\[", r"\]"):
        return " "
    return name[1] if not name[1].isalnum() else name
