"""The quick start's run as a job of a real Slurm: in each topology, and through all that may happen to a job."""

import json
import re
import sys
import time
from pathlib import Path

import pytest
import yaml
from small_run import MARK, ROOT, SMALL, dump, left_over, started

pytestmark = [pytest.mark.slow, pytest.mark.engine]

STEPS = 30


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
        done = spell_launch(*files, *where, *SMALL, "--run.steps=1", *arguments, **slurm.environment)
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
    """A run on one node that nothing disturbs."""
    return completed(slurm, *submit("one", f"--run.steps={STEPS}", "--checkpoint.every=100"))


@pytest.fixture(scope="module")
def split(slurm, submit) -> Path:
    """The same run with a trainer process on each of two nodes, and two engines on a third."""
    nodes = ("cluster.engine_nodes=1", "run.executor.nodes=3")
    return completed(slurm, *submit("split", "--training.parallel.processes=2", "--rollout.replicas=2", *nodes))


def steps(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def questions(run: Path, step: int = 1) -> list[tuple]:
    return [(row["uid"], row["prompt"]) for row in dump(run, step) if row["role"] == "questioner"]


def test_a_run_on_one_node(one_node):
    assert [row["step"] for row in steps(one_node)] == list(range(STEPS + 1))
    assert (one_node / "checkpoints" / "latest").read_text() == f"step_{STEPS:06d}"
    assert steps(one_node)[1]["train/mismatch_abs"] < 1e-4


def test_engines_on_their_own_node_take_the_same_step(one_node, split):
    assert questions(split) == questions(one_node)
    one, other = steps(one_node)[1], steps(split)[1]
    for name in ("train/loss", "train/grad_norm", "train/response_tokens", "train/entropy"):
        assert other[name] == pytest.approx(one[name], rel=1e-5, abs=1e-7), name
    assert {log.name for log in (split / "logs").glob("engine-*")} == {"engine-0.log", "engine-1.log"}
    # where engines were is no setting of the run: it can be resumed anywhere
    assert yaml.safe_load((split / "config.yaml").read_text())["rollout"]["urls"] == []


def test_a_heterogeneous_job_takes_the_same_step(slurm, submit, one_node):
    nodes = ("cluster.engine_nodes=1", "cluster.nodes=2", "cluster.engine_gpus_per_node=1", "--run.device=cpu")
    run = completed(slurm, *submit("heterogeneous", *nodes))
    assert questions(run) == questions(one_node)
    assert steps(run)[1]["train/grad_norm"] == pytest.approx(steps(one_node)[1]["train/grad_norm"], rel=1e-5)


def test_colocated_engines_take_the_same_step(slurm, submit, one_node):
    """Two nodes with a trainer process and an engine each, in steps that overlap."""
    nodes = ("cluster.colocated=true", "cluster.nodes=2")
    run = completed(slurm, *submit("colocated", "--training.parallel.processes=2", "--rollout.replicas=2", *nodes))
    assert questions(run) == questions(one_node)
    assert steps(run)[1]["train/grad_norm"] == pytest.approx(steps(one_node)[1]["train/grad_norm"], rel=1e-5)


def test_a_job_survives(slurm, submit, one_node):
    """An engine and then the trainer are killed, the job comes near its limit of time, is preempted, requeued by hand,
    and loses a node: it ends with the batches and updates of the undisturbed run."""
    nodes = ("cluster.engine_nodes=1", "cluster.nodes=2", "cluster.save_seconds=60")
    run, job, logs = submit("survivor", f"--run.steps={STEPS}", "--checkpoint.every=2", *nodes)

    def goes_on(starts: int, more: int = 1) -> None:
        """Waits until the job runs for the n-th time and has made a step or more since."""
        until(lambda: int(slurm.job(job).get("Restarts", -1)) == starts - 1 and status(run)["restart"] == starts - 1)
        first = last_step(run)
        until(lambda: last_step(run) >= first + more)

    until(lambda: (run / "status.json").exists())
    goes_on(1)
    (engine,) = (process for process in started() if "vllm.entrypoints.openai.api_server" in process.cmdline())
    engine.kill()
    goes_on(1, 2)
    (trainer,) = (process for process in started() if process.cmdline()[1:4] == ["-m", "spell_megatron", "train"])
    trainer.kill()
    goes_on(2, 3)  # with a checkpoint of this start: the processes that write it are there
    before = last_step(run)
    hours, minutes, seconds = map(int, slurm.job(job)["RunTime"].split(":"))
    slurm.run("scontrol", "update", f"JobId={job}", f"TimeLimit={hours * 60 + minutes + (seconds > 0) + 1}")
    until(lambda: slurm.job(job)["Restarts"] == "2")
    assert went_on_from(logs, 2) >= before
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    goes_on(3, 3)
    before = last_step(run)
    whole = ("--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null")
    urgent = slurm.run("sbatch", "--parsable", *whole, "--wrap=sleep 1").strip()
    slurm.wait(urgent, 300)
    assert went_on_from(logs, 3) >= before
    goes_on(4)
    slurm.run("scontrol", "requeue", job)
    goes_on(5)
    node = re.search(r"BatchHost=(\S+)", slurm.run("scontrol", "-o", "show", "job", job))[1]
    slurm.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    goes_on(6)  # on two others
    assert node not in slurm.job(job)["NodeList"]
    completed(slurm, run, job, logs)
    slurm.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)  # it may be back by itself
    assert {folder.name for folder in (run / "jobs").glob(f"{job}.?")} == {f"{job}.{start}" for start in range(6)}
    assert [row["step"] for row in steps(run)] == list(range(STEPS + 1))
    for step in range(1, STEPS + 1):
        assert questions(run, step) == questions(one_node, step)
        for name in ("train/grad_norm", "train/response_tokens", "train/entropy"):
            assert steps(run)[step][name] == pytest.approx(steps(one_node)[step][name], rel=1e-4), (step, name)


