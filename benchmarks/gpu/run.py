"""What only a GPU can show: one command of less than nine minutes on one GPU. `run.sh` beside it calls it.

    python benchmarks/gpu/run.py [--tiny] [--only PART ...] [--out FOLDER]

Needs torch, megatron-core, transformers and pydantic. Uses transformer-engine, apex and vLLM where they are installed.

    attention   tree attention (FlexAttention): output and gradients compared with a dense float64 computation on a
                small tree; then the time of a tree of one long prompt with 8 responses, forward and backward, compared
                with flash attention over the 8 separate sequences, and with the same tree cut into rectangles, each
                one call of flash attention (how CPUs do it)
    logprobs    the vocabulary head: log-probabilities, entropies and gradients compared with float64; its peak memory
                for 8 x 4,096 positions and 151,936 tokens of vocabulary
    experts     grouped experts compared with one expert after the other: output, gradients and time of a layer
    parity      logits of a small Qwen3-MoE in Megatron compared with transformers, float32
    update      one update of a slice of Qwen3-30B-A3B (4 layers) on prompts of 16K to 100K tokens with 8 responses:
                time and peak memory of the tree and of the 8 separate sequences, the share of the GPU's FLOPs that does
                work that is really needed, and memory compared with `spell plan`
    transfer    where vLLM is installed: the weights of that slice sent to a vLLM engine on the same GPU (ipc) and, with
                a second GPU, to an engine there (nccl), compared by checksums; time compared with a copy within the
                GPU's memory

--tiny takes sizes at which everything also runs on a CPU; this tests only the script. A part that fails is reported and
the others go on. --out writes gpu.json and gpu.txt (everything that was printed). The last line is one JSON object;
`holds` says whether all parts met their goals.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from spell_megatron.config.schema import Config, RolloutConfig, TrainingConfig
from spell_megatron.planner.gpus import GPUS, Assumptions
from spell_megatron.planner.memory import trainer_memory
from spell_megatron.planner.model_size import ModelSize
from spell_megatron.training import attention_cpu, backend
from spell_megatron.training.attention import tree_attention
from spell_megatron.training.cost import training_cost
from spell_megatron.training.logprobs import token_logprobs
from spell_megatron.training.model import build_model
from spell_megatron.training.policy import PolicyModel
from spell_megatron.training.prefix_tree import Row, pack
from spell_megatron.training.trainer import Trainer
from spell_megatron.weights.huggingface import load_weights

GROUP = 8
COSINE = 0.9999
MFU = 0.4
HEAD_GB = 1.0


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds(action: Callable[[], object], repeats: int = 3, warm: bool = True) -> float:
    """Shortest time of an action, after a warm-up if it wants one."""
    times = []
    for _ in range(repeats + warm):
        synchronize()
        start = time.perf_counter()
        action()
        synchronize()
        times.append(time.perf_counter() - start)
    return min(times[int(warm) :])


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


class FlashRectangles(torch.autograd.Function):
    """Tree attention as calls of flash attention on the rectangles of a plan, joined by their log-sum-exp."""

    @staticmethod
    def forward(ctx, query, key, value, rectangles, scale):
        out = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
        lse = torch.full((query.size(1), len(query)), -torch.inf, device=query.device)
        seeds = None
        for r in rectangles:
            q, k, v = query[None, r.q_start : r.q_stop], *(x[None, r.k_start : r.k_stop] for x in (key, value))
            part, part_lse, *seeds, _ = torch.ops.aten._flash_attention_forward(
                q, k, v, None, None, q.size(1), k.size(1), 0.0, r.causal, False, scale=scale
            )
            rows = lse[:, r.q_start : r.q_stop]
            weight = torch.sigmoid(part_lse[0] - rows).T[:, :, None]
            out[r.q_start : r.q_stop].lerp_(part[0].float(), weight)
            torch.logaddexp(rows, part_lse[0], out=rows)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse, *seeds)
        ctx.rest = rectangles, scale
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, out, lse, *seeds = ctx.saved_tensors
        rectangles, scale = ctx.rest
        grads = [torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (query, key, value)]
        for r in rectangles:
            queries, keys = slice(r.q_start, r.q_stop), slice(r.k_start, r.k_stop)
            g, q, o = (x[None, queries] for x in (grad, query, out))
            k, v = key[None, keys], value[None, keys]
            parts = torch.ops.aten._flash_attention_backward(
                g.contiguous(), q, k, v, o, lse[None, :, queries].contiguous(),
                *(None, None, q.size(1), k.size(1), 0.0, r.causal, *seeds), scale=scale,
            )  # fmt: skip
            for total, part, where in zip(grads, parts, (queries, keys, keys), strict=True):
                total[where] += part[0]
        return *(x.to(query.dtype) for x in grads), None, None


def flash_rectangles(query, key, value, end, scale):
    small, attention_cpu.SMALL = attention_cpu.SMALL, 0  # flash attention takes no masks
    try:
        rectangles = attention_cpu.plan(end)
    finally:
        attention_cpu.SMALL = small
    return FlashRectangles.apply(query, key, value, rectangles, scale)


def deep_tree() -> list[Row]:
    """Rows that branch at depths 100, 160 and 190, one of them ending inside another."""
    rng = np.random.default_rng(1)
    stem, branches = rng.integers(0, 1000, 100), [rng.integers(0, 1000, 60) for _ in range(2)]
    twigs = [[rng.integers(0, 1000, 30) for _ in range(2)] for _ in branches]
    rows = []
    for branch, pair in zip(branches, twigs, strict=True):
        for twig in pair:
            for length in (40, 7, 0):
                tokens = np.concatenate([stem, branch, twig, rng.integers(0, 1000, length)])
                ones = np.ones(len(tokens) - 100, np.float32)
                rows.append(Row(tokens, 100, ones, -ones))
    return rows


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

    end = whole(deep_tree())
    leaves = inputs(len(end), torch.bfloat16)
    upward = torch.randn(leaves[0].shape, generator=generator, device=device(), dtype=torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    key, value = (x.repeat_interleave(heads // groups, dim=1) for x in exact[1:])
    scores = torch.einsum("qhd,khd->hqk", exact[0], key) * scale
    places = torch.arange(len(end), device=device())
    allowed = (places[:, None] >= places) & (places[:, None] < end)
    dense = torch.einsum("hqk,khd->qhd", scores.masked_fill(~allowed, -torch.inf).softmax(-1), value)
    dense.backward(upward.double())

    def worst_cosine(kind: Callable) -> float:
        for x in leaves:
            x.grad = None
        out = kind(*leaves, end, scale)
        out.backward(upward)
        return min(cosine(out, dense), *(cosine(a.grad, b.grad) for a, b in zip(leaves, exact, strict=True)))

    prompt, response = (500, 50) if tiny else (100_000, 4096)
    long_end = whole(tree(prompt, response))
    long_leaves = inputs(len(long_end), torch.bfloat16)
    sequence = [x.transpose(0, 1)[None].detach().requires_grad_() for x in inputs(prompt + response, torch.bfloat16)]

    def unshared() -> None:
        for _ in range(GROUP):
            F.scaled_dot_product_attention(*sequence, is_causal=True, scale=scale, enable_gqa=True).sum().backward()

    def shared(kind: Callable) -> float:
        return seconds(lambda: kind(*long_leaves, long_end, scale).sum().backward())

    worst, mine, theirs = worst_cosine(tree_attention), shared(tree_attention), seconds(unshared, 1)
    pairs = prompt**2 / 2 + GROUP * (response * prompt + response**2 / 2)
    figures = {
        "worst_cosine": worst,
        "tree_seconds": mine,
        "unshared_flash_seconds": theirs,
        "speedup": theirs / mine,
        "tree_tflops": 12 * pairs * heads * size / mine / 1e12,
        "holds": worst >= COSINE and mine < theirs,
    }
    if torch.cuda.is_available():
        figures["rectangles_worst_cosine"] = worst_cosine(flash_rectangles)
        figures["rectangles_seconds"] = shared(flash_rectangles)
    return figures


def logprobs(tiny: bool) -> dict:
    hidden, vocabulary, positions = (64, 1000, 200) if tiny else (2048, 151936, GROUP * 4096)
    generator = torch.Generator(device()).manual_seed(0)

    def inputs(count: int, **where) -> tuple[torch.Tensor, ...]:
        h = torch.randn(count, 1, hidden, generator=generator, device=device()).bfloat16()
        target = torch.randint(0, vocabulary, (count,), generator=generator, device=device())
        return h.requires_grad_(), torch.arange(count, device=device()), target

    weight = torch.randn(vocabulary, hidden, generator=generator, device=device()).mul_(hidden**-0.5).bfloat16()
    weight.requires_grad_()
    h, source, target = inputs(100)
    logprob, entropy = token_logprobs(h, weight, source, target, 0.7, 64)[:2]
    upward = torch.randn(len(target), generator=generator, device=device())
    logprob.backward(upward)
    exact_h, exact_weight = (x.detach().double().requires_grad_() for x in (h, weight))
    exact = (exact_h[:, 0] @ exact_weight.T / 0.7).log_softmax(-1)
    exact[source, target].backward(upward.double())
    errors = [
        (logprob - exact[source, target]).abs().max().item(),
        (entropy + (exact.exp() * exact).sum(-1)).abs().max().item(),
    ]
    worst = min(cosine(a.grad, b.grad) for a, b in ((h, exact_h), (weight, exact_weight)))
    del exact, exact_h, exact_weight
    figures = {"logprob_error": errors[0], "entropy_error": errors[1], "worst_cosine": worst}
    # bfloat16 logits of size 5 are off by 0.02.
    figures["holds"] = max(errors) <= 0.05 and worst >= COSINE
    weight.grad, weight.main_grad = None, torch.zeros(weight.shape, device=device())  # as in training
    h, source, target = inputs(positions)
    base = memory_peak()
    figures["seconds"] = seconds(lambda: token_logprobs(h, weight, source, target, 0.7, 512)[0].sum().backward())
    if torch.cuda.is_available():
        figures["peak_gb"] = (torch.cuda.max_memory_allocated() - base) / 1e9
        figures["holds"] &= figures["peak_gb"] <= HEAD_GB
    return figures


def memory_peak() -> int:
    """Bytes in use on the GPU; and starts a new record of the peak."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


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
    model = build_model(PolicyModel.load(folder, config.model.dtype), config.training)
    load_weights(model, folder)
    return model


