"""Two trainer ranks that work during rollouts; see `test_overlap`. Engines and director are left out.

usage: overlap_worker.py FOLDER   (holds the policy)
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch.distributed as dist
from trainer_cases import Settings, difference, initialise, make_config, make_rows, make_trainer, weights

from spell_megatron.ahead import Batch
from spell_megatron.config.schema import RunConfig
from spell_megatron.config.selfplay_sections import SelfPlayConfig
from spell_megatron.director.remote import Rollout
from spell_megatron.leader import Follower, Leader
from spell_megatron.monitoring.progress import Progress
from spell_megatron.overlap import finish
from spell_megatron.training import backend
from spell_megatron.training.rows_file import read_rows, write_rows
from spell_megatron.training.swap import Swap
from spell_megatron.training.trainer import Trainer
from spell_megatron.weights.engine_weights import EngineWeights, Order


def main(folder: Path) -> None:
    config = make_config(folder, training__parallel={"processes": 2})
    initialise(config)
    first = dist.get_rank() == 0
    alone, trainer = make_trainer(config), make_trainer(config)
    stop = SimpleNamespace(reason=lambda: None)
    rank = Leader(config, folder, stop, None) if first else Follower(config, stop)
    rank._trainer, rank._engines = trainer, SimpleNamespace(sleep=lambda: None)
    rank.progress = Progress(enabled=False)
    swap = Swap(trainer.model, trainer.optimizer, "none")
    rank._weights = EngineWeights(trainer.model, None, swap, verify=False, say=print, stop=stop.reason)

    def rows(seed: int):
        return make_rows(seed) if first else None

    def same() -> bool:
        one, two = weights(trainer), weights(alone)
        return not first or difference(one, two) < 1e-5

    def roll_out(early: list, last: Order):
        """What rank 0 does in a rollout, and the others meanwhile."""
        if not first:
            return rank.roll_out(1)
        for some in early:
            rank._accumulate(some)
        return rank._give_up() if last is Order.STOP else (rank._weights.give_order(last), None, {})

    for seed in range(2):
        expected = alone.update(rows(seed))
        pieces = make_rows(seed)
        assert roll_out([pieces[3:7], pieces[:3]], Order.UPDATE) == (Order.UPDATE, None, {})
        found = finish(trainer, pieces[7:] if first else None)
        assert not trainer.under_way and found["response_tokens"] == expected["response_tokens"]
        assert roll_out([make_rows(9)], Order.STOP) == (Order.STOP, None, {})  # as if it had never begun
        assert not trainer.under_way
        assert roll_out([], Order.SKIP) == (Order.SKIP, None, {})
    assert same()
    alone.update(rows(2))
    finish(trainer, rows(2))  # a step without early rows
    assert same()
    one_step_off(rank, config, folder, alone, same)
    backend.shutdown()


class Director:
    """Has the rows of a step at once; gives up the rollouts of some."""

    def __init__(self) -> None:
        self.asked, self.given_up = [], []

    def roll_out(self, step, version, on_progress, on_certain, meanwhile=None):
        self.asked.append((step, version))
        if meanwhile:
            meanwhile()
        rows = [] if step == EMPTY else make_rows(step)
        return None if step in self.given_up else Rollout(rows, {"selfplay/generated_tokens": 1.0}, time.monotonic())

    def state_dict(self):
        return {}


EMPTY = 6  # a step whose rollout has nothing to train on


def one_step_off(rank: Leader | Follower, config: Settings, folder: Path, alone: Trainer, same: Callable) -> None:
    """With training.staleness each batch is written by the weights before the last update, and the weights are those
    of updates on the same batches, also where a rollout is given up and the run goes on from a checkpoint."""
    first, director = dist.get_rank() == 0, Director()
    if first:
        training = config.training.model_copy(update={"staleness": 1})
        rank._config = SimpleNamespace(training=training, run=RunConfig(steps=8), selfplay=SelfPlayConfig())
        rank._overlap, rank._director, rank._folder = False, director, folder
        rank._status = SimpleNamespace(update=lambda **state: None)
        rank._weights.sleep = lambda: None  # engines with GPUs of their own stay awake

    def step(number: int, stale: float = 1.0) -> None:
        order, rows, metrics = rank.roll_out(number)
        assert order is (Order.SKIP if number == EMPTY else Order.UPDATE)
        assert not first or metrics["train/staleness"] == stale
        if order is Order.UPDATE:
            finish(rank._trainer, rows)
            alone.update(make_rows(number) if first else None)
        assert same()

    step(1, stale=0)
    step(2)
    assert director.asked == ([(1, "0"), (2, "0"), (3, "1")] if first else [])
    director.given_up = [4]
    assert rank.roll_out(3)[0] is Order.STOP and not rank._trainer.under_way and same()
    if first:  # what the checkpoint of step 2 holds, and the resumed run gets
        record = json.loads(json.dumps(rank.state(2)["ready"]))
        write_rows(folder / "rows", rank.rows)
        rank._ready = Batch.restored(record, read_rows(folder / "rows"))
    director.given_up = []
    for number in range(3, 8):
        step(number)
    assert director.asked[3:] == ([(n, str(n - 2)) for n in (4, 4, 5, 6, 7, 8)] if first else [])
    assert not first or rank.rows is not None
    if first:  # a resumed run that waits for its updates again
        rank._config.training.staleness = 0
    step(8)
    assert rank.rows is None and "ready" not in rank.state(8)
    if first:
        rank._config.run = RunConfig(steps=9)
    step(9, stale=0)
    assert not first or director.asked[-1] == (9, "8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
