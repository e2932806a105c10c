"""The smallest hardware on which each of the paper's models trains, as the table of docs/recipes.md.

    python tools/smallest_hardware.py [GPU ...]

For each recipe of examples/paper_16k it prints the fewest GPUs (a power of two, in nodes of eight) on which a layout
fits by `spell plan`, and the estimated step: with trainer and engines on the same GPUs, and on GPUs of their own.
Recipes of equal sizes share a row. It takes a few minutes and needs no GPU.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

from spell_megatron.cli.arguments import quiet_libraries
from spell_megatron.config.reading import load_config
from spell_megatron.planner.gpus import Assumptions, Gpu, find_gpu
from spell_megatron.planner.model_size import ModelSize
from spell_megatron.planner.search import fewest
from spell_megatron.planner.text import duration
from spell_megatron.training.policy import PolicyModel

EXAMPLES = Path(__file__).parents[1] / "examples"
GPUS = ("H100-80G", "H200-141G")


def main() -> None:
    quiet_libraries()
    gpus = [find_gpu(name) for name in sys.argv[1:] or GPUS]
    heads = [f"{gpu.name}, {where}" for gpu in gpus for where in ("colocated", "separate")]
    print("| " + " | ".join(["`examples/paper_16k/`", *heads]) + " |")
    print("|" + "---|" * (1 + len(heads)))
    rows = defaultdict(list)
    for recipe in sorted((EXAMPLES / "paper_16k").glob("*.yaml")):
        config = load_config([EXAMPLES / "paper_16k.yaml", recipe])
        model = ModelSize.of(PolicyModel.load(config.model.path, config.model.dtype))
        rows[model.arch, config.rollout.sampling.longest_sequence].append((recipe.stem, model, config))
    for same in rows.values():
        _, model, config = same[0]
        cells = [cell(model, config, colocated, gpu) for gpu in gpus for colocated in (True, False)]
        print("| " + " | ".join([", ".join(f"`{name}`" for name, _, _ in same), *cells]) + " |", flush=True)


def cell(model: ModelSize, config, colocated: bool, gpu: Gpu) -> str:
    """The fewest GPUs and the step on them."""
    plan = fewest(model, config, colocated, gpu, Assumptions())
    if plan is None:
        return "none"
    parts = "" if colocated else f" ({plan.processes} + {plan.gpus - plan.processes})"
    return f"{plan.gpus}{parts}: {duration(plan.times.step)}"


if __name__ == "__main__":
    main()
