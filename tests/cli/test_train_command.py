"""`spell train`: dry runs, resuming, several processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
import types
from datetime import date
from pathlib import Path

import pytest
import yaml
from config_files import add_checkpoint

from spell_megatron.errors import UserError
from spell_megatron.monitoring.run_lock import run_lock
from spell_megatron.preflight import inspect as inspection
from spell_megatron.preflight.findings import Findings


def test_a_dry_run_prints_everything_resolved_and_writes_nothing(spell, inputs, tmp_path):
    status, output, errors = spell(
        "train", "--config", inputs / "run.yaml", "--dry-run", "--run.name=mine", "--selfplay.groups", "3"
    )
    assert (status, errors) == (0, "")
    resolved = yaml.safe_load(output)  # the plan is comments
    assert (resolved["run"]["name"], resolved["selfplay"]["groups"]) == ("mine", 3)
    assert resolved["model"]["path"] == str(inputs / "policy")
    assert resolved["selfplay"]["group_size"] == 8
    plan = [line for line in output.splitlines() if line.startswith("# ")]
    assert "# run folder   runs/mine (new)" in plan
    assert "# documents    24 in 12 clusters" in plan
    assert list(tmp_path.iterdir()) == []
    # what it prints is a configuration
    (tmp_path / "printed.yaml").write_text(output)
    assert spell("train", "--config", "printed.yaml", "--dry-run")[1] == output


def test_several_files_and_resuming_with_them(spell, inputs, tmp_path):
    (tmp_path / "more.yaml").write_text("run: {name: more, stepps: 3}\n")
    words = ["train", "--config", inputs / "run.yaml", "--config", "more.yaml", "--dry-run"]
    status, _, errors = spell(*words)
    assert status == 2 and "run.stepps (more.yaml): unknown key" in errors
    (tmp_path / "more.yaml").write_text("run: {name: more}\n")
    resolved = yaml.safe_load(spell(*words)[1])
    assert (resolved["run"]["name"], resolved["model"]["path"]) == ("more", str(inputs / "policy"))
    folder = tmp_path / "runs" / "more"
    add_checkpoint(folder, inputs / "policy")
    assert "(continued)" in spell(*words, "--resume")[1]


def test_a_dry_run_with_faults_fails(spell, inputs):
    words = ["--config", inputs / "run.yaml", "--selfplay.groups=0"]
    status, output, errors = spell("train", *words, "--dry-run")
    assert status == 2 and output == "" and "selfplay.groups" in errors


def test_resuming_takes_the_settings_and_the_folder_of_the_run(spell, inputs, tmp_path):
    text = spell("train", "--config", inputs / "run.yaml", "--dry-run", "--run.name=old")[1]
    moved = tmp_path / "elsewhere" / "moved"
    moved.mkdir(parents=True)
    (moved / "config.yaml").write_text(text)
    (moved / "metrics.jsonl").write_text('{"step": 1}\n')
    add_checkpoint(moved, inputs / "policy")
    status, output, _ = spell("train", "--resume", "elsewhere/moved", "--dry-run", "--run.steps=9")
    assert status == 0
    run = yaml.safe_load(output)["run"]
    assert (run["output_dir"], run["name"], run["steps"]) == (str(tmp_path / "elsewhere"), "moved", 9)
    assert f"# run folder   {moved} (continued)" in output
    words = ["--config", inputs / "run.yaml", "--run.output_dir=elsewhere", "--run.name=moved", "--dry-run"]
    assert spell("train", *words, "--resume")[0] == 0
    status, _, errors = spell("train", *words)
    assert status == 2 and "already holds a run" in errors and "--resume" in errors


def test_the_day_of_the_prompts_is_that_of_the_runs_beginning(spell, inputs, tmp_path):
    def day(*words) -> str:
        return yaml.safe_load(spell("train", *words, "--dry-run")[1])["model"]["prompt_date"]

    before, begun, after = date.today(), day("--config", inputs / "run.yaml"), date.today()
    assert begun in (str(before), str(after))
    run = tmp_path / "runs" / "old"
    add_checkpoint(run, inputs / "policy")
    words = ["--config", inputs / "run.yaml", "--run.name=old", "--model.prompt_date=2024-07-26", "--dry-run"]
    (run / "config.yaml").write_text(spell("train", *words, "--resume")[1])
    assert day("--resume", run) == "2024-07-26"
    assert day("--config", inputs / "run.yaml", "--run.name=old", "--resume") == "2024-07-26"
    assert day("--resume", run, "--model.prompt_date=2025-01-01") == "2025-01-01"
    (run / "config.yaml").write_text("model: {prompt_date: tomorrow}\n")
    status, _, errors = spell("train", "--config", inputs / "run.yaml", "--run.name=old", "--resume", "--dry-run")
    assert status == 2 and "has model.prompt_date 'tomorrow'. Write a day there" in errors


def test_a_run_folder_belongs_to_one_process(inputs, spell, monkeypatch):
    folder, seen = Path("runs") / "mine", []

    def train(config, resume, rendezvous):
        seen.append([path.name for path in folder.iterdir()])
        with pytest.raises(UserError, match="in use by `spell train`"), run_lock(folder):
            pass

    monkeypatch.setitem(sys.modules, "spell_megatron.train", types.SimpleNamespace(run=train))
    words = ("train", "--config", inputs / "run.yaml", "--run.name=mine")
    assert spell(*words)[0] == 0
    assert seen == [["lock-1"]] and list(folder.iterdir()) == []
    with run_lock(folder):
        status, _, errors = spell(*words)
    assert status == 2 and "in use by `spell train`" in errors and len(seen) == 1

    class AfterPreflight(Findings):
        """Another process begins and ends a run before this one has the folder."""

        def __init__(self) -> None:
            super().__init__()
            (folder / "metrics.jsonl").write_text("{}\n")

    monkeypatch.setattr(inspection, "inspect", lambda *_: AfterPreflight())
    status, _, errors = spell(*words)
    assert status == 2 and "has meanwhile made a run" in errors and len(seen) == 1


# Stands in for the training itself, which the launcher knows nothing about: sitecustomize is imported by
# every process that Python starts with this folder on its path.
TRAIN = """
import os, sys, types
module = types.ModuleType("spell_megatron.train")
def run(config, resume, rendezvous):
    import time
    from spell_megatron.errors import UserError
    rank = int(os.environ["RANK"])
    open(f"rank_{rank}", "w").write(os.environ["WORLD_SIZE"])
    behaviour = os.environ["BEHAVIOUR"]
    if behaviour == "user error" and rank == 0:
        raise UserError("The engine died. Look at its log.")
    if behaviour == "preempted" and rank == 1:
        sys.exit(75)
    if behaviour != "success":
        time.sleep(120)
