"""Hugging Face names and layouts of every Megatron parameter, for any tensor-parallel size.

`rules` lists them for a whole model under names with global layer and expert numbers; `global_name` turns a
rank's own parameter name into such a name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from spell_megatron.training.policy import Architecture, DeltaNet, PolicyModel


class Layout(Enum):
    """How a Megatron parameter is made of Hugging Face tensors and cut over tensor-parallel ranks."""

    REPLICATED = "the same on every rank"
    ROWS = "rows cut; padded with zero rows to a multiple of the ranks"
    COLUMNS = "columns cut"
    GROUPS = "rows of several kinds, which belong to groups of heads; a group's rows of all kinds together, then cut"
    GATE_UP = "gate and up cut each, then put on top of each other"
    BY_TURNS = "columns of gate and up by turns, as one tensor; transposed, and then as gate and up"
    TRANSPOSED = "transposed, columns cut"


@dataclass(frozen=True)
class Groups:
    """How rows of several kinds belong to groups of heads: queries, keys and values to key-value heads, say."""

    count: int
    kinds: tuple[tuple[int, ...], ...]
    """For each Hugging Face tensor the numbers of rows of each kind in it, one kind after the other."""
    gated_heads: int = 0
    """If the first tensor holds queries and gates, head by head: how many heads."""

    def joined(self, tensors: list[Tensor]) -> Tensor:
        """One tensor: for one group after the other its rows of all kinds."""
        if self.gated_heads:
            tensors = [tensors[0].unflatten(0, (self.gated_heads, 2, -1)).transpose(0, 1).flatten(0, 2), *tensors[1:]]
        kinds = [kind for x, rows in zip(tensors, self.kinds, strict=True) for kind in x.split(rows)]
        return torch.cat([kind.unflatten(0, (self.count, -1)) for kind in kinds], dim=1).flatten(0, 1)

    def separated(self, joined: Tensor) -> list[Tensor]:
        """The tensors that `joined` was made of. They may be views."""
        rows = [number // self.count for numbers in self.kinds for number in numbers]
        kinds = iter(kind.flatten(0, 1) for kind in joined.unflatten(0, (self.count, -1)).split(rows, dim=1))
        tensors = [_joined([next(kinds) for _ in numbers]) for numbers in self.kinds]
        if self.gated_heads:
            tensors[0] = tensors[0].unflatten(0, (2, self.gated_heads, -1)).transpose(0, 1).flatten(0, 2)
        return tensors


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter in terms of Hugging Face tensors."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    """Shapes of the whole tensors."""
    layout: Layout
    layer: int | None = None
    """Number of its layer; None: outside of all layers."""
    expert: int | None = None
    """Number of its expert, which the expert-tensor-parallel ranks share; None: the tensor-parallel ranks share it."""
    groups: Groups | None = None
    """Of rows in GROUPS."""

    @property
    def elements(self) -> int:
        """Number of elements of the whole tensors."""
        return sum(math.prod(shape) for shape in self.shapes)

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
            case Layout.GROUPS:
                assert self.groups is not None
                return self.groups.joined(tensors).chunk(size)[rank]
            case Layout.GATE_UP:
                return torch.cat([x.chunk(size)[rank] for x in tensors])
            case Layout.BY_TURNS:
                return torch.cat([tensors[0][..., half::2].movedim(-1, 0).chunk(size)[rank] for half in (0, 1)])
            case Layout.TRANSPOSED:
                return tensors[0].chunk(size)[rank].T

    def whole(self, shards: list[Tensor]) -> list[Tensor]:
        """The Hugging Face tensors, from the parts of all ranks in order. Results may be views."""
        match self.layout:
            case Layout.REPLICATED:
                return [shards[0]]
            case Layout.ROWS:
                return [_joined(shards)[: self.shapes[0][0]]]
            case Layout.COLUMNS:
                return [_joined(shards, dim=1)]
            case Layout.GROUPS:
                assert self.groups is not None
                return self.groups.separated(_joined(shards))
            case Layout.GATE_UP:
                return [_joined(list(parts)) for parts in zip(*(shard.chunk(2) for shard in shards))]
            case Layout.BY_TURNS:
                gate, up = (_joined(list(parts)) for parts in zip(*(shard.chunk(2) for shard in shards)))
                return [torch.stack([gate.movedim(0, -1), up.movedim(0, -1)], dim=-1).flatten(-2)]
            case Layout.TRANSPOSED:
                return [_joined(shards, dim=1).T]

    @property
    def fuses(self) -> bool:
        """Whether engines take this matrix of all experts of the layer as one tensor."""
        return self.expert is not None and self.layout in (Layout.GATE_UP, Layout.COLUMNS)

    @property
    def stored_experts(self) -> str:
        """Name of that tensor, in which transformers 5 can store them too."""
        prefix = self.names[0].rpartition(f".{self.expert}.")[0]
        return f"{prefix}.{'gate_up_proj' if self.layout is Layout.GATE_UP else 'down_proj'}"

    def whole_experts(self, shards: list[Tensor], size: int) -> Tensor:
        """The tensor [experts, rows, columns] of that name; for the rule of any one expert. It may be a view.

        Args:
            shards: [experts of a rank, rows, columns] of all ranks in the order of the experts; `size` ranks that
                follow each other share the matrices of the same experts.
        """
        groups = [shards[start : start + size] for start in range(0, len(shards), size)]
        if self.layout is Layout.COLUMNS:
            return _joined([_joined(group, dim=2) for group in groups])
        if size > 1:  # the gates of all shards come before the ups
            groups = [[part for half in zip(*(x.chunk(2, dim=1) for x in group)) for part in half] for group in groups]
        return _joined([_joined(group, dim=1) for group in groups])


def _joined(shards: list[Tensor], dim: int = 0) -> Tensor:
    return shards[0] if len(shards) == 1 else torch.cat(shards, dim=dim)


def rules(policy: PolicyModel) -> dict[str, Rule]:
    """Every parameter of the model by its global Megatron name, in the order of the Hugging Face model.

    A tied vocabulary head is not listed: it is the embedding.
    """
    arch, table = policy.arch, {}

    def add(parameter: _Parameter, layer: int | None = None) -> None:
        name = parameter.name if layer is None else "decoder.layers.{layer}." + parameter.name
        names = (name, *map(policy.named, policy.family.names[name]))
        ours, *theirs = (x.format(layer=layer, expert=parameter.expert) for x in names)
        table[ours] = Rule(tuple(theirs), parameter.shapes, parameter.layout, layer, parameter.expert, parameter.groups)

    vocabulary = ((arch.vocabulary, arch.hidden),)
    add(_Parameter("embedding.word_embeddings.weight", vocabulary, Layout.ROWS))
    for layer in range(arch.layers):
        for parameter in _layer_parameters(arch, layer):
            add(parameter, layer)
    add(_Parameter("decoder.final_layernorm.weight", ((arch.hidden,),), Layout.REPLICATED))
    if not arch.tied:
        add(_Parameter("output_layer.weight", vocabulary, Layout.ROWS))
    return table


def hf_shapes(policy: PolicyModel) -> dict[str, tuple[int, ...]]:
    """Shape of every Hugging Face tensor, in order."""
    return {name: shape for rule in rules(policy).values() for name, shape in zip(rule.names, rule.shapes, strict=True)}


def stored_tensors(policy: PolicyModel) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes of the Hugging Face tensors that each stored tensor holds, in order. Those of several experts are
    stacked."""
    stored: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in hf_shapes(policy).items():
        stored.setdefault(re.sub(rf"(\.experts)\.\d+\.({_TOGETHER})$", r"\1.\2", name), {})[name] = shape
    return stored


