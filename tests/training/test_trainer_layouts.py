"""Updates in every layout, and after loading the checkpoint of another one, against one process."""

import json
from pathlib import Path

import pytest
import torch
from torchrun import torchrun
from trainer_cases import FAMILIES, difference, make_config, make_policy, make_rows, make_trainer, weights

from spell_megatron.training import backend


# With every row a microbatch of its own, all layouts cut the batch alike: the auxiliary loss depends on the cut.
BALANCED = {"training__moe_aux_loss": 1.0, "training__tokens_per_microbatch": 1}


def layout(
    policy: str, recompute: str = "none", distributed: bool = False, other: dict | None = None, **parallel: int
) -> tuple[str, dict]:
    return policy, {
        "training__recompute": recompute,
        "training__optimizer__distributed": distributed,
        "training__parallel": parallel,
        **(other or {}),
    }


ALL_GATHER = {"training__moe_dispatcher": "allgather"}
GROUPED = {"grouped_experts": True}
ON_TWO = {
    "tensor": layout("qwen3", tensor=2),
    "tensor-recompute": layout("llama3", "full", tensor=2),
    "pipeline-tied": layout("qwen2.5", pipeline=2),
    "pipeline-recompute": layout("qwen3", "selective", pipeline=2),
    "expert": layout("qwen3_moe", expert=2),
    "expert-recompute": layout("qwen3_moe", "full", True, expert=2),
    "expert-selective": layout("qwen3_moe", "selective", expert=2),
    "tensor-expert": layout("qwen3_moe", tensor=2, expert=2),
    "tensor-expert-tensor": layout("qwen3_moe", tensor=2, expert_tensor=2),
    "pipeline-moe": layout("qwen3_moe", pipeline=2),
    "tensor-odd": layout("odd", tensor=2),
    "pipeline-odd": layout("odd", pipeline=2),
    "context-odd": layout("odd", context=2),
    "context": layout("qwen3", "full", context=2),
    "context-expert": layout("qwen3_moe", context=2, expert=2),
    "expert-allgather": layout("qwen3_moe", "selective", other=ALL_GATHER, expert=2),
    "tensor-expert-grouped": layout("qwen3_moe", "selective", True, other=GROUPED, tensor=2, expert=2),
    "expert-balanced": layout("qwen3_moe", "full", other=BALANCED, expert=2),
    "tensor-expert-balanced": layout("qwen3_moe", other=BALANCED, tensor=2, expert=2),
}
ON_FOUR = {
    "tensor-data": layout("qwen3", distributed=True, tensor=2),
    "tensor-pipeline": layout("qwen2.5", tensor=2, pipeline=2),
    "pipeline-expert": layout("qwen3_moe", pipeline=2, expert=2),
    "tensor-pipeline-expert": layout("qwen3_moe", "full", tensor=2, pipeline=2, expert=2),
    "expert-data": layout("qwen3_moe", distributed=True, expert=2),
    "expert-everywhere": layout("qwen3_moe", tensor=2, expert=4),
    "context-replicated-heads": layout("qwen3", context=4),
    "tensor-context": layout("qwen3", distributed=True, tensor=2, context=2),
    "pipeline-context": layout("qwen2.5", pipeline=2, context=2),
    "context-data-expert": layout("qwen3_moe", distributed=True, context=2, expert=2),
    "expert-tensor-data": layout("qwen3_moe", tensor=2, expert_tensor=2, expert=2),
    "expert-tensor-grouped": layout("qwen3_moe", other=GROUPED, tensor=2, expert_tensor=2, expert=2),
    "expert-everywhere-allgather": layout("qwen3_moe", other=ALL_GATHER, tensor=2, expert=4),
    "expert-tensor-allgather": layout("qwen3_moe", other=ALL_GATHER, tensor=2, expert_tensor=2, expert=2),
    "tensor-pipeline-balanced": layout("qwen3_moe", "full", other=BALANCED, tensor=2, pipeline=2, expert=2),
    "context-data-balanced": layout("qwen3_moe", "selective", True, other=BALANCED, context=2, expert=2),
}
ON_EIGHT = {"tensor-pipeline-expert-data": layout("qwen3_moe", distributed=True, tensor=2, pipeline=2, expert=2)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """alone(policy, settings) -> metrics and weights of two updates in one process, and of a third one, with
    those of the settings that change the result; `alone.folder` holds the policies."""
    folder = tmp_path_factory.mktemp("policies")
    for policy in FAMILIES:
        make_policy(policy, folder / policy)
    backend.initialise(make_config(folder / "qwen3"))
    results = {}

    def get(policy: str, settings: dict):
        objective = {name: settings[name] for name in BALANCED if name in settings}
        key = policy, bool(objective)
        if key not in results:
            trainer = make_trainer(make_config(folder / policy, **objective))
            two = [trainer.update(make_rows(seed)) for seed in range(2)], weights(trainer)
            results[key] = *two, ([trainer.update(make_rows(2))], weights(trainer))
        return results[key]

    get.folder = folder
    yield get
    backend.shutdown()


@pytest.mark.parametrize(
    ("processes", "cases"),
    [
        pytest.param(2, ON_TWO, id="2"),
        pytest.param(4, ON_FOUR, id="4", marks=pytest.mark.slow),
        pytest.param(8, ON_EIGHT, id="8", marks=pytest.mark.slow),
    ],
)
def test_every_layout_equals_one_process(processes, cases, alone, tmp_path):
    """Metrics and weights after two updates: 1e-5 relative (float32)."""
    for policy in {policy for policy, _ in cases.values()}:
        (tmp_path / policy).symlink_to(alone.folder / policy)
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    torchrun(processes, Path(__file__).with_name("trainer_layouts_worker.py"), tmp_path, timeout=900)
    faults = []

    def compare(name: str, found: list[dict], found_weights, expected: list[dict], expected_weights) -> None:
        keys = ["loss", "grad_norm", "entropy", "mismatch_abs", "mismatch_max_ratio"]
        keys += [key for key in expected[0] if key.startswith("moe_")]
        assert {key for key in found[0] if key.startswith("moe_")} <= set(keys)
        errors = {
            key: max(abs(b[key] - a[key]) / (abs(a[key]) or 1) for a, b in zip(expected, found, strict=True))
            for key in keys
        } | {"weights": difference(found_weights, expected_weights)}
        print(name, {key: f"{error:.1e}" for key, error in errors.items()})
        faults.extend(f"{name}: {key} {error:.1e}" for key, error in errors.items() if not error <= 1e-5)

    for name, (policy, settings) in cases.items():
        metrics, after_two, (third, after_three) = alone(policy, settings)
        found = torch.load(tmp_path / f"{name}.pt")
        assert found["same"], f"{name}: the ranks report different metrics"
        compare(name, found["metrics"], found["weights"], metrics, after_two)
        compare(f"{name}, resumed", [found["resumed"][0]], found["resumed"][1], third, after_three)
    assert not faults
