"""GPUs and transport of each server."""

from __future__ import annotations

import pytest

from spell_megatron.errors import UserError
from spell_megatron.rollout import placement
from spell_megatron.rollout.transports.gloo import GLOO
from spell_megatron.rollout.transports.ipc import IPC
from spell_megatron.rollout.transports.nccl import NCCL


def test_gpus_are_given_to_trainer_and_engines(monkeypatch):
    def placed(gpus: int, trainers: int, replicas: int = 1, tensor_parallel: int = 1, colocated: bool = False):
        monkeypatch.setattr(placement, "_visible_gpus", lambda: [str(i) for i in range(gpus)])
        engines = replicas * tensor_parallel
        try:
            places, transport = placement.place(replicas, tensor_parallel, "auto", trainers, colocated)
        finally:
            shared = placement.shares_gpus(engines, "auto", trainers, colocated)
        assert shared == (transport is IPC)
        assert placement.transport_here(engines, "auto", trainers, colocated) is transport
        return places, transport

    assert placed(8, 4, replicas=2, tensor_parallel=2) == ([["4", "5"], ["6", "7"]], NCCL)
    assert placed(1, 1) == ([["0"]], IPC)
    assert placed(4, 4, replicas=2, tensor_parallel=2) == ([["0", "1"], ["2", "3"]], IPC)
    assert placed(0, 2, replicas=2) == ([[], []], GLOO)
    assert placed(4, 0, replicas=2, tensor_parallel=2) == ([["0", "1"], ["2", "3"]], NCCL)  # an engine node
    with pytest.raises(UserError, match="rollout.replicas"):
        placed(4, 3, replicas=2)
    # By themselves they share GPUs only where there are no others; rollout.colocated has them share always.
    assert placed(4, 2, replicas=2) == ([["2"], ["3"]], NCCL)
    assert placed(4, 2, replicas=2, colocated=True) == ([["0"], ["1"]], IPC)
    assert placed(0, 2, replicas=2, colocated=True) == ([[], []], GLOO)
    with pytest.raises(UserError, match="4 GPU.*2 for the trainer.*1 engine"):
        placed(4, 2, replicas=1, colocated=True)


def test_the_transport_to_engines_elsewhere(monkeypatch):
    monkeypatch.setattr(placement, "_visible_gpus", lambda: ["0"])
    assert placement.transport_elsewhere("auto") is NCCL
    assert placement.transport_elsewhere("cpu") is GLOO
    monkeypatch.setattr(placement, "_visible_gpus", list)
    assert placement.transport_elsewhere("auto") is GLOO