_TOGETHER = "(?:gate_up_proj|down_proj)(?:_bias)?"
"""Own names of tensors that are stored for all experts of a layer together."""


@dataclass(frozen=True)
class ExpertPart:
    """What belongs to one expert within a stored tensor that holds it for all experts of a layer."""

    stored: str
    """Name of the stored tensor."""
    expert: int
    rows: slice
    shape: tuple[int, ...]


def expert_parts(stored: str, shape: tuple[int, ...], biased: bool = False) -> dict[str, ExpertPart]:
    """The experts' tensors in one as transformers 5 can store it, by their names where each is stored by itself.

    It stores `experts.gate_up_proj` [experts, gate and up, hidden] and `experts.down_proj` [experts, hidden, width].
    If they are biased it always does, and these and their biases have no names of parts. {} if the tensor is none of
    these.
    """
    if biased and (match := re.fullmatch(rf"(.+\.experts)\.({_TOGETHER})", stored)):
        return {
            f"{match[1]}.{expert}.{match[2]}": ExpertPart(stored, expert, slice(0, shape[1]), shape[1:])
            for expert in range(shape[0])
        }
    match = re.fullmatch(r"(.+\.experts)\.(gate_up_proj|down_proj)", stored)
    if not match or len(shape) != 3 or (match[2] == "gate_up_proj" and shape[1] % 2):
        return {}
    names = ("gate_proj", "up_proj") if match[2] == "gate_up_proj" else ("down_proj",)
    rows = shape[1] // len(names)
    return {
        f"{match[1]}.{expert}.{name}.weight": ExpertPart(
            stored, expert, slice(place * rows, (place + 1) * rows), (rows, shape[2])
        )
        for expert in range(shape[0])
        for place, name in enumerate(names)
    }


