"""Runs that are killed, stopped and resumed at random moments learn from each batch once, in its order.

The loop of `train` and rank 0's `Leader` are those of a run; self-play, trainer, engines and checkpoints are pretended.
"""

import copy
import json
import random
import time
from types import SimpleNamespace

import pytest
from small_run import ROOT

from spell_megatron import leader as leader_file
from spell_megatron import train
from spell_megatron.ahead import Batch
from spell_megatron.config.reading import load_config
from spell_megatron.director.remote import Rollout
from spell_megatron.errors import UserError
from spell_megatron.leader import Leader
from spell_megatron.monitoring.progress import Progress

STEPS = 12
EMPTY = {4, 9}
"""Batches without rows."""


class Killed(BaseException):
    pass


class World:
    """Chance, and what outlives a start of the run.

    Attributes:
        checkpoint: the newest one.
        trained: of each update, the rows of those batches that it has been made on.
        rolled_out: (step, version of the weights, number of the batch) of each rollout that has ended.
    """

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.checkpoint: dict | None = None
        self.trained: dict[int, set] = {}
        self.rolled_out: list[tuple[int, int, int]] = []
        self.stopped = False

    def strike(self, share: float = 0.05) -> None:
        drawn = self.chance.random()
        self.stopped |= drawn < share
        if share <= drawn < 2 * share:
            raise Killed


class PretendedTrainer:
    """`weights` are the rows of all updates; `accumulated` those of the one under way."""

    def __init__(self) -> None:
        self.weights: list[list] = []
        self.accumulated: list | None = None

    @property
    def under_way(self) -> bool:
        return self.accumulated is not None

    @property
    def scheduler(self):
        return SimpleNamespace(num_steps=len(self.weights))

    def begin(self) -> None:
        self.accumulated = []

    def accumulate(self, rows, progress=None) -> None:
        self.accumulated += rows

    def finish(self, progress=None):
        rows, self.accumulated = self.accumulated, None
        assert rows
        self.weights.append(sorted(rows))
        return {}

    def update(self, rows, progress=None):
        self.begin()
        self.accumulate(rows)
        return self.finish()

    def drop(self) -> None:
        self.accumulated = None


class PretendedDirector:
    """Batch n is the n-th rollout that has ended, as a place in the stream of clusters would have it."""

    def __init__(self, world: World, state: dict) -> None:
        self.world, self.ended = world, state.get("selfplay", 0)

    def roll_out(self, step, version, on_progress, on_certain, meanwhile=None):
        world = self.world
        world.strike()
        if world.stopped:
            return None
        if meanwhile:
            meanwhile()
        rows = [] if self.ended in EMPTY else [(self.ended, i) for i in range(4)]
        early = world.chance.randrange(4) if on_certain else 0
        if early:
            on_certain(rows[:early])
        world.strike()
        if world.stopped and world.chance.random() < 0.7:
            return None
        world.rolled_out.append((step, int(version), self.ended))
        self.ended += 1
        metrics = {"selfplay/generated_tokens": 1.0, "selfplay/clusters": 1.0}
        return Rollout(rows[early:], metrics, time.monotonic())

    def state_dict(self):
        return self.ended


class AtOnce:
    """In the place of `Waiting`."""

    def __init__(self, *_) -> None:
        pass

    def add(self, rows):
        return rows

    def take(self):
        return []


