"""Markers that follow from what a test uses, so that `make test-fast` can leave out what takes long.

The tests themselves have the markers `slow`, `gpu`, `contracts` and `measures`, and `engine` where they start engines
without the fixture.
"""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FunctionType

import pytest

TESTS = str(Path(__file__).parent)
LONG = ("slow", "gpu", "contracts", "measures", "engine", "processes", "browser", "slurm")
"""Markers of the tests that `make test-fast` leaves out."""
OF_FIXTURES = {"engines_for": "engine", "chromium": "browser", "slurm": "slurm", "nemo_run": "slurm"}
PROCESSES = {"subprocess", "multiprocessing"}
"""Names in the code of a function that starts processes."""


def markers_of(test: pytest.Function) -> Iterator[str]:
    """`engine`, `browser` and `slurm` for the fixtures that it uses; `processes` if it or one of them starts any."""
    fixtures = test._fixtureinfo.name2fixturedefs
    yield from {OF_FIXTURES[name] for name in fixtures if name in OF_FIXTURES}
    if any(map(starts_processes, [test.function, *(definitions[-1].func for definitions in fixtures.values())])):
        yield "processes"


@functools.cache
def starts_processes(function: Callable) -> bool:
    """Whether a function, or one of the functions of these tests that it calls, names a module of PROCESSES."""
    if not isinstance(function, FunctionType):
        return False
    names = set(names_in(function.__code__))
    called = (function.__globals__.get(name) for name in names - {function.__name__})
    return bool(names & PROCESSES) or any(starts_processes(other) for other in called if of_these_tests(other))


def of_these_tests(value: object) -> bool:
    return isinstance(value, FunctionType) and value.__code__.co_filename.startswith(TESTS)


def names_in(code: CodeType) -> Iterator[str]:
    """The global names and attributes that code uses, with the functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)
