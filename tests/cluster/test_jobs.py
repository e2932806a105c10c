"""The quick start's run as a job of a real Slurm: engines and trainer on one node, and on nodes of their own."""

import json
import os
import re
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest
import yaml

pytestmark = [pytest.mark.slow, pytest.mark.engine]

ROOT = Path(__file__).parents[2]
MARK = uuid.uuid4().hex  # in the environment of every process of these jobs
SMALL = (
    "--run.steps=1",
    "--selfplay.groups=6",
    "--selfplay.group_size=4",
    "--selfplay.clusters_per_round=20",
    "--selfplay.verifier.votes=3",
    "--rollout.concurrency=64",
    "--rollout.threads=1",
    "--rollout.cpu_kv_cache_gib=0.25",
    "--training.threads=1",
    "--training.tokens_per_microbatch=1024",
    "--validation.limit=10",
)


@pytest.fixture(scope="module")
def submit(slurm, spell_launch, tmp_path_factory):
    """submit(name, *arguments) -> (run folder, job id, folder of its logs)."""
    folder = tmp_path_factory.mktemp("shared")
    cluster = folder / "cluster.yaml"
    python = folder / "venv" / "bin" / "activate"
    python.parent.mkdir(parents=True)
    python.write_text(f"export PATH={Path(sys.executable).parent}:$PATH\n")
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": 1, "SPELL_TEST": MARK}
    settings = {"folder": str(folder), "gpus_per_node": 0, "time": "00:30:00", "env": variables}
    cluster.write_text(yaml.safe_dump(settings | {"venv": str(folder / "venv")}))

    def submit(name: str, *arguments: str) -> tuple[Path, str, Path]:
        where = (f"--run.output_dir={folder}", f"--run.name={name}", "--cluster", cluster)
        files = ("--config", "examples/quickstart.yaml")
        done = spell_launch(*files, *where, *SMALL, *arguments, **slurm.environment)
        assert done.returncode == 0, done.stderr
        job = re.search(r"job (\d+)", done.stdout)[1]
        return folder / name, job, Path(re.search(r"Logs +(\S+)/", done.stdout)[1])

    return submit


def completed(slurm, run: Path, job: str, logs: Path) -> Path:
    """Waits for a job, which must end well; its run."""
    state = slurm.wait(job, 900)
    said = "\n".join(log.read_text()[-3000:] for log in logs.glob("log-*.out"))
    assert (state["JobState"], state["ExitCode"]) == ("COMPLETED", "0:0"), said
    return run


@pytest.fixture(scope="module")
def one_node(slurm, submit) -> Path:
    """A run on one node."""
    return completed(slurm, *submit("one"))


@pytest.fixture(scope="module")
def split(slurm, submit) -> Path:
    """The same run with a trainer process on each of two nodes, and two engines on a third."""
    nodes = ("cluster.engine_nodes=1", "run.executor.nodes=3")
    return completed(slurm, *submit("split", "--training.parallel.processes=2", "--rollout.replicas=2", *nodes))


def steps(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def questions(run: Path) -> list[tuple]:
    rows = [json.loads(line) for line in (run / "rollouts" / "step_000001.jsonl").open()]
    return [(row["uid"], row["prompt"]) for row in rows if row["role"] == "questioner"]


def test_a_run_on_one_node(one_node):
    assert [row["step"] for row in steps(one_node)] == [0, 1]
    assert (one_node / "checkpoints" / "latest").read_text() == "step_000001"
    assert steps(one_node)[1]["train/mismatch_abs"] < 1e-4


def test_engines_on_their_own_node_take_the_same_step(one_node, split):
    assert questions(split) == questions(one_node)
    one, other = steps(one_node)[1], steps(split)[1]
    for name in ("train/loss", "train/grad_norm", "train/response_tokens", "train/entropy"):
        assert other[name] == pytest.approx(one[name], rel=1e-5, abs=1e-7), name
    assert {log.name for log in (split / "logs").iterdir()} == {"engine-0.log", "engine-1.log"}
    # where engines were is no setting of the run: it can be resumed anywhere
    assert yaml.safe_load((split / "config.yaml").read_text())["rollout"]["urls"] == []


def test_a_job_that_is_requeued_goes_on_from_its_checkpoint(slurm, submit):
    run, job, logs = submit("again", "--run.steps=3", "--checkpoint.every=1")
    deadline = time.monotonic() + 900
    while not (run / "checkpoints" / "latest").exists():
        assert slurm.job(job)["JobState"] in ("RUNNING", "PENDING") and time.monotonic() < deadline
        time.sleep(0.2)
    slurm.run("scontrol", "requeue", job)
    completed(slurm, run, job, logs)
    assert slurm.job(job)["Restarts"] == "1"
    assert [row["step"] for row in steps(run)] == [0, 1, 2, 3]
    assert {folder.name for folder in (run / "jobs").iterdir()} == {f"{job}.0", f"{job}.1"}


def test_an_engine_that_dies_ends_the_job_with_its_last_words(slurm, submit):
    nodes = ("cluster.engine_nodes=1", "cluster.nodes=2", "--rollout.extra_args=[--no-such-flag]")
    _, job, logs = submit("dead", *nodes)
    state = slurm.wait(job, 900)
    assert (state["JobState"], state["ExitCode"]) == ("FAILED", "2:0")
    (log,) = logs.glob("log-*engines*.out")
    assert "no-such-flag" in log.read_text() and "Traceback" not in log.read_text()


def test_no_process_outlives_its_job(one_node, split):
    deadline = time.monotonic() + 30  # Slurm ends what a job leaves, in its time
    while (left := list(marked())) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not left


def marked():
    for process in psutil.process_iter():
        try:
            if process.environ().get("SPELL_TEST") == MARK and process.pid != os.getpid():
                yield process.cmdline()
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
