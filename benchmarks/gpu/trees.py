"""Stage 3: what do prefix trees save on a GPU? One prompt of 16K to 100K tokens with 8 responses of 4,096 tokens.

attention_N   one layer's attention, forward and backward, over the tree: time compared with flash attention over
              the 8 separate sequences, and with the same tree cut into rectangles, each one call of flash attention
update_N      an update of a slice of Qwen3-30B-A3B (4 layers): time and peak memory of the tree and of the 8
              separate sequences
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from suite import COSINE, GROUP, cosine, device, main, memory_peak, random_model, run_config, seconds, sizes, tree

PROMPTS = (16_384, 100_000, 32_768, 65_536)
RESPONSE = 4096


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
    from spell_megatron.training import attention_cpu

    small, attention_cpu.SMALL = attention_cpu.SMALL, 0  # flash attention takes no masks
    try:
        rectangles = attention_cpu.plan(end)
    finally:
        attention_cpu.SMALL = small
    return FlashRectangles.apply(query, key, value, rectangles, scale)


def attention(prompt: int, tiny: bool) -> dict:
    from spell_megatron.training.attention import tree_attention
    from spell_megatron.training.prefix_tree import pack

    heads, groups, size = (4, 2, 32) if tiny else (32, 4, 128)
    prompt, response = (prompt // 100, 50) if tiny else (prompt, RESPONSE)
    scale = size**-0.5
    generator = torch.Generator(device()).manual_seed(0)

    def inputs(tokens: int) -> list[torch.Tensor]:
        shapes = (tokens, heads, size), (tokens, groups, size), (tokens, groups, size)
        return [torch.randn(s, generator=generator, device=device()).bfloat16().requires_grad_() for s in shapes]

    (packed,) = pack(tree(prompt, response), 10**9)
    end = torch.from_numpy(packed.end).to(device())
    leaves = inputs(len(end))
    sequence = [x.transpose(0, 1)[None].detach().requires_grad_() for x in inputs(prompt + response)]

    def shared(kind: Callable) -> None:
        kind(*leaves, end, scale).sum().backward()

    def unshared() -> None:
        for _ in range(GROUP):
            F.scaled_dot_product_attention(*sequence, is_causal=True, scale=scale, enable_gqa=True).sum().backward()

    mine, theirs = seconds(partial(shared, tree_attention)), seconds(unshared, 1)
    pairs = prompt**2 / 2 + GROUP * (response * prompt + response**2 / 2)
    figures = {"tree_seconds": mine, "unshared_flash_seconds": theirs, "speedup": theirs / mine}
    figures |= {"tree_tflops": 12 * pairs * heads * size / mine / 1e12, "holds": tiny or mine < theirs}
    if torch.cuda.is_available():
        figures["rectangles_seconds"] = seconds(partial(shared, flash_rectangles))
        with torch.no_grad():
            worst = cosine(flash_rectangles(*leaves, end, scale), tree_attention(*leaves, end, scale))
        figures |= {"rectangles_cosine": worst, "holds": figures["holds"] and worst >= COSINE}
    return figures


@cache
def trainer(tiny: bool):
    """The trainer of the slice; and its settings, in which a part sets the tokens per microbatch."""
    from spell_megatron.training.trainer import Trainer

    config = run_config("bfloat16", max(PROMPTS) + GROUP * RESPONSE, RESPONSE)
    model = random_model(sizes(tiny, num_hidden_layers=4), config.training)
    return Trainer(model, config.training, config.rollout.sampling.temperature, config.run.steps), config.training


def update(prompt: int, tiny: bool) -> dict:
    prompt, response = (prompt // 100, 30) if tiny else (prompt, RESPONSE)
    own, training = trainer(tiny)
    figures: dict[str, float | bool] = {}
    # With as many tokens as one row has, each row is computed on its own.
    for kind, budget in (("tree", prompt + GROUP * response), ("unshared", prompt + response)):
        training.tokens_per_microbatch = budget
        memory_peak()
        repeats, warm = (2, True) if kind == "tree" else (1, prompt <= PROMPTS[0])  # compiled once for all lengths
        figures[f"{kind}_seconds"] = seconds(lambda: own.update(tree(prompt, response)), repeats, warm)
        if torch.cuda.is_available():
            figures[f"{kind}_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    figures["speedup"] = figures["unshared_seconds"] / figures["tree_seconds"]
    figures["rows_tokens_per_second"] = GROUP * (prompt + response) / figures["tree_seconds"]
    return figures | {"holds": tiny or figures["speedup"] > 1}


PARTS = {f"attention_{prompt}": partial(attention, prompt) for prompt in PROMPTS}
PARTS |= {f"update_{prompt}": partial(update, prompt) for prompt in PROMPTS}

if __name__ == "__main__":
    main(PARTS, __doc__)