_Shapes = tuple[tuple[int, ...], ...]


class _Parameter(NamedTuple):
    """A Megatron parameter by its name in the model or within a layer; the rest is as in `Rule`."""

    name: str
    shapes: _Shapes
    layout: Layout
    expert: int | None = None
    groups: Groups | None = None


_OF_EXPERT = "mlp.experts.local_experts.{expert}."


def _layer_parameters(arch: Architecture, layer: int) -> Iterator[_Parameter]:
    if arch.delta_net and arch.delta_layers[layer]:
        yield from _delta_net_parameters(arch.hidden, arch.delta_net)
    else:
        yield from _attention_parameters(arch)
    norm = ((arch.hidden,),)
    if arch.moe_layers[layer]:
        yield _Parameter("mlp.router.weight", ((arch.experts, arch.hidden),), Layout.REPLICATED)
        yield from _biased_expert_parameters(arch) if arch.biased_experts else _expert_parameters(arch)
        if arch.shared_ffn:
            gate_up, down = _feed_forward_shapes(arch.hidden, arch.shared_ffn)
            yield _Parameter("mlp.shared_experts.linear_fc1.weight", gate_up, Layout.GATE_UP)
            yield _Parameter("mlp.shared_experts.linear_fc2.weight", down, Layout.COLUMNS)
            yield _Parameter("mlp.shared_experts.gate_weight", ((1, arch.hidden),), Layout.REPLICATED)
    else:
        gate_up, down = _feed_forward_shapes(arch.hidden, arch.ffn)
        yield _Parameter("mlp.linear_fc1.weight", gate_up, Layout.GATE_UP)
        yield _Parameter("mlp.linear_fc2.weight", down, Layout.COLUMNS)
        if arch.mlp_bias:
            yield _Parameter("mlp.linear_fc1.bias", ((arch.ffn,), (arch.ffn,)), Layout.GATE_UP)
            yield _Parameter("mlp.linear_fc2.bias", norm, Layout.REPLICATED)
    yield _Parameter("input_layernorm.weight", norm, Layout.REPLICATED)
    yield _Parameter("pre_mlp_layernorm.weight", norm, Layout.REPLICATED)


def _expert_parameters(arch: Architecture) -> Iterator[_Parameter]:
    gate_up, down = _feed_forward_shapes(arch.hidden, arch.expert_ffn)
    for expert in range(arch.experts):
        yield _Parameter(_OF_EXPERT + "linear_fc1.weight", gate_up, Layout.GATE_UP, expert)
        yield _Parameter(_OF_EXPERT + "linear_fc2.weight", down, Layout.COLUMNS, expert)


