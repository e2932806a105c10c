"""Every command of README, CONTRIBUTING, docs and examples is run as it is written, or named with the reason why not.

The reasons are in `commands_not_run.py`. Sizes are smaller in two places: in the reader's examples/quickstart.yaml, and
behind the README's `spell init run.yaml`.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from commands_not_run import NOT_RUN, reason, to_run
from hub_server import serve_hub
from page_commands import PAGES, Block, Command, blocks, commands, files, fragment, mentions, name_of
from page_reader import Reader
from small_run import ROOT, SMALL

from spell_megatron.cli import command_parser
from spell_megatron.cli.arguments import overrides_of
from spell_megatron.config.reading import read_section
from spell_megatron.config.schema import Config

QUICK = ("CONTRIBUTING.md", "docs/documents.md", "docs/extending.md")
"""Pages whose commands take seconds. Each is read in a clone of its own."""

LONG = {
    "README.md": (),
    "docs/evaluation.md": (),
    "docs/running.md": ("README.md",),
    "examples/quickstart/README.md": ("README.md",),
    "docs/report.md": ("README.md", "docs/evaluation.md", "examples/quickstart/README.md"),
    "examples/extend/README.md": (),
    "docs/parallel.md": (),
    "docs/long_context.md": (),
    "docs/recipes.md": (),
}
"""Pages whose commands train, start engines or plan at length, each with those whose runs and files it uses. One reader
reads them all."""

BY_OTHER_TESTS = {"docs/cluster.md": "tests/jobs/test_cluster_page.py", "docs/first_run.md": "tests/test_first_run.py"}
"""Pages that need a cluster, or another model in the place of theirs."""

REPEATING = {"examples/documents/README.md": "docs/documents.md"}
"""Pages all of whose commands another page has too."""

COPIES = {"runs/seed0": "runs/quickstart", "runs/recipe1": "runs/shuffled"}
"""Runs of examples/quickstart/README.md that are not made, and those that stand for them."""

PRINTED = ("spell prepare examples/documents", "spell evaluate --answers")
"""Commands that print on every machine what their page shows."""

NO_COMMANDS = {
    "README.md": ["held-out after step 0:"],
    "docs/algorithm.md": ["loss = ", "c · Σ_microbatches"],
    "docs/architecture.md": ["documents\n", "cli\n"],
    "docs/documents.md": [],
    "docs/evaluation.md": ['{"id": "7", "task"'],
    "docs/long_context.md": ['"max_position_embeddings"'],
    "docs/report.md": ["report.html: 0.2 MB"],
    "examples/evidence/rich/README.md": ["Nansiniad appeared"],
}
"""Blocks of code that are no commands, by their beginnings."""


def test_every_command_is_run_or_named_with_the_reason():
    """A page with commands that are to be run is one of those that a test reads."""
    read = [*QUICK, *LONG, *BY_OTHER_TESTS, *REPEATING]
    assert len(read) == len(set(read))
    left = {name_of(page): to_run(name_of(page)) for page in PAGES}
    assert {page for page, found in left.items() if found} == set(read)
    for page, other in REPEATING.items():
        assert {command.text for command in left[page]} <= {command.text for command in left[other]}


def test_what_is_named_exists():
    for page, named in NOT_RUN.items():
        texts = [command.text for command in commands(ROOT / page)]
        assert [start for start in named if not any(text.startswith(start) for text in texts)] == [], page


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_block_of_code_is_commands_or_a_text_that_is_known(page):
    texts = [block.text for block in blocks(page) if block.text]
    known = NO_COMMANDS.get(name_of(page), [])
    assert len(texts) == len(known) and all(map(str.startswith, texts, known)), texts


def test_commands_are_told_from_what_they_print(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "Text, `spell report runs/a`.\n\n"
        "    # run.yaml\n    model: {path: x}\n\n"
        "    $ spell train run.yaml \\\n        --dry-run && spell status runs/a > told\n    done after 1 step\n"
        "    $ OMP_NUM_THREADS=1 vllm serve x\n\n"
        "More.\n\n    tools/a.py --help\n    spell evaluate … --chat\n\nAnd.\n\n    loss = 1\n"
    )
    one, two, three = blocks(page)
    assert one.files == {"run.yaml": "model: {path: x}\n"}
    assert one.commands == (
        Command("spell train run.yaml --dry-run && spell status runs/a > told", "done after 1 step"),
        Command("OMP_NUM_THREADS=1 vllm serve x", stays=True),
    )
    assert one.commands[0].spell == [["train", "run.yaml", "--dry-run"], ["status", "runs/a"]]
    assert [command.text for command in two.commands] == ["tools/a.py --help", "spell evaluate … --chat"]
    assert three == Block((), {}, "loss = 1") and mentions(page) == ["spell report runs/a"]


def read(reader: Reader, page: str) -> None:
    """Run a page's commands one after the other."""
    for name, text in files(ROOT / page).items():
        if not name.startswith("my_package"):  # a part of examples/extend, in short
            (reader.folder / name).write_text(text, encoding="utf-8")
    for command in to_run(page):
        printed = reader.run(command)
        if command.text.startswith(PRINTED):
            shown = [line for line in command.shows.splitlines() if line != "…"]
            assert [line for line in shown if line not in printed.splitlines()] == [], command.text
    reader.end()


@pytest.mark.processes
@pytest.mark.parametrize("page", QUICK)
def test_a_page_of_quick_commands(page, tmp_path):
    if page == "docs/documents.md" and not Path("/usr/share/common-licenses").exists():
        pytest.skip("no Debian")
    with Reader(tmp_path) as reader:
        read(reader, page)


