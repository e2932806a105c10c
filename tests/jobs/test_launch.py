"""`spell launch`: what it makes of a run and a cluster's file, and what it says of faults in them."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from spell_megatron.cli import main
from spell_megatron.config.reading import load_config, read_section
from spell_megatron.config.schema import Config
from spell_megatron.jobs.job import steps
from spell_megatron.jobs.site import Site
from spell_megatron.jobs.site_faults import site_faults
from spell_megatron.ranks import LAUNCHER_VARIABLES

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "slurm" / "cluster.example.yaml"
QUICKSTART = ("--config", "examples/quickstart.yaml")


def run_config(
    processes: int = 16, replicas: int = 2, tensor: int = 4, colocated: bool = False, staleness: int = 0, **run
) -> Config:
    return Config(
        model={"path": "/x/policy"},
        data={"documents": "/x/documents.parquet"},
        run={"output_dir": "/x/runs", **run},
        rollout={"replicas": replicas, "tensor_parallel": tensor, "colocated": colocated},
        training={"parallel": {"processes": processes}, "staleness": staleness, "importance_sampling": "token"},
    )


def cluster_file(folder: Path, **settings) -> Path:
    file = folder / "cluster.yaml"
    file.write_text(yaml.safe_dump({"folder": str(folder / "shared"), "gpus_per_node": 0} | settings))
    return file


def three_nodes(**change: object) -> Site:
    """The example's cluster with three nodes of 8 GPUs, of which one runs engines."""
    nodes = {"nodes": 3, "engine_nodes": 1, "gpus_per_node": 8}
    return Site.model_validate(read_section(Site, EXAMPLE).settings.model_dump() | nodes | change)


def test_the_example_is_a_cluster_for_the_quick_start():
    quick_start = load_config(ROOT / "examples" / "quickstart.yaml")
    assert not site_faults(read_section(Site, EXAMPLE).checked(), quick_start)


def test_a_run_is_spread_over_the_nodes():
    assert not site_faults(three_nodes(), run_config())
    planned = steps(three_nodes(), run_config(), resume=False)
    places = {step.name: (step.nodes, step.tasks_per_node, step.first_node) for step in planned}
    assert places == {"trainer": (2, 8, 0), "engines": (1, 1, 2)}


@pytest.mark.parametrize(
    ("change", "config", "key", "says"),
    [
        ({"time": "a day"}, {}, "time", "HH:MM:SS"),
        ({"folder": "/my folder"}, {}, "folder", "characters"),
        ({"folder": "x", "ssh": {"host": "h", "user": "me"}}, {}, "folder", "absolute"),
        ({"ssh": {"host": "h"}}, {}, "ssh.user", "missing"),
        ({"env": {"A-B": "1"}}, {}, "env", "A-B"),
        ({"sbatch": {"--ntasks": 4}}, {}, "sbatch", "training.parallel.processes"),
        ({"sbatch": {"array": "1-4"}}, {}, "sbatch", "a run is one job"),
        ({"sbatch": {"time": "2:00:00"}}, {}, "sbatch", "time follows from time"),
        ({"sbatch": {"tim": "2:00:00"}}, {}, "sbatch", "tim follows from time"),
        ({"sbatch": {"gpus-per-task": 1}}, {}, "sbatch", "gpu_request"),
        ({"sbatch": {"gres": "gpu:h100:8"}}, {}, "sbatch", "asks for GPUs"),
        ({"sbatch": {"comment": "a\n#SBATCH --array=1-2"}}, {}, "sbatch", "several lines"),
        ({"env": {"HF_HOME": "$SCRATCH/hf"}}, {}, "env", r"export HF_HOME=\$SCRATCH/hf"),
        ({"env": {"HF_HOME": "~/hf"}}, {}, "env", "literal"),
        ({"env": {"DEBUG": True}}, {}, "env", "DEBUG is a YAML boolean"),
        ({"gpu_request": "gpus-per-task"}, {"processes": 12}, "gpu_request", "6 trainer process.* 8 cannot be shared"),
        ({"gpu_request": "gres", "engine_gpus_per_node": 4}, {}, "gpu_request", "same GPUs on all nodes"),
        ({"nodes": 1}, {}, "engine_nodes", "leave none for the trainer"),
        ({}, {"colocated": True}, "rollout.colocated", "nodes of their own cannot share"),
        ({"engine_nodes": 0}, {}, "nodes", "of which none runs engines"),
        (
            {"engine_nodes": 0, "nodes": 1},
            {"processes": 8, "staleness": 1},
            "training.staleness",
            "share all GPUs",
        ),
        (
            {"engine_nodes": 0, "nodes": 1, "colocated": True},
            {"processes": 8, "staleness": 1},
            "training.staleness",
            "share all GPUs",
        ),
        ({"engine_nodes": 0, "nodes": 1}, {}, "gpus_per_node", "16 trainer process.* and 8"),
        ({}, {"processes": 15}, "training.parallel.processes", "spread evenly over 2 nodes"),
        ({}, {"processes": 32}, "training.parallel.processes", "2 node.* 16. Raise nodes"),
        ({"nodes": 4, "engine_nodes": 2}, {"replicas": 3}, "rollout.replicas", "spread evenly over 2 nodes"),
        ({}, {"replicas": 3}, "rollout.replicas", "more than the 8 GPUs"),
        ({}, {"replicas": 1, "tensor": 16}, "rollout.tensor_parallel", "cannot span nodes"),
        ({"gpus_per_node": 0}, {"device": "cuda"}, "gpus_per_node", "run.device is cuda"),
    ],
)
def test_what_does_not_fit_is_named(change, config, key, says):
    faults = site_faults(three_nodes(**change), run_config(**config))
    assert any(key in fault.keys and re.search(says, fault.message) for fault in faults), faults


