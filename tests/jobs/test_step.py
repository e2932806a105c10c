"""What a process of a job does before and after its command, in a real bash: the environment of the node, and how
code of others may fail in it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from spell_megatron.jobs.site import Site
from spell_megatron.jobs.step import local_script, step_script

ROOT = Path(__file__).parents[2]
CAREFREE = "export FROM_FILE=1\nfalse\ninside() { false; }; inside\n[ -f /nonexistent ] && echo never\n"
"""Sourced by others with success, although commands in it fail and the last one is false."""
MODULE = 'module() { [ "$2" = good ] && export LOADED=$2; }\nexport -f module\n'


@pytest.fixture
def run(tmp_path):
    """run(site, command, gpus) -> (exit status, what it printed, the status that the job's script reads)."""
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "activate").write_text(f"export PATH={Path(sys.executable).parent}:$PATH\nfalse\n")
    (tmp_path / "carefree.sh").write_text(CAREFREE)
    (tmp_path / "bin").mkdir()

    def run(site: dict, command: str = "echo done", gpus: int = 0, before: str = "") -> tuple[int, str, str]:
        settings = {"venv": tmp_path / "venv", "env": {"PYTHONPATH": str(ROOT)}} | site
        script = tmp_path / "script"
        script.write_text(before + step_script(Site.model_validate(settings), command, gpus))
        meeting = tmp_path / "meeting"
        shutil.rmtree(meeting, ignore_errors=True)
        meeting.mkdir()
        places = {"SPELL_RENDEZVOUS": str(meeting), "SLURMD_NODENAME": "n7", "SLURM_LOCALID": "0"}
        places |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HOME": str(tmp_path)}
        done = subprocess.run(
            ["bash", script], cwd=tmp_path, env=os.environ | places, capture_output=True, text=True, check=False
        )
        failed = meeting / "failed"
        return done.returncode, done.stdout + done.stderr, failed.read_text().strip() if failed.exists() else ""

    return run


@pytest.mark.parametrize(
    "setup",
    [
        "source carefree.sh",
        ". ./carefree.sh",
        "source ~/carefree.sh",
        'source "$PWD/carefree.sh"',
        "activate_it() { source carefree.sh; true; }; activate_it",
        "[ -f /nonexistent ] && source carefree.sh",
        "\\. ./carefree.sh",
        'eval "$(echo export A=1)"',
        "if false; then :; fi\nfalse || true",
        "set -e\nset -u\ntrue",
        "ls /nonexistent | cat",
        "",
    ],
)
def test_code_of_others_may_fail_inside(run, setup):
    assert run({"setup": setup})[::2] == (0, "")


@pytest.mark.parametrize(
    ("site", "says"),
    [
        ({"setup": "true\nconda activate wrong  # mine\nexport A=1"}, "conda activate wrong"),
        ({"setup": "false"}, "setup failed at: false"),
        ({"setup": "source nothere.sh"}, "source nothere.sh"),
        ({"setup": "source carefree.sh; mkdir /proc/no"}, "mkdir /proc/no"),
        ({"setup": "work() { return 3; }\nwork it"}, "setup failed at: work it"),
        ({"setup": "exit 3"}, "setup ended the script with status 3"),
        ({"modules": ["good", "goood"]}, "`module load goood` failed"),
        ({"venv": Path("/nonexistent/venv")}, "no virtual environment /nonexistent/venv"),
        ({"setup": 'python() { command python -S "$@"; }; unset PYTHONPATH'}, "import spell_megatron: ModuleNotFound"),
        ({"venv": None, "setup": "export PATH=/nonexistent"}, "none is found"),
    ],
)
def test_a_fault_of_the_clusters_file_is_named_and_final(run, site, says):
    status, said, recorded = run(site, before=MODULE)
    assert (status, recorded) == (2, "2") and says in said and "n7" in said
    assert "done" not in said


