"""What is on a GPU and in host memory when, and what engines on the trainer's GPUs get."""

from __future__ import annotations

from pathlib import Path

import pytest

from spell_megatron.config.reading import load_config
from spell_megatron.config.schema import Config
from spell_megatron.errors import UserError
from spell_megatron.planner import engine_share
from spell_megatron.planner.engine_share import engine_settings, share_on
from spell_megatron.planner.gpus import GPUS, Assumptions
from spell_megatron.planner.memory import estimate
from spell_megatron.planner.model_size import ModelSize
from spell_megatron.planner.phases import MOST
from spell_megatron.planner.plan import Plan, make_plan
from spell_megatron.rollout.server import ALONE
from spell_megatron.training.optimizer_on_host import PIECE_BYTES
from spell_megatron.training.policy import PolicyModel

EXAMPLES = Path(__file__).parents[2] / "examples"
GPU = GPUS["H100-80G"]


@pytest.fixture(scope="module")
def size():
    """Of Qwen3-30B-A3B."""
    return ModelSize.of(PolicyModel.load(EXAMPLES / "models" / "qwen3_30b_a3b_instruct_2507", "bfloat16"))


def configured(**changes) -> Config:
    """Qwen3-30B-A3B on 8 GPUs, with settings by section."""
    config = load_config([EXAMPLES / "paper_16k.yaml", EXAMPLES / "paper_16k" / "qwen3_30b_a3b_instruct_2507.yaml"])
    raw = config.model_dump()
    raw["training"]["parallel"] = {"processes": 8, "context": 8, "expert": 8}
    for section, values in changes.items():
        raw[section] |= values
    return Config.model_validate(raw)


def planned(size: ModelSize, processes: int = 8, **changes) -> Plan:
    return make_plan(size, configured(**changes), processes, GPU, Assumptions(), estimate)


def phases(plan: Plan) -> dict[str, int]:
    return {phase.name: phase.total for phase in plan.phases}


SHARED = {"colocated": True, "replicas": 4, "tensor_parallel": 2}


def test_shared_gpus_hold_both_sides(size):
    assume, alone, shared = Assumptions(), planned(size), planned(size, rollout=SHARED)
    assert set(phases(shared)) == {"update", "push", "checkpoint", "generate"}
    for phase in ("update", "checkpoint"):
        assert phases(shared)[phase] == phases(alone)[phase] + assume.engine_asleep
    # A push has the weights of both, and neither the KV cache nor the rest of the trainer's state.
    memory, weights = shared.memory, 2 * size.parameters.all // 2
    assert phases(shared)["push"] == (
        assume.reserve + memory.parameters + memory.buffers + assume.engine_asleep + weights
    )
    assert phases(alone)["push"] == assume.reserve + memory.state + memory.buffers
    assert shared.engine.share == MOST and phases(shared)["generate"] == int(MOST * GPU.memory) + assume.reserve
    assert (shared.gpus, alone.gpus) == (8, 24)
    assert shared.host.processes == 2 * alone.host.processes


def test_what_leaves_a_gpu_is_in_host_memory(size):
    """Gradients are not: the next update makes new ones."""
    none, state, everything = (
        planned(size, rollout=SHARED, training={"swap": what}) for what in ("none", "state", "all")
    )
    memory = none.memory
    assert none.host.swapped == 0 and state.host.swapped == 8 * memory.optimizer
    assert everything.host.swapped == 8 * (memory.optimizer + memory.parameters)
    on_gpu = [plan.phases[-1].trainer for plan in (none, state, everything)]
    assert on_gpu == [memory.reserve + left for left in (memory.state, memory.parameters, 0)]
    assert planned(size, rollout=SHARED).host == everything.host
    assert planned(size).host.swapped == 0
    # Both ways, for weights and optimizer.
    assert everything.times.swap == pytest.approx(2 * (memory.optimizer + memory.parameters) / Assumptions().host)


def test_an_optimizer_in_host_memory(size):
    optimizer = configured().training.optimizer.model_dump() | {"offload": True}
    ordinary, kept = planned(size), planned(size, training={"optimizer": optimizer})
    assert (kept.memory.optimizer, kept.memory.kept) == (0, ordinary.memory.optimizer)
    assert kept.host.optimizer == 8 * ordinary.memory.optimizer
    assert kept.memory.step == PIECE_BYTES + PIECE_BYTES // 3 < ordinary.memory.step
    assert 0 < kept.memory.activations == ordinary.memory.activations
    # On shared GPUs it costs no host memory and no time: the state has to leave anyway.
    ordinary = planned(size, rollout=SHARED)
    kept = planned(size, rollout=SHARED, training={"optimizer": optimizer})
    assert kept.host.total == ordinary.host.total and kept.times == ordinary.times
    assert phases(kept)["update"] < phases(ordinary)["update"]


