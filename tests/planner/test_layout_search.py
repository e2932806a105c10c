"""The fastest layout that fits."""

from benchmarks.planner_memory import make_config
from spell_megatron.planner.gpus import GPUS, Assumptions, Gpu
from spell_megatron.planner.model_size import ModelSize
from spell_megatron.planner.search import fastest, plan_layout
from spell_megatron.training.policy import PolicyModel


def test_the_proposal_is_the_fastest_that_fits(checkpoints):
    config = make_config(checkpoints / "moe", "full", {}, 1024)
    model, gpu = ModelSize.of(PolicyModel.load(checkpoints / "moe", config.model.dtype)), GPUS["H100-80G"]
    tried = list(fastest(model, config, 8, gpu, Assumptions()))
    assert tried[-1].fits and tried[-1].recompute == "none"
    assert tried[-1].times.update < plan_layout(model, config, 8, gpu, Assumptions()).times.update
    small = Gpu(2**30, gpu.flops, gpu.bandwidth, gpu.link)
    assert not list(fastest(model, config, 8, small, Assumptions()))
