"""The fastest plans that fit, and the fewest GPUs."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks.planner_memory import make_config
from spell_megatron.jobs.site import Site
from spell_megatron.jobs.site_faults import site_faults
from spell_megatron.planner.gpus import GPUS, Assumptions
from spell_megatron.planner.memory import counted_memory, estimate
from spell_megatron.planner.model_size import ModelSize
from spell_megatron.planner.numbers import plan_numbers
from spell_megatron.planner.plan import make_plan
from spell_megatron.planner.search import _splits, fastest, fewest
from spell_megatron.planner.text import duration, plan_text, proposal_text
from spell_megatron.training.policy import PolicyModel

GPU = GPUS["H100-80G"]


@pytest.fixture(scope="module")
def moe(checkpoints):
    """(size, configuration) of a small mixture of experts."""
    config = make_config(checkpoints / "moe", "full", {}, 1024)
    return ModelSize.of(PolicyModel.load(checkpoints / "moe", config.model.dtype)), config


@pytest.mark.parametrize("colocated", [True, False])
def test_the_proposal_is_the_fastest_that_fits(moe, colocated):
    model, config = moe
    best = fastest(model, config, 8, colocated, GPU, Assumptions())
    assert best and best.fits and best.gpus == 8 and best.config.rollout.colocated == colocated
    rollout = best.config.rollout
    assert rollout.replicas * rollout.tensor_parallel == (8 if colocated else 8 - best.processes)
    slower = config.model_copy(update={"rollout": rollout})
    assert best.times.step < make_plan(model, slower, best.processes, GPU, Assumptions()).times.step
    assert best.config.training.recompute == "none"


def test_trainers_with_gpus_of_their_own_work_on_answers_during_the_rollout(moe):
    model, config = moe
    plan = make_plan(model, config, 1, GPU, Assumptions(), estimate)
    times, lines = plan.times, "\n".join(plan_text(model, plan))
    assert 0 < times.hidden < times.update and times.hidden <= times.rollout
    assert times.step == pytest.approx(times.waiting - times.hidden) and times.waiting > times.update + times.rollout
    assert f"without it a step takes {duration(times.waiting)} (training.overlap: off)" in lines
    assert "the update overlaps the rollout" in lines
    assert times.one_off == times.waiting - min(times.update, times.rollout) < times.step
    assert f"one update old {duration(times.one_off)} (training.staleness: 1)" in lines
    stale = config.model_copy(deep=True)
    stale.training.staleness = 1
    ahead = make_plan(model, stale, 1, GPU, Assumptions(), estimate)
    assert ahead.times.step == times.one_off
    assert "during the next rollout" in "\n".join(plan_text(model, ahead))
    for change in (
        {"training.overlap": "off"},
        {"rollout.colocated": True},
        {"training.swap": "all"},
        {"training.moe_aux_loss": 0.01},
    ):
        other = config.model_copy(deep=True)
        for name, value in change.items():
            section, field = name.split(".")
            setattr(getattr(other, section), field, value)
        waits = make_plan(model, other, 1, GPU, Assumptions(), estimate)
        assert waits.times.hidden == 0 and waits.times.step == waits.times.waiting
        assert "nothing overlaps" in "\n".join(plan_text(model, waits))


def test_roles_that_are_off_take_no_time(moe):
    """Questions from a file are not asked, and rows of weight 0 are not in the update."""
    model, config = moe

    def times(**change):
        other = config.model_copy(deep=True)
        for name, value in change.items():
            section, field = name.split("__")
            setattr(getattr(other.selfplay, section, other.training), field, value)
        return make_plan(model, other, 1, GPU, Assumptions(), estimate).times

    whole, ungated, given = times(), times(gate__enabled=False), times(questioner__enabled=False)
    unjudged = times(questioner__enabled=False, verifier__enabled=False)
    assert unjudged.update < given.update < ungated.update == whole.update
    assert unjudged.rollout < given.rollout < ungated.rollout < whole.rollout
    assert unjudged.hidden == pytest.approx(min(unjudged.update, unjudged.rollout))
    assert times(training__role_weights={"questioner": 0.0}).update == pytest.approx(given.update)
    nothing = times(training__role_weights=dict.fromkeys(("questioner", "responder", "verifier"), 0.0))
    assert nothing.compute == nothing.hidden == 0


def test_gpus_are_split_finely_between_trainer_and_engines(moe):
    """The split that balances them is found, also if it is no power of two."""
    assert _splits(64, 64) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56]
    assert _splits(2, 8) == [1] and _splits(6, 8) == [1, 2, 3, 4, 5]
    model, config = moe
    node = Assumptions(gpus_per_node=24)
    best = fastest(model, config, 24, False, GPU, node)
    slow = make_plan(model, best.config, best.processes, replace(GPU, flops=GPU.flops / 2), node, estimate)
    assert best.gpus == 24 and best.processes not in (1, 2, 4, 8, 16)
    assert f", engines {best.config.rollout.replicas} x" in (line := next(proposal_text(slow, {"separate": best}, {})))
    assert f" on the other {24 - best.processes}, " in line


@pytest.mark.parametrize(("gpus", "per_node"), [(16, 8), (24, 8), (40, 8), (12, 6), (8, 8), (6, 6)])
@pytest.mark.parametrize("colocated", [True, False])
def test_a_job_on_as_many_nodes_takes_what_is_proposed(moe, gpus, per_node, colocated):
    """Engines span no nodes, and a job has nodes for the trainer and nodes for engines, unless they share all GPUs."""
    model, config = moe
    if not colocated:
        assert _splits(gpus, per_node) == [
            count for count in range(1, gpus) if gpus == per_node or not count % per_node
        ]
    best = fastest(model, config, gpus, colocated, GPU, Assumptions(per_node))
    assert best and best.gpus == gpus
    nodes = gpus // per_node
    engines = 0 if colocated or nodes == 1 else (gpus - best.processes) // per_node
    site = Site(nodes=nodes, engine_nodes=engines, colocated=colocated and nodes > 1, gpus_per_node=per_node)
    assert list(map(str, site_faults(site, best.config))) == []


def test_nothing_is_proposed_where_nothing_fits(moe):
    model, config = moe
    small = replace(GPU, memory=2**30)
    assert fastest(model, config, 8, True, small, Assumptions()) is None
    poor = Assumptions(host_memory=2**30)
    assert fastest(model, config, 8, False, GPU, poor) is None


def test_a_plan_as_json(moe):
    model, config = moe
    plan = make_plan(model, config, 1, GPU, Assumptions(), estimate)
    said = json.loads(json.dumps(plan_numbers(plan)))
    assert said["fits"] == plan.fits and said["seconds"]["step"] == pytest.approx(plan.times.step)
    assert said["trainer"]["processes"] == 1 and said["engines"]["sequences"] == plan.engine.sequences
    assert max(phase["total"] for phase in said["phases"].values()) == plan.fullest.total


def test_the_fewest_gpus(moe):
    """One for trainer and engines in turn, or one for each, where a small model fits."""
    model, config = moe
    for colocated, gpus in ((True, 1), (False, 2)):
        least = fewest(model, config, colocated, GPU, Assumptions())
        assert least and least.gpus == gpus


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize(
    ("kind", "layout", "processes"),
    [
        ("dense", {}, 1),
        ("dense", {"tensor": 2, "pipeline": 4}, 8),
        ("dense", {"pipeline": 3}, 6),
        ("moe", {"pipeline": 2, "expert": 4}, 8),
        ("hybrid", {"tensor": 2, "pipeline": 2}, 4),
        ("moe", {"tensor": 4, "context": 2, "expert": 2, "expert_tensor": 2}, 8),
    ],
)
def test_the_formula_finds_what_is_counted(kind, layout, processes, distributed, checkpoints):
    """But for the padding of buffers: 64 elements for each parameter, and a little for each rank."""
    config = make_config(checkpoints / kind, "none", layout, 1024)
    config.training.optimizer.distributed = distributed
    policy = PolicyModel.load(checkpoints / kind, config.model.dtype)
    for rank in range(0, processes, processes // config.training.parallel.pipeline):  # one of each stage
        found, counted = (
            estimate(ModelSize.of(policy), config, rank, processes),
            counted_memory(policy, config, rank, processes),
        )
        assert found.parameters == counted.parameters and found.layers == counted.layers
        assert found[1:3] == pytest.approx(counted[1:3], rel=0.01)


def test_a_plan_that_does_not_fit_is_not_compared_with_one_that_does(moe):
    model, config = moe
    best = fastest(model, config, 8, True, GPU, Assumptions())
    small = make_plan(model, config, 8, replace(GPU, memory=2**30), Assumptions())
    lines = list(proposal_text(small, {"colocated": best, "separate": None}, {"colocated": best, "separate": None}))
    assert not small.fits and "times as fast" not in "".join(lines)
    assert lines[0].startswith("proposal  colocated step") and "nothing fits" in lines[1]
    assert lines[2].startswith("fewest    colocated 8 GPUs") and "no number of GPUs is enough" in lines[3]
    slow = make_plan(model, config, 8, GPU, Assumptions())
    assert "times as fast" in next(iter(proposal_text(slow, {"colocated": best}, {})))
    assert "nothing that fits is faster" in next(iter(proposal_text(best, {"colocated": best}, {})))
