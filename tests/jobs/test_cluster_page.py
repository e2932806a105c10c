"""docs/cluster.md, followed word by word: its commands are taken from the page and run, on a real Slurm."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from commands_not_run import to_run
from small_run import MARK, ROOT, SMALL

from spell_megatron.config.reading import load_config, to_yaml


def commands() -> list[str]:
    """The page's commands but for those that make the environments, which are here already."""
    return [command.text for command in to_run("docs/cluster.md")]


@pytest.fixture
def reader(nemo_run, tmp_path):
    """reader(command, **environment): run a command of the page as a reader does, in a clone with both environments."""
    if not (ROOT / ".venv-slurm").exists():
        pytest.skip("no .venv-slurm: `make environment-slurm` makes it")
    for name in ("slurm", "examples"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True)
    for name in (".venv-slurm", "spell_megatron"):
        (tmp_path / name).symlink_to((ROOT / name).resolve())
    activate = tmp_path / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text(
        f"export PATH={Path(sys.executable).parent}:$PATH\nexport PYTHONPATH={tmp_path} OMP_NUM_THREADS=1\n"
    )

    def run(command: str, **environment: str) -> str:
        done = subprocess.run(
            shlex.split(command),
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(tmp_path), "SPELL_TEST": MARK} | environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
        return done.stdout

    return run


def change_cluster(folder: Path) -> None:
    """What the page says that a reader must set."""
    file = folder / "cluster.yaml"
    settings = yaml.safe_load(file.read_text())
    assert settings.keys() >= {"folder", "venv"}
    file.write_text(yaml.safe_dump(settings | {"folder": str(folder / "shared"), "venv": str(folder / ".venv")}))


def test_what_submits_nothing(reader, tmp_path):
    """The dry run, the help, and the local run's dry run."""
    (copy, dry_run, *_), words = commands(), commands()
    reader(copy)
    change_cluster(tmp_path)
    assert "#SBATCH --dependency=singleton" in reader(dry_run)
    (help,) = (command for command in words if command.startswith("slurm/launch.py"))
    assert "settings of the cluster's file" in reader(help, PYTHONPATH="", PATH="/usr/local/bin:/usr/bin:/bin")
    (local,) = (command for command in words if "--executor local" in command)
    assert "python -m spell_megatron train" in reader(local + " --dry-run")


@pytest.mark.slow
@pytest.mark.engine
def test_the_page_word_by_word(slurm, reader, tmp_path):
    """The quick start is cut down to small steps; the commands are as they are."""
    quick_start = tmp_path / "examples" / "quickstart.yaml"
    quick_start.write_text(to_yaml(load_config(ROOT / "examples" / "quickstart.yaml", (*SMALL, "--run.steps=3"))))
    run = tmp_path / "runs" / "quickstart"
    jobs = []
    for command in commands():
        if "stop" in command:
            deadline = time.monotonic() + 300
            while not (run / "metrics.jsonl").exists():
                assert time.monotonic() < deadline
                time.sleep(0.2)
        output = reader(command, **slurm.environment)
        if command.startswith("cp "):
            change_cluster(tmp_path)
        if submitted := re.search(r"Submitted as job (\d+)", output):
            jobs.append(submitted[1])
    assert len(jobs) == 2 and slurm.wait(jobs[0], 60)["ExitCode"] == "0:0"
    logs = "".join(log.read_text()[-2000:] for log in (tmp_path / "shared").rglob("log-*.out"))
    assert slurm.wait(jobs[1], 300)["ExitCode"] == "0:0", logs
    for name in ("quickstart", "here"):
        assert (tmp_path / "runs" / name / "checkpoints" / "latest").read_text() == "step_000003"
