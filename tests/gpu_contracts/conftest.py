"""Where the Python files are of packages that need a GPU."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FETCHED = ROOT / ".venv-contracts"


@pytest.fixture(scope="session")
def contract_sources():
    """contract_sources(package) -> its folder for `sys.path`; skips the test if it was not fetched."""

    def folder(package: str) -> Path:
        if not (FETCHED / package / "requirement").exists():
            pytest.skip(f"no Python files of {package}: run `make environment-contracts`")
        return FETCHED / package

    return folder


@pytest.fixture(scope="module", params=["for CPUs", pytest.param("for CUDA", marks=pytest.mark.contracts)])
def with_vllm(request) -> dict[str, str]:
    """The environment of a process that imports vLLM: the installed build, or the Python files of that for CUDA."""
    pytest.importorskip("vllm", reason="this environment has no vLLM")
    path = [str(ROOT), *([] if find_spec("torchvision") else [str(ROOT / "spell_megatron" / "rollout" / "stand_ins")])]
    if request.param == "for CUDA":
        path.insert(0, str(request.getfixturevalue("contract_sources")("vllm")))
    return os.environ | {"PYTHONPATH": os.pathsep.join(path), "CUDA_VISIBLE_DEVICES": ""}
