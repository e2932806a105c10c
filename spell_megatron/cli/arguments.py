"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spell_megatron.config.faults import Fault
from spell_megatron.config.help import Setting, all_settings
from spell_megatron.config.reading import Reading, read_config
from spell_megatron.config.schema import Config
from spell_megatron.config.section import Section
from spell_megatron.errors import UserError

RUN_SETTINGS = "settings, for the YAML file and as --SECTION.KEY=VALUE (values are YAML):"


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    help: str,
    description: str,
    usage: str | None = None,
    epilog: str | None = None,
    takes_settings: bool = False,
) -> argparse.ArgumentParser:
    """The parser of a command.

    Args:
        commands: argparse's subparsers.
        run: does the work and returns the exit status. Its argument also holds `rest` (see `takes_settings`) and
            `argv` (the words of the whole command line).
        takes_settings: put arguments that the parser does not know into `rest`, for `overrides_of`; else they are
            errors.
    """
    parser = commands.add_parser(
        name,
        help=help,
        description=textwrap.fill(description, 98),
        usage=usage,
        epilog=epilog,
        allow_abbrev=False,
        add_help=not takes_settings,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if takes_settings:
        parser.add_argument(
            "-h",
            "--help",
            nargs="?",
            action=_Help,
            metavar="SECTION",
            help="show this; or explain the settings of one section (selfplay.gate), or whose names hold a word",
        )
    parser.set_defaults(command=run, takes_settings=takes_settings)
    return parser


class _Help(argparse.Action):
    """`--help [SECTION]`."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if values is None:
            parser.print_help()
        else:
            print(section_help(values))
        parser.exit()


def section_help(word: str) -> str:
    """The settings of a section, or those whose name holds a word.

    Raises:
        UserError: there are none.
    """
    word = word.lstrip("-").rstrip(".")
    settings = list(all_settings())
    found = [s for s in settings if f"{s.key}.".startswith(f"{word}.")] or [s for s in settings if word in s.key]
    if not found:
        sections = dict.fromkeys(s.key.rpartition(".")[0] for s in settings)
        raise UserError(f"No setting's name holds {word!r}. Sections are {', '.join(sections)}.")
    return "\n".join(line for setting in found for line in _explained(setting)).strip("\n")


def add_config(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """`--config FILE`, once or several times, or FILE alone (see `files_of`).

    required: a command line without one is refused.
    """
    parser.add_argument(
        "--config",
        type=Path,
        action="append",
        metavar="FILE",
        help="YAML file of the run's settings; of several, later ones override earlier ones. --config may be left out "
        "before a name that ends in .yaml",
    )
    parser.set_defaults(needs_config=required)


def loose_words(rest: Sequence[str]) -> tuple[list[str], list[str]]:
    """Among words that no argument takes: those that stand alone, and the settings with their values.

    A word behind a setting without `=` is the setting's value.
    """
    loose: list[str] = []
    settings: list[str] = []
    for word in rest:
        is_value = settings and settings[-1].startswith("--") and "=" not in settings[-1]
        (settings if word.startswith("--") or is_value else loose).append(word)
    return loose, settings


def files_of(rest: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Among words that no argument takes: files of settings that stand alone, and the others."""
    files = [word for word in loose_words(rest)[0] if word.endswith((".yaml", ".yml")) and "=" not in word]
    return [Path(word) for word in files], [word for word in rest if word not in files]


def add_resume(parser: argparse.ArgumentParser) -> None:
    """`--resume [RUN_FOLDER[@STEP]]`."""
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN_FOLDER[@STEP]",
        help="continue a run from its newest checkpoint, with its own settings unless --config is given; "
        "without RUN_FOLDER: the run that --config names; with @STEP: begin a new run, in a folder of its own, with "
        "this checkpoint of the old one",
    )


@dataclass(frozen=True)
class Resume:
    """What `--resume` names."""

    folder: Path
    """Of a run."""
    step: int | None = None
    """A new run begins with this step of it; None: it goes on itself, from its newest checkpoint."""

    @classmethod
    def of(cls, text: str) -> Resume:
        """From RUN_FOLDER or RUN_FOLDER@STEP."""
        run, _, step = text.rpartition("@")
        if run and step.isdecimal() and not Path(text).is_dir():
            return cls(Path(run), int(step))
        return cls(Path(text))


def read_run(
    command: str, arguments: argparse.Namespace, overrides: Sequence[str]
) -> tuple[Reading[Config], Resume | None]:
    """The settings that --config and --resume name, and the run to be continued, if any.

    Raises:
        UserError: they name none, or a file cannot be read at all.
    """
    if arguments.resume:
        resume = Resume.of(arguments.resume)
        return _read_resumed(resume, arguments.config, overrides), resume
    if arguments.config is None:
        raise UserError(
            "A run needs settings. Give a YAML file with --config, or a run to continue with --resume "
            f"RUN_FOLDER. `spell {command} --help` lists all settings."
        )
    reading = read_config(arguments.config, overrides)
    run = reading.settings.run
    return reading, None if arguments.resume is None else Resume(run.output_dir / run.name)