def test_host_memory_of_a_node(size):
    """A full node, or as many ranks as there are; an asynchronous checkpoint is saved beside the next update."""
    assert planned(size, 16).host.processes == planned(size, 8).host.processes
    training = {"recompute": "full", "offload": True}
    waits = planned(size, training=training).host
    beside = planned(size, training=training, checkpoint={"asynchronous": True}).host
    assert waits.offloaded > 0 and beside.total == waits.total + min(waits.offloaded, waits.saved)


def test_more_gpus_never_need_more_memory_on_each(size):
    """Also of the host, and with longer rows never less."""
    for changes in ({}, {"rollout": SHARED}):
        before = None
        for processes in (8, 16, 32, 64):
            plan = planned(size, processes, **changes)
            assert before is None or all(phases(plan)[name] <= before[name] for name in ("update", "push"))
            before = phases(plan)
        rows = [planned(size, training={"tokens_per_microbatch": n}, **changes) for n in (40960, 65536, 131072)]
        assert [phases(plan)["update"] for plan in rows] == sorted(phases(plan)["update"] for plan in rows)
        assert rows[0].memory.working < rows[-1].memory.working


def test_engines_get_what_the_trainer_leaves(size):
    assert planned(size).engine.share == ALONE
    assert planned(size, rollout=SHARED | {"gpu_memory_utilization": 0.4}).engine.share == 0.4
    for processes, swap in ((256, "none"), (8, "state")):
        plan = planned(size, processes, rollout=SHARED, training={"swap": swap})
        held = plan.memory.reserve + (plan.memory.state if swap == "none" else plan.memory.parameters)
        assert 1 - held / GPU.memory - 0.01 < plan.engine.share <= 1 - held / GPU.memory < MOST
        assert phases(plan)["generate"] <= GPU.memory
    assert planned(size, rollout=SHARED, training={"swap": "none"}).engine.share < 0.1


def test_the_run_gives_engines_the_plans_share(size, monkeypatch):
    config = configured(rollout=SHARED, training={"swap": "state"})
    monkeypatch.setattr(engine_share, "shares_gpus", lambda *_: True)
    monkeypatch.setattr(engine_share, "gpu_memory", lambda: int(GPU.memory))
    share = make_plan(size, config, 8, GPU, Assumptions()).engine.share
    assert ALONE != share < MOST
    assert engine_settings(config, 8).gpu_memory_utilization == share
    assert config.rollout.gpu_memory_utilization is None
    config.rollout.gpu_memory_utilization = 0.3
    assert engine_settings(config, 8) is config.rollout
    config.rollout.gpu_memory_utilization = None
    monkeypatch.setattr(engine_share, "shares_gpus", lambda *_: False)
    assert engine_settings(config, 8) is config.rollout
    with pytest.raises(UserError, match=r"leaves .* GiB to the engines.*weights.*`spell plan`"):
        share_on(20 * 2**30, config)


def test_engines_in_float8_have_half_of_the_weights(size):
    """But for the vocabulary, whose two matrices stay as they are."""
    ordinary, fp8 = planned(size).engine, planned(size, rollout={"quantization": "fp8"}).engine
    linear = size.parameters.all - 2 * size.arch.vocabulary * size.arch.hidden
    assert ordinary.weights - fp8.weights == pytest.approx(linear / configured().rollout.tensor_parallel, abs=1)
    assert fp8.kv_cache - ordinary.kv_cache == ordinary.weights - fp8.weights


def test_a_push_counts_calls_as_well_as_bytes(size):
    assert size.parameters.pushed == 531
    slow = make_plan(size, configured(), 8, GPU, Assumptions(push_tensor=1e-3), estimate)
    fast = make_plan(size, configured(), 8, GPU, Assumptions(push_tensor=0), estimate)
    assert slow.times.push - fast.times.push == pytest.approx(0.531)
    assert fast.times.push > 2 * size.parameters.all / 50e9


def test_windows_take_no_more_of_the_cache_than_they_see():
    """gpt-oss-20b: half of its 24 layers keep all tokens, the others a window of 128 and what else is in its blocks."""
    model = ModelSize.of(PolicyModel.load(EXAMPLES / "models" / "gpt_oss_20b", "bfloat16"))
    engine = planned(model, rollout={"tensor_parallel": 2}).engine
    of_a_layer = 2 * 4 * 64 * 2  # keys and values of 4 heads on a GPU, in bfloat16
    assert engine.kv_per_token == 12 * of_a_layer
    assert engine.kv_per_sequence == 12 * (128 + 16) * of_a_layer
    longest = configured().rollout.sampling.longest_sequence
    held = engine.kv_per_token * longest + engine.kv_per_sequence
    assert engine.sequences == engine.kv_cache / held
