"""Learned scores of attention heads (sinks) into vLLM's parameters; it runs inside vLLM."""

from __future__ import annotations

import torch
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size


def load_sinks(model: torch.nn.Module, name: str, tensor: torch.Tensor) -> str | None:
    """What vLLM's model does with its sinks, but through the parameter's loader.

    vLLM copies them into the parameter itself, which has no memory in a layerwise reload, so that nothing arrives.

    Args:
        name: Hugging Face name of a tensor.

    Returns:
        The name of the parameter; None if the tensor holds no sinks of this worker.
    """
    if not name.endswith(".self_attn.sinks"):
        return None
    own = name.replace(".self_attn.", ".attn.")
    parameter = dict(model.named_parameters()).get(own)
    if parameter is None:
        return None
    loader = getattr(parameter, "weight_loader")  # noqa: B009 (vLLM sets it)
    loader(parameter, tensor.chunk(get_tensor_model_parallel_world_size())[get_tensor_model_parallel_rank()])
    return own
