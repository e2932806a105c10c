"""The file that describes a cluster: what it may hold, and what in it does not suit a run."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import Field

from spell_megatron.config.faults import Fault
from spell_megatron.config.schema import Config, Section

_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d\d))?(?::(\d\d))?")
_OURS = {"job_name": "run.name", "nodes": "nodes", "ntasks": "training.parallel.processes", "output": "folder"}
_OURS |= {"ntasks_per_node": "training.parallel.processes", "signal": "save_seconds"}


class ContainerSection(Section):
    image: str = ""
    """Image for Slurm's pyxis plug-in, a name or a .sqsh file; empty: no containers."""
    mounts: list[str] = []
    """Folders to be seen inside, as SOURCE:TARGET. Mount `folder`, the run's folder, model and documents under their
    own paths."""


class SshSection(Section):
    host: str = ""
    """Login node to submit from, by SSH; empty: this machine is one."""
    user: str = ""
    """User name there."""
    port: int | None = Field(None, ge=1, le=65535)
    """Port of its SSH server; default 22."""
    identity: Path | None = None
    """File of the private key; default: what SSH finds, else a password is asked for."""
    setup: str = ""
    """Command before each command there, such as `source /etc/profile`."""


class Cluster(Section):
    folder: Path = Path(".")
    """Folder on the filesystem that login and compute nodes share. NeMo-Run keeps its experiments in
    `folder/nemo-run`; with ssh.host, relative paths of the run's settings are taken from it."""
    account: str | None = None
    """Account that pays for the job; null: the user's default."""
    partition: str | None = None
    """Partition (queue) of the job; null: the cluster's default."""
    qos: str | None = None
    """Quality of service; null: the default."""
    time: str = "01:00:00"
    """Limit of the job's time, "HH:MM:SS" or "D-HH:MM:SS", in quotes: YAML takes 12:00:00 for a number."""
    save_seconds: int = Field(300, ge=0)
    """Seconds before this limit at which the run gives up its rollout or ends its update, saves a checkpoint and is
    queued again. Slurm may give the signal a minute earlier. 0: the run is cut off."""
    nodes: int = Field(1, ge=1)
    """Nodes of the job, those of trainer and engines together."""
    engine_nodes: int = Field(0, ge=0)
    """How many of them, the last ones, run engines. 0: trainer and engines share one node."""
    colocated: bool = False
    """Engines run on all nodes, on the GPUs of the trainer, and give up their memory during updates."""
    gpus_per_node: int = Field(8, ge=0)
    """GPUs of each node; 0: train on CPUs."""
    gpu_type: str = ""
    """Type of these GPUs where Slurm knows several, as in --gpus-per-node=TYPE:8."""
    engine_gpus_per_node: int | None = Field(None, ge=0)
    """GPUs of each engine node, if not as many. With this or engine_gpu_type the job is a heterogeneous one."""
    engine_gpu_type: str | None = None
    """Type of the GPUs of engine nodes, if it is another one."""
    gpu: str = "H100-80G"
    """Kind of GPU, for the memory plan of --dry-run; see `spell plan --help`."""
    cpus_per_task: int | None = Field(None, ge=1)
    """CPU cores of each trainer process; null: what the cluster gives."""
    memory: str | None = None
    """Memory of each node, such as "200G"; "0": all of it; null: the cluster's default."""
    sbatch: dict[str, str | int | bool] = {}
    """Any other options of sbatch by their long names; true for those without a value."""
    modules: list[str] = []
    """Environment modules to load on the nodes."""
    venv: Path | None = None
    """Virtual environment in which spell_megatron is installed, on the shared filesystem or in the container; null:
    `python` on the nodes has it."""
    env: dict[str, str | int | float] = {}
    """Environment variables of all processes of the job."""
    setup: str = ""
    """Shell commands before each process of the job, after modules, environment and variables."""
    container: ContainerSection = ContainerSection()
    ssh: SshSection = SshSection()

    @property
    def trainer_nodes(self) -> int:
        return self.nodes - self.engine_nodes if self.engine_nodes or self.colocated else 1

    @property
    def heterogeneous(self) -> bool:
        """Whether engine nodes differ from the trainer's, so that the job needs two components."""
        return self.engine_gpus_per_node is not None or self.engine_gpu_type is not None

    def gpus_of(self, engines: bool) -> str | int | None:
        """Slurm's --gpus-per-node of the trainer's nodes or the engines'; None: without GPUs."""
        number, kind = self.gpus_per_node, self.gpu_type
        if engines and self.heterogeneous:
            number = number if self.engine_gpus_per_node is None else self.engine_gpus_per_node
            kind = kind if self.engine_gpu_type is None else self.engine_gpu_type
        return (f"{kind}:{number}" if kind else number) or None


