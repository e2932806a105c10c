"""A Slurm cluster, and `spell launch`, for the tests of this folder."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
from mini_slurm import MiniSlurm, missing

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MiniSlurm]:
    """A cluster of four nodes."""
    if reason := missing():
        pytest.skip(f"no Slurm: {reason}")
    with MiniSlurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def nemo_run() -> Callable[..., subprocess.CompletedProcess]:
    """nemo_run(*arguments, enter=(), **environment): a Python that has nemo-run; `enter`: words before the command."""
    python = ROOT / ".venv-slurm" / "bin" / "python"
    if not python.exists():
        if find_spec("nemo_run") is None:
            pytest.skip("no nemo-run: `make environment-slurm` installs it into .venv-slurm")
        python = Path(sys.executable)

    def run(*arguments: object, enter: Sequence[str] = (), **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*enter, python, *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
            capture_output=True,
            text=True,
        )

    return run


@pytest.fixture(scope="session")
def spell_launch(nemo_run) -> Callable[..., subprocess.CompletedProcess]:
    """spell_launch(*arguments, **environment): `spell launch`, in the environment that has nemo-run."""
    return functools.partial(nemo_run, "-m", "spell_megatron", "launch")