@pytest.mark.parametrize(
    "change",
    [
        *({"time": time} for time in ("infinite", "UNLIMITED", "90", "1:30:00", "2-0", "2-00:30:00")),
        {"env": {"A": 1, "B": "true", "C": 0.5, "D": "a$5 #1", "E": "a~b"}},
        {"sbatch": {"gres": "nvme:1", "exclusive": False, "dependency": "afterok:7", "time_min": "1:00:00"}},
        *({"gpu_request": way} for way in ("gpus-per-node", "gres", "gpus-per-task", "none")),
    ],
)
def test_what_fits_is_accepted(change):
    assert not site_faults(three_nodes(**change), run_config())


def test_faults_of_the_cluster_file_are_listed(tmp_path):
    file = tmp_path / "cluster.yaml"
    file.write_text("nodez: 2\ntime: 12:00:00\ncontainer: {imag: x}\nnodes: 0\n")
    reading = read_section(Site, file, ["engine_nodes=two"])
    said = "\n".join(map(str, reading.faults))
    for part in ("Did you mean nodes?", "in quotes", "Did you mean container.image?", "nodes: ", "engine_nodes"):
        assert part in said, said
    assert reading.settings == Site()


def test_without_nemo_run_the_remedy_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "nemo_run", None)
    assert main(["launch", *QUICKSTART, "--executor=local", "--dry-run"]) == 2
    assert "make environment-slurm" in capsys.readouterr().err


def test_scripts_quote_what_people_write(tmp_path):
    venv = tmp_path / "my 'env'"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "activate").write_text("echo activated\npython() { [ $1 = -c ] || echo python $*; }\n")
    cluster = Site(env={"A": "x 'y' $HOME"}, setup="echo before", modules=["cuda/13.0 x"], venv=venv)
    (step,) = steps(cluster, run_config(8, 1, 1, name="a run"), resume=True)
    script = tmp_path / "script"
    script.write_text(step.script + "\necho $A")
    words = f"module() {{ echo module $#; }}; SPELL_RENDEZVOUS=/m; source {script}"
    output = subprocess.run(["bash", "-c", words], capture_output=True, text=True).stdout
    assert output.splitlines() == [
        "module 2",
        "activated",
        "before",
        "python -m spell_megatron train --config /m/config.yaml --rendezvous /m --engine-nodes 0 --resume",
        "x 'y' $HOME",
    ]


