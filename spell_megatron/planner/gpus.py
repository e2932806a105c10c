"""The GPUs that the planner knows, and what its estimates assume about them and their machines."""

from __future__ import annotations

from dataclasses import dataclass

from spell_megatron.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """What the planner knows of a kind of GPU. The figures are the manufacturers' (dense bfloat16, no sparsity)."""

    name: str
    memory: float
    """Bytes, as the driver reports them."""
    flops: float
    """bfloat16 matrix FLOPs per second."""
    bandwidth: float
    """Bytes per second of its memory."""
    link: float
    """Bytes per second to the other GPUs of its node, one way."""
    host_memory: float
    """Bytes of memory of its node for each GPU: the least that large clouds sell with eight of them."""


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100-80G", 81920 * 2**20, 312e12, 2.04e12, 300e9, 144 * 2**30),
        Gpu("H100-80G", 81559 * 2**20, 989e12, 3.35e12, 450e9, 212 * 2**30),
        Gpu("H200-141G", 143771 * 2**20, 989e12, 4.8e12, 450e9, 237 * 2**30),
        Gpu("B200", 183359 * 2**20, 2250e12, 8.0e12, 900e9, 237 * 2**30),
        # one to a machine, mostly; without NVLink, so that the link is PCIe
        Gpu("RTX3090-24G", 24576 * 2**20, 71e12, 0.936e12, 32e9, 64 * 2**30),
        Gpu("RTX4090-24G", 24564 * 2**20, 165e12, 1.008e12, 32e9, 64 * 2**30),
        Gpu("RTX5090-32G", 32607 * 2**20, 209e12, 1.792e12, 64e9, 64 * 2**30),
        Gpu("A6000-48G", 49140 * 2**20, 155e12, 0.768e12, 32e9, 128 * 2**30),
        Gpu("RTX6000Ada-48G", 49140 * 2**20, 364e12, 0.96e12, 32e9, 128 * 2**30),
        Gpu("L40S-48G", 46068 * 2**20, 362e12, 0.864e12, 32e9, 192 * 2**30),
    )
}


def find_gpu(name: str) -> Gpu:
    """The GPU of a name, with or without spaces, in any case, and whose size of memory may be left out.

    Raises:
        UserError: there is none.
    """
    wanted = "".join(name.split()).casefold()
    for known, gpu in GPUS.items():
        if wanted in (known.casefold(), known.split("-")[0].casefold(), f"{known}B".casefold()):
            return gpu
    raise UserError(f"The GPU {name!r} is not known. Known are {', '.join(GPUS)}.")


@dataclass(frozen=True)
class Assumptions:
    """What the estimates assume. This project has measured none of it on the GPUs above."""

    gpus_per_node: int = 8
    host_memory: float | None = None
    """Bytes of memory of a node; None: what is usual for the GPU."""
    matrix_efficiency: float = 0.45
    """Share of a GPU's FLOPs that training and prefill reach."""
    memory_efficiency: float = 0.6
    """Share of a GPU's memory bandwidth that decoding reaches."""
    link_efficiency: float = 0.7
    """Share of the links' bandwidth that collectives reach. They do not overlap with computation."""
    network: float = 50e9
    """Bytes per second of each GPU to other nodes (400 Gbit/s)."""
    host: float = 25e9
    """Bytes per second between a GPU and the memory of its host, one way (PCIe 4)."""
    reserve: float = 3 * 2**30
    """Bytes per GPU for the CUDA context, NCCL and libraries' workspaces of a trainer process."""
    fragmentation: float = 0.05
    """Share of the activations lost between the allocator's blocks."""
    mixed: float = 0.5
    """Share of the questions whose answers are neither all right nor all wrong."""
    prompt: float = 1.0
    """Length of prompts over documents as a share of the longest one allowed."""
    documents: int = 20
    """Documents of a cluster, as in the paper. The questioner and the gate see some of them."""
    response: float = 0.5
    """Length of questions and answers as a share of the longest one allowed."""
    judged: float = 500
    """Tokens of the verifier's prompt: instructions, question and two short answers."""
    verdict: float = 0.25
    """Length of judgments as a share of the longest one allowed. With this share the G judgments of each answer take
    about half the time of the answers, as the paper reports."""
    engine_workspace: float = 4 * 2**30
    """Bytes that an engine needs per GPU besides weights and KV cache."""
    engine_asleep: float = 5 * 2**30
    """Bytes per GPU that an engine keeps while it sleeps: CUDA context, NCCL, CUDA graphs, blocks of torch's allocator.
    vLLM's users report 4.8 to 6.9 GiB ("memory is still in use", its issues 17117 and 47654)."""
    process: float = 6 * 2**30
    """Bytes of host memory of a trainer process, and of an engine's process on a GPU: Python, CUDA and libraries."""
    push_tensor: float = 1.5e-3
    """Seconds of a push for each tensor besides its bytes, with its share of the HTTP. `benchmarks/push_overhead.py`
    finds 0.8 s of CPU time for the 531 tensors of Qwen3-30B-A3B."""
