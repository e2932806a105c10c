"""Parameters of a live Megatron model, in any layout, as a stream of Hugging Face tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from spell_megatron.processes.collective import from_all
from spell_megatron.training.model import TreeGPTModel
from spell_megatron.weights.buckets import BUCKET_BYTES
from spell_megatron.weights.names import Layout, Rule, global_name, rules


def local_parameters(model: TreeGPTModel, tied_head: bool = False) -> list[tuple[Rule, Tensor]]:
    """This rank's parameters and what they are made of, in Hugging Face order.

    Args:
        model: as `build_model` has built it.
        tied_head: also list the copy of the embedding that the last of several pipeline stages holds as its
            vocabulary head.
    """
    table = rules(model.policy)
    own = _own_parameters(model)
    head = own.pop("output_layer.weight", None) if model.share_embeddings_and_output_weights else None
    unknown = own.keys() - table.keys()
    if unknown:
        raise RuntimeError(f"no Hugging Face name for Megatron parameters {sorted(unknown)[:5]}")
    listed = [(rule, own[name]) for name, rule in table.items() if name in own]
    if tied_head and head is not None:
        listed.append((table["embedding.word_embeddings.weight"], head))
    return listed


def shard_place(rule: Rule) -> tuple[int, int]:
    """(number of shards, this rank's shard) of a parameter."""
    if rule.expert is not None:
        return (
            parallel_state.get_expert_tensor_parallel_world_size(),
            parallel_state.get_expert_tensor_parallel_rank(),
        )
    return (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )


def _own_parameters(model: TreeGPTModel) -> dict[str, Tensor]:
    """This rank's parameters by their names in `rules`."""
    first_layer = get_transformer_layer_offset(model.config)
    experts = (model.config.num_moe_experts or 0) // parallel_state.get_expert_model_parallel_world_size()
    first_expert = experts * parallel_state.get_expert_model_parallel_rank()
    return {global_name(name, first_layer, first_expert): p for name, p in model.named_parameters()}


def export(
    model: TreeGPTModel, bucket_bytes: int = BUCKET_BYTES, everywhere: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """`Export.stream` of a single time, with each expert by itself as in checkpoints."""
    return Export(model).stream(bucket_bytes, everywhere)


class Export:
    """The parameters of a live model as a stream of Hugging Face tensors, again and again.

    All ranks make it together. What stays the same from one time to the next is worked out once: names, shapes, and
    which ranks hold what.

    Args:
        model: as `build_model` has built it.
        fuse_experts: a matrix of all experts of a layer is one tensor [experts, rows, columns], as transformers 5 can
            store it, if it fits a bucket.
    """

    def __init__(self, model: TreeGPTModel, fuse_experts: bool = False) -> None:
        self._own = _own_parameters(model)
        if len({parameter.dtype for parameter in self._own.values()}) > 1:
            raise RuntimeError("the model's parameters have several types; buckets are of one")
        self._element = next(model.parameters()).element_size()
        self._rules, self._fuse_experts = rules(model.policy), fuse_experts
        self._holders = _Holders(model)
        self._buckets: list[_Bucket] = []
        self._bucket_bytes = 0

    @torch.no_grad()
    def stream(self, bucket_bytes: int = BUCKET_BYTES, everywhere: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Every (Hugging Face name, whole tensor) of the model on rank 0, or on every rank.

        Every rank runs the iteration; unless `everywhere`, the others send what rank 0 lacks and yield nothing.
        Names come in the order of the Hugging Face model; a tied vocabulary head is not among them and padding
        of the vocabulary is gone. Tensors may be views of the parameters: copy what must outlive the next update.

        Each shard goes straight from one rank that holds it to those that yield, which put the shards together.
        Ranks hold two buckets of about `bucket_bytes` (or two tensors, where one is larger) beside their own part.
        """
        if bucket_bytes != self._bucket_bytes:
            self._buckets, self._bucket_bytes = self._cut(bucket_bytes), bucket_bytes
        buckets, own, me = self._buckets, self._own, dist.get_rank()
        if everywhere or me == 0:
            incoming = _receive(buckets[0], own, everywhere)
            for bucket, following in zip(buckets, [*buckets[1:], None], strict=True):
                current = incoming
                if following:  # travels while this one is used
                    incoming = _receive(following, own, everywhere)
                shards = current.wait()
                for number, part in enumerate(bucket.parts):
                    yield from part.whole([parts[number].view(part.shape) for parts in shards])
            return
        sending: list[tuple[dist.Work, Tensor]] = []
        for bucket in buckets:
            if me in bucket.owners:
                if len(sending) == 2:
                    sending.pop(0)[0].wait()
                flat = torch.cat([parameter.reshape(-1) for part in bucket.parts for parameter in part.held(own)])
                sending.append((dist.isend(flat, dst=0), flat))
        for work, _ in sending:
            work.wait()

    def _cut(self, bucket_bytes: int) -> list[_Bucket]:
        """The whole model in order, the same on every rank."""
        buckets: list[_Bucket] = []
        size = 0
        for part in self._parts(bucket_bytes):
            nbytes = part.elements * self._element
            if not buckets or buckets[-1].owners != part.owners or size + nbytes > bucket_bytes:
                buckets.append(_Bucket([], part.owners))
                size = 0
            buckets[-1].parts.append(part)
            size += nbytes
        return buckets

    def _parts(self, bucket_bytes: int) -> Iterator[_Part]:
        together: dict[object, list[str]] = {}
        for name, rule in self._rules.items():
            fused = self._fuse_experts and rule.fuses
            together.setdefault((rule.layer, rule.layout) if fused else name, []).append(name)
        for names in together.values():
            rule = self._rules[names[0]]
            if len(names) > 1 and len(names) * rule.elements * self._element <= bucket_bytes:
                owners, size = self._holders.of_experts(rule)
                shape = (len(names) * size // len(owners), *_shard_shape(rule, size))
                yield _Part(tuple(names), rule, owners, size, torch.Size(shape))
                continue
            for name in names:
                rule = self._rules[name]
                owners = self._holders.of(name, rule)
                yield _Part((name,), rule, owners, len(owners), _shard_shape(rule, len(owners)))


@dataclass(frozen=True)
class _Part:
    """What travels as one piece: a parameter, or a matrix of all experts of a layer."""

    parameters: tuple[str, ...]
    """Global Megatron names."""
    rule: Rule
    """Of the first parameter."""
    owners: tuple[int, ...]
    """Global ranks, one for each shard in order."""
    sharing: int
    """Ranks, following each other among the owners, that share the same parameters."""
    shape: torch.Size
    """Of a shard. Its first dimension is that of the experts, if there are several."""

    @property
    def elements(self) -> int:
        return len(self.parameters) * self.rule.elements

    def held(self, own: dict[str, Tensor]) -> list[Tensor]:
        """The parameters that this rank holds."""
        return [own[name].detach() for name in self.parameters if name in own]

    def whole(self, shards: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The Hugging Face tensors."""
        if len(self.parameters) > 1:
            return iter([(self.rule.stored_experts, self.rule.whole_experts(shards, self.sharing))])
        return zip(self.rule.names, self.rule.whole(shards))


@dataclass(frozen=True)
class _Bucket:
    """Consecutive parts that the same ranks hold."""

    parts: list[_Part]
    owners: tuple[int, ...]


class _Incoming:
    """Shards of a bucket on their way to this rank."""

    def __init__(self, sizes: list[int]) -> None:
        self._sizes = sizes
        self._shards: list[list[Tensor] | tuple[dist.Work, Tensor]] = []

    def add(self, work: dist.Work, flat: Tensor) -> None:
        self._shards.append((work, flat))

    def add_own(self, shards: list[Tensor]) -> None:
        self._shards.append(shards)

    def wait(self) -> list[list[Tensor]]:
        """Shards by owner and part."""
        arrived = []
        for shards in self._shards:
            if isinstance(shards, tuple):
                work, flat = shards
                work.wait()
                shards = list(flat.split(self._sizes))
            arrived.append(shards)
        return arrived


def _receive(bucket: _Bucket, own: dict[str, Tensor], everywhere: bool) -> _Incoming:
    """Ask for a bucket on rank 0; with `everywhere`, all ranks ask for it and its owners hand it out."""
    sizes = [part.shape.numel() for part in bucket.parts]
    incoming, example, me = _Incoming(sizes), next(iter(own.values())), dist.get_rank()
    for rank in bucket.owners:
        mine = [part.held(own) for part in bucket.parts] if rank == me else []
        if mine and not (everywhere and dist.get_world_size() > 1):
            incoming.add_own([held[0] if len(held) == 1 else torch.stack(held) for held in mine])
            continue
        every = [parameter.reshape(-1) for held in mine for parameter in held]
        flat = torch.cat(every) if every else example.new_empty(sum(sizes))
        work = dist.broadcast(flat, src=rank, async_op=True) if everywhere else dist.irecv(flat, src=rank)
        incoming.add(work, flat)
    return incoming


def _shard_shape(rule: Rule, size: int) -> torch.Size:
    """Shape of one of `size` shards."""
    return rule.shard([torch.empty(shape, device="meta") for shape in rule.shapes], size, 0).shape


class _Holders:
    """Which ranks hold a parameter."""

    def __init__(self, model: TreeGPTModel) -> None:
        self._places = _places(model)
        self._experts = model.config.num_moe_experts or 0
        self._expert_groups = parallel_state.get_expert_model_parallel_world_size()
        self._tensor = parallel_state.get_tensor_model_parallel_world_size()
        self._expert_tensor = parallel_state.get_expert_tensor_parallel_world_size()
        self._found: dict[tuple, tuple[int, ...]] = {}

    def of(self, name: str, rule: Rule) -> tuple[int, ...]:
        """A rank for each of a parameter's shards, in order."""
        if rule.layer is not None:
            stage = self._stage(rule.layer)
        else:
            stage = 0 if name.startswith("embedding") else max(p.stage for p in self._places)
        whole = rule.layout is Layout.REPLICATED
        if rule.expert is not None:
            group = rule.expert * self._expert_groups // self._experts
            return self._first(stage, group, 1 if whole else self._expert_tensor)
        return self._first(stage, None, 1 if whole else self._tensor)

    def of_experts(self, rule: Rule) -> tuple[tuple[int, ...], int]:
        """A rank for each shard of a matrix of all experts, first those of the first experts; and the number of
        ranks that share the same experts."""
        assert rule.layer is not None
        stage = self._stage(rule.layer)
        groups = [self._first(stage, group, self._expert_tensor) for group in range(self._expert_groups)]
        return tuple(rank for group in groups for rank in group), self._expert_tensor

    def _stage(self, layer: int) -> int:
        return next(p.stage for p in self._places if layer in p.layers)

    def _first(self, stage: int, group: int | None, count: int) -> tuple[int, ...]:
        """The first rank that holds each of `count` shards, of dense layers (None) or a group of experts."""
        if (stage, group, count) not in self._found:
            holders = [p for p in self._places if p.stage == stage and group in (None, p.expert_group)]
            shards = [p.shard if group is None else p.expert_shard for p in holders]
            self._found[stage, group, count] = tuple(holders[shards.index(i)].rank for i in range(count))
        return self._found[stage, group, count]


@dataclass(frozen=True)
class _Place:
    """Which part of the model a rank holds."""

    rank: int
    stage: int
    layers: range
    shard: int
    expert_group: int
    expert_shard: int


def _places(model: TreeGPTModel) -> list[_Place]:
    """The places of all ranks, in the order of the ranks."""
    first_layer = get_transformer_layer_offset(model.config)
    mine = _Place(
        dist.get_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        range(first_layer, first_layer + len(model.decoder.layers)),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_expert_model_parallel_rank(),
        parallel_state.get_expert_tensor_parallel_rank(),
    )
    return from_all(mine)
