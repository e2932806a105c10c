"""Tiny policies, batches and runs shared by the trainer's tests and the processes they start."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers
from families import FAMILIES, hf_model
from hf_models import apart

from spell_megatron.checkpoint.saver import Saver
from spell_megatron.config.schema import CheckpointConfig, ModelConfig, RolloutConfig, RunConfig, TrainingConfig
from spell_megatron.config.section import Section
from spell_megatron.training import backend
from spell_megatron.training.model import build_model
from spell_megatron.training.policy import PolicyModel
from spell_megatron.training.prefix_tree import Row, Tree, pack
from spell_megatron.training.trainer import Trainer
from spell_megatron.weights.huggingface import load_weights
from spell_megatron.weights.reshard import export

VOCAB = 128
_COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=96,
    max_position_embeddings=512,
    initializer_range=0.2,
)
# With larger weights the second update of a hybrid, or of experts with bounds, depends on the last bits of its first.
_OF_HYBRIDS = {"initializer_range": 0.1}
# name: (family, fields of config.json)
POLICIES = {name: (name, _OF_HYBRIDS if "layer_types" in fields else {}) for name, (_, fields) in FAMILIES.items()} | {
    # One key-value head, a vocabulary that 2 does not divide, layers that 2 does not divide.
    "odd": (
        "qwen3",
        dict(
            tie_word_embeddings=True,
            head_dim=16,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=1,
            vocab_size=VOCAB + 3,
        ),
    ),
    # As many key heads as four ranks, which are more than the key-value heads.
    "four_key_heads": (
        "qwen3_5_text",
        _OF_HYBRIDS | dict(linear_num_key_heads=4, linear_num_value_heads=8, num_hidden_layers=3),
    ),
    "vision": ("qwen3_5_moe_text", _OF_HYBRIDS | {"vision": True}),
    "gpt_oss": ("gpt_oss", _OF_HYBRIDS),
    "three_sinks": ("gpt_oss", _OF_HYBRIDS | dict(num_attention_heads=3, num_key_value_heads=3, num_hidden_layers=3)),
    "three_heads": ("qwen3", dict(head_dim=16, num_attention_heads=3, num_key_value_heads=3)),
}


def make_policy(name: str, folder: Path, **options) -> None:
    """A random Hugging Face checkpoint without a tokenizer; `options` change its config.json."""
    family, fields = POLICIES[name]
    hf = hf_model(family, **_COMMON | fields | options)
    for name, parameter in hf.named_parameters():
        if "norm" in name:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    hf.save_pretrained(folder)


def make_rows(seed: int = 0, groups: int = 4, group_size: int = 4) -> list[Row]:
    """Groups of responses to shared prompts, one prompt that continues another's response, a repeated row."""
    rng = np.random.default_rng(seed)
    rows = []

    def add(prompt, response):
        weights, logprobs = rng.normal(size=len(response)), -rng.exponential(size=len(response))
        rows.append(
            Row(
                np.concatenate([prompt, response]),
                len(prompt),
                weights.astype(np.float32),
                logprobs.astype(np.float32),
            )
        )

    for _ in range(groups):
        prompt = rng.integers(0, VOCAB, rng.integers(5, 40))
        for _ in range(group_size):
            add(prompt, rng.integers(0, VOCAB, rng.integers(1, 20)))
    first = rows[0]
    add(first.tokens[:-1], rng.integers(0, VOCAB, 6))
    add(first.tokens[: first.prompt_length], first.tokens[first.prompt_length :])
    add(np.array([3]), rng.integers(0, VOCAB, 5))
    return rows


def every_row_alone(rows: list[Row], *unused) -> list[list[Tree]]:
    """In the place of `prefix_tree.plan`, for one rank: nothing is shared. The rows have no routings."""
    trees = [(number, tree) for number, row in enumerate(rows) for tree in pack([row], 1)]
    return [[replace(tree, row=np.full_like(tree.row, number)) for number, tree in trees]]


def make_routed_rows(seed: int = 0) -> list[Row]:
    """`make_rows` with random routings for the mixture of experts, some only from the response on. The rollout
    log-probabilities are not far from a random policy's, so that importance weights on both sides of the cap occur;
    the weights are positive, so that the loss, in which these weights multiply, is no small difference."""
    rng, rows = np.random.default_rng(seed), make_rows(seed)
    rows = recorded(rows, other_routings(rows, 2, 8, 2, seed))
    rows[1:4] = [replace(row, routing=row.routing[row.prompt_length :]) for row in rows[1:4]]
    logprobs = [rng.normal(-6.5, 2, len(row.weights)).astype(np.float32) for row in rows]
    return [replace(row, weights=abs(row.weights), rollout_logprobs=x) for row, x in zip(rows, logprobs, strict=True)]