def test_a_cancelled_job_leaves_a_checkpoint(slurm, submit):
    """Also when it has written one before, and when the step of the engines is signalled too."""
    nodes = ("cluster.engine_nodes=1", "cluster.nodes=2")
    run, job, _ = submit("cancelled", f"--run.steps={STEPS}", "--checkpoint.every=2", *nodes)
    until(lambda: (run / "metrics.jsonl").exists() and last_step(run) >= 3)
    slurm.run("scancel", job)
    assert slurm.wait(job, 120)["JobState"] == "CANCELLED"
    until(lambda: status(run)["state"] == "stopped", 60)
    assert (run / "checkpoints" / "latest").read_text() == f"step_{last_step(run):06d}"


def went_on_from(logs: Path, times: int) -> int:
    """The step of the checkpoint with which the job was queued again by its script for the n-th time."""

    def told() -> list[str]:
        said = "".join(log.read_text() for log in logs.parent.rglob("*.out"))
        return re.findall(r"^The job is queued again, to go on from checkpoint step_(\d+)", said, re.MULTILINE)

    until(lambda: len(told()) >= times, 60)
    return int(told()[times - 1])


def until(holds, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


def last_step(run: Path) -> int:
    return steps(run)[-1]["step"] if (run / "metrics.jsonl").exists() and steps(run) else -1


def test_an_engine_that_dies_ends_the_job_with_its_last_words(slurm, submit):
    nodes = ("cluster.engine_nodes=1", "cluster.nodes=2", "--rollout.extra_args=[--no-such-flag]")
    _, job, logs = submit("dead", *nodes)
    state = slurm.wait(job, 900)
    assert (state["JobState"], state["ExitCode"]) == ("FAILED", "2:0")
    (log,) = logs.glob("log-*engines*.out")
    assert "no-such-flag" in log.read_text() and "Traceback" not in log.read_text()


def test_no_process_outlives_its_job(one_node, split):  # the last test: it looks for those of all jobs
    deadline = time.monotonic() + 30  # Slurm ends what a job leaves, in its time
    while (left := left_over()) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not left