def test_dry_run_shows_the_job_and_submits_nothing(spell_launch, tmp_path):
    """The overrides reach NeMo-Run's executor, and the steps follow from them."""
    sbatch = {"constraint": "fast", "exclusive": True, "hold": False, "dependency": "afterok:7", "gres": "nvme:1"}
    settings = {"account": "me", "cpus_per_task": 2, "gpus_per_node": 4, "gpu_type": "h100", "gpu_request": "gres"}
    file = cluster_file(tmp_path, sbatch=sbatch, **settings)
    arguments = ("--run.name=my run", "--training.parallel.processes=4", "--rollout.replicas=2")
    arguments += ("run.executor.nodes=3", "cluster.engine_nodes=1", "run.executor.qos=high")
    arguments += ("run.executor.time=2:00:00", "run.executor.comment=mine")
    done = spell_launch(*QUICKSTART, "--cluster", file, f"--run.output_dir={tmp_path}", *arguments, "--dry-run")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    flags = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
    assert {"account=me", "nodes=3", "ntasks-per-node=2", "constraint=fast", "exclusive", "qos=high"} <= flags
    assert {"dependency=singleton,afterok:7", "gres=gpu:h100:4,nvme:1", "time=2:00:00", "comment=mine"} <= flags
    assert not [flag for flag in flags if flag.startswith(("gpus", "hold"))]
    trainer, engines = (shlex.split(line) for line in lines if line.startswith("srun"))
    assert {"--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--relative=0", "--cpus-per-task=2"} <= set(trainer)
    assert {"--nodes=1", "--ntasks=1", "--ntasks-per-node=1", "--relative=2", "--cpus-per-task=4"} <= set(engines)
    assert any(line.startswith("scontrol") and "show node" in line for line in lines)
    settings = done.stdout.split("END_OF_SPELL_CONFIG\n")[0].split("<<'END_OF_SPELL_CONFIG' || exit 1\n")[1]
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(settings)
    assert load_config(resolved).training.parallel.processes == 4
    assert "Memory plan" in done.stdout
    assert not list((tmp_path / "shared").rglob("*.sh")) and not (tmp_path / "my run").exists()


LEFT_BEHIND = dict.fromkeys((*LAUNCHER_VARIABLES, "PYTHONUSERBASE", "CUDA_VISIBLE_DEVICES"), "1")
LEFT_BEHIND |= {"SLURM_NTASKS": "7", "SLURM_JOB_ID": "1", "SLURM_EXPORT_ENV": "NONE", "SBATCH_EXPORT": "NONE"}
LEFT_BEHIND |= {"SBATCH_PARTITION": "nonesuch", "SBATCH_ARRAY_INX": "1-2", "SBATCH_TIMELIMIT": "1", "KEPT": "yes"}
"""What the shell may hold that submits a job: of another program, of `salloc`, and options of sbatch."""


def test_steps_get_their_nodes_and_gpus(slurm, spell_launch, tmp_path):
    """A job on three nodes of two GPUs each; its steps say where they are instead of training.

    Nothing that the submitting shell holds of other programs reaches them, or changes the job.
    """
    ranks = "import spell_megatron.ranks as r; print(*r.launched() or r.ALONE, end=' ')"
    say = f'python -c "{ranks}"; echo ${{RANK-}}${{MASTER_ADDR-}} $KEPT $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES'
    env = {"PYTHONPATH": str(ROOT)}
    python = f"export PATH={Path(sys.executable).parent}:$PATH"
    setup = f"{python}\n{say}\nexit 0"
    nodes = {"nodes": 3, "engine_nodes": 1, "gpus_per_node": 2, "gpu_request": "gpus-per-task"}
    file = cluster_file(tmp_path, env=env, setup=setup, **nodes)
    arguments = ("--run.device=auto", "--training.parallel.processes=4", "--rollout.replicas=2", "--run.name=places")
    where = (f"--run.output_dir={tmp_path}", "--cluster", file)
    done = spell_launch(*QUICKSTART, *where, *arguments, **LEFT_BEHIND, **slurm.environment)
    assert done.returncode == 0, done.stderr
    assert "SBATCH_PARTITION=nonesuch" in done.stderr and "cluster's file" in done.stderr
    job = re.search(r"job (\d+)", done.stdout)[1]
    ended = slurm.wait(job, 120)
    assert (ended["ExitCode"], ended["Partition"], ended["TimeLimit"]) == ("0:0", "batch", "01:00:00")
    said = {log.name: sorted(log.read_text().splitlines()) for log in tmp_path.rglob("log-*.out")}
    trainer = [f"{rank}: {rank} 4 {rank % 2} yes n{1 + rank // 2} 0,1" for rank in range(4)]
    assert said == {f"log-places.trainer_{job}_0.out": trainer, f"log-places.engines_{job}_0.out": ["0 1 0 yes n3 0,1"]}