def _biased_expert_parameters(arch: Architecture) -> Iterator[_Parameter]:
    """With the bias of the router. Of each kind those of all experts follow each other, as they are stored."""
    yield _Parameter("mlp.router.bias", ((arch.experts,),), Layout.REPLICATED)
    hidden, both, width = arch.hidden, 2 * arch.expert_ffn, arch.expert_ffn
    for name, shape, layout in (
        ("linear_fc1.weight", (hidden, both), Layout.BY_TURNS),
        ("linear_fc1.bias", (both,), Layout.BY_TURNS),
        ("linear_fc2.weight", (width, hidden), Layout.TRANSPOSED),
        ("linear_fc2.bias", (hidden,), Layout.REPLICATED),
    ):
        for expert in range(arch.experts):
            yield _Parameter(_OF_EXPERT + name, (shape,), layout, expert)


def _attention_parameters(arch: Architecture) -> Iterator[_Parameter]:
    own = "self_attention."
    queries, keys = arch.heads * arch.head_dim, arch.groups * arch.head_dim
    kinds = ((queries, queries) if arch.output_gate else (queries,), (keys,), (keys,))
    rows, groups = tuple(map(sum, kinds)), Groups(arch.groups, kinds, arch.heads if arch.output_gate else 0)
    qkv = tuple((n, arch.hidden) for n in rows)
    yield _Parameter(own + "linear_qkv.weight", qkv, Layout.GROUPS, groups=groups)
    if arch.qkv_bias:
        yield _Parameter(own + "linear_qkv.bias", tuple((n,) for n in rows), Layout.GROUPS, groups=groups)
    yield _Parameter(own + "linear_proj.weight", ((arch.hidden, queries),), Layout.COLUMNS)
    if arch.output_bias:
        yield _Parameter(own + "linear_proj.bias", ((arch.hidden,),), Layout.REPLICATED)
    if arch.sinks:
        yield _Parameter(own + "core_attention.softmax_offset", ((arch.heads,),), Layout.ROWS)
    if arch.qk_norm:
        yield _Parameter(own + "q_layernorm.weight", ((arch.head_dim,),), Layout.REPLICATED)
        yield _Parameter(own + "k_layernorm.weight", ((arch.head_dim,),), Layout.REPLICATED)


def _delta_net_parameters(hidden: int, net: DeltaNet) -> Iterator[_Parameter]:
    own, key_heads, heads = "self_attention.", net.key_heads, (net.heads,)
    keys, values = key_heads * net.key_dim, net.heads * net.value_dim
    kinds = ((keys, keys, values), (values,), heads, heads)  # queries, keys and values; gates; rates; decays
    projected = tuple((sum(rows), hidden) for rows in kinds)
    yield _Parameter(own + "in_proj.weight", projected, Layout.GROUPS, groups=Groups(key_heads, kinds))
    convolution = ((net.channels, 1, net.width),)
    yield _Parameter(own + "conv1d.weight", convolution, Layout.GROUPS, groups=Groups(key_heads, kinds[:1]))
    yield _Parameter(own + "dt_bias", (heads,), Layout.ROWS)
    yield _Parameter(own + "A_log", (heads,), Layout.ROWS)
    yield _Parameter(own + "out_norm.weight", ((net.value_dim,),), Layout.REPLICATED)
    yield _Parameter(own + "out_proj.weight", ((hidden, values),), Layout.COLUMNS)


def _feed_forward_shapes(hidden: int, width: int) -> tuple[_Shapes, _Shapes]:
    """Shapes of (gate and up, down)."""
    return ((width, hidden), (width, hidden)), ((hidden, width),)


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
    name = re.sub(r"experts\.(linear_fc[12])\.(weight|bias)(\d+)$", r"experts.local_experts.\3.\1.\2", name)
    name = re.sub(r"(?<=decoder\.layers\.)\d+", lambda m: str(int(m[0]) + first_layer), name)
    return re.sub(r"(?<=local_experts\.)\d+", lambda m: str(int(m[0]) + first_expert), name)
