"""A matrix of all experts of a layer into vLLM's parameters at once; it runs inside vLLM."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

_PLACES = {"gate_up_proj": (("w13_weight", "w1"), ("w13_weight", "w3")), "down_proj": (("w2_weight", "w2"),)}
"""vLLM's parameter and shard of each part of a fused tensor."""


def load_experts(experts: RoutedExperts, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[str]:
    """What `RoutedExperts.load_weights` does, but a fused tensor takes one call of the loader for each shard.

    vLLM takes such a tensor apart and calls the loader for every expert, though the loader takes whole ones too. In a
    layerwise reload that costs 0.4 ms for each matrix, and 48 layers of 128 experts have 18,432 of them.

    Yields:
        The parameters that something was loaded into.
    """
    for name, tensor in weights:
        if name not in _PLACES or not _whole(experts, tensor):
            yield from RoutedExperts.load_weights(experts, [(name, tensor)])
            continue
        for (own, shard), part in zip(_PLACES[name], tensor.chunk(len(_PLACES[name]), dim=1), strict=True):
            parameter = getattr(experts, own)
            parameter.weight_loader(
                param=parameter,
                loaded_weight=part,
                weight_name=f"{experts.layer_name}.{own}",
                shard_id=shard,
                expert_id=0,
                return_success=True,
            )
            yield own


def _whole(experts: RoutedExperts, tensor: torch.Tensor) -> bool:
    """Whether this worker takes (its shard of) all experts of the tensor, in their order."""
    return (
        tensor.dim() == 3
        and len(tensor) == experts.local_num_experts
        and experts.expert_map is None
        and not experts.is_fused_checkpoint_transposed
    )