def pieces(rows: list[Row], seed: int) -> list[list[Row]]:
    """The rows cut at random into two pieces in any order, and an empty one. Rows that begin with the same token and
    have routings stay together: which routing a shared token takes depends on the rows of its piece."""
    rng = np.random.default_rng(seed)
    together: dict[object, int] = {}
    cut: list[list[Row]] = [[], [], []]
    for number, row in enumerate(rows):
        key = ("token", row.tokens[0]) if row.routing is not None else ("row", number)
        cut[together.setdefault(key, int(rng.integers(2)))].append(row)
    return [cut[i] for i in rng.permutation(3)]


class Settings(Section):
    """The settings that trainers and their checkpoints read."""

    model: ModelConfig
    run: RunConfig = RunConfig()
    rollout: RolloutConfig = RolloutConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()


def make_config(folder: Path, **overrides) -> Settings:
    """`overrides`: dotted names with `__` for the dot."""
    values = {
        "run": {"device": "cpu", "steps": 10},
        "model": {"path": str(folder), "dtype": "float32"},
        "training": {
            "tokens_per_microbatch": 100,
            "logprob_chunk": 16,
            "optimizer": {"lr": 1e-3, "clip_grad": 1e6, "distributed": False},
        },
    }
    for name, value in overrides.items():
        *path, last = name.split("__")
        node = values
        for key in path:
            node = node.setdefault(key, {})
        node[last] = value
    return Settings(**values)


def initialise(config: Settings) -> None:
    """Process groups of the layout, on CPUs."""
    policy = PolicyModel.load(config.model.path, config.model.dtype)
    backend.initialise(policy, config.training, config.run.device, config.run.seed)


def make_trainer(config: Settings) -> Trainer:
    model = build_model(PolicyModel.load(config.model.path, config.model.dtype), config.training)
    load_weights(model, config.model.path)
    return Trainer(model, config.training, config.rollout.sampling.temperature, config.run.steps)


def update_in_pieces(trainer: Trainer, rows: list[Row], seed: int = 0) -> dict[str, float]:
    """What `trainer.update(rows)` does, piece by piece; all ranks have the rows."""
    trainer.begin()
    for piece in pieces(rows, seed):
        trainer.accumulate(piece if torch.distributed.get_rank() == 0 else None)
    return trainer.finish()


def saver(run: Path, trainer: Trainer, config: Settings) -> Saver:
    return Saver(run, trainer, config.checkpoint, config.model.path, config.model_dump_json())


def save(run: Path, step: int, trainer: Trainer, config: Settings, state: dict, rows: list[Row] | None = None) -> Path:
    """Write one checkpoint and wait until it is complete; returns its folder."""
    with saver(run, trainer, config) as saving:
        saving.save(step, state, rows)
        saving.finish()
    return run / "checkpoints" / f"step_{step:06d}"


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().float().clone() for name, tensor in export(trainer.model)}


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Gradients of the last update by Hugging Face name: the export's cuts and joins are linear."""
    kept = [parameter.data for parameter in trainer.model.parameters()]
    for parameter in trainer.model.parameters():
        parameter.data = parameter.main_grad.clone()
    result = weights(trainer)
    for parameter, data in zip(trainer.model.parameters(), kept):
        parameter.data = data
    return result


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Norm of the difference relative to the norm, over all tensors."""
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    names = sorted(a)
    x, y = (torch.cat([d[name].flatten().double() for name in names]) for d in (a, b))
    return ((x - y).norm() / y.norm()).item()


def reference(
    folder: Path, rows: list[Row], sampling: str = "none", cap: float = 2.0, routings: list | None = None
) -> tuple[dict[str, float], torch.nn.Module]:
    """Metrics of an update at temperature 0.7 by transformers and plain torch, row by row, and the model, whose
    parameters are replaced by their gradients.

    sampling, cap: importance weights. routings: experts of each row's tokens [tokens, layers, top_k], -1: the
    model's own.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    count = sum(len(row.weights) for row in rows)
    names = ("loss", "entropy", "mismatch_abs", "mismatch_kl", "importance_weight", "importance_capped")
    names += ("top_probability", "top_share")
    sums = dict.fromkeys(names, 0.0)
    for number, row in enumerate(rows):
        tokens, p = torch.from_numpy(row.tokens), row.prompt_length
        if routings is not None:
            force_experts(model, torch.from_numpy(routings[number]))
        logits = model(tokens[None]).logits[0, p - 1 : -1].float() / 0.7
        logp = logits.log_softmax(-1)
        chosen = logp.gather(-1, tokens[p:, None])[:, 0]
        with torch.no_grad():
            delta = chosen - torch.from_numpy(row.rollout_logprobs)
            ratio = delta.sum().expand_as(delta).exp() if sampling == "sequence" else delta.exp()
            weight = ratio.clamp(max=cap)
        losses = -torch.from_numpy(row.weights) * (chosen - chosen.detach()).exp()
        if sampling != "none":
            losses = losses * weight
        (losses.sum() / count).backward()
        top, likely = logp.exp().max(-1)
        columns = losses, -(logp.exp() * logp).sum(-1), delta.abs(), delta.exp() - 1 - delta, weight, ratio >= cap
        columns += top, likely == tokens[p:]
        for name, column in zip(names, columns, strict=True):
            sums[name] += column.sum().item() / count
    for parameter in model.parameters():
        parameter.data = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
    return sums, model


