"""A job submitted from outside of the cluster, through a real SSH server of this test's own."""

import getpass
import os
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.slow

SSHD = shutil.which("sshd", path=os.environ["PATH"] + ":/usr/sbin")


@pytest.fixture(scope="module")
def ssh(slurm, tmp_path_factory):
    """(settings of the cluster file's ssh section, folder of an `ssh` that knows the server's key)."""
    lacking = [name for name in ("ssh", "ssh-keygen", "rsync") if not shutil.which(name)] + ["sshd"] * (not SSHD)
    if lacking:
        pytest.skip(f"{', '.join(lacking)} not found (Debian: apt-get install openssh-server rsync)")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # as the system's own start script does
    folder = tmp_path_factory.mktemp("sshd")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kind, key, _ = (folder / "host.pub").read_text().split()
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {kind} {key}\n")
    options = {
        "Port": port,
        "ListenAddress": "127.0.0.1",
        "HostKey": folder / "host",
        "AuthorizedKeysFile": folder / "user.pub",
        "PidFile": folder / "pid",
        "StrictModes": "no",
        "UsePAM": "no",
    }
    (folder / "sshd_config").write_text("".join(f"{name} {value}\n" for name, value in options.items()))
    known = folder / "bin" / "ssh"  # rsync starts this one
    known.parent.mkdir()
    known.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -o UserKnownHostsFile={folder}/known_hosts "$@"\n')
    known.chmod(0o755)
    environment = " ".join(f"{name}={value}" for name, value in slurm.environment.items())
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([SSHD, "-D", "-e", "-f", folder / "sshd_config"], stderr=log)
    try:
        deadline = time.monotonic() + 20
        while b"listening" not in (folder / "log").read_bytes():
            assert server.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.05)
        place = {"host": "127.0.0.1", "port": port, "user": getpass.getuser(), "identity": str(folder / "user")}
        yield place | {"setup": f"export {environment}"}, known.parent
    finally:
        server.terminate()
        server.wait()


def test_a_login_that_fails_is_told(spell_launch, ssh, tmp_path):
    place, _path = ssh
    file = tmp_path / "cluster.yaml"
    arguments = ("--config", "examples/quickstart.yaml", "--cluster", file)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        closed = nobody.getsockname()[1]
        file.write_text(yaml.safe_dump({"folder": "/x", "gpus_per_node": 0, "ssh": place | {"port": closed}}))
        done = spell_launch(*arguments, NEMORUN_HOME=str(tmp_path / "home"))
    assert done.returncode == 2, done.stderr
    assert "cannot be reached by SSH" in done.stderr and "Traceback" not in done.stderr


def test_a_job_is_submitted_through_ssh(slurm, spell_launch, ssh, tmp_path):
    """The settings arrive, with their relative paths below the cluster's folder. (The job then ends itself.)"""
    place, path = ssh
    there, here = tmp_path / "there", tmp_path / "here"
    settings = {"folder": str(there), "gpus_per_node": 0, "ssh": place, "setup": "echo the step ran; exit 0"}
    here.mkdir()
    (here / "cluster.yaml").write_text(yaml.safe_dump(settings))
    files = ("--config", "examples/quickstart.yaml", "--cluster", here / "cluster.yaml", "--run.name=far")
    environment = {"PATH": f"{path}:{os.environ['PATH']}", "NEMORUN_HOME": str(here / "home")}
    done = spell_launch(*files, **environment)
    assert done.returncode == 0, done.stderr
    job = re.search(r"job (\d+)", done.stdout)[1]
    assert slurm.wait(job, 120)["ExitCode"] == "0:0"
    (log,) = there.glob("nemo-run/experiments/far/*/spell/log-*.out")
    assert log.read_text() == "the step ran\n"
    meeting = there / "runs" / "far" / "jobs" / f"{job}.0"
    arrived = yaml.safe_load((meeting / "config.yaml").read_text())
    assert arrived["model"]["path"] == str(there / "examples/quickstart/policy")
    assert arrived["run"]["output_dir"] == str(there / "runs")
    assert "NodeAddr=127.0.0.1" in (meeting / "nodes").read_text()
