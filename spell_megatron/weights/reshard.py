"""Parameters of a live Megatron model as a stream of Hugging Face tensors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor
from transformers import PretrainedConfig

from spell_megatron.weights.names import Rule, global_name, rules


def local_parameters(
    model: torch.nn.Module, hf_config: PretrainedConfig, tied_head: bool = False
) -> list[tuple[Rule, Tensor]]:
    """This rank's parameters and what they are made of, in Hugging Face order.

    Args:
        model: as built, or wrapped (DDP).
        hf_config: the model's configuration.
        tied_head: also list the copy of the embedding that the last of several pipeline stages holds as its
            vocabulary head.
    """
    while hasattr(model, "module"):
        model = model.module
    table = rules(hf_config)
    first_layer = get_transformer_layer_offset(model.config)
    experts = (model.config.num_moe_experts or 0) // parallel_state.get_expert_model_parallel_world_size()
    first_expert = experts * parallel_state.get_expert_model_parallel_rank()
    own = {global_name(name, first_layer, first_expert): p for name, p in model.named_parameters()}
    head = own.pop("output_layer.weight", None) if model.share_embeddings_and_output_weights else None
    unknown = own.keys() - table.keys()
    if unknown:
        raise RuntimeError(f"no Hugging Face name for Megatron parameters {sorted(unknown)[:5]}")
    listed = [(rule, own[name]) for name, rule in table.items() if name in own]
    if tied_head and head is not None:
        listed.append((table["embedding.word_embeddings.weight"], head))
    return listed


@torch.no_grad()
def export(model: torch.nn.Module, hf_config: PretrainedConfig) -> Iterator[tuple[str, Tensor]]:
    """Stream (Hugging Face name, whole tensor) of this rank's pipeline stage and experts.

    Names come in the order of the Hugging Face model; a tied vocabulary head is not among them and padding
    of the vocabulary is gone. Tensors may be views of the parameters: copy what must outlive the next
    update. Every rank of a tensor-parallel group must run the iteration.
    """
    for rule, parameter in local_parameters(model, hf_config):
        yield from zip(rule.names, rule.whole(_gather(rule, parameter.detach())))


def _gather(rule: Rule, shard: Tensor) -> list[Tensor]:
    if rule.expert:
        group = parallel_state.get_expert_tensor_parallel_group()
    else:
        group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return [shard]
    shards = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(shards, shard.contiguous(), group=group)
    return shards


def metadata(
    model: torch.nn.Module, hf_config: PretrainedConfig
) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """(Hugging Face name, type, shape) of what `export` will stream, in its order, without any tensor."""
    return [
        (name, parameter.dtype, shape)
        for rule, parameter in local_parameters(model, hf_config)
        for name, shape in zip(rule.names, rule.shapes)
    ]
