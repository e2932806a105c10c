"""README's way from documents to a report, command by command as it is written there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import ROOT
from test_docs_commands import commands


def own_documents() -> list[list[str]]:
    """The commands of the section "Train on your own documents"."""
    every = commands(ROOT / "README.md")
    first = next(i for i, words in enumerate(every) if words[0] == "prepare")
    return every[first : first + 6]


def test_eight_commands_are_enough():
    names = [words[0] for words in own_documents()]
    assert names == ["prepare", "init", "train", "train", "evaluate", "report"] and len(names) <= 8


@pytest.mark.slow
@pytest.mark.engine
def test_from_documents_to_a_report(tmp_path):
    """In a folder that has the examples and nothing else: a trained step, an evaluation, a page."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for words in own_documents():
        command = [sys.executable, "-m", "spell_megatron", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    run = tmp_path / "runs" / "run"
    assert "step 2/2" in (run / "logs" / "train.log").read_text() and (run / "checkpoints" / "step_000002").is_dir()
    assert (
        Path(tmp_path, "report.html").stat().st_size > 100_000 and Path(tmp_path, "evaluation", "scores.md").is_file()
    )
