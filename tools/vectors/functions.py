"""Registers how a function of the reference is called here, and what was decided otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from spell_megatron.selfplay import parsing, scoring

NUMBER, TEXT, LETTER = "docmath_qa", "doc_general_qa", "doc_mc"


def as_reference(input: Any, expected: Any) -> Any:
    """The rule of functions in which we follow the reference."""
    return expected


class Function(NamedTuple):
    """A function of the reference.

    Attributes:
        run: our result for an input.
        decide: the result that we want, given the input and the reference's result.
        ignored: keys of the result for which this project has no concept.
        sees_wanted: `run` gets the wanted result too, because chance decides details that both leave open.
    """

    run: Callable[..., Any]
    decide: Callable[[Any, Any], Any] = as_reference
    ignored: frozenset[str] = frozenset()
    sees_wanted: bool = False


FUNCTIONS: dict[str, Function] = {}


def function(
    name: str,
    decide: Callable[[Any, Any], Any] = as_reference,
    ignored: Sequence[str] = (),
    sees_wanted: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as `Function.run`."""

    def register(run: Callable[..., Any]) -> Callable[..., Any]:
        FUNCTIONS[name] = Function(run, decide, frozenset(ignored), sees_wanted)
        return run

    return register


def equal(a: Any, b: Any) -> bool:
    """Equality of results; `b` may be written as JSON has it ("NaN", "Infinity", {"raises": name})."""
    if isinstance(a, Exception):
        return isinstance(b, dict) and set(b) == {"raises"}
    if isinstance(b, dict):
        return isinstance(a, dict) and set(a) == set(b) and all(equal(a[key], b[key]) for key in b)
    if isinstance(b, list | tuple):
        return isinstance(a, list | tuple) and len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, int | float) and isinstance(b, int | float):
        return a == b or math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-5)
    if isinstance(a, float) and b in ("NaN", "Infinity"):
        return a == float("inf") if b == "Infinity" else math.isnan(a)
    return a == b


def stated_reference(task: str, text: str) -> str | None:
    """A reference out of its phrase; ours need none (decided), so that a bare one stands for itself."""
    return parsing.extract_answer(task, text) if "answer is" in text else text


def compute_score(task: str, input: dict) -> dict[str, Any]:
    prediction = parsing.parse_answer(task, input["response"], False)
    reference = stated_reference(task, input["ground_truth"])
    score = 0 if reference is None else scoring.rule_score(task, prediction, reference)
    return {"score": score, "pred": prediction, "gt": reference}
