"""The cluster that the other tests of this folder use does what a cluster does."""


def test_srun_starts_a_task_on_each_node_with_its_rank(slurm):
    where = "echo $SLURM_PROCID $SLURMD_NODENAME"
    lines = slurm.run("srun", "--nodes=4", "--ntasks-per-node=1", "bash", "-c", where).splitlines()
    assert sorted(lines) == ["0 n1", "1 n2", "2 n3", "3 n4"]


def test_a_batch_job_ends_with_the_status_of_its_script(slurm, tmp_path):
    ids = []
    for status in (0, 3):
        script = tmp_path / f"{status}.sh"
        script.write_text(f"#!/bin/bash\nexit {status}\n")
        ids.append(slurm.run("sbatch", "--parsable", f"--chdir={tmp_path}", str(script)).strip())
    good, bad = (slurm.wait(job, 60) for job in ids)
    assert (good["JobState"], good["ExitCode"]) == ("COMPLETED", "0:0")
    assert (bad["JobState"], bad["ExitCode"]) == ("FAILED", "3:0")
