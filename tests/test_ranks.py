"""The place of a process, as torchrun and srun tell it."""

from spell_megatron.ranks import ALONE, launched


def test_ranks_come_from_torchrun_or_srun_or_nowhere(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    assert (launched() or ALONE) == (0, 1, 0)
    # In a batch script, outside srun, Slurm announces the job's tasks, but this process is not one of them.
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert (launched() or ALONE) == (0, 1, 0)
    monkeypatch.setenv("SLURM_STEP_ID", "2")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    assert (launched() or ALONE) == (3, 4, 1)
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert (launched() or ALONE) == (5, 6, 0)
