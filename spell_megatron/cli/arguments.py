"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path

from spell_megatron.config.help import all_settings
from spell_megatron.config.schema import Config, Section
from spell_megatron.errors import UserError


def add_config(parser: argparse.ArgumentParser, required: bool = False) -> None:
    parser.add_argument(
        "--config",
        type=Path,
        action="append",
        metavar="FILE",
        required=required,
        help="YAML file of the run's settings; of several, later ones override earlier ones",
    )


def add_rendezvous(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument(
        "--rendezvous",
        type=Path,
        required=required,
        metavar="FOLDER",
        help="folder of the shared filesystem by which the processes of a cluster's job find each other",
    )
    parser.add_argument(
        "--engine-nodes",
        type=int,
        default=0,
        metavar="N",
        help="number of `spell engines` processes that publish their engines in the rendezvous",
    )


RUN_SETTINGS = "settings, for the YAML file and as --SECTION.KEY=VALUE (values are YAML):"


def settings_help(schema: type[Section] = Config, title: str = RUN_SETTINGS) -> str:
    lines = [title]
    for setting in all_settings(schema):
        default = "required" if setting.default is None else f"default {setting.default}"
        lines += ["", f"  {setting.key}  ({setting.type}; {default})"]
        lines += textwrap.wrap(setting.help, 98, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def quiet_libraries() -> None:
    """Leave out the warnings of libraries about themselves, which hide what a run has to say."""
    from warnings import filterwarnings

    for module in ("megatron", "torch", "transformers"):
        filterwarnings("ignore", module=rf"{module}\.")


def overrides_of(rest: Sequence[str]) -> list[str]:
    """`--a.b=c` and `--a.b c` as `a.b=c`; a switch without a value stays as it is, to be reported."""
    overrides: list[str] = []
    for word in rest:
        if word.startswith("--"):
            overrides.append(word.removeprefix("--"))
        elif overrides and "=" not in overrides[-1]:
            overrides[-1] += f"={word}"
        else:
            raise UserError(f"Unexpected argument {word!r}. Settings are written --SECTION.KEY=VALUE.")
    return overrides


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 1 or more")
    return int(text)
