#!/usr/bin/env python
"""Run test vectors of the reference implementation against this package.

    python tools/check_vectors.py FILE

FILE is a JSON list of {function, input, expected, note}: what a function of the released SPELL code
returned for an input. Floats are rounded to 6 decimals (compared within 1e-5), "NaN" and "Infinity" are
strings, booleans equal 0 and 1, and {"raises": name} says that the reference raised.

The files of tools/vectors/ hold, for each function, how to call ours (`run`). Where the project decided to behave
otherwise than the reference (docs/algorithm.md), they also hold the rule (`decide`), which makes the result that
we want of the input and the reference's result. A case passes if the wanted result is the reference's and ours
equals it. It is "decided otherwise" if the wanted result differs and ours equals it. Anything else is a failure.
The rules are written apart from the package, so that they check it.

Prints each failure and, last, `N passed, M failed, K decided otherwise`. Exit status 1 if any failed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vectors import answers, batches, evaluation, loss, numbers, only_reference, questions, votes  # noqa: F401
from vectors.functions import FUNCTIONS, equal


def without(result: Any, keys: frozenset[str]) -> Any:
    return {k: v for k, v in result.items() if k not in keys} if keys and isinstance(result, dict) else result


def check(case: dict[str, Any]) -> tuple[str, str]:
    """(passed | failed | decided otherwise, what to say about it) of one case."""
    name, input, expected = case["function"], case["input"], case["expected"]
    if name not in FUNCTIONS:
        return "failed", "this script knows no such function"
    function = FUNCTIONS[name]
    expected = without(expected, function.ignored)
    try:
        wanted = without(function.decide(input, case["expected"]), function.ignored)
    except Exception as error:  # the rule of this script does not cover the case
        return "failed", f"the rule for decided behaviour failed: {error!r}"
    try:
        ours = function.run(input, wanted) if function.sees_wanted else function.run(input)
    except Exception as error:  # whatever our code raises is its result for this case
        ours = error
    if not equal(ours, wanted):
        what = f"expected {wanted!r}" if equal(wanted, expected) else f"decided {wanted!r}, reference {expected!r}"
        return "failed", f"{what}, got {ours!r}"
    if equal(wanted, expected):
        return "passed", ""
    return "decided otherwise", f"reference {expected!r}, decided {wanted!r}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run test vectors of the reference implementation.")
    parser.add_argument("file", type=Path, help="JSON list of {function, input, expected, note}")
    parser.add_argument("--verbose", action="store_true", help="also print the cases decided otherwise")
    options = parser.parse_args(arguments)
    try:
        cases = json.loads(options.file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        parser.error(f"{options.file} cannot be read: {error}")
    counts: Counter[str] = Counter()
    for number, case in enumerate(cases):
        outcome, detail = check(case)
        counts[outcome] += 1
        if outcome == "failed" or (options.verbose and detail):
            shown = json.dumps(case["input"], ensure_ascii=False)
            print(f"{outcome.upper()} case {number}: {case['function']}({shown[:500]})\n    {detail}")
    print(f"{counts['passed']} passed, {counts['failed']} failed, {counts['decided otherwise']} decided otherwise")
    return int(counts["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