def test_modules_are_loaded_again_in_the_job(run):
    """Those of the submitting shell count as loaded, and may have lost their variables on the way."""
    before = "export LOADEDMODULES=good\nmodule() { [[ $LOADEDMODULES == *$2* ]] || export LOADED=$2; }\n"
    assert run({"modules": ["good"]}, "echo $LOADED", before=before)[1] == "good\n"


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("unshare"), reason="needs root and unshare to have a profile")
def test_a_profile_may_end_with_a_test_that_is_false(tmp_path):
    (tmp_path / "profile").write_text(CAREFREE + MODULE)
    script = tmp_path / "script"
    site = Site(modules=["good"], venv=None, env={"PYTHONPATH": str(ROOT)}, setup=f"PATH={Path(sys.executable).parent}")
    script.write_text("unset -f module\n" + local_script(site, "echo $LOADED"))
    mounted = f"mount --bind {tmp_path}/profile /etc/profile && exec bash {script}"
    done = subprocess.run(["unshare", "--mount", "bash", "-c", mounted], capture_output=True, text=True)
    assert done.stdout == "good\n", done.stderr


def test_how_the_command_ended_is_recorded(run):
    assert run({}, "(exit 0)")[::2] == (0, "")
    assert run({}, "(exit 75)")[::2] == (75, "75")
    assert run({}, "bash -c 'kill -9 $$'")[::2] == (137, "137")
    assert run({}, "bash -c 'kill $$'")[::2] == (143, "")  # by Slurm, which has ended another process or the job
    saved = "trap 'echo saved; exit 75' USR1; kill -USR1 $PPID $$; sleep 5"
    assert run({}, f'bash -c "{saved.replace("$", chr(92) + "$")}"') == (75, "saved\n", "75")  # all get the signal


def test_values_under_env_win_over_the_defaults(run, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "/home/me/.triton")
    show = "echo $PYTHONNOUSERSITE $HF_HUB_OFFLINE $TRITON_CACHE_DIR $VLLM_CACHE_ROOT"
    said = run({}, show)[1].split()
    assert said[:2] == ["1", "1"] and all(
        path.startswith(("/tmp/", os.environ.get("TMPDIR", "/tmp"))) for path in said[2:]
    )
    env = {"PYTHONPATH": str(ROOT), "PYTHONNOUSERSITE": "", "HF_HUB_OFFLINE": "0", "TRITON_CACHE_DIR": "/x $y"}
    assert run({"env": env}, show)[1].startswith("0 /x $y ")


def test_files_may_be_opened_in_plenty(run):
    assert run({}, '[ "$(ulimit -S -n)" = "$(ulimit -H -n)" ] && echo all', before="ulimit -S -n 64\n")[1] == "all\n"


def test_a_cache_that_another_user_made_is_not_used(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    (tmp_path / f"spell-cache-{os.getuid()}").symlink_to(tmp_path / "bin")
    assert run({}, "echo =$TRITON_CACHE_DIR=")[1] == "==\n"


@pytest.mark.parametrize(("there", "status"), [(8, 0), (7, 1), (0, 1)])
def test_a_node_that_has_lost_a_gpu_is_left_out(run, tmp_path, there, status):
    """Its driver answers in place of the GPUs that this machine lacks."""
    lines = [f"GPU {number}: NVIDIA H100 80GB HBM3 (UUID: GPU-{number})" for number in range(there)]
    lines += ["Unable to determine the device handle for GPU0000:3B:00.0: GPU is lost"] * (there < 8)
    driver = tmp_path / "bin" / "nvidia-smi"
    driver.write_text("#!/bin/sh\ncat <<'END'\n" + "\n".join(lines) + "\nEND\n")
    driver.chmod(0o755)
    done, said, _ = run({}, gpus=8)
    unhealthy = [file.read_text().strip() for file in (tmp_path / "meeting").glob("unhealthy-*")]
    assert (done, unhealthy) == (status, ["n7"] if status else [])
    assert said == "done\n" if not status else f"lists {there} of 8 GPUs: Unable" in said
