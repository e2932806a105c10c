"""How rank 0 ends a run; the rest of it is tested with engines in tests/test_train.py."""

import io
import time
from types import SimpleNamespace

import pytest
from rich.console import Console
from small_run import ROOT

from spell_megatron.ahead import Batch
from spell_megatron.config.reading import load_config
from spell_megatron.director.remote import Rollout
from spell_megatron.errors import UserError
from spell_megatron.leader import Leader
from spell_megatron.monitoring.progress import Progress
from spell_megatron.monitoring.status import Status
from spell_megatron.monitoring.stopping import StopRequest
from spell_megatron.monitoring.timeline import Timeline
from spell_megatron.report.timeline import common, read_timeline, seconds, steps_of
from spell_megatron.weights.engine_weights import Order


@pytest.fixture
def leader(tmp_path, monkeypatch):
    """A leader of a run of two steps, without engines."""
    monkeypatch.chdir(ROOT)
    config = load_config("examples/quickstart.yaml", ["--run.steps=2"])
    leader = Leader(config, tmp_path, StopRequest(tmp_path), None)
    leader._status = Status(tmp_path, 2)
    leader.progress = Progress(console=Console(file=io.StringIO()))
    return leader


def test_a_run_that_trained_nothing_is_not_done(leader):
    leader._why_none = "Prepare shorter documents."
    with pytest.raises(UserError, match=r"nothing was trained in 2 steps.*Prepare shorter documents\."):
        leader.end(2, updates=0)
    assert "done" not in leader.progress.console.file.getvalue()


def test_a_run_that_trained_in_one_step_is_done(leader):
    assert leader.end(2, updates=1) is None
    assert "done after 2 steps" in leader.progress.console.file.getvalue()


@pytest.mark.parametrize("ended", [False, True])
def test_a_rollout_that_is_given_up_begins_the_trainers_turn(ended, leader):
    """On GPUs that they share, engines sleep before the trainer's state comes back to be saved, or have ended. What was
    accumulated in the rollout is dropped."""
    events = []

    def sleep():
        events.append("sleep")
        if ended:
            raise UserError("An engine has ended.")

    leader._overlap, leader._trainer = True, SimpleNamespace(drop=lambda: events.append("drop"))
    leader._director = SimpleNamespace(roll_out=lambda *arguments: None)
    leader._engines = SimpleNamespace(sleep=sleep)
    leader._weights = SimpleNamespace(give_order=lambda order: events.append(order) or order)
    assert leader.roll_out(1) == (Order.STOP, None, {})
    assert events == ["drop", "sleep", Order.STOP]


def test_a_batch_whose_update_does_not_begin_is_in_the_checkpoint(leader):
    """The job ends, and the engines with it, when the rollout has ended and they are to free the GPUs for the update.
    Self-play has moved on: the resumed run learns from this batch first."""

    def ended():
        raise UserError("An engine has ended.")

    rows, metrics = [object()], {"selfplay/generated_tokens": 1.0}
    leader._overlap, leader._trainer = False, SimpleNamespace(drop=lambda: None)
    leader._director = SimpleNamespace(
        roll_out=lambda *arguments: Rollout(rows, metrics, time.monotonic()), state_dict=lambda: {"round": 1}
    )
    leader._engines = SimpleNamespace(sleep=ended)
    leader._weights = SimpleNamespace(sleep=ended, give_order=lambda order: order, restarts=0)
    leader._stop = SimpleNamespace(reason=lambda: "terminate")
    assert leader.roll_out(1) == (Order.STOP, None, {})
    state = leader.state(0)
    assert state["selfplay"] == {"round": 1} and leader.rows == rows
    leader._ready = Batch.restored(state["ready"], rows)
    leader._director, leader._weights.sleep = None, lambda: None  # nothing is rolled out
    order, found, found_metrics = leader.roll_out(1)
    assert order is Order.UPDATE and found == rows and found_metrics["train/staleness"] == 0
    assert leader.rows is None and "ready" not in found_metrics


def test_an_update_that_outlasts_the_next_rollout_does_not_lengthen_it(leader, tmp_path):
    """With training.staleness the seconds of rollouts, and of what they hide, are those of the step: in the metrics as
    in the timeline."""
    leader._config.training.staleness, leader._config.run.steps = 1, 3
    leader.progress = Progress(console=Console(file=io.StringIO()), timeline=Timeline(tmp_path))
    leader._overlap = False
    leader._accumulate = lambda rows: leader._trainer.work()
    row = SimpleNamespace()

    class Trainer:
        under_way = False

        def work(self):
            with leader.progress.span("accumulate"):
                time.sleep(0.2)

    def roll_out(step, version, on_progress, on_certain, meanwhile=None):
        time.sleep(0.1)
        ended = time.monotonic()
        if meanwhile:
            meanwhile()
            ended += 0.05  # the engines wrote on for a while
        return Rollout([row], {"selfplay/generated_tokens": 10.0}, ended)

    leader._trainer, leader._director = Trainer(), SimpleNamespace(roll_out=roll_out)
    leader._weights = SimpleNamespace(give_order=lambda order: order, sleep=lambda: None)
    found = {step: leader.roll_out(step)[2] for step in (1, 2, 3)}
    steps = steps_of(read_timeline(tmp_path))
    assert [step.step for step in steps] == [1, 2]  # the last batch is written already
    for step, rollout in zip(steps, (0.25, 0.15), strict=True):
        shown, rolled_out = found[step.step], step.when("rollout")
        assert rollout <= shown["time/rollout"] == pytest.approx(seconds(rolled_out), abs=0.05)
        hidden = common(rolled_out, step.when("accumulate"))
        assert 0 < shown["time/hidden"] <= 0.05 and shown["time/hidden"] == pytest.approx(seconds(hidden), abs=0.04)
    assert found[3]["time/rollout"] == found[3]["time/hidden"] == 0
    assert found[3]["rollout/tokens_per_second"] > 0  # of the batch
