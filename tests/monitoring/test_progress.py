"""What a run prints: one line per step, bars on a terminal, sparse lines elsewhere."""

from __future__ import annotations

import io
import os

import pytest
from rich.console import Console

from spell_megatron.monitoring import progress as module
from spell_megatron.monitoring.glossary import LEGEND
from spell_megatron.monitoring.progress import PatientConsole, Progress, gain


@pytest.fixture
def plain():
    """(progress, what it wrote so far) without a terminal, with lines narrower than what is printed."""
    output = io.StringIO()
    return Progress(console=Console(file=output, width=40)), output.getvalue


def test_the_line_of_a_step_shows_the_metrics_that_it_has(plain):
    progress, written = plain
    progress.summary(
        3,
        16,
        {
            "selfplay/reward": 0.51249,
            "selfplay/rate/mixed": 0.4,
            "selfplay/rate/valid": 0.875,
            "train/tokens_unshared": 120034.0,
            "train/grad_norm": 0.8125,
            "time/rollout": 10.24,
            "train/seconds": 4.0,
            "time/push": 0.26,
            "unknown": 1,
            "validation/pass@1": 0.5372,
            "validation/doc_mc/pass@1": 0.1,
        },
    )
    assert written() == (
        f"{LEGEND}\nstep  3/16  reward 0.512  mixed 40%  valid 88%  tokens 120,034  grad norm 0.812  rollout 10.2s  "
        "update 4.0s  push 0.3s  pass@1 53.7%\n"
    )


def test_a_step_without_an_update_has_a_line_too(plain):
    progress, written = plain
    progress.summary(1, 2, {"selfplay/rate/mixed": 0.0, "train/empty": 1.0, "train/grad_norm": float("nan")})
    progress.summary(2, 2, {"train/skipped": 1.0, "train/grad_norm": float("inf")})
    assert written() == (
        f"{LEGEND}\nstep 1/2  mixed 0%  grad norm nan  no update: nothing to train on\n"
        "step 2/2  grad norm inf  no update: the gradient was not finite\n"
    )


def test_the_line_of_a_validation(plain):
    progress, written = plain
    measured = {"validation/pass@1": 0.5, "validation/pass@4": 0.75, "validation/standard_error": 0.0213}
    progress.validation(0, measured | {"validation/questions": 1200})
    assert written() == "held-out after step 0:  pass@1 50.0% (± 2.1%)  pass@4 75.0%  of 1,200 questions\n"


def test_without_a_terminal_only_long_stages_write(plain, monkeypatch):
    progress, written = plain
    with progress.stage("rollout", 48) as advance:
        advance(1)
    assert written() == ""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with progress.stage("rollout", 48) as advance, progress.stage("update") as count:
        for second in range(0, 101, 10):
            now[0] = float(second)
            advance(second // 10)
            count(second // 10, 20)
    lines = [line.strip() for line in written().splitlines()]
    stages = (("rollout", 48), ("update", 20))
    assert lines == [f"{stage} {n}/{total}" for n in (3, 6, 9) for stage, total in stages]


def test_a_terminal_shows_a_bar_that_leaves_nothing_behind():
    output = io.StringIO()
    progress = Progress(console=Console(file=output, force_terminal=True, width=100))
    with progress.stage("rollout", 48) as advance:
        advance(12)
        progress.line("[bold]not markup[/bold]")
    with progress.stage("starting engines"):
        pass
    text = output.getvalue()
    assert "rollout" in text and "12/48" in text and "[bold]not markup[/bold]" in text
    assert text.rstrip().endswith("\x1b[2K")  # the last bar was erased


def test_a_process_beside_the_first_shows_nothing(capfd):
    progress = Progress(enabled=False)
    with progress.stage("rollout", 3) as advance:
        advance(3)
    progress.summary(1, 2, {})
    assert capfd.readouterr() == ("", "")


def test_the_gain_compares_the_first_and_the_last_validation():
    before = {"validation/pass@1": 0.4, "validation/pass@4": 0.7, "other": 1.0}
    after = {"validation/pass@1": 0.5, "validation/pass@4": 0.75}
    assert gain(before, after) == "; held-out pass@1 40.0% -> 50.0%, pass@4 70.0% -> 75.0%"
    assert gain({}, after) == gain(before, {}) == ""


def test_work_goes_on_when_nobody_reads_its_progress():
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as unread:
        progress = Progress(console=PatientConsole(file=unread))
        progress.line("read")
        os.close(reader)
        for _ in range(3):
            with progress.stage("work", 2) as advance:
                progress.line("not read")
                advance(1)
        unread.write("nor this")
