"""What only a GPU can show, in one command of a few minutes on one GPU.

    python benchmarks/gpu/run.py [--tiny] [--only PART ...]

Needs torch, megatron-core and transformers; transformer-engine, apex and vLLM are used where they are installed.

    attention   tree attention (FlexAttention): output and gradients against a dense float32 computation on a small
                tree, then the time of a tree of one long prompt with 8 responses, forward and backward, against flash
                attention over the 8 sequences that it stands for
    experts     grouped experts against one expert after the other: output, gradients and time of a layer
    parity      logits of a small Qwen3-MoE in Megatron against transformers, float32
    update      one update of a slice of Qwen3-30B-A3B (4 layers) on such a tree: time, share of the GPU's FLOPs that
                is used for the work really needed, and peak memory against `spell plan`

--tiny takes sizes at which all of it also runs on a CPU, which proves the script and nothing else. A part that fails is
reported and the others go on. The last line is one JSON object; `holds` says whether all parts met their goals.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from spell_megatron import planner
from spell_megatron.config import Config
from spell_megatron.training import backend
from spell_megatron.training.architecture import load_hf_config
from spell_megatron.training.attention import tree_attention
from spell_megatron.training.model import build_model
from spell_megatron.training.prefix_tree import Row, pack
from spell_megatron.training.trainer import Trainer, training_cost
from spell_megatron.weights.huggingface import load_weights

GROUP = 8
COSINE = 0.9999
MFU = 0.4


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds(action: Callable[[], object], repeats: int = 3) -> float:
    """Shortest time of an action after a warm-up."""
    times = []
    for _ in range(repeats + 1):
        synchronize()
        start = time.perf_counter()
        action()
        synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def tree(prompt: int, response: int) -> list[Row]:
    """Rows of one prompt with GROUP responses."""
    rng = np.random.default_rng(0)
    start, ones = rng.integers(0, 1000, prompt), np.ones(response, np.float32)
    return [Row(np.concatenate([start, rng.integers(0, 1000, response)]), prompt, ones, -ones) for _ in range(GROUP)]


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return F.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()


# ------------------------------------------------------------------------------------------ parts


def attention(tiny: bool) -> dict:
    heads, groups, size = (4, 2, 32) if tiny else (32, 4, 128)
    scale = size**-0.5
    generator = torch.Generator(device()).manual_seed(0)

    def inputs(tokens: int, dtype: torch.dtype) -> list[torch.Tensor]:
        shapes = (tokens, heads, size), (tokens, groups, size), (tokens, groups, size)
        return [torch.randn(s, generator=generator, device=device(), dtype=dtype).requires_grad_() for s in shapes]

    def whole(rows: list[Row]) -> torch.Tensor:
        (packed,) = pack(rows, 10**9)
        return torch.from_numpy(packed.end).to(device())

    end = whole(tree(200, 40))
    leaves = inputs(len(end), torch.bfloat16)
    out = tree_attention(*leaves, end, scale)
    upward = torch.randn(out.shape, generator=generator, device=device(), dtype=out.dtype)
    out.backward(upward)
    exact = [x.detach().float().requires_grad_() for x in leaves]
    key, value = (x.repeat_interleave(heads // groups, dim=1) for x in exact[1:])
    scores = torch.einsum("qhd,khd->hqk", exact[0], key) * scale
    places = torch.arange(len(end), device=device())
    allowed = (places[:, None] >= places) & (places[:, None] < end)
    dense = torch.einsum("hqk,khd->qhd", scores.masked_fill(~allowed, -torch.inf).softmax(-1), value)
    dense.backward(upward.float())
    worst = min(cosine(out, dense), *(cosine(a.grad, b.grad) for a, b in zip(leaves, exact, strict=True)))

    prompt, response = (500, 50) if tiny else (100_000, 4096)
    end = whole(tree(prompt, response))
    leaves = inputs(len(end), torch.bfloat16)

    def shared() -> None:
        tree_attention(*leaves, end, scale).sum().backward()

    sequence = [x.transpose(0, 1)[None].detach().requires_grad_() for x in inputs(prompt + response, torch.bfloat16)]

    def unshared() -> None:
        for _ in range(GROUP):
            F.scaled_dot_product_attention(*sequence, is_causal=True, scale=scale, enable_gqa=True).sum().backward()

    mine, theirs = seconds(shared), seconds(unshared, 1)
    pairs = prompt**2 / 2 + GROUP * (response * prompt + response**2 / 2)
    return {
        "worst_cosine": worst,
        "tree_seconds": mine,
        "unshared_flash_seconds": theirs,
        "speedup": theirs / mine,
        "tree_tflops": 12 * pairs * heads * size / mine / 1e12,
        "holds": worst >= COSINE and mine < theirs,
    }


def make_checkpoint(folder: Path, tiny: bool, **changes) -> None:
    """A random checkpoint with the sizes of Qwen3-30B-A3B, or tiny ones, but for `changes`."""
    sizes = {"head_dim": 128, "num_attention_heads": 32, "num_key_value_heads": 4, "hidden_size": 2048}
    sizes |= {"moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936}
    if tiny:
        sizes |= {"head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
        sizes |= {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2, "vocab_size": 1024}
    sizes |= {"intermediate_size": 3 * sizes["hidden_size"], "norm_topk_prob": True, "tie_word_embeddings": False}
    config = Qwen3MoeConfig(**sizes | {"max_position_embeddings": 262144} | changes)
    torch.manual_seed(0)
    dtype = changes.get("dtype", torch.bfloat16)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)


def run_config(folder: Path, dtype: str, tokens: int, response: int) -> Config:
    return Config(
        model={"path": folder, "dtype": dtype},
        data={"documents": "none"},
        selfplay={"group_size": GROUP},
        rollout={"sampling": {"max_prompt_tokens": tokens, "max_response_tokens": response}},
        training={"tokens_per_microbatch": tokens, "logprob_chunk": 512, "recompute": "full"},
    )


def load(folder: Path, config: Config):
    hf_config = load_hf_config(folder)
    model = build_model(hf_config, config)
    load_weights(model, hf_config, folder)
    return hf_config, model


def experts(tiny: bool) -> dict:
    from megatron.core.transformer.moe.experts import SequentialMLP

    from spell_megatron.training.moe import GroupedExperts

    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder), tiny, num_hidden_layers=1, vocab_size=1024)
        _, model = load(Path(folder), run_config(Path(folder), "bfloat16", 4096, 64))
    layer = next(m for m in model.modules() if isinstance(m, SequentialMLP))
    count, tokens = layer.num_local_experts, 64 if tiny else 65536
    generator = torch.Generator(device()).manual_seed(0)
    hidden = torch.randn(tokens, layer.config.hidden_size, generator=generator, device=device(), dtype=torch.bfloat16)
    split = torch.full((count,), tokens // count)
    probs = torch.rand(tokens, generator=generator, device=device())

    def grads(kind: type) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        model.zero_grad()
        x = hidden.clone().requires_grad_()
        out, _ = kind.forward(layer, x, split, probs)
        out.float().square().sum().backward()
        return out.detach(), x.grad, torch.cat([p.grad.flatten() for p in layer.parameters()])

    pairs = zip(grads(GroupedExperts), grads(SequentialMLP), strict=True)
    worst = min(cosine(a, b) for a, b in pairs)
    grouped, single = seconds(lambda: grads(GroupedExperts)), seconds(lambda: grads(SequentialMLP))
    figures = {"worst_cosine": worst, "grouped_seconds": grouped, "sequential_seconds": single}
    return figures | {"speedup": single / grouped, "holds": worst >= COSINE and (tiny or grouped < single)}


def parity(tiny: bool) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder), True, num_hidden_layers=3, dtype=torch.float32)
        config = run_config(Path(folder), "float32", 256, 64)
        _, model = load(Path(folder), config)
        hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device())
    tokens = torch.randint(0, 1024, (1, 200), device=device(), generator=torch.Generator(device()).manual_seed(0))
    places, end = torch.arange(200, device=device())[None], torch.full((200,), 200, device=device())
    with torch.no_grad():
        hidden = model(tokens, places, end)
        logits = model.output_layer(hidden, weight=model.output_weight)[0][:, 0]
        error = (logits - hf(tokens).logits[0]).abs().max().item()
    return {"largest_logit_difference": error, "holds": error <= 1e-3}


def update(tiny: bool) -> dict:
    prompt, response = (300, 30) if tiny else (100_000, 4096)
    tokens, name = prompt + GROUP * response, gpu_name()
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder), tiny, num_hidden_layers=4)
        config = run_config(Path(folder), "bfloat16", tokens, response)
        hf_config, model = load(Path(folder), config)
    trainer = Trainer(config, hf_config, model)
    rows = tree(prompt, response)
    trainer.update(rows)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    spent = seconds(lambda: trainer.update(rows), 1 if tiny else 2)
    (packed,) = pack(rows, tokens)
    useful = training_cost(hf_config).of(packed) / spent
    figures = {"seconds": spent, "unshared_tokens_per_second": GROUP * (prompt + response) / spent}
    figures["useful_tflops"] = useful / 1e12
    if name:
        figures |= {"gpu": name, "mfu": useful / planner.GPUS[name].flops}
    if torch.cuda.is_available():
        assume = planner.Assumptions(reserve=0, fragmentation=0)
        memory = planner.trainer_memory(planner.Model.of(hf_config), config, 1, assume)
        figures["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        figures["planned_gib"] = (memory.total - memory.buffers) / 2**30
        figures["holds"] = figures.get("mfu", 0) >= MFU
    else:
        figures["holds"] = True
    return figures


def gpu_name() -> str | None:
    """The planner's name of this GPU."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_name()
    return next((name for name in planner.GPUS if name.split("-")[0] in found), None)


PARTS = {"attention": attention, "experts": experts, "parity": parity, "update": update}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU: proves the script only")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.tiny:
        parser.exit(3, "skipped: torch sees no GPU (--tiny runs the script on a CPU)\n")
    backend.initialise(run_config(Path("none"), "bfloat16", 1, 1))
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, tiny sizes"
    print(f"{where}, torch {torch.__version__}", flush=True)
    results: dict[str, dict] = {}
    for name in options.only:
        start = time.perf_counter()
        try:
            results[name] = PARTS[name](options.tiny)
        except Exception as error:  # the other parts are wanted all the more
            traceback.print_exc()
            results[name] = {"error": f"{type(error).__name__}: {error}", "holds": False}
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        figures = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in results[name].items())
        print(f"{name:10} {figures}   ({time.perf_counter() - start:.0f} s)", flush=True)
    holds = all(result["holds"] for result in results.values())
    result = {"benchmark": "gpu", "device": where, "figures": results, "goal": "see each part", "holds": holds}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