@pytest.fixture(scope="module")
def follow(tmp_path_factory) -> Iterator[Callable[[str], Path]]:
    """follow(page): reads a page of LONG, and before it those that it needs, once; returns the reader's folder.

    The reader's hub has Qwen3-0.6B, without weights and with the quick start's tokenizer.
    """
    folder = tmp_path_factory.mktemp("reader")
    done = set()

    def follow(page: str) -> Path:
        if page not in done:
            done.add(page)
            for needed in LONG[page]:
                follow(needed)
            for copy, made in COPIES.items():
                if (folder / made).exists() and not (folder / copy).exists():
                    shutil.copytree(folder / made, folder / copy)
            read(reader, page)
        return folder

    model = (ROOT / "examples" / "models" / "qwen3_0.6b" / "config.json").read_bytes()
    with serve_hub() as hub:
        hub.add_folder("Qwen/Qwen3-0.6B", ROOT / "examples" / "quickstart" / "policy", {"config.json": model})
        small = [*(word for word in SMALL if not word.startswith("--checkpoint")), "--selfplay.groups=2"]
        more = {"spell init run.yaml --model examples/quickstart/policy": small}
        with Reader(folder, hub.environment(folder / "hub"), small, more) as reader:
            yield follow


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.parametrize("page", LONG)
def test_a_page(page, follow):
    follow(page)


def test_eight_commands_of_the_readme_are_enough():
    """From documents to a trained step, an evaluation and a report."""
    words = [command.text.split()[1] for command in to_run("README.md")]
    way = words[words.index("prepare") :]
    assert way == ["prepare", "init", "train", "train", "evaluate", "report"]


@pytest.mark.slow
@pytest.mark.engine
def test_what_the_readme_leads_to(follow):
    folder = follow("README.md")
    run = folder / "runs" / "run"
    assert "step 2/2" in (run / "logs" / "train.log").read_text() and (run / "checkpoints" / "step_000002").is_dir()
    assert (folder / "report.html").stat().st_size > 100_000 and (folder / "evaluation" / "scores.md").is_file()
    log = (folder / "runs" / "quickstart" / "metrics.jsonl").read_text().splitlines()
    assert 10 in [json.loads(line)["step"] for line in log]  # docs/running.md makes two more


@pytest.mark.slow
@pytest.mark.engine
def test_engines_by_themselves_make_no_folder_of_a_run(follow):
    runs = follow("docs/parallel.md") / "runs"
    assert [path.name for path in (runs / "quickstart-engines").iterdir()] == ["engine-0.log"]
    assert not (runs / "quickstart").exists() or (runs / "quickstart" / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.engine
def test_a_step_with_code_of_ones_own(follow, monkeypatch):
    """The rewards of its questions are those of examples/extend, and its rule check judged the answers."""
    run = follow("examples/extend/README.md") / "runs" / "extend"
    monkeypatch.syspath_prepend(ROOT / "examples" / "extend")
    from my_package.rewards import short_questions
    from my_package.rules import score

    rows = [json.loads(line) for line in (run / "rollouts" / "step_000001.jsonl").read_text().splitlines()]
    assert "names" in {row["task"] for row in rows}
    answers = [row for row in rows if row["role"] == "responder" and row["task"] != "names"]
    told = [row for row in answers if row["prediction"] is not None]
    assert told and all(row["rule_score"] == score(row["task"], row["prediction"], row["reference"]) for row in told)
    asked = [row for row in rows if (row["role"], row["outcome"]) == ("questioner", "mixed")]
    assert len(asked) == 2
    for row in asked:
        mean = np.mean(
            [answer["reward"] for answer in rows if (answer["uid"], answer["role"]) == (row["uid"], "responder")]
        )
        assert row["reward"] == pytest.approx(short_questions(mean, row["prediction"], row["reference"]))


@functools.cache
def options_of(command: str) -> set[str]:
    """The options of a command of `spell`, with those of its own commands."""
    parsers = [next(iter(command_parser()._subparsers._group_actions)).choices.get(command)]
    found: set[str] = set()
    while parsers:
        parser = parsers.pop()
        assert parser is not None, f"spell has no command {command}"
        found |= parser._option_string_actions.keys()
        own = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        parsers += [one for choices in own for one in choices.values()]
    return found


NOT_EXECUTED = {
    f"{name_of(page)}: {words[:70]}": words
    for page in PAGES
    for words in (
        *(c.text for b in blocks(page) for c in b.commands if fragment(c) or reason(name_of(page), c)),
        *mentions(page),
    )
}


@pytest.mark.parametrize("text", NOT_EXECUTED.values(), ids=NOT_EXECUTED)
def test_what_is_not_run_is_spelled_as_the_programs_know_it(text):
    """Options and settings of `spell`, targets of make, files of Python, names of modules."""
    program, *words = re.sub(r"^(?:[A-Z_]+=\S+ )*", "", text).split()
    if program == "make":
        assert re.search(rf"^{re.escape(words[0])}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    if program == "python" and not words[0].startswith("-"):
        assert (ROOT / words[0]).is_file() or words[0] in ("dump_docstrings.py",)
    for spell in Command(text.replace("…", "")).spell:
        options = options_of(spell[0])
        settings = [word for word in spell[1:] if re.match(r"--\w+\.\w", word)]
        known = [word for word in spell[1:] if word.startswith("--") and word not in settings]
        assert [word for word in known if word.partition("=")[0] not in options] == []
        complete = [word for word in settings if "=" in word]
        reading = read_section(Config, None, overrides_of(complete))
        assert not [fault for fault in reading.faults if not fault.message.startswith("is missing")]
