"""When the trainer works during a rollout, and how much of that is hidden; runs that do it are in test_train.py."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from torchrun import torchrun
from trainer_cases import make_policy

from spell_megatron.ahead import check_gpus
from spell_megatron.config.schema import RolloutConfig, TrainingConfig
from spell_megatron.errors import UserError
from spell_megatron.overlap import EarlyRows, when, why_not
from spell_megatron.rollout.engines import RunningEngines
from spell_megatron.rollout.servers import Servers
from spell_megatron.rollout.transports.gloo import GLOO
from spell_megatron.rollout.transports.ipc import IPC
from spell_megatron.rollout.transports.nccl import NCCL
from spell_megatron.training.prefix_tree import Row
from spell_megatron.training.waiting import Waiting


@pytest.mark.parametrize(
    ("transport", "cores", "source", "training", "reason"),
    [
        (NCCL, 1, Servers, {}, ""),
        (IPC, 8, Servers, {}, "share the trainer's GPUs"),
        (NCCL, 8, Servers, {"overlap": "off"}, "training.overlap is off"),
        (NCCL, 8, Servers, {"swap": "state"}, "training.swap is state"),
        (NCCL, 8, Servers, {"moe_aux_loss": 0.1}, "moe_aux_loss"),
        (GLOO, 8, Servers, {}, ""),
        (GLOO, 7, Servers, {}, "8 threads of trainer and engines share 7 cores"),
        (GLOO, 2, RunningEngines, {}, ""),  # they are elsewhere
        (GLOO, 1, RunningEngines, {}, "2 threads"),
    ],
)
def test_updates_begin_early_where_nobody_is_in_the_way(transport, cores, source, training, reason, monkeypatch):
    """Two trainer processes of one thread, two engines of three threads."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(cores))
    engines = SimpleNamespace(transport=transport, source=source.__new__(source))
    why = why_not(RolloutConfig(replicas=2, threads=3), TrainingConfig(**training), engines, 2)
    assert bool(why) == bool(reason) and reason in why


def test_one_step_off_needs_gpus_for_both():
    check_gpus(0, IPC)
    check_gpus(1, NCCL)
    check_gpus(1, GLOO)
    with pytest.raises(UserError, match="share GPUs.*Set training.staleness to 0"):
        check_gpus(1, IPC)
    engines = SimpleNamespace(transport=NCCL)
    assert when(RolloutConfig(), TrainingConfig(staleness=1), engines, 1)[0] is False


def test_only_work_before_the_end_of_the_rollout_is_hidden(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("spell_megatron.overlap.time.monotonic", lambda: now[0])
    worked = []

    def work(rows):
        worked.append(len(rows))
        now[0] += 10.0

    ones = np.ones(5, np.float32)
    early = EarlyRows(Waiting(TrainingConfig(tokens_per_microbatch=100), 2), work)
    for group in range(3):  # each fills a microbatch, and the trainer has two ranks
        early.add([Row(np.arange(65) + group, 60, ones, ones)] * 2)
    assert worked == [4] and early and len(early.rest()) == 2 and not early.rest()
    assert early.hidden(25.0) == 10.0 and early.hidden(4.0) == 4.0 and early.hidden(0.0) == 0.0


def test_all_ranks_work_during_a_rollout(tmp_path):
    """On rows that come in pieces, with the weights of one update; what a rollout that is given up has left is gone.
    With training.staleness, on the batch before, also after a resume."""
    make_policy("qwen3", tmp_path / "qwen3")
    torchrun(2, Path(__file__).with_name("overlap_worker.py"), tmp_path / "qwen3", timeout=300)