module.run = run
sys.modules["spell_megatron.train"] = module
"""


@pytest.fixture
def launch(inputs, tmp_path):
    """Start `spell train` with two processes in an empty folder."""
    stand_in = tmp_path / "stand_in"
    stand_in.mkdir()
    (stand_in / "sitecustomize.py").write_text(textwrap.dedent(TRAIN))
    work = tmp_path / "work"
    work.mkdir()

    def launch(behaviour: str) -> tuple[subprocess.Popen, Path]:
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join([str(stand_in), root])
        environment = os.environ | {"PYTHONPATH": path, "BEHAVIOUR": behaviour, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "spell_megatron", "train", "--config", str(inputs / "run.yaml")]
        words = ["--training.parallel.processes=2"]
        process = subprocess.Popen(
            [*command, *words],
            env=environment,
            cwd=work,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        return process, work

    return launch


# Each takes about 15 s: the launcher and two processes import torch and check the configuration.
@pytest.mark.parametrize(
    ("behaviour", "status", "message"),
    [
        pytest.param("success", 0, "", marks=pytest.mark.slow),
        ("user error", 2, "spell (process 0): The engine died. Look at its log.\n"),
        pytest.param("preempted", 75, "", marks=pytest.mark.slow),
    ],
)
def test_several_processes_are_started_and_their_status_comes_back(launch, behaviour, status, message):
    process, work = launch(behaviour)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == status
    assert "Traceback" not in errors and errors.endswith(message)
    if behaviour == "success":
        assert [(work / f"rank_{rank}").read_text() for rank in (0, 1)] == ["2", "2"]


@pytest.mark.slow
def test_an_interrupt_ends_all_processes(launch):
    process, work = launch("endless")
    deadline = time.monotonic() + 600
    while not all((work / f"rank_{rank}").exists() for rank in (0, 1)):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130
    assert "Traceback" not in errors
