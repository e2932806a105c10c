"""What a worker of vLLM computes with, as pieces of Hugging Face tensors.

vLLM's kernels keep weights fused, sharded and packed. This module undoes that, so that an engine's weights can be
compared with a checkpoint, whether they came from disk or by updates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from vllm._custom_ops import causal_conv1d_weight_pack, cpu_prepack_moe_weight
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn import QwenGatedDeltaNetAttention
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from spell_megatron.training.families import ALONE, WITHIN, Family


@dataclass(frozen=True)
class Piece:
    """A block of a Hugging Face tensor."""

    name: str
    start: tuple[int, ...]
    """Place of its first element in the whole tensor."""
    values: Tensor


def pieces(model: torch.nn.Module, family: Family, tied_head: bool) -> Iterator[Piece]:
    """Everything that the model computes with. A tied head is read too, under the embedding's name.

    Raises:
        NotImplementedError: weights are kept in a way that cannot be turned back.
    """
    language_model = getattr(model, "language_model", None)
    for piece in _pieces(language_model or model, family, tied_head):
        # A model that also sees images has a language model that is like one that stands alone.
        within = language_model is not None and piece.name.startswith(ALONE)
        if family.sinks:  # vLLM's gpt-oss calls them otherwise
            piece = replace(piece, name=piece.name.replace(".attn.", ".self_attn."))
        yield replace(piece, name=WITHIN + piece.name.removeprefix(ALONE)) if within else piece


def _pieces(model: torch.nn.Module, family: Family, tied_head: bool) -> Iterator[Piece]:
    rank = get_tensor_model_parallel_rank()
    for name, module in model.named_modules():
        parent, _, own = name.rpartition(".")
        if isinstance(module, QwenGatedDeltaNetAttention):
            for own in ("A_log", "dt_bias"):
                yield Piece(f"{name}.{own}", (rank * len(getattr(module, own)),), getattr(module, own))
            yield from _convolution(f"{name}.conv1d.weight", module)
        elif own == "conv1d":
            continue  # just read
        elif isinstance(module, RoutedExperts):
            # The experts' container may stand between the layer and its experts.
            yield from _experts(name.removesuffix(".routed_experts"), module, family)
        elif isinstance(module, VocabParallelEmbedding):
            indices = module.shard_indices
            rows = indices.org_vocab_end_index - indices.org_vocab_start_index
            head = isinstance(module, ParallelLMHead)
            (embedding,) = family.names["embedding.word_embeddings.weight"]
            whole = f"{name}.weight" if head and not tied_head else embedding
            values = _matrix(module, module.embedding_dim) if head else module.weight
            yield Piece(whole, (indices.org_vocab_start_index, 0), values[:rows])
        elif isinstance(module, LinearBase):
            # Replicated layers have no partitions.
            columns = getattr(module, "input_size_per_partition", module.input_size)
            matrix, bias = _matrix(module, columns), module.bias
            if isinstance(module, RowParallelLinear):
                yield Piece(f"{name}.weight", (0, rank * matrix.size(1)), matrix)
                if bias is not None:
                    yield Piece(f"{name}.bias", (0,), bias.to(matrix.dtype))
                continue
            begin = 0
            for part, start, rows in _rows(module, own, family, rank, matrix.size(0)):
                whole = f"{parent}.{part}"
                yield Piece(f"{whole}.weight", (start, 0), matrix[begin : begin + rows])
                if bias is not None:
                    # Some kernels for CPUs keep it in float32.
                    yield Piece(f"{whole}.bias", (start,), bias[begin : begin + rows].to(matrix.dtype))
                begin += rows
        else:
            for own, values in module.named_parameters(recurse=False):
                if own == "sinks":
                    yield Piece(f"{name}.{own}", (rank * len(values),), values)
                    continue
                yield Piece(f"{name}.{own}", (0,) * values.dim(), values)


def _rows(module: LinearBase, name: str, family: Family, rank: int, rows: int) -> list[tuple[str, int, int]]:
    """(name, first row in the whole tensor, rows here) of what a linear layer has one above the other."""
    if isinstance(module, QKVParallelLinear):
        queries, keys = module.num_heads * module.head_size, module.num_kv_heads * module.head_size
        group = rank // module.num_kv_head_replicas
        parts = family.layers("decoder.layers.{layer}.self_attention.linear_qkv.weight")
        places = (rank * queries, queries), (group * keys, keys), (group * keys, keys)
        return [(part, *place) for part, place in zip(parts, places, strict=True)]
    if name == "in_proj_qkvz":
        whole = module.output_sizes
        starts = [0, whole[0], whole[0] + whole[1], 0]  # of queries, keys and values in one tensor, gates in another
        names = ["in_proj_qkv"] * 3 + ["in_proj_z"]
        return [
            (part, start + module.tp_rank * (size // module.tp_size), size // module.tp_size)
            for part, start, size in zip(names, starts, whole, strict=True)
        ]
    if name == "in_proj_ba":
        half = rows // 2
        return [(part, module.tp_rank * half, half) for part in ("in_proj_b", "in_proj_a")]
    if isinstance(module, MergedColumnParallelLinear):
        return [
            (part, rank * (rows // 2), rows // 2)
            for part in family.layers("decoder.layers.{layer}.mlp.linear_fc1.weight")
        ]
    return [(name, 0, rows)]


def _matrix(module: torch.nn.Module, columns: int) -> Tensor:
    """The matrix [out, columns] that a layer multiplies by."""
    multiply = getattr(module, "cpu_linear", None)
    if multiply is None:
        return module.weight
    # Kernels for CPUs keep a packed copy only; by the unit matrix they give it back, each value exactly.
    unit = torch.eye(columns, dtype=module.weight.dtype)
    return multiply(unit, module.weight, None).T


def _convolution(name: str, module: QwenGatedDeltaNetAttention) -> Iterator[Piece]:
    """The rows of queries, keys and values in the filter [channels, 1, width] of a gated delta net."""
    weight, width = module.conv1d.weight, module.conv_kernel_size
    if hasattr(module.conv1d, "_cpu_unpacked_conv_weight"):  # CPU kernels keep a packed copy
        weight = _in_order(weight, lambda numbers: causal_conv1d_weight_pack(numbers.view(-1, width)))
    weight, begin, whole = weight.reshape(-1, 1, width), 0, 0
    for size in (module.key_dim, module.key_dim, module.value_dim):
        rows = size // module.tp_size
        yield Piece(name, (whole + module.tp_rank * rows, 0, 0), weight[begin : begin + rows])
        begin, whole = begin + rows, whole + size


def _experts(name: str, module: RoutedExperts, family: Family) -> Iterator[Piece]:
    method, config = module.quant_method, module.moe_config
    rows = config.intermediate_size_per_partition_unpadded
    start = config.tp_rank * rows
    experts = list(range(module.local_num_experts))
    if module.expert_map is not None:
        places = module.expert_map.tolist()
        experts = [places.index(local) for local in experts]
    gate_up, down = _unpacked(module, module.w13_weight), _unpacked(module, module.w2_weight)
    if family.experts and family.experts.biased:
        for local, expert in enumerate(experts):
            whole = f"{name}.{expert}"
            yield Piece(f"{whole}.gate_up_proj", (0, 2 * start), gate_up[local, : 2 * rows].T)
            yield Piece(f"{whole}.gate_up_proj_bias", (2 * start,), module.w13_bias[local, : 2 * rows].to(down.dtype))
            yield Piece(f"{whole}.down_proj", (start, 0), down[local, :, :rows].T)
            if not start:  # the others have zeros
                yield Piece(f"{whole}.down_proj_bias", (0,), module.w2_bias[local].to(down.dtype))
        return
    own = "decoder.layers.{layer}.mlp.experts.local_experts.{expert}."
    (gate_name, up_name), (down_name,) = (family.layers(f"{own}linear_{fc}.weight") for fc in ("fc1", "fc2"))
    half = gate_up.size(1) // 2
    swapped = method.unquantized_backend is UnquantizedMoeBackend.FLASHINFER_CUTLASS
    gate, up = (half, 0) if swapped else (0, half)
    for local, expert in enumerate(experts):
        whole = f"{name}.{expert}"
        yield Piece(f"{whole}.{gate_name}.weight", (start, 0), gate_up[local, gate : gate + rows])
        yield Piece(f"{whole}.{up_name}.weight", (start, 0), gate_up[local, up : up + rows])
        yield Piece(f"{whole}.{down_name}.weight", (0, start), down[local, :, :rows])


def _unpacked(module: RoutedExperts, weight: Tensor) -> Tensor:
    """Experts' matrices [experts, out, in] as they were before they were packed for the kernel."""
    backend, kernel = module.quant_method.unquantized_backend, module.quant_method.moe_kernel
    plain = (
        UnquantizedMoeBackend.TRITON,
        UnquantizedMoeBackend.BATCHED_TRITON,
        UnquantizedMoeBackend.FLASHINFER_CUTLASS,
    )
    if backend in plain or (backend is UnquantizedMoeBackend.CPU and kernel.fused_experts._use_zentorch):
        return weight
    if backend is not UnquantizedMoeBackend.CPU:
        raise NotImplementedError(f"experts of vLLM's {backend.value} kernel cannot be read back")
    # Packing changes the order within an expert, the same for all.
    isa = kernel.fused_experts.isa
    order = _order(weight[0], lambda numbers: cpu_prepack_moe_weight(numbers.view(1, *weight.shape[1:]), isa))
    result = torch.empty_like(weight)
    result.view(len(weight), -1)[:, order] = weight.view(len(weight), -1)
    return result


def _in_order(weight: Tensor, pack: Callable[[Tensor], Tensor]) -> Tensor:
    """The values [all] of a weight as they were before they were packed."""
    result = torch.empty_like(weight).view(-1)
    result[_order(weight, pack)] = weight.reshape(-1)
    return result


def _order(weight: Tensor, pack: Callable[[Tensor], Tensor]) -> Tensor:
    """The places from which packing takes values: the order in which it puts numbers."""
    count = torch.arange(weight.numel(), dtype=torch.int32)

    def packed(numbers: Tensor) -> Tensor:
        return pack(numbers.view(weight.dtype)).reshape(-1).view(numbers.dtype).to(torch.int64)

    if weight.element_size() == 4:
        return packed(count)
    low, high = (packed(part.to(torch.int16)) for part in (count & 0xFFFF, count >> 16))
    return (high << 16) + (low & 0xFFFF)
