"""Is `spell plan` right about memory? Compares its prediction with updates of small models on this machine.

    python benchmarks/planner_memory.py [--quick]

Each case trains a random model for two updates on CPU processes (gloo), in its own layout. Two figures are compared
with the prediction, on the fullest rank:

* the bytes of parameters, gradient buffers and optimizer state, which must be equal;
* the peak of what an update allocates beside them (activations and vocabulary head), as torch's profiler sees it. The
  prediction uses the CPU's RMSNorm here, which keeps more than the GPU's.

Rows are one tree of a prompt with two responses. The prediction assumes balanced routing. The busiest rank's copies of
tokens over the ranks' mean are printed too, for the layer where this is greatest. Gloo frees some of its buffers late,
so measurements on two processes differ by up to a fifth from run to run. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

GOAL = 0.15
"""Largest relative error of the dynamic memory."""

DENSE = {"intermediate_size": 1024}
MOE = {"moe_intermediate_size": 256, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}
CASES = [  # processes, model, recompute, layout
    (1, "dense", "none", {}),
    (1, "dense", "selective", {}),
    (1, "dense", "full", {}),
    (1, "moe", "none", {}),
    (1, "moe", "selective", {}),
    (1, "moe", "full", {}),
    (2, "dense", "none", {"tensor": 2}),
    (2, "dense", "none", {"context": 2}),
    (2, "dense", "selective", {"pipeline": 2}),
    (2, "dense", "full", {}),
    (2, "moe", "none", {"expert": 2}),
    (2, "moe", "none", {"tensor": 2, "expert_tensor": 2}),
    (2, "moe", "full", {"tensor": 2, "expert": 2}),
    (2, "moe", "selective", {"context": 2, "expert": 2}),
]


def make_config(folder: Path, recompute: str, layout: dict[str, int], tokens: int):
    from spell_megatron.config.schema import Config

    return Config(
        run={"device": "cpu"},
        model={"path": folder, "dtype": "bfloat16"},
        data={"documents": "none"},
        selfplay={"group_size": 2},
        rollout={"sampling": {"max_prompt_tokens": tokens // 2, "max_response_tokens": tokens // 4}},
        training={
            "tokens_per_microbatch": tokens,
            "logprob_chunk": 128,
            "recompute": recompute,
            "parallel": layout,
        },
    )


def make_checkpoint(kind: str, folder: Path) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8}
    sizes |= {"num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": False, "dtype": "bfloat16"}
    torch.manual_seed(0)
    if kind == "moe":
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **MOE))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, **DENSE))
    model.to(torch.bfloat16).save_pretrained(folder)


def update_peak(trainer, rows) -> int:
    """Bytes that an update allocates at its peak, beside what was there before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        trainer.update(rows)
    return allocated_peak(profiler)


def allocated_peak(profiler) -> int:
    """Bytes allocated at the peak of what torch's profiler saw with `profile_memory` and `acc_events`."""
    events = profiler.profiler.kineto_results.events()
    level = top = 0
    for _, nbytes in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        level += nbytes
        top = max(top, level)
    return top


def static_bytes(trainer) -> tuple[int, int, int]:
    """Bytes of parameters, gradient buffers and optimizer state that a trainer really holds after an update."""
    import torch

    ddp = trainer._ddp
    gradients = sum(b.grad_data.nbytes for b in ddp.buffers + ddp.expert_parallel_buffers)
    state = 0
    for part in getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer]):
        masters = [p for group in part.optimizer.param_groups for p in group["params"]]
        state += sum(p.nbytes for p in masters if p.dtype != trainer.model.config.params_dtype)
        state += sum(
            x.nbytes for s in part.optimizer.state.values() for x in s.values() if torch.is_tensor(x) and x.dim()
        )
    return sum(p.nbytes for p in trainer.model.parameters()), gradients, state


