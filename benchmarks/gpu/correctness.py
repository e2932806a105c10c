"""Stage 1: is what the trainer computes on a GPU right?

attention   tree attention (FlexAttention) on a small tree that branches at three depths: output and gradients
            compared with a dense float64 computation
logprobs    the vocabulary head: log-probabilities, entropies and gradients compared with float64; its peak memory
            for 8 x 4,096 positions and 151,936 tokens of vocabulary
parity      logits of a small Qwen3-MoE in Megatron compared with transformers, float32
update      an update of a small Qwen3-MoE on a tree compared with one on separate sequences, float32: gradient
            norm, entropy and every weight after it
experts     grouped experts compared with one expert after the other: output, gradients and time of a layer
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from suite import (
    COSINE,
    cosine,
    device,
    main,
    memory_peak,
    random_model,
    run_config,
    seconds,
    sizes,
    tree,
)

HEAD_GB = 1.0


def deep_tree() -> list:
    """Rows that branch at depths 100, 160 and 190, one of them ending inside another."""
    from spell_megatron.training.prefix_tree import Row

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
    from spell_megatron.training.attention import tree_attention
    from spell_megatron.training.prefix_tree import pack

    heads, groups, size = (4, 2, 32) if tiny else (32, 4, 128)
    (packed,) = pack(deep_tree(), 10**9)
    end = torch.from_numpy(packed.end).to(device())
    generator = torch.Generator(device()).manual_seed(0)
    shapes = [(len(end), count, size) for count in (heads, groups, groups)]
    leaves = [torch.randn(s, generator=generator, device=device()).bfloat16().requires_grad_() for s in shapes]
    upward = torch.randn(shapes[0], generator=generator, device=device()).bfloat16()
    out = tree_attention(*leaves, end, size**-0.5)
    out.backward(upward)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    dense = dense_attention(*exact, end, size**-0.5)
    dense.backward(upward.double())
    worst = min(cosine(out, dense), *(cosine(a.grad, b.grad) for a, b in zip(leaves, exact, strict=True)))
    return {"tokens": len(end), "worst_cosine": worst, "holds": worst >= COSINE}


def dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, end: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention [tokens, heads, size] with a mask of all pairs: q attends to k if and only if k <= q < end[k]."""
    key, value = (x.repeat_interleave(query.size(1) // x.size(1), dim=1) for x in (key, value))
    places = torch.arange(len(end), device=end.device)
    allowed = (places[:, None] >= places) & (places[:, None] < end)
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~allowed, -torch.inf).softmax(-1), value)


def logprobs(tiny: bool) -> dict:
    from spell_megatron.training.logprobs import token_logprobs

    hidden, vocabulary, positions = (64, 1000, 200) if tiny else (2048, 151936, 8 * 4096)
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


def parity(tiny: bool) -> dict:
    from transformers import AutoModelForCausalLM

    from spell_megatron.weights.huggingface import load_weights

    architecture = sizes(True, num_hidden_layers=3)
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(architecture, dtype=torch.float32)
    model = random_model(architecture, run_config("float32", 256, 64).training, "float32")
    with tempfile.TemporaryDirectory() as folder:
        hf.save_pretrained(folder)
        load_weights(model, Path(folder))
    tokens = torch.randint(0, 1024, (1, 200), device=device(), generator=torch.Generator(device()).manual_seed(0))
    places, end = torch.arange(200, device=device())[None], torch.full((200,), 200, device=device())
    with torch.no_grad():
        hidden = model(tokens, places, end)
        logits = model.output_layer(hidden, weight=model.output_weight)[0][:, 0]
        error = (logits - hf.to(device())(tokens).logits[0]).abs().max().item()
    return {"largest_logit_difference": error, "holds": error <= 1e-3}


def update(tiny: bool) -> dict:
    prompt, response = 300, 40
    kinds = {"tree": prompt + 8 * response, "unshared": prompt + response}  # one row in a microbatch: nothing is shared
    outcomes = {kind: one_update(budget, tree(prompt, response)) for kind, budget in kinds.items()}
    (shared, weights), (separate, others) = outcomes["tree"], outcomes["unshared"]
    worst = max(((a - b).norm() / b.norm()).item() for a, b in zip(weights, others, strict=True))
    figures = {"sharing": shared["sharing"], "largest_weight_difference": worst}
    for name in ("grad_norm", "entropy"):
        figures[f"{name}_difference"] = abs(shared[name] / separate[name] - 1)
    # Elements with tiny gradients may move anywhere within the learning rate, which is 1e-6 of a weight of size 1.
    close = max(figures["grad_norm_difference"], figures["entropy_difference"]) <= 1e-3 and worst <= 1e-3
    return figures | {"holds": close and shared["sharing"] > 2 and separate["sharing"] == 1 and not shared["skipped"]}


def one_update(budget: int, rows: list) -> tuple[dict[str, float], list[torch.Tensor]]:
    """Metrics of the first update of a small model, and its weights after it. All updates start from one model."""
    from spell_megatron.training.trainer import Trainer

    config = run_config("float32", budget, 64)
    model = random_model(sizes(True, num_hidden_layers=3), config.training, "float32")
    trainer = Trainer(model, config.training, config.rollout.sampling.temperature, config.run.steps)
    metrics = trainer.update(rows)
    return metrics, [parameter.detach().clone() for parameter in model.parameters()]


def experts(tiny: bool) -> dict:
    from megatron.core.transformer.moe.experts import SequentialMLP

    from spell_megatron.training.moe import GroupedExperts

    training = run_config("bfloat16", 4096, 64).training
    # transformer-engine has experts of its own, and these two kinds are for machines without it.
    model = random_model(sizes(tiny, num_hidden_layers=1, vocab_size=1024), training, plain=True)
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


PARTS = {"attention": attention, "logprobs": logprobs, "parity": parity, "update": update, "experts": experts}

if __name__ == "__main__":
    main(PARTS, __doc__)
