"""Ranks wait for each other for longer than their default process group allows."""

from __future__ import annotations

from pathlib import Path

from torchrun import torchrun


def test_messages_have_no_limit_of_minutes():
    output = torchrun(2, Path(__file__).with_name("waiting_worker.py"), timeout=120)
    assert output.count("RESULT update ['part 0', 'part 1']") == 2
