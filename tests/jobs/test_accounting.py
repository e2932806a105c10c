"""`spell launch` on a cluster with accounting: accounts are checked, and what became of a job is recorded."""

import re
import subprocess
import time

import pytest
import yaml
from mini_slurm import MiniSlurm, missing

QUICKSTART = ("--config", "examples/quickstart.yaml")


@pytest.fixture(scope="module")
def accounts(tmp_path_factory):
    if reason := missing(accounting=True):
        pytest.skip(f"no accounting: {reason}")
    with MiniSlurm(tmp_path_factory.mktemp("accounting"), nodes=1, accounting=True) as cluster:
        yield cluster


def launch(spell_launch, cluster: MiniSlurm, folder, **settings: object) -> subprocess.CompletedProcess:
    file = folder / "cluster.yaml"
    file.write_text(yaml.safe_dump({"folder": str(folder / "shared"), "gpus_per_node": 0} | settings))
    return spell_launch(*QUICKSTART, "--cluster", file, f"--run.output_dir={folder}", **cluster.environment)


def test_jobs_are_recorded(accounts, spell_launch, tmp_path):
    done = launch(spell_launch, accounts, tmp_path, account="project", setup="exit 3")
    assert done.returncode == 0, done.stderr
    job = re.search(r"job (\d+)", done.stdout)[1]
    accounts.wait(job, 300)
    assert accounts.job(job)["Restarts"] == "0"  # the same setup would fail again
    fields, deadline = "--format=State,Account,ExitCode", time.monotonic() + 60  # the record follows the end
    while (recorded := accounts.run("sacct", "-nPX", fields, "--jobs", job)) != "FAILED|project|2:0\n":
        assert time.monotonic() < deadline, recorded
        time.sleep(0.5)


def test_another_account_is_refused(accounts, spell_launch, tmp_path):
    done = launch(spell_launch, accounts, tmp_path, account="nobodys")
    assert done.returncode == 2 and "account" in done.stderr and "Traceback" not in done.stderr
