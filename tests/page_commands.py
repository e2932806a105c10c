"""The commands of README, CONTRIBUTING, docs and examples, read from their blocks of code."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from small_run import ROOT

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *(path for folder in ("docs", "slurm", "tools", "benchmarks") for path in sorted((ROOT / folder).glob("*.md"))),
    *(path for path in sorted((ROOT / "examples").rglob("README.md"))),
]
PROGRAM = re.compile(
    r"(?:[A-Z_]+=\S+ )*(?:spell|make|python3?(?:\.\d+)?|pip|uv|vllm|sbatch|srun|torchrun|docker|curl|git|cp|cat|export|"
    r"[\w.-]+/[\w./-]*\w)(?: |$)"
)
"""The beginning of a command: variables, then a program by its name or its path."""


@dataclass(frozen=True)
class Command:
    text: str
    """The command, in one line, without `&`."""
    shows: str = ""
    """What the page shows below it."""
    stays: bool = False
    """It serves until it is ended: it ends with `&`, or is `vllm serve`."""

    @property
    def spell(self) -> list[list[str]]:
        """The words behind `spell`, of each command of `spell` in it."""
        found = []
        for part in self.text.split(" && "):
            bare = re.sub(r"^(?:[A-Z_]+=\S+ )*(?:\.venv-slurm/bin/)?", "", part.partition(" > ")[0])
            if bare.startswith("spell "):
                found.append(shlex.split(bare)[1:])
        return found


@dataclass(frozen=True)
class Block:
    """Indented lines, with the blank lines between them. A line `# NAME.yaml` or `.py` begins a file's content."""

    commands: tuple[Command, ...]
    files: dict[str, str]
    text: str
    """The block if it is neither."""


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in re.findall(r"^    .*\n(?:(?:[ \t]*\n)*    .*\n)*", text, re.MULTILINE):
        block = re.sub(r"^    ", "", found, flags=re.MULTILINE)
        marked = "$ " if re.search(r"^\$ ", block, re.MULTILINE) else ""
        files, block = files_in(block)
        if marked or (block and PROGRAM.match(block)):
            yield Block(tuple(commands_in(block, marked)), files, "")
        else:
            yield Block((), files, block)


def files_in(block: str) -> tuple[dict[str, str], str]:
    """The files that a block shows, and what is left of it."""
    pattern = r"^# (\S+\.(?:py|yaml))\n((?:(?!\$ ).*\n)*)"
    found = {name: text.rstrip("\n") + "\n" for name, text in re.findall(pattern, block, re.MULTILINE)}
    return found, re.sub(pattern, "", block, flags=re.MULTILINE).strip("\n")


def commands_in(block: str, marked: str) -> Iterator[Command]:
    """The commands of a block: its lines, or those behind `$ `, between which is what they print."""
    lines = re.sub(r" *\\\n *", " ", block).splitlines()
    starts = [i for i, line in enumerate(lines) if line.strip() and line.startswith(marked)]
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        text = lines[start].removeprefix(marked)
        stays = text.endswith(" &") or bool(re.match(r"(?:[A-Z_]+=\S+ )*vllm serve ", text))
        yield Command(text.removesuffix(" &"), "\n".join(lines[start + 1 : end]), stays)


def fragment(command: Command) -> bool:
    """Whether the page leaves something out: `spell evaluate … --judge URL`."""
    return "…" in command.text


def commands(page: Path) -> list[Command]:
    return [command for block in blocks(page) for command in block.commands if not fragment(command)]


def files(page: Path) -> dict[str, str]:
    return {name: text for block in blocks(page) for name, text in block.files.items()}


def mentions(page: Path) -> list[str]:
    """Commands in the text of a page with more than a program's name and nothing left out: `spell train --dry-run`."""
    text = re.sub(r"^    .*\n", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]
    return [span for span in spans if re.match(r"(?:spell|make|python) [^A-Z]", span) and "…" not in span]
