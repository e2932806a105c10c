"""Output that cannot be shown: nobody reads it, the disk is full, or the terminal lacks the characters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

STATUS = {"state": "failed", "steps": 2, "host": "n1", "pid": 1, "job": None, "restart": 0, "time": 0.0}


def run_unread(*words: str | Path, stderr_too: bool = False) -> tuple[int, str]:
    """(exit status, what stands on standard error) of a command whose standard output nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "spell_megatron", *map(str, words)]
    errors = subprocess.STDOUT if stderr_too else subprocess.PIPE
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, stdout=writer, stderr=errors, text=True, timeout=120, env=buffered)
    os.close(writer)
    return done.returncode, done.stderr or ""


def test_help_that_nobody_reads():
    assert run_unread("train", "--help") == (0, "")


def test_a_long_answer_that_nobody_reads(tmp_path):
    """`spell train --dry-run` prints more than Python keeps back."""
    message = "x" * 100_000
    (tmp_path / "status.json").write_text(json.dumps(STATUS | {"message": message}))
    assert run_unread("status", tmp_path) == (141, "")


def test_the_exit_status_of_a_short_answer_stays(tmp_path):
    (tmp_path / "status.json").write_text(json.dumps(STATUS))
    assert run_unread("status", tmp_path) == (3, "")
    assert run_unread("status", tmp_path / "nowhere", stderr_too=True)[0] == 2


def test_names_that_the_terminal_cannot_show_are_told_all_the_same(tmp_path):
    run = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9 \xe6\xbc\xa2")
    os.mkdir(run)
    (Path(run) / "status.json").write_text(json.dumps(STATUS))
    command = [sys.executable, "-m", "spell_megatron", "status", run]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 3 and r"caf\udce9 \u6f22: failed" in done.stdout and not done.stderr


def test_a_full_disk_under_the_output_is_a_message(tmp_path):
    (tmp_path / "status.json").write_text(json.dumps(STATUS))
    command = [sys.executable, "-m", "spell_megatron", "status", tmp_path]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and "disk is full" in done.stderr
    assert "Traceback" not in done.stderr
