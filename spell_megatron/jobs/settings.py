"""The file that describes a cluster: its settings, and what in it does not suit a run."""

from __future__ import annotations

import re
from collections.abc import Iterator
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
    """What in a cluster's file is wrong by itself, or does not suit a run. Checks no files."""
    return [*_file_faults(cluster), *_placement_faults(cluster, config)]


def _file_faults(cluster: Cluster) -> Iterator[Fault]:
    """What is wrong with a cluster's file, whatever the run."""
    limit = _seconds(cluster.time)
    if limit is None:
        yield Fault.of("time", f'{cluster.time!r} is no time for Slurm. Write "HH:MM:SS" or "D-HH:MM:SS", in quotes')
    elif limit <= cluster.save_seconds + 60:
        yield Fault.of(
            "time save_seconds",
            f"the last {cluster.save_seconds} s of {cluster.time}, and up to one minute more, are kept for the last "
            "checkpoint. No time is left to train. Raise time, or lower save_seconds",
        )
    if cluster.heterogeneous and not cluster.engine_nodes:
        yield Fault.of(
            "engine_nodes engine_gpus_per_node engine_gpu_type",
            "`engine_gpus_per_node` and `engine_gpu_type` describe engine nodes, and there are none. Set engine_nodes, "
            "or leave out the other two",
        )
    # NeMo-Run writes paths into the batch script as they are.
    if not re.fullmatch(r"[\w./+@:=~-]+", str(cluster.folder)):
        yield Fault.of(
            "folder",
            f"{str(cluster.folder)!r} has characters that cannot stand in a batch script. Use letters, digits and ./_-",
        )
    if cluster.ssh.host and not cluster.folder.is_absolute():
        yield Fault.of("folder ssh.host", f"{str(cluster.folder)!r} on {cluster.ssh.host} must be an absolute path")
    if cluster.ssh.host and not cluster.ssh.user:
        yield Fault.of("ssh.user", "is missing: your user name on the login node")
    for name in cluster.env:
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            yield Fault.of("env", f"{name!r} cannot name a variable. Correct it")
    for option in cluster.sbatch:
        if (name := option.strip("-").replace("-", "_")) in _OURS:
            yield Fault.of("sbatch", f"{option} follows from {_OURS[name]}. Set that instead")


def _placement_faults(cluster: Cluster, config: Config) -> Iterator[Fault]:
    """Why trainer and engines of a run do not fit the cluster's nodes and GPUs."""
    if not cluster.gpus_per_node and config.run.device == "cuda":
        yield Fault.of(
            "gpus_per_node run.device",
            "is 0, but run.device is cuda. Give the number of GPUs, or train with --run.device=cpu",
        )
    if cluster.engine_nodes >= cluster.nodes:
        yield Fault.of(
            "engine_nodes nodes",
            f"{cluster.engine_nodes} of {cluster.nodes} node(s) leave none for the trainer. Raise nodes, which counts "
            "the engines' nodes too",
        )
    elif not cluster.colocated and not cluster.engine_nodes:
        yield from _one_node_faults(cluster, config)
    else:
        if cluster.colocated:
            yield from _colocation_faults(cluster, config)
        yield from _trainer_node_faults(cluster, config)
        yield from _engine_node_faults(cluster, config)


def _gpus_per_node(cluster: Cluster, config: Config) -> int:
    """GPUs that the run uses on each of the trainer's nodes; 0 on CPUs."""
    return cluster.gpus_per_node if config.run.device != "cpu" else 0


def _one_node_faults(cluster: Cluster, config: Config) -> Iterator[Fault]:
    """Trainer and engines share one node, each on GPUs of its own."""
    if cluster.nodes != 1:
        yield Fault.of(
            "nodes engine_nodes",
            f"{cluster.nodes} nodes, of which none runs engines. Say with engine_nodes how many of them do, or use one",
        )
    gpus, processes, rollout = _gpus_per_node(cluster, config), config.training.parallel.processes, config.rollout
    engines = 0 if rollout.urls else rollout.replicas * rollout.tensor_parallel
    if gpus and processes + engines > gpus and not processes == engines == gpus:
        yield Fault.of(
            "gpus_per_node training.parallel.processes rollout.replicas",
            f"a node of {cluster.gpus_per_node} GPUs is too small for {processes} trainer process(es) and {engines} "
            "GPU(s) of engines. Give the engines nodes of their own (engine_nodes), or make either smaller",
        )