def work(folder: Path, recompute: str, layout: dict[str, int], tokens: int) -> None:
    """One rank of a case: trains, and prints what it measured and what was predicted (rank 0, for the fullest)."""
    import numpy as np
    import torch.distributed as dist
    from megatron.core import parallel_state

    from spell_megatron.planner.activations import head_bytes, stage_activations
    from spell_megatron.planner.memory import counted_memory, step_bytes
    from spell_megatron.training import backend
    from spell_megatron.training.model import build_model
    from spell_megatron.training.policy import PolicyModel
    from spell_megatron.training.prefix_tree import Row
    from spell_megatron.training.trainer import Trainer
    from spell_megatron.weights.huggingface import load_weights

    config = make_config(folder, recompute, layout, tokens)
    policy = PolicyModel.load(folder, config.model.dtype)
    backend.initialise(policy, config.training, config.run.device)
    model = build_model(policy, config.training)
    load_weights(model, folder)
    trainer = Trainer(model, config.training, config.rollout.sampling.temperature, config.run.steps)
    rng, rows = np.random.default_rng(0), []
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    for _ in range(parallel_state.get_data_parallel_world_size() * stages):
        prompt = rng.integers(0, 4096, tokens // 2)
        for _ in range(2):
            response = rng.integers(0, 4096, tokens // 4)
            ones = np.ones(len(response), np.float32)
            rows.append(Row(np.concatenate([prompt, response]), len(prompt), ones, -ones))
    rows = rows if dist.get_rank() == 0 else None
    trainer.update(rows)
    copies: list[int] = []  # at the experts of each layer
    for layer in model.decoder.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts.register_forward_pre_hook(lambda _, inputs: copies.append(len(inputs[0])))
    peak = update_peak(trainer, rows)
    first, layers = model.decoder.layers[0].layer_number - 1, len(model.decoder.layers)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    arch = policy.arch
    own = range(first, first + layers)
    kept, layer = stage_activations(arch, config, own, tokens, stages - stage, gpu=False)
    head, static = head_bytes(arch, config, tokens) if stage == stages - 1 else 0, static_bytes(trainer)
    dynamic = max(kept + max(layer, head), step_bytes(config, static[2]))
    mine = {"peak": peak, "predicted": dynamic, "static": static, "rank": dist.get_rank(), "copies": copies}
    everyone: list[dict] = [mine] * dist.get_world_size()
    if len(everyone) > 1:
        dist.all_gather_object(everyone, mine)
    rank, world = dist.get_rank(), dist.get_world_size()
    backend.shutdown()
    if rank == 0:
        fullest = max(everyone, key=lambda m: m["peak"])
        of_layers = zip(*(m.pop("copies") for m in everyone), strict=True)
        fullest["busiest"] = max((max(of) / np.mean(of) for of in of_layers), default=1.0)
        counted = counted_memory(policy, config, fullest["rank"], world)[:3]
        print("RESULT " + json.dumps(fullest | {"counted": counted}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only the cases on one process")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        folder, recompute, layout, tokens = json.loads(options.work)
        work(Path(folder), recompute, layout, tokens)
        return
    worst, figures = 0.0, []
    columns = ("parameters, gradients, optimizer state MB", "peak MB measured, predicted", "busiest rank")
    print("processes model recompute layout:", " | ".join(columns))
    with tempfile.TemporaryDirectory() as scratch:
        for kind in ("dense", "moe"):
            make_checkpoint(kind, Path(scratch) / kind)
        for processes, kind, recompute, layout in CASES:
            if options.quick and processes > 1:
                continue
            task = json.dumps([str(Path(scratch) / kind), recompute, layout, 2048])
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
            done = subprocess.run([*command, __file__, "--work", task], capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr[-3000:])
            found = json.loads(done.stdout.split("RESULT ")[1])
            error = found["predicted"] / found["peak"] - 1
            same = list(found["static"]) == list(found["counted"])
            worst = max(worst, abs(error) if same else float("inf"))
            name = ", ".join(f"{k} {v}" for k, v in layout.items()) or ("data 2" if processes > 1 else "-")
            static = ", ".join(f"{x / 1e6:.2f}" for x in found["static"])
            counted = "as counted" if same else f"counted {found['counted']}, found {found['static']}"
            print(
                f"{processes} {kind:5} {recompute:9} {name:26} {static} {counted} | "
                f"{found['peak'] / 1e6:.1f}, {found['predicted'] / 1e6:.1f} ({error:+.1%}) | {found['busiest']:.2f}",
                flush=True,
            )
            figures.append({"case": f"{kind} {recompute} {name}", "error": round(error, 4), "counts_equal": same})
    holds = worst <= GOAL
    result = {"benchmark": "planner_memory", "figures": figures, "goal": f"error <= {GOAL:.0%}", "holds": holds}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
