"""Runs of small models on one GPU: the recipes of examples/, and what `spell init` writes for such a machine."""

import sys
from pathlib import Path

import pytest
import transformers

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import one_gpu

from spell_megatron.cli import main
from spell_megatron.config.reading import load_config
from spell_megatron.errors import UserError
from spell_megatron.planner import draft
from spell_megatron.planner.gpus import GPUS, Assumptions, find_gpu
from spell_megatron.planner.memory import estimate
from spell_megatron.planner.model_size import ModelSize
from spell_megatron.planner.plan import Plan, make_plan
from spell_megatron.training.policy import PolicyModel

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SIZES = {"0.6b": 596_049_920, "1.7b": 1_720_574_976, "4b": 4_022_468_096}
"""The recipes' models, and their numbers of parameters as published (tied embeddings counted once)."""


def plan_of(size: str, gpu: str, *overrides: str) -> Plan:
    model = EXAMPLES / "models" / f"qwen3_{size}"
    config = load_config(EXAMPLES / f"qwen3_{size}_1gpu.yaml", [f"model.path={model}", *overrides])
    policy = PolicyModel.load(config.model.path, config.model.dtype)
    return make_plan(ModelSize.of(policy), config, 1, GPUS[gpu], Assumptions(gpus_per_node=1), estimate)


@pytest.mark.parametrize("size", SIZES)
def test_the_models_are_those_of_the_hub(size):
    config = transformers.AutoConfig.from_pretrained(EXAMPLES / "models" / f"qwen3_{size}")
    assert ModelSize.of(PolicyModel.of(config)).parameters.all == SIZES[size]
    recipe = load_config(EXAMPLES / f"qwen3_{size}_1gpu.yaml")
    assert str(recipe.model.path) == f"Qwen/Qwen3-{size.upper()}"
    assert config.max_position_embeddings > recipe.rollout.sampling.longest_sequence


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("size", SIZES)
def test_the_recipes_fit_one_gpu(size, gpu):
    """On all GPUs from 24 GB up; the largest from 48 GB up, which its file says."""
    large_enough = GPUS[gpu].memory > 44 * 2**30 or size != "4b"
    for overrides in one_gpu.LENGTHS.values():
        plan = plan_of(size, gpu, *overrides)
        assert plan.fits == large_enough, (plan.phases, plan.host)
        assert plan.gpus == 1 and plan.config.rollout.colocated
        if plan.fits:
            assert plan.engine.sequences > 5


def test_the_page_has_what_the_script_prints():
    page = (ROOT / "docs" / "first_run.md").read_text(encoding="utf-8")
    assert "\n".join(one_gpu.rows()) in page
    for overrides in one_gpu.LENGTHS.values():
        assert all(f"--{override}" in page for override in overrides)
    for size in SIZES:
        name, needed = f"qwen3_{size}_1gpu.yaml", f"{plan_of(size, 'H100-80G').host.total / 2**30:.0f} GiB"
        assert f"`examples/{name}` | {'48' if size == '4b' else '24'} GB or more | {needed} |" in page
        assert f"{needed} of it are needed" in (EXAMPLES / name).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("size", "gpu"),
    [("0.6b", "rtx 4090"), ("1.7b", "RTX4090-24G"), ("4b", "L40S"), ("4b", "H100")],
)
def test_the_command_of_a_recipe_says_that_it_fits(size, gpu, capsys):
    model = EXAMPLES / "models" / f"qwen3_{size}"
    words = ["--config", str(EXAMPLES / f"qwen3_{size}_1gpu.yaml"), "--gpu", gpu, "--gpus-per-node", "1"]
    assert main(["plan", *words, f"--model.path={model}"]) == 0
    said = capsys.readouterr().out
    assert f"1 x {find_gpu(gpu).name}" in said and "DOES NOT FIT" not in said and "will not start" not in said


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA GeForce RTX 4090", "RTX4090-24G"),
        ("NVIDIA GeForce RTX 3090", "RTX3090-24G"),
        ("NVIDIA RTX A6000", "A6000-48G"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX6000Ada-48G"),
        ("NVIDIA L40S", "L40S-48G"),
        ("NVIDIA A100-SXM4-80GB", "A100-80G"),
        ("NVIDIA H100 80GB HBM3", "H100-80G"),
    ],
)
def test_gpus_are_known_by_the_names_that_their_driver_gives(name, known, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: name)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (0, 20 * 2**30))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    hardware = draft.hardware_here(8)
    assert hardware.gpu.bandwidth == GPUS[known].bandwidth and hardware.gpu.memory == 20 * 2**30
    assert (hardware.gpus, hardware.per_node) == (1, 1) and hardware.host_memory > 2**30


@pytest.mark.parametrize("gpu", ["RTX4090-24G", "L40S-48G"])
@pytest.mark.parametrize("size", ["0.6b", "1.7b"])
def test_init_writes_the_same_kind_of_settings(size, gpu):
    """Trainer and engine on the one GPU, the optimizer not shared out, rows that fit; the planner agrees."""
    model = PolicyModel.load(EXAMPLES / "models" / f"qwen3_{size}", "bfloat16")
    recipe = load_config(EXAMPLES / f"qwen3_{size}_1gpu.yaml", ["training.tokens_per_microbatch=131072"])
    plan = draft._fastest(model, recipe, draft.Hardware(GPUS[gpu], 1, 1), GPUS[gpu], fixed=False)
    settings = draft._of_plan(plan)
    assert plan.fits and settings["rollout.colocated"] and settings["training.parallel.processes"] == 1
    assert settings["training.optimizer.distributed"] is False
    assert settings["training.tokens_per_microbatch"] <= 131072
    if (size, gpu) == ("1.7b", "RTX4090-24G"):
        assert settings["training.tokens_per_microbatch"] == 9728 + 4096
        assert settings["training.optimizer.offload"] and settings["training.recompute"] == "full"
        small = draft.Hardware(GPUS[gpu], 1, 1, host_memory=32 * 2**30)
        with pytest.raises(UserError, match="or a machine with more memory"):
            draft._fastest(model, recipe, small, GPUS[gpu], fixed=False)
