"""Stage 4: how much of a GPU's arithmetic does useful work (MFU), and is the planner right about memory?

Updates of a slice of Qwen3-30B-A3B (4 layers) on one prompt with 8 responses of 4,096 tokens. Useful are the operations
that a computation of the tree needs, without what is computed again.

    full_N        training.recompute: full (every layer is computed again in the backward pass), prompt of N tokens
    selective_N   training.recompute: selective (the experts are computed again)
    none_N        nothing is computed again
    planned       GiB that `spell plan` expects in each case, to be compared with peak_gib
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from suite import GROUP, gpu_flops, main, memory_peak, random_model, run_config, seconds, sizes, tree

MFU = 0.4
RESPONSE = 4096
CASES = (("full", 100_000), ("full", 16_384), ("selective", 16_384), ("none", 16_384), ("selective", 100_000))


def update(recompute: str, prompt: int, tiny: bool) -> dict:
    from spell_megatron.training.cost import training_cost
    from spell_megatron.training.prefix_tree import pack
    from spell_megatron.training.trainer import Trainer

    prompt, response = (prompt // 100, 30) if tiny else (prompt, RESPONSE)
    config = run_config("bfloat16", prompt + GROUP * response, response)
    config.training.recompute = recompute
    model = random_model(sizes(tiny, num_hidden_layers=4), config.training)
    trainer = Trainer(model, config.training, config.rollout.sampling.temperature, config.run.steps)
    rows = tree(prompt, response)
    (packed,) = pack(rows, config.training.tokens_per_microbatch)
    useful = training_cost(model.policy.arch).of(packed)
    memory_peak()
    spent = seconds(lambda: trainer.update(rows), 2)
    figures = {"seconds": spent, "useful_tflops": useful / spent / 1e12, "holds": True}
    if flops := gpu_flops():
        figures["mfu"] = useful / spent / flops
        figures["holds"] = recompute != "full" or prompt < 65_536 or figures["mfu"] >= MFU
    if torch.cuda.is_available():
        figures["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return figures


def planned(tiny: bool) -> dict:
    """In a process of its own: the planner makes process groups that are not there, and sends CUDA calls to the CPU."""
    script = Path(__file__).with_name("planned.py")
    command = [sys.executable, str(script), json.dumps([tiny, RESPONSE, CASES])]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout) | {"holds": True}


PARTS = {f"{recompute}_{prompt}": partial(update, recompute, prompt) for recompute, prompt in CASES}
PARTS["planned"] = planned

if __name__ == "__main__":
    main(PARTS, __doc__)