def experts(tiny: bool) -> dict:
    from megatron.core.transformer.moe.experts import SequentialMLP

    from spell_megatron.training.moe import GroupedExperts

    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder), tiny, num_hidden_layers=1, vocab_size=1024)
        model = load(Path(folder), run_config(Path(folder), "bfloat16", 4096, 64))
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
        model = load(Path(folder), config)
        hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device())
    tokens = torch.randint(0, 1024, (1, 200), device=device(), generator=torch.Generator(device()).manual_seed(0))
    places, end = torch.arange(200, device=device())[None], torch.full((200,), 200, device=device())
    with torch.no_grad():
        hidden = model(tokens, places, end)
        logits = model.output_layer(hidden, weight=model.output_weight)[0][:, 0]
        error = (logits - hf(tokens).logits[0]).abs().max().item()
    return {"largest_logit_difference": error, "holds": error <= 1e-3}


def update(tiny: bool) -> dict:
    prompts, response = ((100, 300), 30) if tiny else ((16_384, 32_768, 65_536, 100_000), 4096)
    longest, name = prompts[-1] + GROUP * response, gpu_name()
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder), tiny, num_hidden_layers=4)
        config = run_config(Path(folder), "bfloat16", longest, response)
        model = load(Path(folder), config)
    trainer = Trainer(model, config.training, config.rollout.sampling.temperature, config.run.steps)
    trainer.update(tree(prompts[0], response))
    figures: dict[str, object] = {}
    for prompt in prompts:
        rows, (packed,) = tree(prompt, response), pack(tree(prompt, response), longest)
        useful, line = training_cost(model.policy.arch).of(packed), {}
        # As many tokens as one row has: each row is computed on its own.
        for kind, budget in (("tree", longest), ("unshared", prompt + response)):
            config.training.tokens_per_microbatch = budget
            memory_peak()
            repeats, warm = (2, True) if kind == "tree" else (1, prompt == prompts[0])  # compiled once for all lengths
            spent = seconds(lambda: trainer.update(rows), repeats, warm)
            line[f"{kind}_seconds"] = spent
            line[f"{kind}_useful_tflops"] = useful / spent / 1e12
            if torch.cuda.is_available():
                line[f"{kind}_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        line["speedup"] = line["unshared_seconds"] / line["tree_seconds"]
        line["rows_tokens_per_second"] = GROUP * (prompt + response) / line["tree_seconds"]
        if name:
            line["mfu"] = line["tree_useful_tflops"] * 1e12 / GPUS[name].flops
        figures[f"prompt_{prompt}"] = line
    if torch.cuda.is_available():
        assume = Assumptions(reserve=0, fragmentation=0)
        config.training.tokens_per_microbatch = longest
        memory = trainer_memory(ModelSize.of(model.policy), config, 1, assume)
        figures["planned_gib"] = (memory.total - memory.buffers) / 2**30
    figures["holds"] = not torch.cuda.is_available() or line.get("mfu", 0) >= MFU
    return figures


def transfer(tiny: bool) -> dict:
    if find_spec("vllm") is None:
        return {"skipped": "vLLM is not installed", "holds": True}
    # These need what is there only beside vLLM.
    from spell_megatron.rollout.engines import Engines
    from spell_megatron.weights.push import WeightPusher
    from spell_megatron.weights.reshard import export

    ways = {"ipc": ["0"], "nccl": ["0", "1"]} if torch.cuda.is_available() else {"gloo": []}
    figures: dict[str, object] = {"holds": True}
    for way, gpus in ways.items():
        if len(gpus) > torch.cuda.device_count():
            figures[way] = {"skipped": f"needs {len(gpus)} GPUs"}
            continue
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)  # of the engines; this process has its GPU already
        with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
            folder = Path(name)
            make_checkpoint(folder, tiny, num_hidden_layers=4)
            config = run_config(folder, "bfloat16", 1024, 64)
            config.rollout = RolloutConfig(
                sampling=config.rollout.sampling,
                concurrency=8,
                gpu_memory_utilization=0.3,
                cpu_kv_cache_gib=0.25,
                extra_args=["--load-format", "dummy", "--enforce-eager"],
            )
            model = load(folder, config)
            engines = stack.enter_context(
                Engines.open(
                    config.model,
                    config.rollout,
                    folder / "logs",
                    device=config.run.device,
                    seed=config.run.seed,
                    routing=config.training.routing_replay,
                    trainers=1,
                )
            )
            assert engines.transport.name == way, engines.transport.name
            pusher = WeightPusher(engines)
            stack.callback(pusher.close)
            first = pusher.push(export(model), "1", verify=True)
            pushes = [pusher.push(export(model), str(version)).seconds for version in range(2, 5)]
            source = torch.zeros(first.bytes, dtype=torch.uint8, device=device())
            copy = seconds(lambda: source.clone())
        line = {"gigabytes": first.bytes / 1e9, "checksums_compared": first.verified, "push_seconds": min(pushes)}
        figures[way] = line | {"copy_seconds": copy, "push_by_copy": min(pushes) / copy}
    return figures


