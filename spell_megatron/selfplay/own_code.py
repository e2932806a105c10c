"""Code of the user's own, which settings name as MODULE:NAME (docs/extending.md)."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spell_megatron.errors import UserError


class OwnCodeError(UserError):
    """Code of the user's own failed, or returned what it must not, on one input."""


@dataclass(frozen=True)
class OwnFunction:
    """A function of the user's own.

    Attributes:
        setting: the setting that names it, such as `selfplay.rule`.
        name: what the setting says, and in an object the attribute: `my_package.rules:score`.
    """

    setting: str
    name: str
    function: Callable[..., Any]

    def __call__(self, *arguments: object) -> Any:
        """What the function returns.

        Raises:
            OwnCodeError: it raised an exception.
        """
        try:
            return self.function(*arguments)
        except (Exception, SystemExit) as error:
            raise OwnCodeError(
                f"{self._call(arguments)} raised {type(error).__name__}: {error}{_line_of(error)}. "
                "Correct the function: it must return a value for every input."
            ) from error

    def refuse(self, arguments: tuple[object, ...], value: object, expected: str) -> OwnCodeError:
        """The error that the function returned `value`, where something else was `expected`."""
        return OwnCodeError(f"{self._call(arguments)} returned {_short(value)}. It must return {expected}.")

    def _call(self, arguments: tuple[object, ...]) -> str:
        return f"{self.name}({', '.join(map(_short, arguments))}), of {self.setting},"


def own_function(setting: str, name: str, function: object, parameters: str) -> OwnFunction:
    """A function of the user's own, if it can be called with these parameters ("task, prediction").

    Raises:
        UserError: it cannot.
    """
    if not callable(function):
        raise UserError(
            f"{name} is not a function but {_short(function)}. {setting} needs a function of ({parameters})."
        )
    try:
        inspect.signature(function).bind(*parameters.split(", "))
    except TypeError:
        raise UserError(
            f"{name} takes {inspect.signature(function)}, but {setting} calls it with ({parameters}). Correct its "
            "parameters."
        ) from None
    except ValueError:  # a function in C that does not tell its parameters: the first call will
        pass
    return OwnFunction(setting, name, function)


def own_object(setting: str, name: str, folder: Path | None) -> Any:
    """What a setting names as MODULE:NAME. `folder` may hold the module, besides the places where Python looks.

    Names come from settings alone; no text of a model ever reaches this function.

    Raises:
        UserError: there is no such module or name, or the module cannot be imported.
    """
    module_name, colon, attribute = name.partition(":")
    if not colon or not all(part.isidentifier() for part in f"{module_name}.{attribute}".split(".")):
        raise UserError(f"{setting} is {name!r}. It must be MODULE:NAME, such as my_package.rules:score.")
    if folder is not None and str(folder) not in sys.path:
        sys.path.append(str(folder))  # last, so that nothing there hides an installed package
    module = _import(setting, module_name, folder)
    value = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            public = [known for known in dir(value) if not known.startswith("_")]
            close = difflib.get_close_matches(part, public, 1)
            hint = f"Did you mean {close[0]}?" if close else "Define it there, or correct the name."
            where = getattr(module, "__file__", None) or "a folder without __init__.py"
            raise UserError(f"{module_name} ({where}) has no {part}, which {setting} names. {hint}")
        value = getattr(value, part)
    return value


def _import(setting: str, module: str, folder: Path | None) -> Any:
    try:
        importlib.invalidate_caches()
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        if missing == "torch" and "torch" in sys.modules:  # as None
            raise UserError(
                f"{module}, which {setting} names, imports torch{_line_of(error)}, which the process of self-play does "
                "without. Use numpy instead."
            ) from error
        if module != missing and not module.startswith(f"{missing}."):
            raise UserError(
                f"{module}, which {setting} names, imports {missing}, which this Python does not have"
                f"{_line_of(error)}. Install it in the environment of the run."
            ) from error
        if "." in missing:
            remedy = f"Correct the name, or add the module to {missing.rpartition('.')[0]}."
        elif folder is None:
            remedy = f"Install it, or set selfplay.code to the folder that holds {missing}."
        else:
            remedy = f"It is neither installed nor in {folder} (selfplay.code). Correct one of the names."
        raise UserError(f"There is no module {missing}, which {setting} names. {remedy}") from error
    except (Exception, SystemExit) as error:
        raise UserError(
            f"{module}, which {setting} names, cannot be imported: {type(error).__name__}: {error}{_line_of(error)}. "
            "Correct it."
        ) from error


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _line_of(error: BaseException) -> str:
    """Where an exception was raised, outside Python's own import system: " (rules.py, line 3)"; "" if not known."""
    place, trace = "", error.__traceback__
    while trace:
        file = trace.tb_frame.f_code.co_filename
        if not file.startswith("<") and file not in (__file__, importlib.__file__):
            place = f" ({Path(file).name}, line {trace.tb_lineno})"
        trace = trace.tb_next
    return place
