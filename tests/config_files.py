"""Files of settings, and what is wrong with them."""

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