def gpu_name() -> str | None:
    """The planner's name of this GPU."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_name()
    return next((name for name in GPUS if name.split("-")[0] in found), None)


PARTS = {
    "attention": attention,
    "logprobs": logprobs,
    "experts": experts,
    "parity": parity,
    "update": update,
    "transfer": transfer,
}


def shown(figures: dict) -> str:
    """Figures in lines: plain ones in one, each group of them in a line of its own."""
    plain = {k: v for k, v in figures.items() if not isinstance(v, dict)}
    line = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in plain.items())
    return line + "".join(f"\n{'':10} {k}: {shown(v)}" for k, v in figures.items() if isinstance(v, dict))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU: proves the script only")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--out", type=Path, help="folder for gpu.json and gpu.txt")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.tiny:
        parser.exit(3, "skipped: torch sees no GPU (--tiny runs the script on a CPU)\n")
    backend.initialise(PolicyModel.of(Qwen3MoeConfig()), TrainingConfig())
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, tiny sizes"
    printed: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        printed.append(line)
        if options.out:  # at once: a run that is cut short leaves what it has
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "gpu.txt").write_text("\n".join(printed) + "\n", encoding="utf-8")

    say(f"{where}, torch {torch.__version__}, megatron-core {version('megatron-core')}")
    results: dict[str, dict] = {}
    for name in options.only:
        start = time.perf_counter()
        try:
            results[name] = PARTS[name](options.tiny)
        except Exception as error:  # the other parts are wanted all the more
            traceback.print_exc()
            results[name] = {"error": f"{type(error).__name__}: {error}", "holds": False}
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        say(f"{name:10} {shown(results[name])}   ({time.perf_counter() - start:.0f} s)")
    holds = all(result["holds"] for result in results.values())
    result = {"benchmark": "gpu", "device": where, "figures": results, "goal": "see each part", "holds": holds}
    if options.out:
        (options.out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
