"""Pushes of weights into vLLM's layers of float8 on a pretended machine of H100s.

usage: quantised_reload.py OLD NEW   (folders of two checkpoints of one mixture of experts)

vLLM's own model is built on CPUs with the flags of `rollout.quantization: fp8`. It loads OLD, then the worker's
extension takes a push of NEW, with the experts of a layer as one tensor. Only the kernel that turns values into float8
is made of plain torch. Prints one JSON line of what the model then holds.
"""

# ruff: noqa: E402  (imports after what they depend on)

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["VLLM_DISABLE_SHARED_EXPERTS_STREAM"] = "1"  # it would need a driver

import pretended_gpus  # noqa: F401
import torch
from vllm import _custom_ops

for kernel in (
    "cutlass_scaled_mm_supports_fp8",
    "cutlass_scaled_mm_supports_block_fp8",
    "cutlass_group_gemm_supported",
):
    setattr(_custom_ops, kernel, lambda capability: True)


def to_float8(weight: torch.Tensor, scale: None, use_per_token_if_dynamic: bool) -> tuple[torch.Tensor, torch.Tensor]:
    assert scale is None and use_per_token_if_dynamic
    scale = weight.abs().amax(dim=-1, keepdim=True).float() / 448
    return (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


_custom_ops.scaled_fp8_quant = to_float8

from vllm.triton_utils import triton


class Config:  # of Triton, which vLLM's linear attention looks at when it is imported
    def __init__(self, kwargs: dict, num_warps: int = 4, num_stages: int = 3) -> None:
        self.kwargs, self.num_warps, self.num_stages = kwargs, num_warps, num_stages


triton.Config = Config
torch.cuda.current_device = lambda: torch.device("cpu")
compiled = torch.library.Library("_C", "FRAGMENT")
if not hasattr(torch.ops._C, "silu_and_mul"):
    compiled.define("silu_and_mul(Tensor(a!) result, Tensor input) -> ()")

from safetensors.torch import load_file
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.model_executor.kernels.linear import fp8_scaled_mm_is_batch_invariant
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_processing,
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)
from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
from vllm.utils.torch_utils import set_default_torch_dtype

from spell_megatron.rollout.server import RATES, ROUTERS
from spell_megatron.rollout.worker import WorkerExtension


def tensors(folder: str) -> dict[str, torch.Tensor]:
    """Of the language model."""
    held = load_file(f"{folder}/model.safetensors")
    return {name: tensor.bfloat16() for name, tensor in held.items() if not name.startswith("model.visual.")}


def loaded(folder: str) -> torch.nn.Module:
    """A model as vLLM's loader leaves it."""
    config.compilation_config.static_forward_context.clear()  # of another model
    model = initialize_model(config)
    record_metadata_for_reloading(model)
    model.load_weights(tensors(folder).items())
    finalize_layerwise_processing(model, config.model_config)
    process_weights_after_loading(model, config.model_config, torch.device("cpu"))
    return model


def held(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


def pushed(model: torch.nn.Module, folder: str) -> dict:
    """The report of a push."""
    worker = WorkerExtension()
    worker.vllm_config, worker.weight_transfer_engine = config, SimpleNamespace(model=model)
    initialize_layerwise_reload(model)
    worker.spell_watch_update("no")
    stream = {name: tensor for name, tensor in tensors(folder).items() if ".experts." not in name}
    for prefix in {name[: name.index(".experts.")] + ".experts" for name in tensors(folder).keys() - stream.keys()}:
        gate, up, down = (
            torch.stack([tensors(folder)[f"{prefix}.{e}.{name}_proj.weight"] for e in range(experts)])
            for name in ("gate", "up", "down")
        )
        stream |= {f"{prefix}.gate_up_proj": torch.cat([gate, up], dim=1), f"{prefix}.down_proj": down}
    model.load_weights(stream.items())
    report = worker.spell_report_update()
    finalize_layerwise_reload(model, config.model_config)
    return report


old, new = sys.argv[1:]
config = AsyncEngineArgs(
    model=old,
    language_model_only="text_config" in json.loads(Path(old, "config.json").read_text()),
    dtype="bfloat16",
    quantization="fp8_per_channel",
    quantization_config={"ignore": [*ROUTERS, *RATES]},
    moe_backend="triton",
    skip_tokenizer_init=True,
    max_model_len=64,
    enforce_eager=True,
).create_engine_config()
experts = config.model_config.hf_text_config.num_experts
with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16):
    init_distributed_environment(1, 0, "tcp://127.0.0.1:29777", 0, "gloo")
    initialize_model_parallel(1, 1)
    model, fresh = loaded(old), held(loaded(new))
    before = {name: parameter.data_ptr() for name, parameter in held(model).items()}
    changed = [name for name, parameter in held(model).items() if not torch.equal(parameter, fresh[name])]
    report = pushed(model, new)
    found = {
        "types": sorted({str(parameter.dtype) for parameter in fresh.values()}),
        "changed": len(changed),
        "received": len(report["received"]),
        "missing": report["missing"],
        "unused": report["unused"],
        "moved": [name for name, parameter in held(model).items() if parameter.data_ptr() != before.pop(name, 0)],
        "gone": list(before),
        "differ": [name for name, parameter in held(model).items() if not torch.equal(parameter, fresh[name])],
        "kernels": sorted(
            {
                type(module.quant_method.moe_kernel.fused_experts).__name__
                if isinstance(module, RoutedExperts)
                else type(module.quant_method.fp8_linear).__name__
                for module in model.modules()
                if isinstance(module, (RoutedExperts, QKVParallelLinear))
            }
        ),
        "stale_scales": [
            module.layer_name
            for module in model.modules()
            if isinstance(module, RoutedExperts)
            and not torch.equal(module.quant_method.moe_quant_config.w1_scale, module.w13_weight_scale)
        ],
        "batch_invariant": all(
            fp8_scaled_mm_is_batch_invariant(module.quant_method.fp8_linear)
            for module in model.modules()
            if isinstance(module, QKVParallelLinear)
        ),
    }
print("FOUND " + json.dumps(found), flush=True)
