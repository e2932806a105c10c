"""Runs that write each batch while the trainer works on the one before (`training.staleness`)."""

import json
import signal
import time
from pathlib import Path

import pytest
from small_run import (
    SMALL,
    dump,
    finished,
    left_over,
    metrics,
    same_steps,
    same_weights,
    servers,
    signal_all,
    start,
    wait_for_step,
    weights,
)

from spell_megatron.report.timeline import common, read_timeline, seconds, steps_of

pytestmark = [pytest.mark.engine, pytest.mark.slow]

STALE = ("--training.staleness=1", "--training.importance_sampling=token", "--run.steps=4")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Folder of a run of four steps, with what it printed in output.txt."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    where = (f"--run.output_dir={folder.parent}", f"--run.name={folder.name}")
    output = finished("--config", "examples/quickstart.yaml", *where, *SMALL, *STALE)
    (folder / "output.txt").write_text(output)
    return folder


def test_each_batch_is_written_by_the_weights_before_the_last_update(whole):
    steps = metrics(whole)
    for step, wrote in ((1, 0), (2, 0), (3, 1), (4, 2)):
        versions = {(row["weight_version"], row["trained_version"]) for row in dump(whole, step)}
        assert versions == {(str(wrote), str(step - 1))}
        assert steps[step]["train/staleness"] == step - 1 - wrote
        assert steps[step]["batch/responder/rows"] == 24 and steps[step]["train/importance_capped"] < 0.1
    assert abs(steps[1]["train/importance_weight"] - 1) < 1e-5 and steps[1]["train/mismatch_abs"] < 1e-4
    for step in (2, 3, 4):
        assert abs(steps[step]["train/importance_weight"] - 1) > 1e-5 and steps[step]["train/mismatch_abs"] > 1e-3


def test_the_trainer_works_during_the_next_rollout(whole):
    assert "Updates run during the next rollouts" in (whole / "output.txt").read_text()
    for step in steps_of(read_timeline(whole)):
        update, rollout = step.when("accumulate", "update"), step.when("rollout")
        hidden, rolled_out = (metrics(whole)[step.step][f"time/{name}"] for name in ("hidden", "rollout"))
        if step.step == 4:  # the last one: no rollout follows
            assert hidden == rolled_out == 0 and not rollout
        else:
            assert 0 < hidden == pytest.approx(seconds(common(update, rollout)), abs=0.1)
            assert rolled_out == pytest.approx(seconds(rollout), abs=0.1)


def test_a_checkpoint_holds_the_next_batch_unless_it_is_the_last(whole):
    for step, there in ((2, True), (4, False)):
        folder = whole / "checkpoints" / f"step_{step:06d}"
        state = json.loads((folder / "state.json").read_text())
        assert there == (folder / "rows.safetensors").exists() == ("ready" in state)
        assert not there or (state["ready"]["step"], state["ready"]["version"]) == (3, 1)


def test_a_run_that_is_killed_and_stopped_goes_on_with_the_same_batches(whole):
    """The engine is killed in step 2, and another one gets the weights that it had. In the rollout of step 3 the run is
    asked to stop: what it has written for step 3 is in the checkpoint. In the same rollout of the resumed run all is
    killed."""
    folder = whole.parent / "killed"
    where = (f"--run.output_dir={folder.parent}", f"--run.name={folder.name}")
    rare = ("--checkpoint.every=100", "--validation.limit=10")
    process = start("--config", "examples/quickstart.yaml", *where, *SMALL[:-2], *rare, *STALE)
    wait_for_step(process, folder, 1)
    time.sleep(0.3)
    (server,) = servers(process)
    server.kill()
    wait_for_step(process, folder, 2)
    signal_all(process, signal.SIGUSR1)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 75 and "started again" in output, output[-3000:] + errors[-3000:]
    newest = folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text()
    assert newest.name == "step_000002" and json.loads((newest / "state.json").read_text())["ready"]["step"] == 3
    process = start("--resume", str(folder))
    while process.poll() is None and json.loads((folder / "status.json").read_text())["state"] != "running":
        time.sleep(0.05)
    time.sleep(0.5)
    process.kill()
    process.communicate(timeout=600)
    assert process.returncode == -signal.SIGKILL and sorted(metrics(folder)) == [0, 1, 2]
    finished("--resume", str(folder))
    same_steps(whole, folder, 4, mismatch=0.1)
    for step in (2, 3, 4):
        assert metrics(folder)[step]["train/staleness"] == 1
        expected = metrics(whole)[step]["train/importance_weight"]
        assert metrics(folder)[step]["train/importance_weight"] == pytest.approx(expected, rel=1e-4)
    assert same_weights(weights(whole, 4), weights(folder, 4))


def test_no_process_outlives_its_run(whole):
    assert not left_over()
