"""One process against two data-parallel processes, and what two processes save and resume."""

from pathlib import Path

import pytest
import torch
from torchrun import torchrun
from trainer_cases import difference, make_config, make_policy, make_rows, make_trainer, weights

from spell_megatron.checkpoint.folder import latest
from spell_megatron.checkpoint.restore import load

pytestmark = pytest.mark.usefixtures("process_group")
SEEDS = range(2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs the worker once; the tests read what it wrote."""
    folder = tmp_path_factory.mktemp("parallel")
    for family in ("qwen3", "qwen3_moe"):
        make_policy(family, folder / family)
    torchrun(2, Path(__file__).with_name("trainer_worker.py"), folder, timeout=900)
    return folder


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_two_processes_equal_one(family, distributed, folder):
    """Loss, gradient norm and weights after each of two updates: 1e-5 relative."""
    result = torch.load(folder / f"{family}_{distributed}.pt")
    trainer = make_trainer(make_config(folder / family))
    for seed, parallel in zip(SEEDS, result["metrics"]):
        metrics = trainer.update(make_rows(seed))
        for name in ("loss", "grad_norm", "entropy", "mismatch_abs", "mismatch_kl", "mismatch_max_ratio"):
            assert parallel[name] == pytest.approx(metrics[name], rel=1e-5), name
        for name in ("response_tokens", "tokens_unshared", "lr"):
            assert parallel[name] == metrics[name]
    error = difference(result["weights"], weights(trainer))
    print(f"{family}, distributed optimizer {distributed}: weights {error:.1e}")
    assert error <= 1e-5
    assert result["same_metrics"]


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_resumed_run_is_identical(family, distributed, folder):
    """Three updates after resuming against the same three without: bit for bit."""
    result = torch.load(folder / f"{family}_{distributed}.pt")
    timing = {"seconds", "tokens_per_second"}
    for a, b in zip(result["next"], result["resumed"]):
        assert {k: v for k, v in a.items() if k not in timing} == {k: v for k, v in b.items() if k not in timing}
    assert difference(result["resumed_weights"], result["next_weights"]) == 0
    assert result["state"] == {"rank": 0}


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_one_process_resumes_what_two_saved(family, distributed, folder):
    """The next update on one process: 1e-5 relative in loss and weights."""
    result = torch.load(folder / f"{family}_{distributed}.pt")
    trainer = make_trainer(make_config(folder / family, training__optimizer__distributed=distributed))
    load(latest(folder / f"run_{family}_{distributed}"), trainer)
    assert difference(weights(trainer), result["weights"]) == 0
    for seed, expected in zip((2, 3, 4), result["next"]):
        metrics = trainer.update(make_rows(seed))
        assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert difference(weights(trainer), result["next_weights"]) <= 1e-5


def test_a_rank_without_work_changes_nothing(folder):
    result = torch.load(folder / "one_row.pt")
    trainer = make_trainer(make_config(folder / "qwen3_moe"))
    metrics = trainer.update(make_rows()[:1])
    assert result["metrics"]["loss"] == pytest.approx(metrics["loss"], rel=1e-5)
    assert difference(result["weights"], weights(trainer)) <= 1e-5
