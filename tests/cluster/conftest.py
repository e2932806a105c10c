"""A Slurm cluster for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mini_slurm import MiniSlurm, missing


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MiniSlurm]:
    """A cluster of three nodes."""
    if reason := missing():
        pytest.skip(f"no Slurm: {reason}")
    with MiniSlurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster
