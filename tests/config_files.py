"""Files of settings, and what is wrong with them; a checkpoint as preflight reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from spell_megatron.config.reading import load_config
from spell_megatron.errors import UserError

MINIMAL = "model: {path: policy}\ndata: {documents: corpus.parquet}\n"


def faults_of(path: Path, *overrides: str) -> list[str]:
    """The lines of the error, without its first."""
    with pytest.raises(UserError) as error:
        load_config(path, overrides)
    first, *lines = str(error.value).splitlines()
    assert first.startswith(f"{len(lines)} fault") and str(path) in first
    return [line.strip() for line in lines]


def add_checkpoint(run: Path, policy: Path, number: int = 1) -> Path:
    """What preflight reads of a checkpoint of a run, which becomes its newest; returns its folder."""
    step = run / "checkpoints" / f"step_{number:06d}"
    step.mkdir(parents=True)
    (step / "meta.json").write_text(f'{{"step": {number}, "updates": {number}, "ranks": 1}}')
    (step / "state.json").write_text(f'{{"step": {number}}}')
    (step / "hf").symlink_to(policy)
    (step.parent / "latest").write_text(step.name)
    return step
