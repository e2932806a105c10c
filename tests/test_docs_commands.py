"""The commands of README and docs as they are written.

`spell` takes their words, their settings exist, and so do the files that they name, or an earlier command makes them.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from small_run import ROOT

from spell_megatron.cli import command_parser
from spell_megatron.cli.arguments import files_of, loose_words, overrides_of
from spell_megatron.config.reading import read_section
from spell_megatron.config.schema import Config

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").rglob("README.md"))]

OF_THE_READER = {
    "documents.md": ("ultra_fineweb/", "evaluation_sets/", "models/", "docmath_train.parquet", "docmath_testmini.jsonl")
    + ("web/", "reports/", "articles/", "docstrings", "/usr/share/common-licenses"),
    "evaluation.md": ("downloads/", "answers.jsonl", "runs/my_run"),
    "first_run.md": ("my_documents", "heldout.jsonl"),
    "recipes.md": ("corpus.parquet",),
    "report.md": ("eval/",),
    "running.md": ("run.yaml",),
    "cluster.md": ("cluster.yaml",),
}
"""What a page's reader has by another page, or by data of their own, which the page says."""

RUNS = ("qwen3-0.6b", "quickstart", "seed0", "seed1", "shuffled", "attached", "evaluation")
"""Folders under runs/ that commands of README, docs and examples make."""

MAKES = ("--out", "-o", "--megatron", "--hf", "--run.name")


def commands(page: Path) -> list[list[str]]:
    """The words of each `spell` command in a page's blocks of code, continued lines joined."""
    blocks = re.findall(r"(?:^    .*\n)+", page.read_text(encoding="utf-8"), re.MULTILINE)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = []
    for line in lines:
        for part in line.removeprefix("$ ").split(" && "):
            bare = re.sub(r"^(?:[A-Z_]+=\S+ )*(?:\.venv-slurm/bin/)?", "", part.partition(" > ")[0]).removesuffix(" &")
            if bare.startswith("spell ") and "…" not in bare and "..." not in bare:
                found.append(shlex.split(bare)[1:])
    return found


ALL = [(page, words) for page in PAGES for words in commands(page)]


def test_there_are_commands():
    assert len(ALL) > 40


@pytest.mark.parametrize(
    ("page", "words"), ALL, ids=[f"{page.relative_to(ROOT).as_posix()}: {' '.join(words)[:60]}" for page, words in ALL]
)
def test_a_command_is_understood(page, words, capsys):
    if "--help" in words:
        return
    try:
        arguments, rest = command_parser().parse_known_args(words)
    except SystemExit:
        pytest.fail(capsys.readouterr().err)
    if not arguments.takes_settings:
        assert not rest
        return
    _, rest = files_of(rest)
    loose, settings = loose_words(rest)
    if words[0] == "launch":
        loose = [word for word in loose if not word.startswith(("cluster.", "run.executor."))]
    assert not loose or words[0] in ("ask", "init")
    reading = read_section(Config, None, overrides_of(settings))
    assert not [fault for fault in reading.faults if not fault.message.startswith("is missing")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_that_commands_name_are_there(page):
    made = set(OF_THE_READER.get(page.name, ())) | {f"runs/{name}" for name in RUNS}
    missing = []
    for words in commands(page):
        own = {words[i + 1] for i, word in enumerate(words[:-1]) if word in MAKES} | set(
            words[1:2] * (words[0] == "init")
        )
        own |= {f"runs/{Path(words[1]).stem}"} if words[0] == "init" else set()
        own |= {f"runs/{word.partition('=')[2]}" for word in words if word.startswith("--run.name=")}
        for word in words[1:]:
            path = word.rpartition("=")[2]
            looks_so = "/" in path or path.endswith((".parquet", ".jsonl", ".yaml", ".html"))
            if not looks_so or path in own or re.match(r"[a-z]+://|openai/|\[|[A-Z_]+$|[A-Z]\w+/\w", path):
                continue
            known = (ROOT / path.partition("@")[0]).exists() or any(path.startswith(name) for name in made)
            if not known:
                missing.append(f"{path} in: spell {' '.join(words)}")
        made |= own
    assert not missing, "\n".join(missing)
