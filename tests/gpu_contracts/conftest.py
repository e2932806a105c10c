"""Where the Python files are of packages that need a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

FETCHED = Path(__file__).parents[2] / ".venv-contracts"


@pytest.fixture(scope="session")
def contract_sources():
    """contract_sources(package) -> its folder for `sys.path`; skips the test if it was not fetched."""

    def folder(package: str) -> Path:
        if not (FETCHED / package / "requirement").exists():
            pytest.skip(f"no Python files of {package}: run `make environment-contracts`")
        return FETCHED / package

    return folder
