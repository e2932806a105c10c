"""The GPUs that the planner knows, and what its estimates assume about them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """What the planner knows of a kind of GPU. The figures are the manufacturers' (dense bfloat16, no sparsity)."""

    memory: float
    """Bytes, as the driver reports them."""
    flops: float
    """bfloat16 matrix FLOPs per second."""
    bandwidth: float
    """Bytes per second of its memory."""
    link: float
    """Bytes per second to the other GPUs of its node, one way."""


GPUS = {
    "A100-80G": Gpu(81920 * 2**20, 312e12, 2.04e12, 300e9),
    "H100-80G": Gpu(81559 * 2**20, 989e12, 3.35e12, 450e9),
    "H200-141G": Gpu(143771 * 2**20, 989e12, 4.8e12, 450e9),
    "B200": Gpu(183359 * 2**20, 2250e12, 8.0e12, 900e9),
}


@dataclass(frozen=True)
class Assumptions:
    """What the estimates assume. This project has measured none of it on the GPUs above."""

    gpus_per_node: int = 8
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
    """Bytes per GPU for the CUDA context, NCCL and libraries' workspaces."""
    fragmentation: float = 0.05
    """Share of the activations lost between the allocator's blocks."""
    mixed: float = 0.5
    """Share of the questions whose answers are neither all right nor all wrong."""
    prompt: float = 1.0
    """Length of prompts over documents as a share of the longest one allowed."""
    response: float = 0.5
    """Length of questions and answers as a share of the longest one allowed."""
    judged: float = 500
    """Tokens of the verifier's prompt: instructions, question and two short answers."""
    verdict: float = 0.25
    """Length of judgments as a share of the longest one allowed. With this share the G judgments of each answer take
    about half the time of the answers, as the paper reports."""
    engine_workspace: float = 4 * 2**30
    """Bytes that an engine needs per GPU besides weights and KV cache."""