def _colocation_faults(cluster: Cluster, config: Config) -> Iterator[Fault]:
    """Engines and trainer share the GPUs of all nodes."""
    if cluster.engine_nodes or config.rollout.urls:
        yield Fault.of(
            "colocated engine_nodes rollout.urls",
            "`colocated` cannot be combined with `engine_nodes` or `rollout.urls`. Leave out either",
        )
    gpus = _gpus_per_node(cluster, config) * cluster.nodes
    processes = config.training.parallel.processes
    engines = config.rollout.replicas * config.rollout.tensor_parallel
    if gpus and not processes == engines == gpus:
        yield Fault.of(
            "colocated training.parallel.processes rollout.replicas rollout.tensor_parallel",
            f"with `colocated` each of the {gpus} GPUs must have one trainer process and belong to an engine. There "
            f"are {processes} trainer processes, and the engines need {engines} GPUs",
        )


def _trainer_node_faults(cluster: Cluster, config: Config) -> Iterator[Fault]:
    """The trainer's processes are spread over its nodes."""
    processes, nodes = config.training.parallel.processes, cluster.trainer_nodes
    gpus = _gpus_per_node(cluster, config) * nodes
    if processes % nodes:
        yield Fault.of(
            "training.parallel.processes nodes",
            f"{processes} trainer processes cannot be spread evenly over {nodes} nodes",
        )
    if gpus and processes > gpus:
        yield Fault.of(
            "training.parallel.processes nodes gpus_per_node",
            f"{processes} trainer processes need a GPU each, and {nodes} node(s) have {gpus}. Raise nodes",
        )


def _engine_node_faults(cluster: Cluster, config: Config) -> Iterator[Fault]:
    """The engines are spread over their nodes; none spans nodes."""
    replicas, each = config.rollout.replicas, config.rollout.tensor_parallel
    nodes = cluster.engine_nodes or cluster.nodes
    gpus = _gpus_per_node(cluster, config)
    engine_gpus = gpus if cluster.engine_gpus_per_node is None else cluster.engine_gpus_per_node
    if config.rollout.urls and not cluster.colocated:
        yield Fault.of(
            "engine_nodes rollout.urls",
            "engine_nodes starts engines, and rollout.urls names engines that run already. Set engine_nodes to 0, or "
            "leave out urls",
        )
    if replicas % nodes:
        yield Fault.of(
            "rollout.replicas engine_nodes", f"{replicas} engines cannot be spread evenly over {nodes} nodes"
        )
    if gpus and replicas * each > engine_gpus * nodes:
        yield Fault.of(
            "rollout.replicas rollout.tensor_parallel engine_nodes",
            f"{replicas} engines of {each} GPU(s) need more than the {engine_gpus * nodes} GPUs of {nodes} node(s). "
            "Raise engine_nodes (an engine cannot span nodes)",
        )
    if gpus and each > engine_gpus:
        yield Fault.of(
            "rollout.tensor_parallel gpus_per_node",
            f"an engine of {each} GPUs does not fit a node of {engine_gpus}: an engine cannot span nodes. Lower it",
        )


def _seconds(time: str) -> int | None:
    """Seconds of a time of Slurm's ("MIN", "MIN:SS", "HH:MM:SS", "D-HH", "D-HH:MM", "D-HH:MM:SS"); None: it is none."""
    match = _TIME.fullmatch(time)
    if match is None:
        return None
    days, *parts = (int(part or 0) for part in match.groups())
    if match[1] is None and match[4] is None:  # minutes come first
        return 60 * parts[0] + parts[1]
    return 86400 * days + 3600 * parts[0] + 60 * parts[1] + parts[2]