def cluster_faults(cluster: Cluster, config: Config) -> list[Fault]:
    """What in a cluster's file is wrong by itself, or with a run. Checks no files."""
    faults: list[Fault] = []

    def check(holds: bool, keys: str, message: str) -> None:
        if not holds:
            faults.append(Fault(tuple(keys.split()), message))

    limit = _seconds(cluster.time)
    check(
        limit is not None,
        "time",
        f'{cluster.time!r} is no time for Slurm. Write "HH:MM:SS" or "D-HH:MM:SS", in quotes',
    )
    check(
        limit is None or limit > cluster.save_seconds + 60,
        "time save_seconds",
        f"of {cluster.time}, the last {cluster.save_seconds} s and up to a minute more are for the last checkpoint: "
        "nothing is left to train in. Raise time, or lower save_seconds",
    )
    check(
        not cluster.heterogeneous or cluster.engine_nodes > 0,
        "engine_nodes engine_gpus_per_node engine_gpu_type",
        "there are no engine nodes whose GPUs could differ. Set engine_nodes, or leave out the other two",
    )
    # NeMo-Run writes paths into the batch script as they are.
    check(
        re.fullmatch(r"[\w./+@:=~-]+", str(cluster.folder)) is not None,
        "folder",
        f"{str(cluster.folder)!r} has characters that cannot stand in a batch script. Use letters, digits and ./_-",
    )
    check(
        not cluster.ssh.host or cluster.folder.is_absolute(),
        "folder ssh.host",
        f"{str(cluster.folder)!r} must be an absolute path, for it is one of {cluster.ssh.host}",
    )
    check(not cluster.ssh.host or bool(cluster.ssh.user), "ssh.user", "is missing: your user name on the login node")
    for name in cluster.env:
        check(re.fullmatch(r"[A-Za-z_]\w*", name) is not None, "env", f"{name!r} cannot name a variable. Correct it")
    for option in cluster.sbatch:
        name = option.strip("-").replace("-", "_")
        check(name not in _OURS, "sbatch", f"{option} follows from {_OURS.get(name)}. Set that instead")

    processes, replicas, each = (
        config.training.parallel.processes,
        config.rollout.replicas,
        config.rollout.tensor_parallel,
    )
    gpus = cluster.gpus_per_node if config.run.device != "cpu" else 0
    engine_gpus = gpus if cluster.engine_gpus_per_node is None else cluster.engine_gpus_per_node
    check(
        cluster.gpus_per_node > 0 or config.run.device != "cuda",
        "gpus_per_node run.device",
        "is 0, but run.device is cuda. Give the number of GPUs, or train with --run.device=cpu",
    )
    if cluster.engine_nodes >= cluster.nodes:
        check(
            False,
            "engine_nodes nodes",
            f"{cluster.engine_nodes} of {cluster.nodes} node(s) leave none for the trainer. Raise nodes, which counts "
            "those of the engines too",
        )
        return faults
    if cluster.colocated:
        check(
            not cluster.engine_nodes and not config.rollout.urls,
            "colocated engine_nodes rollout.urls",
            "the engines are to be on the nodes of the trainer, and elsewhere too. Leave out engine_nodes and "
            "rollout.urls, or colocated",
        )
        check(
            not gpus or processes == replicas * each == gpus * cluster.nodes,
            "colocated training.parallel.processes rollout.replicas rollout.tensor_parallel",
            f"each of the {gpus * cluster.nodes} GPUs must have one trainer process (they are {processes}) and belong "
            f"to an engine (they need {replicas * each})",
        )
    elif not cluster.engine_nodes:
        check(
            cluster.nodes == 1,
            "nodes engine_nodes",
            f"{cluster.nodes} nodes, of which none runs engines. Say with engine_nodes how many of them do, or use one",
        )
        engines = 0 if config.rollout.urls else replicas * each
        check(
            not gpus or processes + engines <= gpus or processes == engines == gpus,
            "gpus_per_node training.parallel.processes rollout.replicas",
            f"a node of {cluster.gpus_per_node} GPUs is too small for {processes} trainer process(es) and {engines} "
            "GPU(s) of engines. Give the engines nodes of their own (engine_nodes), or make either smaller",
        )
        return faults
    check(
        not config.rollout.urls,
        "engine_nodes rollout.urls",
        "the run is to use engines that run already, and to start its own. Set engine_nodes to 0, or leave out urls",
    )
    check(
        processes % cluster.trainer_nodes == 0,
        "training.parallel.processes nodes",
        f"{processes} trainer processes cannot be spread evenly over {cluster.trainer_nodes} nodes",
    )
    check(
        not gpus or processes <= gpus * cluster.trainer_nodes,
        "training.parallel.processes nodes gpus_per_node",
        f"{processes} trainer processes need a GPU each, and {cluster.trainer_nodes} node(s) have "
        f"{gpus * cluster.trainer_nodes}. Raise nodes",
    )
    nodes = cluster.engine_nodes or cluster.nodes
    check(
        replicas % nodes == 0,
        "rollout.replicas engine_nodes",
        f"{replicas} engines cannot be spread evenly over {nodes} nodes",
    )
    check(
        not gpus or replicas * each <= engine_gpus * nodes,
        "rollout.replicas rollout.tensor_parallel engine_nodes",
        f"{replicas} engines of {each} GPU(s) need more than the {engine_gpus * nodes} GPUs of "
        f"{nodes} node(s). Raise engine_nodes (an engine cannot span nodes)",
    )
    check(
        not gpus or each <= engine_gpus,
        "rollout.tensor_parallel gpus_per_node",
        f"an engine of {each} GPUs does not fit a node of {engine_gpus}: engines cannot span nodes. Lower it",
    )
    return faults


def _seconds(time: str) -> int | None:
    """Seconds of a time of Slurm's ("MIN", "MIN:SS", "HH:MM:SS", "D-HH", "D-HH:MM", "D-HH:MM:SS"); None: it is none."""
    match = _TIME.fullmatch(time)
    if match is None:
        return None
    days, *parts = (int(part or 0) for part in match.groups())
    if match[1] is None and match[4] is None:  # minutes come first
        return 60 * parts[0] + parts[1]
    return 86400 * days + 3600 * parts[0] + 60 * parts[1] + parts[2]
