"""Fixtures of the planner's tests."""

import pytest

from benchmarks.planner_memory import make_checkpoint


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planner")
    for kind in ("dense", "moe"):
        make_checkpoint(kind, folder / kind)
    return folder