def _read_resumed(resume: Resume, files: list[Path] | None, overrides: Sequence[str]) -> Reading[Config]:
    """The settings of a run that `--resume RUN_FOLDER[@STEP]` continues or begins with."""
    own = resume.folder / "config.yaml"
    if not own.is_file() and not files:
        if (resume.folder / "meta.json").is_file():
            its_run, step = resume.folder.parents[1], resume.folder.name.removeprefix("step_")
            raise UserError(
                f"{resume.folder} is a checkpoint, not a run. Continue the run with --resume {its_run}, or begin a new "
                f"run with this checkpoint: --resume {its_run}@{int(step) if step.isdecimal() else 'STEP'}."
            )
        raise UserError(
            f"There is no run to resume in {resume.folder}: it has no config.yaml. Give the folder of a run, or "
            "the YAML file with --config."
        )
    location = resume.folder.absolute()
    reading = read_config(files or own, overrides)
    run = reading.settings.run
    named = {key for key in ("run.name", "run.output_dir") if key in reading.overridden}
    if resume.step is not None:
        if not files and "run.output_dir" not in named:
            run.output_dir = location.parent
        if not files and "run.name" not in named:
            run.name = f"{location.name}-from-{resume.step}"
        return reading
    elsewhere = (run.output_dir / run.name).absolute() != location
    if elsewhere and named:
        reading.faults.append(
            Fault.of(
                " ".join(sorted(named)),
                f"--resume {resume.folder} goes on in that folder. To begin another run with one of its checkpoints, "
                f"say --resume {resume.folder}@STEP",
            )
        )
    run.output_dir, run.name = location.parent, location.name
    return reading


def add_rendezvous(parser: argparse.ArgumentParser, required: bool) -> None:
    """`--rendezvous FOLDER` and `--engine-nodes N`, for processes of a Slurm job."""
    parser.add_argument(
        "--rendezvous",
        type=Path,
        required=required,
        metavar="FOLDER",
        help="folder of the shared filesystem by which the processes of a Slurm job find each other",
    )
    parser.add_argument(
        "--engine-nodes",
        type=int,
        default=0,
        metavar="N",
        help="number of `spell engines` processes that publish their engines in the rendezvous",
    )


def add_run_folder(parser: argparse.ArgumentParser) -> None:
    """The folder of a run."""
    parser.add_argument("run", type=Path, metavar="RUN_FOLDER", help="run.output_dir/run.name")


def add_number(add: Callable[..., Any], flag: str, default: int | None, meaning: str, minimum: int = 1) -> None:
    """`--flag N`, a whole number of `minimum` or more. `add` is a parser's or a group's `add_argument`."""

    def number(text: str) -> int:
        if not text.lstrip("-").isdecimal() or int(text) < minimum:
            raise UserError(f"{flag} is {text}; it must be a whole number of {minimum} or more.")
        return int(text)

    shown = "" if default is None else f" (default {default})"
    add(flag, type=number, default=default, metavar="N", help=meaning + shown)


def settings_help(schema: type[Section] = Config, title: str = RUN_SETTINGS) -> str:
    """All settings of a schema with type, default and meaning, for the end of a help text."""
    return "\n".join([title, *(line for setting in all_settings(schema) for line in _explained(setting))])


def _explained(setting: Setting) -> list[str]:
    """A setting with type, default and meaning in lines, below an empty one."""
    default = "required" if setting.default is None else f"default {setting.default}"
    meaning = textwrap.wrap(setting.help, 98, initial_indent="      ", subsequent_indent="      ")
    return ["", f"  {setting.key}  ({setting.type}; {default})", *meaning]


def overrides_of(rest: Sequence[str]) -> list[str]:
    """`--a.b=c` and `--a.b c` as `a.b=c`; a switch without a value stays as it is, to be reported."""
    overrides: list[str] = []
    for word in rest:
        if word.startswith("--"):
            overrides.append(word.removeprefix("--"))
        elif overrides and "=" not in overrides[-1]:
            overrides[-1] += f"={word}"
        else:
            hint = f" To continue the run in that folder, say --resume {word}." if _is_run(word) else ""
            raise UserError(f"Unexpected argument {word!r}. Settings are written --SECTION.KEY=VALUE.{hint}")
    return overrides


def _is_run(word: str) -> bool:
    return (Path(word) / "config.yaml").is_file()


def quiet_libraries() -> None:
    """Hide the warnings of libraries about themselves, which bury the messages of a run."""
    from warnings import filterwarnings

    for module in ("megatron", "torch", "transformers"):
        filterwarnings("ignore", module=rf"{module}\.")