def near_the_policy(folder: Path, rows: list[Row], noise: float = 0.5, dtype=torch.float32) -> list[Row]:
    """The rows with rollout log-probabilities that differ by normal noise from the policy's in transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    rng, result = np.random.default_rng(0), []
    for row in rows:
        tokens, p = torch.from_numpy(row.tokens), row.prompt_length
        with torch.no_grad():
            logp = (model(tokens[None]).logits[0, p - 1 : -1].float() / 0.7).log_softmax(-1)
        chosen = logp.gather(-1, tokens[p:, None])[:, 0].numpy()
        result.append(replace(row, rollout_logprobs=chosen + rng.normal(0, noise, len(chosen)).astype(np.float32)))
    return result


def saved(model: torch.nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """Tensors under their names in a checkpoint, each expert by itself."""
    from safetensors.torch import load_file

    model.save_pretrained(folder)
    return apart(load_file(folder / "model.safetensors"))


def gates(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The routers of a transformers model."""
    return [layer.mlp.gate for layer in model.model.layers]


def force_experts(model: torch.nn.Module, experts: torch.Tensor) -> None:
    """Send the tokens of the next sequence to these experts [tokens, layers, top_k], or where they are -1 to those
    that the router of transformers chooses; the weights are computed as it does."""

    def forward(self, hidden, forced):
        logits = torch.nn.functional.linear(hidden, self.weight)
        probabilities = logits.softmax(-1, dtype=torch.float32)
        chosen = torch.where(forced < 0, probabilities.topk(self.top_k).indices, forced)
        weights = probabilities.gather(1, chosen)
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights.to(logits.dtype), chosen

    for gate, forced in zip(gates(model), experts.long().unbind(1), strict=True):
        gate.forward = lambda hidden, gate=gate, forced=forced: forward(gate, hidden, forced)


def own_routings(model: torch.nn.Module, rows: list[Row]) -> list[np.ndarray]:
    """Experts [tokens, layers, top_k] to which a transformers model sends each row's tokens."""
    chosen: list[torch.Tensor] = []
    hooks = [gate.register_forward_hook(lambda *call: chosen.append(call[2][2])) for gate in gates(model)]
    routings = []
    with torch.no_grad():
        for row in rows:
            chosen.clear()
            model(torch.from_numpy(row.tokens)[None])
            routings.append(torch.stack(chosen, 1).numpy().astype(np.uint8))
    for hook in hooks:
        hook.remove()
    return routings


def other_routings(rows: list[Row], layers: int, experts: int, top_k: int, seed: int = 0) -> list[np.ndarray]:
    """Experts [tokens, layers, top_k] drawn at random for each row."""
    rng = np.random.default_rng(seed)
    return [rng.random((len(row.tokens), layers, experts)).argsort(-1)[..., :top_k].astype(np.uint8) for row in rows]


def recorded(rows: list[Row], routings: list[np.ndarray]) -> list[Row]:
    """Rows with routings as engines return them: without the last token's."""
    return [replace(row, routing=routing[:-1]) for row, routing in zip(rows, routings, strict=True)]


def replayed(rows: list[Row]) -> list[np.ndarray]:
    """Experts [tokens, layers, top_k] that each row's tokens are to be sent to, -1: the router's own, by the
    definition: the first row, in the order of token ids, that shares a token and has a record of it."""
    layers_and_k = next(row.routing.shape[1:] for row in rows if row.routing is not None)
    known: dict[tuple, np.ndarray] = {}
    for row in sorted(rows, key=lambda row: list(row.tokens)):
        for place in row.routed:
            known.setdefault(tuple(row.tokens[: place + 1]), row.routing[place - row.routed.start])
    none = np.full(layers_and_k, -1)
    return [np.stack([known.get(tuple(row.tokens[:i]), none) for i in range(1, len(row.tokens) + 1)]) for row in rows]
