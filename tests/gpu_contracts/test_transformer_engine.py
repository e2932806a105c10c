"""Checkpoints move between plain layers and those of transformer-engine, weights and optimizer.

transformer-engine's own Python files run in a process of its own, with a stub of its compiled extension: its layers and
its optimizer are built, loaded and saved there, but compute nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_cases import CASES_OF_TRANSFORMER_ENGINE, OPTIMIZERS, config_of, describe, entries_of, same
from torch.distributed.checkpoint import FileSystemReader
from trainer_cases import initialise, make_policy, make_rows, make_trainer, save

from spell_megatron.checkpoint.folder import latest
from spell_megatron.checkpoint.restore import load
from spell_megatron.config.schema import ParallelConfig
from spell_megatron.training import backend
from spell_megatron.weights.convert import compare, hf_to_megatron

pytestmark = pytest.mark.contracts
TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(contract_sources, tmp_path_factory) -> Path:
    """Runs and conversions of plain layers, and what transformer-engine made of them."""
    path = [contract_sources("transformer-engine"), TESTS.parent, TESTS]
    folder = tmp_path_factory.mktemp("checkpoints")
    for case, (family, fields) in CASES_OF_TRANSFORMER_ENGINE.items():
        make_policy(family, folder / case, **fields)
        for optimizer in OPTIMIZERS:
            config = config_of(folder / case, optimizer)
            initialise(config)
            trainer = make_trainer(config)
            for seed in (0, 1):
                trainer.update(make_rows(seed))
            save(folder / f"{case}_{optimizer}", 2, trainer, config, {})
            backend.shutdown()
        hf_to_megatron(folder / case, folder / f"{case}_megatron", ParallelConfig(tensor=2))
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("transformer_engine_worker.py"), folder],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return folder


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("case", CASES_OF_TRANSFORMER_ENGINE)
def test_weights_and_optimizer_go_there_and_back(case, optimizer, folder):
    """There, transformer-engine's trainer holds them bit by bit. Back, the next updates are those of a run that never
    left the plain layers."""
    config = config_of(folder / case, optimizer)
    initialise(config)
    try:
        stayed, returned = make_trainer(config), make_trainer(config)
        load(latest(folder / f"{case}_{optimizer}"), stayed)
        same(torch.load(folder / f"{case}_{optimizer}_entries.pt"), entries_of(stayed))
        load(latest(folder / f"{case}_{optimizer}_te"), returned)
        same(entries_of(returned), entries_of(stayed))
        for seed in (2, 3):
            one, two = (trainer.update(make_rows(seed)) for trainer in (stayed, returned))
            assert (one["loss"], one["grad_norm"]) == (two["loss"], two["grad_norm"])
        same(entries_of(returned), entries_of(stayed))
    finally:
        backend.shutdown()


@pytest.mark.parametrize("case", CASES_OF_TRANSFORMER_ENGINE)
def test_names_shapes_and_stored_pieces_are_the_same(case, folder):
    plain, theirs = describe(folder / case), torch.load(folder / f"{case}_te.pt")
    assert plain.keys() == theirs.keys()
    for rank in plain:
        assert plain[rank] == theirs[rank], rank


@pytest.mark.parametrize("case", CASES_OF_TRANSFORMER_ENGINE)
def test_conversions_are_the_same(case, folder):
    """What the worker has converted is read here; it has read what plain layers have converted."""
    plain, theirs = folder / f"{case}_megatron", folder / f"{case}_te_megatron"
    assert keys(plain) == keys(theirs)
    compare(theirs, folder / case)


def keys(folder: Path) -> set[str]:
    return set(FileSystemReader(str(folder)).read_metadata().state_dict_metadata)
