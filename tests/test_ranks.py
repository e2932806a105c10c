"""The place of a process, as torchrun, srun and others tell it, whatever else has left variables behind."""

import pytest

from spell_megatron.ranks import ALONE, LAUNCHER_VARIABLES, launched, local_processes

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
TORCHRUN |= {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none"}
SRUN = {"SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
SHELL = {name: value for name, value in TORCHRUN.items() if name != "TORCHELASTIC_RUN_ID"}
"""What a shell may hold that once ran a script for several nodes."""


@pytest.fixture
def place(monkeypatch):
    """place(variables): what a process with these variables takes for its place."""
    for name in (*LAUNCHER_VARIABLES, *SRUN, "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)

    def place(variables: dict[str, str]) -> tuple:
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            return tuple(launched() or ALONE), local_processes()

    return place


@pytest.mark.parametrize(
    ("variables", "rank"),
    [
        ({}, (0, 1, 0)),
        # In a batch script, outside srun, Slurm announces the job's tasks, but this process is not one of them.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (0, 1, 0)),
        (SRUN, (3, 4, 1)),
        (TORCHRUN, (5, 6, 1)),
        (SRUN | TORCHRUN, (5, 6, 1)),  # torchrun in a step
        (SHELL, (5, 6, 1)),  # another launcher that speaks torchrun's protocol
        (SHELL | {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (5, 6, 1)),  # such a one in a batch script
        (SRUN | SHELL, (3, 4, 1)),
        (SRUN | {"RANK": "0", "WORLD_SIZE": "1"}, (3, 4, 1)),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"} | SHELL, (0, 1, 0)),  # the shell of salloc
        ({"RANK": "1", "WORLD_SIZE": "2"}, (0, 1, 0)),
        ({"LOCAL_RANK": "3"}, (0, 1, 0)),
    ],
)
def test_a_process_knows_its_place(place, variables, rank):
    assert place(variables)[0] == rank


def test_the_processes_of_this_machine_are_those_of_torchrun(place):
    assert place(TORCHRUN)[1] == 2
    assert place(SRUN | SHELL)[1] is None and place({"LOCAL_WORLD_SIZE": "8"})[1] is None


def test_a_step_of_one_task_may_be_a_shell_and_starts_processes_itself(monkeypatch):
    for name, value in (SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}).items():
        monkeypatch.setenv(name, value)
    assert launched() is None