def test_components_of_a_heterogeneous_job_get_their_gpus(slurm, spell_launch, tmp_path):
    say = "echo $SLURM_STEP_NUM_TASKS $SLURM_PROCID $CUDA_VISIBLE_DEVICES; sleep 1; exit 0"
    file = cluster_file(tmp_path, nodes=3, engine_nodes=1, gpus_per_node=2, engine_gpus_per_node=1, setup=say)
    arguments = ("--run.device=auto", "--training.parallel.processes=4", "--run.name=parts")
    done = spell_launch(*QUICKSTART, "--cluster", file, f"--run.output_dir={tmp_path}", *arguments, **slurm.environment)
    assert done.returncode == 0, done.stderr
    job = re.search(r"job (\d+)", done.stdout)[1]
    assert slurm.wait(job, 120)["ExitCode"] == "0:0"
    said = {log.name.split("_")[0]: sorted(log.read_text().splitlines()) for log in tmp_path.rglob("log-*.out")}
    trainer = [f"{rank}: 4 {rank} 0,1" for rank in range(4)]
    assert said == {"log-parts.trainer": trainer, "log-parts.engines": ["1 0 0"]}
    logs = tmp_path / "parts" / "logs" / f"job-{job}"
    assert {log.name.split("_")[0] for log in logs.glob("log-*.out")} == set(said)
    nodes = next((tmp_path / "parts" / "jobs").glob("*/nodes")).read_text()
    assert {f"NodeName=n{number} " in nodes for number in (1, 2, 3)} == {True}


PRETENDED = """
nvidia-smi() { seq -f "GPU %g: H100" $([ $SLURMD_NODENAME = n1 ] && echo 1 || echo 2); }
type() { [ "$2" = nvidia-smi ] || builtin type "$@"; }
timeout() { shift; "$@"; }
python() {
    case $*/$SLURM_PROCID in
        -c*) ;;
        *train*/0) sleep 2; return 2 ;;
        *) sleep 60; return 143 ;;
    esac
}
"""
"""Stands in for the driver, which lists one GPU on n1 and two on others, and for the run: rank 0 finds a fault of the
user, and the others wait until Slurm ends them."""


def test_a_bad_node_is_left_out_and_a_fault_of_the_user_is_final(slurm, spell_launch, tmp_path):
    nodes = {"nodes": 2, "engine_nodes": 1, "gpus_per_node": 2}
    file = cluster_file(tmp_path, setup=PRETENDED, sbatch={"exclude": "n4"}, **nodes)
    arguments = ("--run.device=auto", "--training.parallel.processes=2", "--run.name=bad")
    done = spell_launch(*QUICKSTART, "--cluster", file, f"--run.output_dir={tmp_path}", *arguments, **slurm.environment)
    assert done.returncode == 0, done.stderr
    ended = slurm.wait(re.search(r"job (\d+)", done.stdout)[1], 120)
    first, second = (log.read_text() for log in sorted(tmp_path.rglob("log-bad.trainer*.out")))
    assert "spell: n1: nvidia-smi lists 1 of 2 GPUs" in first and "nvidia-smi" not in second
    assert (ended["ExitCode"], ended["Restarts"]) == ("2:0", "1")
    assert ended["NodeList"] == "n[2-3]" and sorted(re.findall(r"\d", ended["ExcNodeList"])) == ["1", "4"]


def test_executors_are_factories_of_nemo_run(nemo_run, tmp_path):
    """`run.executor=slurm run.executor.nodes=8` on the command line of a program that uses NeMo-Run."""
    (tmp_path / "cluster.yaml").write_text(EXAMPLE.read_text())
    code = (
        "import os, spell_megatron.jobs.executors; from nemo_run.cli.api import RunContext\n"
        f"os.chdir({str(tmp_path)!r})\n"
        "context = RunContext(name='x'); context.parse_args(['executor=slurm', 'executor.nodes=8'])\n"
        "print(type(context.executor).__name__, context.executor.nodes, context.executor.time)"
    )
    done = nemo_run("-c", code)
    assert done.stdout == "SlurmExecutor 8 01:00:00\n", done.stderr


def test_what_slurm_refuses_is_told(slurm, spell_launch, tmp_path):
    file = cluster_file(tmp_path, partition="nonesuch")
    done = spell_launch(*QUICKSTART, "--cluster", file, f"--run.output_dir={tmp_path}", **slurm.environment)
    assert done.returncode == 2
    assert "nonesuch" in done.stderr and "cluster's file" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("run.executor.nodez=2", "Did you mean run.executor.nodes?"),
        ("run.executor.additional_parameters={'array': '1-2'}", "cluster.sbatch.OPTION"),
    ],
)
def test_overrides_of_the_executor_are_checked(spell_launch, tmp_path, word, says):
    done = spell_launch(*QUICKSTART, "--cluster", cluster_file(tmp_path), f"--run.output_dir={tmp_path}", word)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr
