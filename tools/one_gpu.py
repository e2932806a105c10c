"""Steps of the recipes for one GPU, as the table of docs/first_run.md.

    python tools/one_gpu.py

For each recipe and length of documents it prints what `spell plan` estimates of a step on some GPUs, and of the
recipe's 30 steps. It needs no GPU and no network.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from spell_megatron.cli.arguments import quiet_libraries
from spell_megatron.config.reading import load_config
from spell_megatron.planner.gpus import GPUS, Assumptions
from spell_megatron.planner.memory import estimate
from spell_megatron.planner.model_size import ModelSize
from spell_megatron.planner.plan import make_plan
from spell_megatron.training.policy import PolicyModel

EXAMPLES = Path(__file__).parents[1] / "examples"
LENGTHS = {
    "4,000": ("rollout.sampling.max_prompt_tokens=5632",),
    "8,000": (),
    "16,000": ("rollout.sampling.max_prompt_tokens=18000", "training.tokens_per_microbatch=22528"),
}
"""What is set for documents of so many tokens."""
ON = ("RTX4090-24G", "RTX5090-32G", "RTX6000Ada-48G", "L40S-48G", "A100-80G", "H100-80G")


def rows() -> Iterator[str]:
    yield "| model | documents | " + " | ".join(ON) + " |"
    yield "|" + "---|" * (2 + len(ON))
    for size in ("0.6b", "1.7b", "4b"):
        for length, overrides in LENGTHS.items():
            cells = [cell(size, overrides, gpu) for gpu in ON]
            yield f"| Qwen3-{size.upper()} | {length} | " + " | ".join(cells) + " |"


def cell(size: str, overrides: tuple[str, ...], gpu: str) -> str:
    """Minutes of a step and hours of all; or that it does not fit."""
    model = EXAMPLES / "models" / f"qwen3_{size}"
    config = load_config(EXAMPLES / f"qwen3_{size}_1gpu.yaml", [f"model.path={model}", *overrides])
    policy = ModelSize.of(PolicyModel.load(config.model.path, config.model.dtype))
    plan = make_plan(policy, config, 1, GPUS[gpu], Assumptions(gpus_per_node=1), estimate)
    if not plan.fits:
        return "does not fit"
    return f"{plan.times.step / 60:.0f} min, {plan.times.step * config.run.steps / 3600:.0f} h"


if __name__ == "__main__":
    quiet_libraries()
    print("\n".join(rows()))
