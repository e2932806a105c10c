"""Trainer and engines on the same GPUs: what is where, and when, on all ranks; no fault of an engine loses anything."""

from __future__ import annotations

from pathlib import Path

from torchrun import torchrun
from trainer_cases import make_policy


def test_each_has_the_gpus_in_its_turn(tmp_path):
    """Two ranks whose engines refuse to sleep, to wake or to take weights, end in a rollout, or end with the job. All
    updates are those of a trainer that never leaves, bit for bit."""
    make_policy("qwen3", tmp_path / "qwen3")
    torchrun(2, Path(__file__).with_name("turns_worker.py"), tmp_path / "qwen3", timeout=300)
