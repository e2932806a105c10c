"""Compiles FlexAttention, as `training.attention_gpu` calls it, for a GPU that is not there.

usage: flex_compiler.py 80|90|frames

`torch.compile` captures the graphs of forward and backward on the CPU. Their tensors are moved to a fake GPU. Inductor
writes the kernels, and Triton and ptxas compile them for this compute capability (80: A100, 90: H100). Only loading
them is left out. Prints one line for each graph: FORWARD or BACKWARD, and the bytes of shared memory of its kernels.

`frames` compiles no kernels. It prints how often `torch.compile` starts anew over rows of many lengths.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from types import SimpleNamespace
from typing import Any

os.environ |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as attention

from spell_megatron.training.attention_gpu import flex_block_mask

WANTED = sys.argv[1]
MAJOR, MINOR = int(WANTED[0]) if WANTED.isdigit() else 0, 0
# Of a block on an H100 and on an A100, in bytes.
SHARED_MEMORY, PROCESSORS = (232448, 132) if MAJOR >= 9 else (166912, 108)
HEADS, GROUPS, HEAD_DIM = 32, 4, 128
GPU = torch.device("cuda", 0)


def capture() -> list[tuple[str, torch.fx.GraphModule]]:
    """The graphs that `torch.compile` makes for rows of any length: all queries, and a rank's part of them."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    graphs: list[tuple[str, torch.fx.GraphModule]] = []

    def keep(kind: str) -> Any:
        return lambda graph, inputs: graphs.append((kind, graph)) or graph

    backend = aot_autograd(
        fw_compiler=keep("FORWARD"),
        bw_compiler=keep("BACKWARD"),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    compiled = torch.compile(attention.flex_attention, backend=backend)
    for length, cut in ((384, False), (768, False), (768, True)):
        queries = [(0, length // 4), (3 * length // 4, length)] if cut else None
        out = attend(compiled, length, queries, HEADS, GROUPS, HEAD_DIM, torch.bfloat16)
        with contextlib.suppress(NotImplementedError):  # a CPU cannot run the graph
            out.sum().backward()
    # The first is of that length alone. Later ones are of any length; the last has a part of the queries.
    return graphs[2:]


def attend(
    compiled: Any, length: int, queries: Any, heads: int, groups: int, head_dim: int, dtype: torch.dtype
) -> Tensor:
    """Attention as in `training.attention.tree_attention`, over a prompt with two answers."""
    end = torch.full((length,), length)
    end[length // 2 : 3 * length // 4] = 3 * length // 4
    asking = sum(stop - start for start, stop in queries) if queries else length
    q, k, v = (
        torch.randn(tokens, n, head_dim, dtype=dtype, requires_grad=True).transpose(0, 1)[None]
        for n, tokens in ((heads, asking), (groups, length), (groups, length))
    )
    mask = flex_block_mask(end, queries)
    return compiled(q, k, v, block_mask=mask, scale=head_dim**-0.5, enable_gqa=heads != groups)


def frames() -> int:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(attention.flex_attention, backend=counter)
    for length in (390, 640, 900, 1128, 1024, 128, 150, 2001, 857, 1410, 512, 768, 110, 64, 129, 1664, 256, 257):
        attend(compiled, length, None, 8, 2, 16, torch.float32)
    return counter.frame_count


def pretend_a_gpu() -> None:
    """Tell torch, inductor and Triton that there is one GPU of this compute capability."""
    import torch._dynamo.device_interface as interfaces
    import torch._inductor.scheduler
    import torch._inductor.utils
    import torch._subclasses.fake_tensor
    import torch.utils._triton
    import triton
    from torch._inductor.runtime import triton_helpers
    from triton.backends.compiler import GPUTarget

    properties = SimpleNamespace(
        name="A GPU that is not there",
        major=MAJOR,
        minor=MINOR,
        total_memory=80 << 30,
        multi_processor_count=PROCESSORS,
        L2_cache_size=50 << 20,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        regs_per_multiprocessor=65536,
        warp_size=32,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=SHARED_MEMORY,
        shared_memory_per_multiprocessor=SHARED_MEMORY + 1024,
        uuid="GPU-0",
        is_integrated=0,
        gcnArchName="",
        clock_rate=1980000,
        memory_clock_rate=2619000,
        memory_bus_width=5120,
    )
    answers = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": properties.name,
        "get_device_properties": properties,
        "get_device_capability": (MAJOR, MINOR),
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
    }
    for name in ("_lazy_init", "set_device", "set_rng_state", "synchronize"):
        answers[name] = None
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.random.get_rng_state = torch.cuda.get_rng_state
    for name in ("_cuda_getCurrentRawStream", "_cuda_setDevice", "_cuda_exchangeDevice"):
        setattr(torch._C, name, lambda device: 0)

    answers |= {
        "get_compute_capability": int(WANTED),
        "is_triton_capable": True,
        "raise_if_triton_unavailable": None,
        "maybe_exchange_device": 0,
        "exchange_device": 0,
    }
    for of in (interfaces.CudaInterface, interfaces.CudaInterface.Worker):
        for name, answer in answers.items():
            if hasattr(of, name):
                setattr(of, name, staticmethod(lambda *_, answer=answer, **__: answer))
    for module in (torch.utils._triton, torch._inductor.scheduler, torch._inductor.utils):
        if hasattr(module, "has_triton"):
            module.has_triton = lambda *_: True
    torch._subclasses.fake_tensor.init_gpu_context = lambda device: None
    triton_helpers.set_driver_to_gpu = lambda: None

    class Driver:
        """Triton's."""

        class utils:  # noqa: N801
            @staticmethod
            def get_device_properties(device: int) -> dict[str, int]:
                sizes = {"max_shared_mem": SHARED_MEMORY, "multiprocessor_count": PROCESSORS}
                return sizes | {"max_num_regs": 65536, "warpSize": 32}

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", int(WANTED), 32)

        def get_current_device(self) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return GPU

        def get_device_interface(self) -> Any:
            return torch.cuda

        def is_active(self) -> bool:
            return True

    triton.runtime.driver.set_active(Driver())
    # A build of torch for CPUs cannot copy between fake tensors of a GPU. Only their strides matter.
    flex = sys.modules["torch._higher_order_ops.flex_attention"]
    permuted = flex._permute_strides

    def permuted_without_copy(out: Tensor, strides: tuple) -> Tensor:
        copy, Tensor.copy_ = Tensor.copy_, lambda to, _: to
        try:
            return permuted(out, strides)
        finally:
            Tensor.copy_ = copy

    flex._permute_strides = permuted_without_copy


def compile_graphs(graphs: list[tuple[str, torch.fx.GraphModule]]) -> None:
    import torch._inductor.config
    from torch._guards import TracingContext, detect_fake_mode, tracing
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    kernels: dict[str, int] = {}

    def precompile(self: Any, *_: object, **__: object) -> None:
        """Compile, but load nothing."""
        for config in self.configs:
            kernel = self._precompile_config(config).kernel
            assert kernel.asm["cubin"]
            kernels[self.fn.__name__] = max(kernels.get(self.fn.__name__, 0), kernel.metadata.shared)
        self.compile_results, self.launchers = [], [lambda *_, **__: None]

    CachingAutotuner.precompile = precompile
    for name in ("use_static_cuda_launcher", "use_static_triton_launcher"):
        if hasattr(torch._inductor.config, name):
            setattr(torch._inductor.config, name, False)
    for kind, graph in graphs:
        values = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
        mode = detect_fake_mode(values)
        _move(graph, mode)
        inputs = [_moved(value, mode) for value in values]
        with tracing(TracingContext(mode)), torch.no_grad():
            compile_fx_inner(graph, inputs, is_backward=kind == "BACKWARD")
        print(kind, json.dumps(kernels), flush=True)
        kernels.clear()


def _move(graph: torch.fx.GraphModule, mode: Any) -> None:
    """Let a graph and those inside it be of tensors on the GPU."""
    for module in graph.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                if "device" in node.kwargs:
                    node.kwargs = {**node.kwargs, "device": GPU}
                if "val" in node.meta:
                    node.meta["val"] = _moved(node.meta["val"], mode)
                node.meta.pop("tensor_meta", None)
            module.recompile()


def _moved(value: Any, mode: Any) -> Any:
    if isinstance(value, Tensor):
        with mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=GPU)
    return type(value)(_moved(part, mode) for part in value) if isinstance(value, list | tuple) else value


attention._validate_device = lambda *tensors: None  # it refuses gradients on CPUs
torch.set_num_threads(1)
if WANTED == "frames":
    print("FRAMES", frames())
else:
    captured = capture()
    pretend_a_gpu()
    compile_graphs(captured)
