"""`spell train`: dry runs, resuming, several processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
import types
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from config_files import add_checkpoint

from spell_megatron.config.reading import load_config
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


@pytest.mark.parametrize("kind", ["changed", "all"])
def test_settings_are_printed_so_that_they_can_be_read_again(spell, inputs, tmp_path, kind):
    words = (
        "train",
        inputs / "run.yaml",
        "--selfplay.groups=3",
        "--training.optimizer.lr=2e-6",
    )  # the latter is as ever
    status, output, errors = spell(*words, f"--print-config={kind}")
    assert (status, errors) == (0, "") and list(tmp_path.iterdir()) == []
    printed = yaml.safe_load(output)
    assert printed["selfplay"]["groups"] == 3
    assert ("optimizer" in printed.get("training", {})) == ("logging" in printed) == (kind == "all")
    (tmp_path / "printed.yaml").write_text(output)
    assert load_config(tmp_path / "printed.yaml") == load_config(inputs / "run.yaml", ["selfplay.groups=3"])
    assert spell(*words, "--print-config")[1] == spell(*words, "--print-config=changed")[1]


def test_a_file_of_settings_may_stand_alone(spell, inputs, tmp_path, monkeypatch):
    (tmp_path / "more.yml").write_text("run: {name: more, stepps: 3}\n")
    status, _, errors = spell("train", inputs / "run.yaml", "more.yml", "--dry-run")
    assert status == 2 and "run.stepps (more.yml): unknown key" in errors
    status, _, errors = spell("train", "--selfplay.groups=0", "--data.documents", "x.yaml", inputs / "run.yaml")
    assert status == 2 and "x.yaml does not exist" in errors and "selfplay.groups" in errors
    status, _, errors = spell("plan", "--gpu", "H100-80G")
    assert status == 2 and "--config FILE" in errors and "Traceback" not in errors
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    status, _, errors = spell("train", "run")
    assert status == 2 and "say --resume run" in errors


def test_a_dry_run_asks_running_engines(spell, inputs, monkeypatch):
    class Health(BaseHTTPRequestHandler):
        def do_GET(self):
            right = self.headers["Authorization"] == "Bearer key" and self.path == "/health"
            self.send_response(200 if right else 401)
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Health) as server, ThreadPoolExecutor(1) as thread:
        thread.submit(server.serve_forever)
        url = f"http://127.0.0.1:{server.server_port}"
        words = ("train", inputs / "run.yaml", "--dry-run", f"--rollout.urls=[{url},http://127.0.0.1:1]")
        status, output, _ = spell(*words)
        monkeypatch.setenv("SPELL_API_KEY", "key")
        again = spell(*words)[1]
        server.shutdown()
    assert status == 0 and f"#   {url} answers with HTTP status 401" in output and "SPELL_API_KEY is not set" in output
    assert f"#   {url} answers\n#   http://127.0.0.1:1 cannot be reached" in again


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


@pytest.fixture
def old(spell, inputs, tmp_path) -> Path:
    """A run of 4 steps, which has kept 2 and 4."""
    folder = tmp_path / "runs" / "old"
    text = spell("train", "--config", inputs / "run.yaml", "--dry-run", "--run.name=old", "--run.steps=4")[1]
    for step in (2, 4):
        add_checkpoint(folder, inputs / "policy", step)
    (folder / "config.yaml").write_text(text)
    (folder / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(5)))
    (folder / "logs").mkdir()
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def trained(monkeypatch) -> list:
    """The (configuration, resume) with which training is called, which does nothing."""
    calls = []

    def train(config, resume, rendezvous):
        calls.append((config, resume))

    monkeypatch.setitem(sys.modules, "spell_megatron.train", types.SimpleNamespace(run=train))
    return calls


def test_a_run_with_fewer_steps_than_it_has_made_is_refused_and_left_as_it_was(spell, old, trained):
    before = files(old)
    status, output, errors = spell("train", "--resume", old, "--run.steps=3")
    assert status == 2 and "run.steps: the run has made 4 steps already, and this is 3" in errors
    assert "--resume RUN_FOLDER@STEP" in errors and output == ""
    assert files(old) == before and not trained


def test_a_finished_run_says_so_at_once(spell, old, trained):
    before = files(old)
    for more in ((), ("--dry-run",), ("--run.steps=4",)):
        status, output, errors = spell("train", "--resume", old, *more)
        assert (status, errors) == (0, "") and "has made its 4 steps" in output
        assert f"spell train --resume {old} --run.steps=8" in output
    assert files(old) == before and not trained
    assert spell("train", "--resume", old, "--run.steps=8")[0] == 0
    assert [(config.run.steps, resume) for config, resume in trained] == [(8, True)]


def test_a_run_that_trained_nothing_is_not_finished(spell, old, trained):
    meta = old / "checkpoints" / "step_000004" / "meta.json"
    meta.write_text(meta.read_text().replace('"updates": 4', '"updates": 0'))
    status, output, errors = spell("train", "--resume", old)
    assert status == 2 and "none of them changed the weights" in errors and not output and not trained
    assert spell("train", "--resume", old, "--run.steps=8")[0] == 0  # it may go on with more


def test_a_job_for_a_finished_run_is_not_submitted(spell, old):
    before = files(old)
    status, output, _ = spell("launch", "--resume", old, "--cluster", "cluster.yaml")
    assert status == 0 and "has made its 4 steps" in output
    status, _, errors = spell("launch", "--resume", f"{old}@2", "--cluster", "cluster.yaml")
    assert status == 2 and "A job goes on from the newest checkpoint" in errors
    assert files(old) == before


def test_a_run_that_lacks_its_last_validation_is_not_finished(spell, old, trained, tmp_path):
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"task": "doc_general_qa", "question": "Who?", "answer": "She", "documents": ["A text."]}\n')
    words = ("train", "--resume", old, f"--validation.questions={questions}")
    assert spell(*words)[0] == 0 and len(trained) == 1
    with (old / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "validation/pass@1": 0.5}\n')
    assert "has made its 4 steps" in spell(*words)[1] and len(trained) == 1


def test_a_new_run_begins_with_a_kept_step_of_another(spell, old, trained, inputs):
    before = files(old)
    status, output, _ = spell("train", "--resume", f"{old}@2", "--dry-run", "--run.steps=3")
    assert status == 0 and f"old-from-2 (new, from step 2 of {old})" in output and files(old) == before
    assert spell("train", "--resume", f"{old}@2", "--run.steps=3")[0] == 0
    new = old.with_name("old-from-2")
    assert [(config.run.name, resume) for config, resume in trained] == [(new.name, True)]
    assert (new / "checkpoints" / "latest").read_text() == "step_000002"
    assert [path.name for path in sorted((new / "checkpoints").iterdir())] == ["latest", "step_000002"]
    one, other = (run / "checkpoints" / "step_000002" / "state.json" for run in (old, new))
    assert one.samefile(other)  # no second copy
    assert files(old) == before
    status, _, errors = spell("train", "--resume", f"{old}@2", "--run.steps=3")
    assert status == 2 and "already holds a run" in errors
    assert spell("train", "--resume", f"{old}@2", "--run.steps=3", "--run.name=third")[0] == 0
    assert (old.with_name("third") / "checkpoints" / "step_000002").is_dir()


def test_a_new_run_has_the_dump_of_a_batch_that_is_written_already(spell, old, trained):
    """With training.staleness a checkpoint holds the next batch."""
    (old / "checkpoints" / "step_000002" / "state.json").write_text('{"ready": {"step": 3}}')
    (old / "rollouts").mkdir()
    for step in (2, 3, 4):
        (old / "rollouts" / f"step_{step:06d}.jsonl").write_text(f"{step}")
    before = files(old)
    assert spell("train", "--resume", f"{old}@2", "--run.steps=3")[0] == 0
    dumps = old.with_name("old-from-2") / "rollouts"
    assert files(dumps) == {"step_000003.jsonl": b"3"} and files(old) == before


@pytest.mark.parametrize(
    ("step", "more", "message"),
    [
        (3, (), "has no checkpoint of step 3. It has kept 2, 4"),
        (4, (), "the run has made 4 steps already, and this is 4"),
        (2, ("--run.name=old",), "already holds a run"),
    ],
)
def test_a_new_run_that_cannot_begin_so(spell, old, step, more, message):
    status, _, errors = spell("train", "--resume", f"{old}@{step}", *more)
    assert status == 2 and message in errors


def test_a_resume_does_not_go_elsewhere(spell, old, inputs):
    status, _, errors = spell("train", "--resume", old, "--run.name=other", "--run.steps=8")
    assert status == 2 and "run.name: --resume" in errors and "goes on in that folder" in errors
    assert spell("train", "--resume", old, "--run.name=old", "--run.steps=8", "--dry-run")[0] == 0
    status, _, errors = spell("train", "--resume", old / "checkpoints" / "step_000002")
    assert status == 2 and f"--resume {old}@2" in errors


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
    status, _, errors = spell(*words)
    log = (folder / "logs" / "train.log").read_text()
    assert status == 0 and "spell train --config" in log and "--run.name=mine" in log
    for warning in errors.splitlines():
        assert warning.removeprefix("spell: warning: ") in log
    assert [sorted(names) for names in seen] == [["lock-1", "logs"]]
    assert [path.name for path in folder.iterdir()] == ["logs"]
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
import os, pathlib, sys, types
module = types.ModuleType("spell_megatron.train")
def run(config, resume, rendezvous):
    import time
    from spell_megatron.errors import UserError
    rank = int(os.environ["RANK"])
    pathlib.Path(f"rank_{rank}").write_text(os.environ["WORLD_SIZE"])
    behaviour = os.environ["BEHAVIOUR"]
    if behaviour == "user error" and rank == 0:
        raise UserError("The engine died. Look at its log.")
    if behaviour == "preempted" and rank == 1:
        sys.exit(75)
    if behaviour == "killed" and rank == 1:
        os.kill(os.getpid(), 9)
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
        pytest.param("killed", 137, "Resume the run from its last checkpoint.\n", marks=pytest.mark.slow),
    ],
)
def test_several_processes_are_started_and_their_status_comes_back(launch, behaviour, status, message):
    process, work = launch(behaviour)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == status
    assert "Traceback" not in errors and errors.endswith(message)
    assert ("Process 1 of the trainer" in errors and "killed by signal 9" in errors) == (behaviour == "killed")
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
