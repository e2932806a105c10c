"""Signals to all processes of a run, as Slurm and terminals send them: nothing that is done is lost.

The processes are real, and each test saves a checkpoint before it signals: by then the helpers are there.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_run import ROOT
from trainer_cases import make_policy

from spell_megatron.checkpoint.folder import latest

# Saves, signals everybody, saves, and at last kills what Megatron's writers report to.
SAVES = """
import os, signal, sys
from pathlib import Path
import psutil

def signal_all(*numbers):
    for process in [*psutil.Process().children(recursive=True), psutil.Process()]:
        for number in numbers:
            process.send_signal(number)

def main():
    from trainer_cases import initialise, make_config, make_rows, make_trainer, saver
    from megatron.core.dist_checkpointing.strategies import filesystem_async as megatron
    from spell_megatron.errors import ProcessLost
    from spell_megatron.monitoring.stopping import StopRequest
    run = Path(sys.argv[2])
    with StopRequest(run) as request:
        request.can_save = True
        config = make_config(Path(sys.argv[1]), checkpoint__asynchronous=sys.argv[3] == "True")
        initialise(config)
        trainer = make_trainer(config)
        trainer.update(make_rows(0))
        with saver(run, trainer, config) as saving:
            saving.save(1, {})
            signal_all(signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
            saving.save(2, {})
            signal_all(signal.SIGTERM, signal.SIGUSR1)
            saving.finish()
            print("asked" if request.reason() else "not asked", (run / "checkpoints" / "latest").read_text())
            os.kill(megatron._results_queue._manager._process.pid, signal.SIGKILL)
            try:
                saving.save(3, {})
                saving.finish()
            except ProcessLost as error:
                print(error)

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("asynchronous", [False, True])
def test_checkpoints_survive_signals_to_everybody(asynchronous, tmp_path):
    make_policy("qwen3", tmp_path / "policy")
    script, run = tmp_path / "saves.py", tmp_path / "run"
    script.write_text(SAVES)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{Path(__file__).parent}:{ROOT}"}
    arguments = [sys.executable, script, tmp_path / "policy", run, str(asynchronous)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    said, lost = done.stdout.splitlines()
    assert said == "asked step_000002"
    assert "was killed" in lost and "disk" not in lost
    assert latest(run).name == "step_000002"


def test_the_launcher_of_engines_outlasts_the_trainer(tmp_path):
    """Slurm signals all steps of a job, and the end of one would end the others."""
    environment = os.environ | {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "1", "SLURM_PROCID": "0"}
    words = ["engines", "--config", tmp_path / "settings that come late", "--rendezvous", tmp_path]
    command = [sys.executable, "-m", "spell_megatron", *map(str, words)]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as launcher:
        until(lambda: catches(launcher.pid, signal.SIGTERM))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
            launcher.send_signal(number)
        with pytest.raises(subprocess.TimeoutExpired):
            launcher.wait(1)
        (tmp_path / "ended").touch()
        assert launcher.wait(60) in (130, 143)
        assert "Traceback" not in launcher.stderr.read()


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler of a signal."""
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[1]
    return bool(int(caught, 16) >> (number - 1) & 1)


def until(holds) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)
