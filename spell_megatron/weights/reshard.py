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


@torch.no_grad()
def export(
    model: TreeGPTModel, bucket_bytes: int = BUCKET_BYTES, everywhere: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Stream every (Hugging Face name, whole tensor) of the model on rank 0, or on every rank.

    Every rank runs the iteration; unless `everywhere`, the others send what rank 0 lacks and yield nothing.
    Names come in the order of the Hugging Face model; a tied vocabulary head is not among them and padding
    of the vocabulary is gone. Tensors may be views of the parameters: copy what must outlive the next update.

    Each shard goes straight from one rank that holds it to those that yield, which put the shards together.
    Ranks hold two buckets of about `bucket_bytes` (or two tensors, where one is larger) beside their own part.
    """
    own, me = _own_parameters(model), dist.get_rank()
    if len({parameter.dtype for parameter in own.values()}) > 1:
        raise RuntimeError("the model's parameters have several types; buckets are of one")
    buckets = _buckets(model, rules(model.policy), bucket_bytes)
    if everywhere or me == 0:
        incoming = _receive(buckets[0], own, everywhere)
        for bucket, following in zip(buckets, [*buckets[1:], None], strict=True):
            current = incoming
            if following:  # travels while this one is used
                incoming = _receive(following, own, everywhere)
            shards = current.wait()
            for number, rule in enumerate(bucket.rules.values()):
                shape = _shard_shape(rule, len(bucket.owners))
                yield from zip(rule.names, rule.whole([parts[number].view(shape) for parts in shards]))
        return
    sending: list[tuple[dist.Work, Tensor]] = []
    for bucket in buckets:
        if me in bucket.owners:
            if len(sending) == 2:
                sending.pop(0)[0].wait()
            flat = torch.cat([own[name].detach().reshape(-1) for name in bucket.rules])
            sending.append((dist.isend(flat, dst=0), flat))
    for work, _ in sending:
        work.wait()
    return
    yield


@dataclass(frozen=True)
class _Bucket:
    """Consecutive parameters that the same ranks hold."""

    rules: dict[str, Rule]
    """By global Megatron name."""
    owners: tuple[int, ...]
    """Global ranks, one for each shard in order."""


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
        """Shards by owner and parameter."""
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
    sizes = [_shard_shape(rule, len(bucket.owners)).numel() for rule in bucket.rules.values()]
    incoming, example, me = _Incoming(sizes), next(iter(own.values())), dist.get_rank()
    for rank in bucket.owners:
        mine = [own[name].detach() for name in bucket.rules] if rank == me else []
        if mine and not (everywhere and dist.get_world_size() > 1):
            incoming.add_own(mine)
            continue
        flat = torch.cat([part.reshape(-1) for part in mine]) if mine else example.new_empty(sum(sizes))
        work = dist.broadcast(flat, src=rank, async_op=True) if everywhere else dist.irecv(flat, src=rank)
        incoming.add(work, flat)
    return incoming


def _shard_shape(rule: Rule, size: int) -> torch.Size:
    """Shape of one of `size` shards."""
    return rule.shard([torch.empty(shape, device="meta") for shape in rule.shapes], size, 0).shape


def _buckets(model: TreeGPTModel, table: dict[str, Rule], bucket_bytes: int) -> list[_Bucket]:
    """The whole model in order, the same on every rank."""
    places = _places(model)
    experts = (model.config.num_moe_experts or 0) // parallel_state.get_expert_model_parallel_world_size()
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    expert_tensor = parallel_state.get_expert_tensor_parallel_world_size()
    found: dict[tuple, tuple[int, ...]] = {}

    def owners(name: str, rule: Rule) -> tuple[int, ...]:
        if rule.layer is not None:
            stage = next(p.stage for p in places if rule.layer in p.layers)
        else:
            stage = 0 if name.startswith("embedding") else max(p.stage for p in places)
        group = None if rule.expert is None else rule.expert // experts
        count = 1 if rule.layout is Layout.REPLICATED else tensor if group is None else expert_tensor
        if (stage, group, count) not in found:
            holders = [p for p in places if p.stage == stage and group in (None, p.expert_group)]
            shards = [p.shard if group is None else p.expert_shard for p in holders]
            found[stage, group, count] = tuple(holders[shards.index(i)].rank for i in range(count))
        return found[stage, group, count]

    element = next(model.parameters()).element_size()
    buckets: list[_Bucket] = []
    size = 0
    for name, rule in table.items():
        ranks = owners(name, rule)
        nbytes = sum(torch.Size(shape).numel() for shape in rule.shapes) * element
        if not buckets or buckets[-1].owners != ranks or size + nbytes > bucket_bytes:
            buckets.append(_Bucket({}, ranks))
            size = 0
        buckets[-1].rules[name] = rule
        size += nbytes
    return buckets


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
