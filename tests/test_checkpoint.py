"""Saving, resuming and what can go wrong, on one process."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file
from trainer_cases import (
    difference,
    initialise,
    make_config,
    make_policy,
    make_rows,
    make_trainer,
    save,
    saver,
    weights,
)

from spell_megatron.checkpoint import restore
from spell_megatron.checkpoint import saver as saver_file
from spell_megatron.checkpoint.folder import best, latest, note_score
from spell_megatron.checkpoint.restore import load
from spell_megatron.errors import UserError
from spell_megatron.training import backend
from spell_megatron.training.prefix_tree import Row


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    make_policy("qwen3", folder)
    initialise(make_config(folder))
    yield folder
    backend.shutdown()


@pytest.fixture(scope="module")
def saved(policy, tmp_path_factory):
    """A run with checkpoints of steps 1, 2 and 3 of which the newest two are kept."""
    run = tmp_path_factory.mktemp("run")
    config = make_config(policy, checkpoint__keep=2)
    trainer = make_trainer(config)
    for step in (1, 2, 3):
        trainer.update(make_rows(step))
        save(run, step, trainer, config, {"step": step, "history": {"a": [1, "ü"]}})
    return run, trainer, config


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_layout_and_retention(saved):
    run, trainer, _ = saved
    assert names(run) == ["latest", "step_000002", "step_000003"]
    assert latest(run) == run / "checkpoints" / "step_000003"
    folder = latest(run)
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "hf",
        "meta.json",
        "rng",
        "state.json",
        "trainer",
    ]
    assert json.loads((folder / "config.json").read_text())["checkpoint"]["keep"] == 2
    assert json.loads((folder / "meta.json").read_text())["step"] == 3
    exported = load_file(folder / "hf" / "model.safetensors")
    assert difference(exported, weights(trainer)) == 0


def test_the_best_checkpoint_is_kept(policy, tmp_path):
    config = make_config(policy, checkpoint__keep=1)
    trainer = make_trainer(config)
    for step, score in ((1, 0.2), (2, 0.5), (3, 0.4), (4, 0.3)):
        save(tmp_path, step, trainer, config, {})
        note_score(tmp_path, step, score)
    assert best(tmp_path) == {"checkpoint": "step_000002", "score": 0.5}
    assert names(tmp_path) == ["best.json", "latest", "step_000002", "step_000004"]


def test_the_helper_of_a_trainer_that_is_killed_ends(tmp_path):
    """And leaves no file."""
    code = (
        "import time; from megatron.core.dist_checkpointing.strategies import filesystem_async as megatron\n"
        "from spell_megatron.checkpoint.saver import _start_manager\n"
        "if __name__ == '__main__':\n"
        "    _start_manager()\n"
        "    megatron._results_queue.put('is there')\n"
        "    print(megatron._results_queue._manager._process.pid, flush=True)\n"
        "    time.sleep(60)"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) as process:
        helper = psutil.Process(int(process.stdout.readline()))
        assert helper.is_running()
        process.kill()
    helper.wait(30)
    assert list(tmp_path.iterdir()) == []


def test_no_checkpoint_yet(tmp_path):
    assert latest(tmp_path) is None


@pytest.mark.parametrize("distributed", [False, True])
def test_resume_continues_exactly(distributed, policy, tmp_path):
    """Random numbers drawn after saving, the next three updates and the weights are identical."""
    config = make_config(policy, training__optimizer__distributed=distributed, training__optimizer__warmup_steps=4)
    trainer = make_trainer(config)
    trainer.update(make_rows(0))
    save(tmp_path, 1, trainer, config, {"step": 1})

    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    def go_on(trainer):
        metrics = [trainer.update(make_rows(seed)) for seed in (1, 2, 3)]
        return [(m["loss"], m["grad_norm"], m["lr"]) for m in metrics]

    drawn, expected = draw(), go_on(trainer)
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    other = make_trainer(config)
    assert load(latest(tmp_path), other) == {"step": 1}
    assert draw() == drawn
    assert go_on(other) == expected
    assert difference(weights(other), weights(trainer)) == 0
    assert [lr for _, _, lr in expected] == pytest.approx([5e-4, 7.5e-4, 1e-3])


@pytest.mark.parametrize("distributed", [False, True])
def test_resume_before_the_first_update(distributed, policy, tmp_path):
    config = make_config(policy, training__optimizer__distributed=distributed)
    trainer = make_trainer(config)
    plain = make_trainer(config)
    save(tmp_path, 0, trainer, config, {})
    assert difference(weights(trainer), weights(plain)) == 0
    resumed = make_trainer(config)
    load(latest(tmp_path), resumed)
    for each in (trainer, plain, resumed):
        for seed in (0, 1):
            each.update(make_rows(seed))
    assert difference(weights(trainer), weights(plain)) == 0
    assert difference(weights(resumed), weights(plain)) == 0


@pytest.mark.parametrize("distributed", [False, True])
def test_optimizer_settings_come_from_the_configuration(distributed, policy, tmp_path):
    config = make_config(policy, training__optimizer__distributed=distributed)
    trainer = make_trainer(config)
    trainer.update(make_rows())
    save(tmp_path, 1, trainer, config, {})
    changed = make_config(policy, training__optimizer__distributed=distributed, training__optimizer__lr=5e-5)
    other = make_trainer(changed)
    load(latest(tmp_path), other)
    assert other.update(make_rows())["lr"] == 5e-5


def test_bfloat16_resumes_with_its_float32_master_weights(policy, tmp_path):
    config = make_config(
        policy, model__dtype="bfloat16", training__optimizer__distributed=True, training__optimizer__lr=1e-5
    )
    trainer = make_trainer(config)
    trainer.update(make_rows(0))
    save(tmp_path, 1, trainer, config, {})
    other = make_trainer(config)
    load(latest(tmp_path), other)
    for seed in (1, 2, 3):
        assert other.update(make_rows(seed))["loss"] == trainer.update(make_rows(seed))["loss"]
    assert difference(weights(other), weights(trainer)) == 0


@pytest.fixture
def held(monkeypatch, tmp_path):
    """Writing processes do nothing until `held.go` exists; then first what `held.first` says."""

    class Held(saver_file.TemporalAsyncCaller):
        go = tmp_path / "go"

        @staticmethod
        def first():
            pass

        def schedule_async_call(self, request):
            def write(*args, **kwargs):
                while not Held.go.exists():
                    time.sleep(0.01)
                Held.first()
                request.async_fn(*args, **kwargs)

            super().schedule_async_call(request._replace(async_fn=write))

    monkeypatch.setattr(saver_file, "TemporalAsyncCaller", Held)
    return Held


@pytest.mark.parametrize("distributed", [False, True])
def test_asynchronous_save_holds_what_was_there_when_it_began(distributed, policy, held, tmp_path):
    """Weights move before anything is written; the checkpoint has no name until all is."""
    config = make_config(policy, training__optimizer__distributed=distributed, checkpoint__asynchronous=True)
    run = tmp_path / "run"
    trainer = make_trainer(config)
    trainer.update(make_rows(0))
    with saver(run, trainer, config) as saving:
        saving.save(1, {"step": 1})
        expected = [trainer.update(make_rows(seed))["grad_norm"] for seed in (1, 2)]
        saving.poll()
        assert names(run) == ["step_000001.tmp"] and latest(run) is None
        held.go.touch()
        saving.save(2, {"step": 2})  # completes the one before
        assert latest(run).name == "step_000001"
        resumed = make_trainer(config)
        assert load(latest(run), resumed) == {"step": 1}
        assert [resumed.update(make_rows(seed))["grad_norm"] for seed in (1, 2)] == expected
        assert difference(weights(resumed), weights(trainer)) == 0
        while "step_000002" not in names(run):
            saving.poll()
    assert names(run) == ["latest", "step_000001", "step_000002"]


def test_asynchronous_save_that_fails_or_is_left(policy, held, tmp_path):
    run = tmp_path / "run"
    config = make_config(policy, checkpoint__asynchronous=True)
    trainer = make_trainer(config)
    trainer.update(make_rows(0))

    def full_disk():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    with saver(run, trainer, config) as saving:
        saving.save(1, {})
        held.go.touch()
        saving.finish()
        held.first = full_disk
        saving.save(2, {})
        # torch says "unexpected pos" where a disk is full in the middle of a tensor
        with pytest.raises(UserError, match="Writing a checkpoint to .* failed: rank 0: .*(too large|unexpected pos)"):
            saving.finish()
        assert names(run) == ["latest", "step_000001"]
        held.go.unlink()
        saving.save(3, {})
        (writer,) = [process for process in active_children() if "Manager" not in process.name]
    writer.join(timeout=600)
    assert writer.exitcode == -signal.SIGKILL
    assert names(run) == ["latest", "step_000001", "step_000003.tmp"]
    assert latest(run).name == "step_000001"


def test_incomplete_and_missing_folders(saved, tmp_path):
    import shutil

    run, trainer, _ = saved
    shutil.copytree(run, tmp_path / "run")
    root = tmp_path / "run" / "checkpoints"
    (root / "step_000003" / "meta.json").unlink()
    with pytest.raises(UserError, match="step_000003 is incomplete.*Complete ones are step_000002"):
        latest(tmp_path / "run")
    with pytest.raises(UserError, match="is incomplete"):
        load(root / "step_000003", trainer)
    shutil.rmtree(root / "step_000003")
    with pytest.raises(UserError, match="step_000003 does not exist"):
        latest(tmp_path / "run")


def test_another_model_is_refused(saved, tmp_path):
    run, *_ = saved
    make_policy("llama", tmp_path / "other")
    with pytest.raises(UserError, match="model.path"):
        load(latest(run), make_trainer(make_config(tmp_path / "other")))


def test_another_vocabulary_is_refused(saved, tmp_path):
    run, trainer, _ = saved
    folder = tmp_path / "step_000003"
    shutil.copytree(latest(run), folder)
    config = json.loads((folder / "hf" / "config.json").read_text())
    (folder / "hf" / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 1}))
    with pytest.raises(UserError, match="vocabulary"):
        load(folder, trainer)


def test_a_model_of_equal_tensors_with_other_positions_is_refused(saved, tmp_path):
    run, trainer, _ = saved
    folder = tmp_path / "step_000003"
    shutil.copytree(latest(run), folder)
    config = json.loads((folder / "hf" / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] *= 2
    (folder / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="rope_parameters"):
        load(folder, trainer)


def test_leftovers_of_an_interrupted_save_are_removed(policy, tmp_path):
    left = tmp_path / "checkpoints" / "step_000001.tmp"
    left.mkdir(parents=True)
    (left / "half").write_text("x")
    config = make_config(policy)
    trainer = make_trainer(config)
    save(tmp_path, 2, trainer, config, {"n": 1})
    save(tmp_path, 2, trainer, config, {"n": 2})  # the same step again replaces it
    assert names(tmp_path) == ["latest", "step_000002"]
    assert load(latest(tmp_path), trainer) == {"n": 2}


@pytest.mark.parametrize(
    ("limit", "rows", "reason"),
    [(100_000, 0, ".*Raise the limit .ulimit -f.*"), (8_000_000, 3_000_000, "SafetensorError: .*File too large.*")],
)
def test_full_disk(limit, rows, reason, saved, policy):
    """A limit on file sizes makes real writes fail as a full disk does: nothing is half-written. `rows` tokens of the
    next update are written too."""
    run, trainer, config = saved
    before = names(run)
    none = np.zeros(0, np.float32)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(UserError, match=f"Writing a checkpoint to .* failed: {reason}untouched"):
            save(run, 4, trainer, config, {}, [Row(np.arange(rows), rows, none, none)] if rows else None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert names(run) == before
    assert load(latest(run), trainer)["step"] == 3


def test_too_little_space_is_found_before_writing(saved, monkeypatch):
    run, trainer, config = saved
    monkeypatch.setattr(saver_file.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    before = names(run)
    with pytest.raises(UserError, match="has 0.0 GB left"):
        save(run, 5, trainer, config, {})
    assert names(run) == before


@pytest.mark.parametrize("asynchronous", [False, True])
def test_killed_while_saving(asynchronous, policy, tmp_path):
    """A process killed in the middle of a save leaves the checkpoint before it as the latest one."""
    script = tmp_path / "killed.py"
    script.write_text(
        textwrap.dedent("""
        import os, signal, sys
        from pathlib import Path

        def main():
            from trainer_cases import initialise, make_config, make_trainer, save
            from spell_megatron.checkpoint import saver
            config = make_config(Path(sys.argv[1]), checkpoint__asynchronous=sys.argv[3] == "True")
            initialise(config)
            trainer = make_trainer(config)
            save(Path(sys.argv[2]), 1, trainer, config, {"step": 1})
            saver._save_hf = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
            save(Path(sys.argv[2]), 2, trainer, config, {"step": 2})

        if __name__ == "__main__":
            main()
    """)
    )
    run = tmp_path / "run"
    here = str(Path(__file__).parent)
    log = tmp_path / "log"
    with open(log, "w") as output:  # not a pipe: its helper processes would keep it open
        process = subprocess.Popen(
            [sys.executable, script, policy, run, str(asynchronous)],
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([here, os.getcwd()])},
        )
        try:
            assert process.wait(timeout=900) == -signal.SIGKILL, log.read_text()[-2000:]
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # Megatron's writer processes outlive a killed parent
    assert "step_000002.tmp" in names(run)
    config = make_config(policy)
    trainer = make_trainer(config)
    assert load(latest(run), trainer) == {"step": 1}
    save(run, 2, trainer, config, {"step": 2})
    assert names(run) == ["latest", "step_000001", "step_000002"]


def test_a_node_waits_for_the_checkpoint_that_rank_0_sees(tmp_path, monkeypatch):
    """The shared filesystem shows it the one before."""
    root, newest = tmp_path / "checkpoints", tmp_path / "checkpoints" / "step_000004"
    for folder in (root / "step_000002", newest):
        folder.mkdir(parents=True)
    (root / "latest").write_text("step_000002")
    (root / "step_000002" / "meta.json").touch()
    monkeypatch.setattr(restore.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(restore, "from_rank_0", lambda _: (newest, ""))
    later = threading.Timer(0.1, (newest / "meta.json").touch)
    later.start()
    assert restore._newest(tmp_path) == newest and (newest / "meta.json").exists()
    later.join()
    monkeypatch.setattr(restore, "from_rank_0", lambda _: (None, "The checkpoint is gone."))
    with pytest.raises(UserError, match="The checkpoint is gone"):  # on all ranks
        restore._newest(tmp_path)
