"""Hugging Face names and layouts of every Megatron parameter, for any tensor-parallel size.

`rules` lists them for a whole model under names with global layer and expert numbers; `global_name` turns a
rank's own parameter name into such a name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from spell_megatron.training.policy import Architecture, PolicyModel


class Layout(Enum):
    """How a Megatron parameter is made of Hugging Face tensors and cut over tensor-parallel ranks."""

    REPLICATED = "the same on every rank"
    ROWS = "rows cut; padded with zero rows to a multiple of the ranks"
    COLUMNS = "columns cut"
    QKV = "per key-value head: its query rows, its key rows, its value rows; cut after that"
    GATE_UP = "gate and up cut each, then put on top of each other"


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter in terms of Hugging Face tensors."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    """Shapes of the whole tensors."""
    layout: Layout
    expert: bool = False
    """Cut over the expert-tensor-parallel ranks rather than the tensor-parallel ranks."""
    groups: int = 1
    """Key-value heads (QKV only)."""

    def shard(self, tensors: list[Tensor], size: int, rank: int) -> Tensor:
        """Part of rank `rank` of `size`, from the whole Hugging Face tensors."""
        match self.layout:
            case Layout.REPLICATED:
                return tensors[0]
            case Layout.ROWS:
                whole = tensors[0]
                if missing := -whole.size(0) % size:
                    whole = torch.cat([whole, whole.new_zeros(missing, *whole.shape[1:])])
                return whole.chunk(size)[rank]
            case Layout.COLUMNS:
                return tensors[0].chunk(size, dim=1)[rank]
            case Layout.QKV:
                grouped = [x.unflatten(0, (self.groups, -1)) for x in tensors]
                return torch.cat(grouped, dim=1).flatten(0, 1).chunk(size)[rank]
            case Layout.GATE_UP:
                return torch.cat([x.chunk(size)[rank] for x in tensors])

    def whole(self, shards: list[Tensor]) -> list[Tensor]:
        """The Hugging Face tensors, from the parts of all ranks in order. Results may be views."""
        match self.layout:
            case Layout.REPLICATED:
                return [shards[0]]
            case Layout.ROWS:
                return [_joined(shards)[: self.shapes[0][0]]]
            case Layout.COLUMNS:
                return [_joined(shards, dim=1)]
            case Layout.QKV:
                grouped = _joined(shards).unflatten(0, (self.groups, -1))
                rows = [shape[0] // self.groups for shape in self.shapes]
                return [x.flatten(0, 1) for x in grouped.split(rows, dim=1)]
            case Layout.GATE_UP:
                return [_joined(list(parts)) for parts in zip(*(shard.chunk(2) for shard in shards))]


def _joined(shards: list[Tensor], dim: int = 0) -> Tensor:
    return shards[0] if len(shards) == 1 else torch.cat(shards, dim=dim)


def rules(policy: PolicyModel) -> dict[str, Rule]:
    """Every parameter of the model by its global Megatron name, in the order of the Hugging Face model.

    A tied vocabulary head is not listed: it is the embedding.
    """
    arch = policy.arch
    table = {"embedding.word_embeddings.weight": _rule("model.embed_tokens.weight", _vocabulary(arch), Layout.ROWS)}
    for layer in range(arch.layers):
        table |= _layer_rules(arch, layer)
    table["decoder.final_layernorm.weight"] = _rule("model.norm.weight", (arch.hidden,), Layout.REPLICATED)
    if not arch.tied:
        table["output_layer.weight"] = _rule("lm_head.weight", _vocabulary(arch), Layout.ROWS)
    return table


def hf_shapes(policy: PolicyModel) -> dict[str, tuple[int, ...]]:
    """Shape of every Hugging Face tensor, in order."""
    return {name: shape for rule in rules(policy).values() for name, shape in zip(rule.names, rule.shapes, strict=True)}


def _layer_rules(arch: Architecture, layer: int) -> dict[str, Rule]:
    ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
    hidden, queries, keys = arch.hidden, arch.heads * arch.head_dim, arch.groups * arch.head_dim
    table: dict[str, Rule] = {}

    def qkv(kind: str, *columns: int) -> None:
        names = tuple(f"{theirs}self_attn.{x}_proj.{kind}" for x in "qkv")
        shapes = tuple((rows, *columns) for rows in (queries, keys, keys))
        table[f"{ours}self_attention.linear_qkv.{kind}"] = Rule(names, shapes, Layout.QKV, groups=arch.groups)

    def single(our: str, their: str, shape: tuple[int, ...], layout: Layout = Layout.REPLICATED) -> None:
        table[ours + our] = _rule(theirs + their, shape, layout)

    def feed_forward(our: str, their: str, width: int, expert: bool) -> None:
        gate_up = (f"{theirs}{their}gate_proj.weight", f"{theirs}{their}up_proj.weight")
        down = (f"{theirs}{their}down_proj.weight",)
        table[f"{ours}{our}linear_fc1.weight"] = Rule(gate_up, ((width, hidden),) * 2, Layout.GATE_UP, expert)
        table[f"{ours}{our}linear_fc2.weight"] = Rule(down, ((hidden, width),), Layout.COLUMNS, expert)

    qkv("weight", hidden)
    if arch.qkv_bias:
        qkv("bias")
    single("self_attention.linear_proj.weight", "self_attn.o_proj.weight", (hidden, queries), Layout.COLUMNS)
    if arch.output_bias:
        single("self_attention.linear_proj.bias", "self_attn.o_proj.bias", (hidden,))
    if arch.qk_norm:
        single("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", (arch.head_dim,))
        single("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", (arch.head_dim,))
    if arch.moe_layers[layer]:
        single("mlp.router.weight", "mlp.gate.weight", (arch.experts, hidden))
        for expert in range(arch.experts):
            our, their = f"mlp.experts.local_experts.{expert}.", f"mlp.experts.{expert}."
            feed_forward(our, their, arch.expert_ffn, expert=True)
    else:
        feed_forward("mlp.", "mlp.", arch.ffn, expert=False)
        if arch.mlp_bias:
            gate_up = (f"{theirs}mlp.gate_proj.bias", f"{theirs}mlp.up_proj.bias")
            table[f"{ours}mlp.linear_fc1.bias"] = Rule(gate_up, ((arch.ffn,),) * 2, Layout.GATE_UP)
            single("mlp.linear_fc2.bias", "mlp.down_proj.bias", (hidden,))
    single("input_layernorm.weight", "input_layernorm.weight", (hidden,))
    single("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", (hidden,))
    return table


def _vocabulary(arch: Architecture) -> tuple[int, int]:
    return arch.vocabulary, arch.hidden


def _rule(name: str, shape: tuple[int, ...], layout: Layout) -> Rule:
    return Rule((name,), (shape,), layout)


def global_name(name: str, first_layer: int, first_expert: int) -> str:
    """The name in `rules` of a rank's parameter.

    Args:
        name: as in `model.named_parameters()`, of the plain-torch or the transformer-engine layer spec.
        first_layer: number of the pipeline stage's first layer in the whole model.
        first_expert: number of the rank's first expert in its layer.
    """
    # transformer-engine keeps a norm inside the linear layer that follows it, and all experts in one module.
    name = name.replace("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")
    name = name.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
    name = re.sub(r"experts\.(linear_fc[12])\.weight(\d+)$", r"experts.local_experts.\2.\1.weight", name)
    name = re.sub(r"(?<=decoder\.layers\.)\d+", lambda m: str(int(m[0]) + first_layer), name)
    return re.sub(r"(?<=local_experts\.)\d+", lambda m: str(int(m[0]) + first_expert), name)
