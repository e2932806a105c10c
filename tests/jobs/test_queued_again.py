"""When a job of a real Slurm is queued again, and what is told of it. Its trainer is a script that ends as one does."""

import re
import sys
import time
from pathlib import Path

import pytest
import yaml
from small_run import ROOT, spell

# A start of a run that is to be queued again, as far as the job's script and the commands see it.
STARTS = f"""#!/bin/bash
case "$*" in *"spell_megatron train"*) ;; *) exit 0 ;; esac
export PYTHONPATH={ROOT}
{sys.executable} -c '
import sys
from pathlib import Path
from spell_megatron.monitoring.status import Status
with Status(Path(sys.argv[1]), steps=9) as status:
    status.update(state="stopped")' "@RUN@" || exit 1
touch "$SPELL_RENDEZVOUS/requeue"
@MORE@
exit 75
"""
PROGRESS = 'mkdir -p "@RUN@/checkpoints" && echo step_${SLURM_RESTART_COUNT:-0} > "@RUN@/checkpoints/latest"'
TRIES = 'echo 3 > "$(dirname "$SPELL_RENDEZVOUS")/$SLURM_JOB_ID.failures"'

WITHOUT = (
    "it started 4 times without a new checkpoint or validation. If starts end at the time limit, raise time in the "
    "cluster's file; otherwise the logs say why they end."
)


@pytest.fixture
def submit(slurm, spell_launch, tmp_path):
    """submit(more, **cluster) -> (run folder, job): submit a job whose trainer does `more`."""
    run, venv = tmp_path / "run", tmp_path / "venv" / "bin"
    venv.mkdir(parents=True)
    (venv / "activate").write_text(f"export PATH={venv}:$PATH\n")

    def submit(more: str, **cluster) -> tuple[Path, str]:
        (venv / "python").write_text(STARTS.replace("@MORE@", more).replace("@RUN@", str(run)))
        (venv / "python").chmod(0o755)
        file = tmp_path / "cluster.yaml"
        settings = {"folder": str(tmp_path), "gpus_per_node": 0, "time": "00:10:00", "venv": str(venv.parent)}
        file.write_text(yaml.safe_dump(settings | cluster))
        where = (f"--run.output_dir={tmp_path}", "--run.name=run", "--cluster", file)
        done = spell_launch("--config", "examples/quickstart.yaml", *where, **slurm.environment)
        assert done.returncode == 0, done.stderr
        return run, re.search(r"job (\d+)", done.stdout)[1]

    return submit


def told_by_job(run: Path) -> list[str]:
    """What the batch scripts say. (Slurm's log has the script too, which bash shows as it reads it.)"""
    logs = "".join(log.read_text() for log in run.parent.rglob("*.out"))
    return re.findall(r"^The job is .*queued again.*$", logs, re.MULTILINE)


@pytest.mark.parametrize(
    ("more", "cluster", "why"),
    [
        pytest.param(
            PROGRESS,
            {"sbatch": {"no_requeue": True}},
            "sbatch has no_requeue. Continue the run with --resume.",
            id="no_requeue",
        ),
        pytest.param(TRIES, {}, WITHOUT, id="no progress"),
        pytest.param(f'{PROGRESS}; touch "@RUN@/stop"', {}, "", id="spell stop"),
    ],
)
def test_a_job_that_is_not_queued_again_says_so(slurm, submit, more, cluster, why):
    run, job = submit(more, **cluster)
    state = slurm.wait(job, 120)
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("FAILED", "75:0", "0")
    assert told_by_job(run) == ([f"The job is not queued again: {why}"] if why else [])


def test_a_job_that_waits_is_shown_and_cancelled(slurm, submit, monkeypatch):
    """Before its first start, and queued again."""
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    run, job = submit(f"{TRIES}; {PROGRESS}", sbatch={"hold": True})
    told = spell("status", run)
    assert told.returncode == 0 and f"waits in the queue (job {job})\n" in told.stdout, told.stderr
    slurm.run("scontrol", "release", job)
    deadline = time.monotonic() + 120
    while slurm.job(job)["Restarts"] != "1":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    slurm.run("scontrol", "hold", job)
    assert told_by_job(run) == ["The job is queued again, to go on from checkpoint step_0."]
    told = spell("status", run)
    assert told.returncode == 0 and f"waits in the queue (job {job}); before that it was stopped" in told.stdout
    stopped = spell("stop", run)
    assert stopped.returncode == 0 and "waits in the queue" not in stopped.stdout, stopped.stderr
    assert slurm.wait(job, 60)["JobState"] == "CANCELLED"
    again = spell("stop", run)
    assert again.returncode == 2 and "has ended already" in again.stderr
