"""One update on prefix trees against the same update on unshared sequences, in one run on this machine.

    python benchmarks/tree_update.py [--quick] [--threads N]

Batches of 4 groups, each of 8 responses of 40 tokens to a prompt of 1,000 (25:1), on a dense and a
mixture-of-experts model (4 layers, hidden size 256, vocabulary 8,192, float32); --quick takes 2 groups and
the dense model only. All ways give the same gradient norm (checked) and go through the same trainer, one
group per microbatch, optimizer step included:

    tree                the project's update: the prompt once
    response logits     every sequence whole, in one packed row; logits of response positions only
    all logits          the same with logits of all positions, as released trainers compute them
    SPELL reference     all logits, after a pass for old log-probabilities and one of a reference model

Seconds are of CPU time, since wall time on a shared machine also measures the neighbours; ratios are
of medians over rounds in which the four take turns. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers

from spell_megatron.config import Config
from spell_megatron.training import backend

PROMPT, RESPONSE, GROUP, VOCAB = 1000, 40, 8, 8192
GOALS = {"response logits": 5.5, "all logits": 8.0, "SPELL reference": 12.0}


def hf_config(moe: bool):
    common = dict(
        vocab_size=VOCAB,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        head_dim=32,
        num_key_value_heads=2,
        intermediate_size=768,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    if not moe:
        return transformers.Qwen3Config(**common)
    return transformers.Qwen3MoeConfig(
        **common,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=384,
        norm_topk_prob=True,
        mlp_only_layers=[],
        decoder_sparse_step=1,
    )


def unshared(rows, numbers):
    """A packed row that holds the rows of these numbers whole, one after the other."""
    from spell_megatron.training.prefix_tree import Tree, pack

    parts, start = [], 0
    for number in numbers:
        (tree,) = pack([rows[number]], 1)
        parts.append(
            (
                tree.tokens,
                tree.position_ids,
                tree.end + start,
                tree.source + start,
                tree.target,
                np.full_like(tree.row, number),
                tree.offset,
                tree.fresh,
                tree.routed_by,
            )
        )
        start += len(tree.tokens)
    return Tree(*(np.concatenate(column) for column in zip(*parts)))


def plain_logprobs(all_positions: bool):
    """Log-probabilities from whole logits by autograd, of the predicting positions or of all."""

    def logprobs(hidden, weight, source, target, temperature, *unused):
        h = hidden[:, 0] if all_positions else hidden[source, 0]
        logp = F.log_softmax(F.linear(h, weight).float() / temperature, -1)
        index = source if all_positions else torch.arange(len(source))
        entropy = -(logp.detach().exp() * logp.detach())[index].sum(-1)
        return logp[index, target], entropy

    return logprobs


def measure(moe: bool, groups: int, rounds: int, config: Config) -> dict[str, float]:
    """Median seconds of each way."""
    from spell_megatron.training import trainer as module
    from spell_megatron.training.model import build_model
    from spell_megatron.training.prefix_tree import Row

    torch.manual_seed(0)
    model = build_model(hf_config(moe), config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    trainer = module.Trainer(config, hf_config(moe), model)
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, VOCAB, (groups, PROMPT))
    rows = [
        Row(
            np.concatenate([prompt, rng.integers(0, VOCAB, RESPONSE)]),
            PROMPT,
            np.full(RESPONSE, rng.normal(), np.float32),
            np.zeros(RESPONSE, np.float32),
        )
        for prompt in prompts
        for _ in range(GROUP)
    ]
    packed = [unshared(rows, range(first, first + GROUP)) for first in range(0, len(rows), GROUP)]
    project = module.plan, module.token_logprobs

    def update(way: str) -> tuple[float, float]:
        """Seconds and gradient norm of one update."""
        module.plan, module.token_logprobs = project
        if way != "tree":
            module.plan = lambda *unused: [packed]
            module.token_logprobs = plain_logprobs(way != "response logits")
        start = time.process_time()
        if way == "SPELL reference":
            for tree in packed * 2:  # the old policy, the reference policy
                with torch.no_grad():
                    batch = iter([(tree, len(tree.tokens))])
                    hidden, loss = trainer._forward(module._ResponseValues(rows), batch, model)
                    loss(hidden)
        norm = trainer.update(rows)["grad_norm"]
        return time.process_time() - start, norm

    ways = ["tree", *GOALS]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if torch.is_tensor(tensor)}
    norms = []
    for way in ways:  # also warms up
        norms.append(update(way)[1])
        model.load_state_dict(before, strict=False)
    assert max(norms) / min(norms) - 1 < 1e-4, f"the ways disagree in the gradient norm: {norms}"
    seconds = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            seconds[way].append(update(way)[0])
    module.plan, module.token_logprobs = project
    return {way: statistics.median(values) for way, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds (under two minutes)")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    config = Config(
        model={"path": Path("."), "dtype": "float32"},
        data={"documents": Path(".")},
        run={"device": "cpu"},
        training={"threads": options.threads, "tokens_per_microbatch": PROMPT + GROUP * RESPONSE},
    )
    backend.initialise(config)
    figures, holds = {}, True
    groups, rounds, kinds = (2, 1, ["dense"]) if options.quick else (4, 3, ["dense", "moe"])
    print(
        f"{groups} groups of {GROUP} responses of {RESPONSE} tokens to a prompt of {PROMPT}; tokens "
        f"{GROUP * (PROMPT + RESPONSE) / (PROMPT + GROUP * RESPONSE):.2f} to 1; {options.threads} thread(s)"
    )
    for kind in kinds:
        seconds = measure(kind == "moe", groups, rounds, config)
        for way, value in seconds.items():
            ratio = value / seconds["tree"]
            goal = f"  goal {GOALS[way]}" if way in GOALS else ""
            print(f"{kind:6s} {way:16s} {value:7.2f} s  {ratio:6.2f} x{goal}")
            figures[f"{kind} {way}"] = {"seconds": round(value, 3), "ratio": round(ratio, 2)}
            holds &= ratio >= GOALS.get(way, 0)
    backend.shutdown()
    print(json.dumps({"benchmark": "tree_update", "figures": figures, "goal": GOALS, "holds": bool(holds)}))


if __name__ == "__main__":
    main()
