"""The settings of the file that describes a Slurm cluster (`spell launch --cluster`).

In this package a Slurm cluster is a site, because a cluster is one of documents elsewhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from spell_megatron.config.section import Section


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


class Site(Section):
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
    """Limit of the job's time, "HH:MM:SS" or "D-HH:MM:SS", in quotes: YAML takes 12:00:00 for a number. "infinite": no
    limit but the partition's."""
    save_seconds: int = Field(300, ge=0)
    """Seconds before this limit at which the run gives up its rollout or ends its update, saves a checkpoint and is
    queued again. Slurm may give the signal a minute earlier. 0: the run is cut off."""
    nodes: int = Field(1, ge=1)
    """Nodes of the job, for trainer and engines together."""
    engine_nodes: int = Field(0, ge=0)
    """How many of them, the last ones, run engines. 0: trainer and engines share one node."""
    colocated: bool = False
    """Engines run on all nodes, on the GPUs of the trainer, and give up their memory during updates."""
    gpus_per_node: int = Field(8, ge=0)
    """GPUs of each node; 0: train on CPUs."""
    gpu_type: str = ""
    """Type of these GPUs where Slurm knows several, as in --gpus-per-node=TYPE:8."""
    gpu_request: Literal["gpus-per-node", "gres", "gpus-per-task", "none"] = "gpus-per-node"
    """How the job asks Slurm for GPUs: by --gpus-per-node=8; by --gres=gpu:8; by --gpus-per-task, an equal share for
    each trainer process; or not at all (none), where Slurm knows no GPUs. Take whole nodes then
    (sbatch: {exclusive: true})."""
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
    """Any other options of sbatch by their long names; true for those without a value. `dependency` comes on top of the
    default, singleton: jobs of the same run.name wait for each other."""
    modules: list[str] = []
    """Environment modules to load on the nodes."""
    venv: Path | None = None
    """Virtual environment in which spell_megatron is installed, on the shared filesystem or in the container; null:
    `python` on the nodes has it."""
    env: dict[str, str | int | float | bool] = {}
    """Environment variables of all processes of the job. Values are literal: no $NAME or ~ is replaced in them. For
    that, write `export HF_HOME=$SCRATCH/hf` into setup. Quote what YAML takes for something else ("true", "010")."""
    setup: str = ""
    """Shell commands before each process of the job, after modules, environment and variables. One that fails ends the
    job; write `|| true` after one that may. Files that it sources may fail inside."""
    container: ContainerSection = ContainerSection()
    ssh: SshSection = SshSection()

    @property
    def trainer_nodes(self) -> int:
        return self.nodes - self.engine_nodes if self.engine_nodes or self.colocated else 1

    @property
    def heterogeneous(self) -> bool:
        """Whether engine nodes differ from the trainer's, so that the job needs two components."""
        return self.engine_gpus_per_node is not None or self.engine_gpu_type is not None

    def gpus_of(self, engines: bool) -> tuple[str, int]:
        """(type, number) of the GPUs of each of the trainer's nodes, or of the engines'."""
        number, kind = self.gpus_per_node, self.gpu_type
        if engines and self.heterogeneous:
            number = number if self.engine_gpus_per_node is None else self.engine_gpus_per_node
            kind = kind if self.engine_gpu_type is None else self.engine_gpu_type
        return kind, number