def start(world: World, config, overlap: bool, colocated: bool, monkeypatch) -> bool:
    """One start of the run, new or resumed; whether it has come to its end."""
    trainer, checkpoint = PretendedTrainer(), copy.deepcopy(world.checkpoint)

    class PretendedLeader(Leader):
        def __enter__(self):
            self.progress = Progress(enabled=False)
            self._status = SimpleNamespace(update=lambda **_: None)
            self._engines = SimpleNamespace(sleep=lambda: None)
            self._weights = SimpleNamespace(sleep=self._sleep, give_order=lambda order: order, restarts=0)
            self._overlap = overlap and not colocated and not config.training.staleness
            return self

        def _sleep(self):
            if colocated and world.chance.random() < 0.1:
                world.stopped = True
                raise UserError("The end of the job has ended an engine.")

        def begin(self, trainer, step, state, rows):
            self._trainer, self._director = trainer, PretendedDirector(world, state)
            if rows is not None:
                self._ready = Batch.restored(state["ready"], rows)

        def push(self, step):
            return {}

        def end_step(self, step, metrics):
            assert not trainer.under_way
            rows = () if metrics.get("train/empty") else tuple(trainer.weights[-1])
            world.trained.setdefault(step, set()).add(rows)

        def meet(self):
            pass

        def end(self, step, updates):
            return step == STEPS

    class PretendedSaver:
        root = untrained = ""

        def __init__(self, *_):
            pass

        __enter__ = __exit__ = lambda self, *_: None

        def save(self, step, state, rows):
            assert not trainer.under_way
            saved = {"step": step, "weights": trainer.weights, "state": json.loads(json.dumps(state)), "rows": rows}
            world.checkpoint = copy.deepcopy(saved)

        def poll(self):
            world.strike()

        def finish(self):
            pass

    def restore(folder, trainer):
        trainer.weights = checkpoint["weights"]
        return checkpoint["step"], checkpoint["state"], checkpoint["rows"]

    monkeypatch.setattr(leader_file, "Waiting", AtOnce)
    monkeypatch.setattr(train, "Leader", PretendedLeader)
    monkeypatch.setattr(train, "Saver", PretendedSaver)
    monkeypatch.setattr(train, "restore", restore)
    monkeypatch.setattr(train, "load_trainer", lambda policy, config: trainer)
    monkeypatch.setattr(train, "PolicyModel", SimpleNamespace(load=lambda *_: None))
    monkeypatch.setattr(train, "backend", SimpleNamespace(initialise=lambda *_: None, shutdown=lambda: None))
    monkeypatch.setattr(train, "dist", SimpleNamespace(get_rank=lambda: 0))
    monkeypatch.setattr(train, "finished", lambda config: "")
    world.stopped = False
    stop = SimpleNamespace(reason=lambda: "stop" if world.stopped else None)
    return train._run(config, checkpoint is not None, None, stop)


@pytest.mark.parametrize("changing", [False, True])
def test_every_batch_is_learned_from_once_and_in_order(changing, monkeypatch):
    """With and without training.staleness, which resumes change where `changing`, as they change run.steps; with an
    update during the rollout, after it, and on shared GPUs, whose engines end with their job."""
    monkeypatch.chdir(ROOT)
    config = load_config("examples/quickstart.yaml")
    config.validation.questions = None
    for seed in range(60):
        world = World(seed)
        draw = world.chance.choice
        staleness, overlap, colocated = draw([0, 1]), draw([False, True]), draw([False, False, True])
        config.checkpoint.every = draw([1, 2, 3, 100])
        done = False
        while not done:
            made = world.checkpoint["step"] if world.checkpoint else 0
            config.run.steps = draw(range(made + 1, STEPS + 1)) if changing else STEPS
            staleness = draw([0, 1]) if changing else staleness
            config.training.staleness = 0 if colocated else staleness
            try:
                done = start(world, config, overlap, colocated, monkeypatch)
            except Killed:
                continue
        batches = [() if n in EMPTY else tuple((n, i) for i in range(4)) for n in range(STEPS)]
        assert world.trained == {n + 1: {rows} for n, rows in enumerate(batches)}, seed
        assert world.checkpoint["weights"] == [list(rows) for rows in batches if rows], seed
        for step, version, batch in world.rolled_out:
            assert batch == step - 1, (seed, step)
            ahead = config.training.staleness and step > 1
            assert version in (step - 1, step - 2) if changing else version == step - 1 - ahead, (seed, step)
