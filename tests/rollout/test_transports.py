"""The channels of transports that need GPUs, as far as they run without one."""

from __future__ import annotations

from pathlib import Path

import pytest
from torchrun import torchrun

from spell_megatron.rollout.transports import TRANSPORTS


def test_trainer_ranks_that_share_their_gpus_tell_of_all_buffers():
    output = torchrun(2, Path(__file__).with_name("ipc_worker.py"), timeout=600)
    # Two ones in float32 are bytes of which 2 x (128 + 63) is the sum.
    for number in (1, 2):
        handles = {f"GPU-{rank}": ("handle of", rank, 3 * number + 382) for rank in range(2)}
        assert output.count(f"RESULT [3, 8] {handles}") == 2


def test_vllm_knows_the_receivers():
    pytest.importorskip("vllm", reason="the environment for newer versions of Megatron-Core has no vLLM")
    from vllm.distributed.weight_transfer.base import WeightTransferEngine
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    import spell_megatron.rollout.worker  # noqa: F401  (registers ours)

    for name in TRANSPORTS:
        assert issubclass(WeightTransferEngineFactory._registry[name](), WeightTransferEngine)
