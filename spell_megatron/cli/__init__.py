"""The `spell` command. Each command has a file of its own; `errors.ExitStatus` lists the exit statuses."""

# torch, Megatron, vLLM and transformers are imported inside the commands: `spell --help` answers at once.

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from contextlib import suppress

from spell_megatron import __version__
from spell_megatron.cli import (
    ask,
    completion,
    convert,
    engines,
    evaluate,
    init,
    launch,
    metrics,
    plan,
    prepare,
    report,
    status,
    stop,
    train,
)
from spell_megatron.cli.arguments import files_of
from spell_megatron.errors import ExitStatus, ProcessLost, UserError, explain
from spell_megatron.monitoring.unread import end_unread
from spell_megatron.ranks import launched_processes, rank

COMMANDS = (
    init,
    train,
    launch,
    engines,
    status,
    stop,
    evaluate,
    ask,
    plan,
    prepare,
    convert,
    report,
    metrics,
    completion,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (without the program's name) and return the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    with suppress(AttributeError):  # texts and names of files that the terminal's encoding lacks are still told
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    parser = command_parser()
    try:
        try:
            arguments, rest = parser.parse_known_args(argv)
            if rest and not arguments.takes_settings:
                parser.error(f"unknown argument {rest[0]!r}; see `spell {argv[0]} --help`")
            if arguments.takes_settings:
                files, rest = files_of(rest)
                arguments.config = [*(arguments.config or ()), *files] or None
                if arguments.needs_config and not arguments.config:
                    raise UserError("The settings of a run are missing. Give their YAML file: --config FILE.")
            arguments.rest, arguments.argv = rest, argv
            return arguments.command(arguments)
        finally:
            _flush()
    except UserError as error:
        return _tell(error)
    except BrokenPipeError:
        if not end_unread():
            raise
        return ExitStatus.CLOSED_PIPE
    except ProcessLost as error:
        _tell(error)
        return ExitStatus.DEFECT
    except OSError as error:
        explanation = explain(error)
        if explanation is None:
            raise
        go_on = {
            "train": " The run goes on from its last checkpoint with --resume.",
            "evaluate": " What is done stays.",
        }
        place = f"{error.filename}: " if error.filename else ""
        return _tell(f"{place}{explanation}.{go_on.get(argv[0], '')}")
    except KeyboardInterrupt:
        print("spell: interrupted", file=sys.stderr)
        return ExitStatus.INTERRUPTED


def _flush() -> None:
    """Write what was printed, while a full disk can still be told. That nobody reads it any more is no fault."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        if not end_unread():
            raise


def _tell(message: object) -> ExitStatus:
    """Print the message of an error that the user can correct."""
    process = f" (process {rank()})" if (launched_processes() or 1) > 1 else ""
    try:
        print(f"spell{process}: {message}", file=sys.stderr)
    except BrokenPipeError:
        end_unread()
    return ExitStatus.USER_ERROR


def command_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="spell",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="SPELL: a language model improves its long-context reasoning by self-play on documents.\n"
        "Megatron-Core trains it, vLLM generates.",
        epilog=textwrap.dedent(
            """\
            A first run on documents of your own:
              spell prepare FOLDER --out corpus.parquet
              spell init run.yaml --model MODEL_FOLDER --documents corpus.parquet
              spell train run.yaml --dry-run
              spell train run.yaml

            `spell COMMAND --help` explains a command."""
        ),
    )
    parser.add_argument("--version", action="version", version=f"spell_megatron {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    return parser
