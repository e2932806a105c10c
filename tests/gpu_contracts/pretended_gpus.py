"""Lets vLLM believe that it is on a machine with eight H100s. The rest of it stays as it is.

To be imported by a script before vLLM.
"""

# ruff: noqa: E402  (imports after what they depend on)

from __future__ import annotations

import sys
from types import ModuleType

for extension in (
    "_C",
    "_C_stable_libtorch",
    "_moe_C",
    "vllm_flash_attn._vllm_fa3_C",
):  # compiled; vLLM for CPUs lacks them
    sys.modules[f"vllm.{extension}"] = ModuleType(f"vllm.{extension}")

import vllm.platforms
from vllm.platforms.cuda import NonNvmlCudaPlatform
from vllm.platforms.interface import DeviceCapability


class EightH100(NonNvmlCudaPlatform):
    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
        return DeviceCapability(9, 0)

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        return "NVIDIA H100 80GB HBM3"

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        return 80 << 30

    @classmethod
    def device_count(cls) -> int:
        return 8

    def is_cumem_allocator_available(self) -> bool:  # a compiled extension
        return True


vllm.platforms._current_platform = EightH100()

import vllm.config.vllm

vllm.config.vllm.HAS_TRITON = True  # it asks for a driver

from vllm import _custom_ops

for _kernels in ("scaled_mm_supports_fp8", "scaled_mm_supports_block_fp8", "group_gemm_supported"):  # compiled
    setattr(_custom_ops, f"cutlass_{_kernels}", lambda capability: True)
