"""What in a site's file is wrong, or does not suit a run."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from spell_megatron.config.faults import Fault
from spell_megatron.config.schema import Config
from spell_megatron.jobs.site import Site

_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d\d?))?(?::(\d\d?))?")
_ENDLESS = ("infinite", "unlimited")
_OURS = {name: name for name in ("account", "partition", "qos", "time", "nodes", "cpus_per_task", "gpus_per_node")}
_OURS |= dict.fromkeys(("ntasks", "ntasks_per_node", "ntasks_per_gpu"), "training.parallel.processes")
_OURS |= dict.fromkeys(("gpus", "gpus_per_task", "gpus_per_socket"), "gpus_per_node and gpu_request")
_OURS |= dict.fromkeys(("output", "error", "chdir", "open_mode"), "folder")
_OURS |= {"mem": "memory", "job_name": "run.name", "signal": "save_seconds"}
"""Options of sbatch that follow from other keys of the file, or from settings of the run."""
_UNSUITABLE = {
    "array": "a run is one job; for several runs call `spell launch` several times",
    "wrap": "the job's script is that of the run",
    "wait": "`spell status` tells how the job does",
    "test_only": "`--dry-run` shows the job",
}
_UNSUITABLE |= dict.fromkeys(("help", "usage", "version", "parsable", "quiet"), "it changes what sbatch prints")


def site_faults(site: Site, config: Config) -> list[Fault]:
    """What in a cluster's file is wrong by itself, or does not suit a run. Checks no files."""
    return [*_file_faults(site), *_placement_faults(site, config)]


def _file_faults(site: Site) -> Iterator[Fault]:
    """What is wrong with a cluster's file, whatever the run."""
    limit = _seconds(site.time)
    if limit is None:
        yield Fault.of("time", f'{site.time!r} is no time for Slurm. Write "HH:MM:SS" or "D-HH:MM:SS", in quotes')
    elif limit <= site.save_seconds + 60:
        yield Fault.of(
            "time save_seconds",
            f"the last {site.save_seconds} s of {site.time}, and up to one minute more, are kept for the last "
            "checkpoint. No time is left to train. Raise time, or lower save_seconds",
        )
    if site.heterogeneous and not site.engine_nodes:
        yield Fault.of(
            "engine_nodes engine_gpus_per_node engine_gpu_type",
            "`engine_gpus_per_node` and `engine_gpu_type` describe engine nodes, and there are none. Set engine_nodes, "
            "or leave out the other two",
        )
    # NeMo-Run writes paths into the batch script as they are.
    if not re.fullmatch(r"[\w./+@:=~-]+", str(site.folder)):
        yield Fault.of(
            "folder",
            f"{str(site.folder)!r} has characters that cannot stand in a batch script. Use letters, digits and ./_-",
        )
    if site.ssh.host and not site.folder.is_absolute():
        yield Fault.of("folder ssh.host", f"{str(site.folder)!r} on {site.ssh.host} must be an absolute path")
    if site.ssh.host and not site.ssh.user:
        yield Fault.of("ssh.user", "is missing: your user name on the login node")
    for name in site.env:
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            yield Fault.of("env", f"{name!r} cannot name a variable. Correct it")
        yield from _variable_faults(name, site.env[name])
    for option, value in site.sbatch.items():
        yield from _option_faults(option, value)


def _variable_faults(name: str, value: str | int | float | bool) -> Iterator[Fault]:
    if isinstance(value, bool):
        yield Fault.of("env", f"{name} is a YAML boolean (true, yes, on, ...). Write the text that you mean in quotes")
    elif re.search(r"\$\{?[A-Za-z_]|^~(/|$)", str(value)):
        yield Fault.of(
            "env",
            f"{name}: values are literal, and {value!r} would stay as it is. Write under setup: export {name}={value}",
        )


def _option_faults(option: str, value: str | int | bool) -> Iterator[Fault]:
    """What is wrong with an option of sbatch. sbatch takes the beginning of a name for the name."""
    name = option.strip("-").replace("-", "_")
    if "\n" in str(value):
        yield Fault.of("sbatch", f"{option} has several lines. Write one")
    elif why := next((why for full, why in _UNSUITABLE.items() if full.startswith(name)), None):
        yield Fault.of("sbatch", f"{option} cannot be used: {why}")
    elif ours := _OURS.get(name) or next((ours for full, ours in _OURS.items() if full.startswith(name)), None):
        yield Fault.of("sbatch", f"{option} follows from {ours}. Set that instead")
    elif name in ("gres", "tres_per_task") and "gpu" in str(value):
        yield Fault.of("sbatch", f"{option}={value} asks for GPUs. Set gpus_per_node, gpu_type and gpu_request instead")


def _placement_faults(site: Site, config: Config) -> Iterator[Fault]:
    """Why trainer and engines of a run do not fit the cluster's nodes and GPUs."""
    if not site.gpus_per_node and config.run.device == "cuda":
        yield Fault.of(
            "gpus_per_node run.device",
            "is 0, but run.device is cuda. Give the number of GPUs, or train with --run.device=cpu",
        )
    if config.rollout.colocated and site.engine_nodes:
        yield Fault.of(
            "engine_nodes rollout.colocated",
            "engines on nodes of their own cannot share the trainer's GPUs. Leave out engine_nodes, and set "
            "`colocated` if the job has several nodes; or set rollout.colocated to false",
        )
    if site.engine_nodes >= site.nodes:
        yield Fault.of(
            "engine_nodes nodes",
            f"{site.engine_nodes} of {site.nodes} node(s) leave none for the trainer. Raise nodes, which counts "
            "the engines' nodes too",
        )
    elif not site.colocated and not site.engine_nodes:
        yield from _one_node_faults(site, config)
    else:
        if site.colocated:
            yield from _colocation_faults(site, config)
        yield from _trainer_node_faults(site, config)
        yield from _engine_node_faults(site, config)
    if config.training.staleness and _share_gpus(site, config):
        yield Fault.of(
            "training.staleness colocated",
            "trainer and engines would work at the same time, but here they share all GPUs, which each of them has in "
            "its turn. Set training.staleness to 0, or give the engines GPUs of their own",
        )
    if site.trainer_nodes > 0:
        yield from _gpu_request_faults(site, config)


def _share_gpus(site: Site, config: Config) -> bool:
    """Whether trainer and engines have the same GPUs."""
    rollout, gpus = config.rollout, _gpus_per_node(site, config)
    if site.colocated or site.engine_nodes or rollout.urls:
        return site.colocated and gpus > 0
    return config.training.parallel.processes == rollout.replicas * rollout.tensor_parallel == gpus


def _gpu_request_faults(site: Site, config: Config) -> Iterator[Fault]:
    """Why the job cannot ask for its GPUs in the way that the file wants."""
    tasks = config.training.parallel.processes // site.trainer_nodes
    if site.gpu_request == "gpus-per-task" and site.gpus_per_node and (not tasks or site.gpus_per_node % tasks):
        yield Fault.of(
            "gpu_request gpus_per_node training.parallel.processes",
            f"with gpus-per-task each of the {tasks} trainer process(es) of a node asks for an equal share of its "
            f"GPUs, and {site.gpus_per_node} cannot be shared evenly. Change either, or use another gpu_request",
        )
    if site.gpu_request == "gres" and site.gpus_of(engines=True) != site.gpus_of(engines=False):
        yield Fault.of(
            "gpu_request engine_gpus_per_node engine_gpu_type",
            "gres asks for the same GPUs on all nodes (NeMo-Run has one --gres for both parts of a heterogeneous job). "
            "Use gpus-per-node or gpus-per-task, or leave out engine_gpus_per_node and engine_gpu_type",
        )


def _gpus_per_node(site: Site, config: Config) -> int:
    """GPUs that the run uses on each of the trainer's nodes; 0 on CPUs."""
    return site.gpus_per_node if config.run.device != "cpu" else 0


def _one_node_faults(site: Site, config: Config) -> Iterator[Fault]:
    """Trainer and engines share one node, each on GPUs of its own."""
    if site.nodes != 1:
        yield Fault.of(
            "nodes engine_nodes",
            f"{site.nodes} nodes, of which none runs engines. Say with engine_nodes how many of them do, or use one",
        )
    gpus, processes, rollout = _gpus_per_node(site, config), config.training.parallel.processes, config.rollout
    engines = 0 if rollout.urls else rollout.replicas * rollout.tensor_parallel
    if gpus and processes + engines > gpus and not processes == engines == gpus:
        yield Fault.of(
            "gpus_per_node training.parallel.processes rollout.replicas",
            f"a node of {site.gpus_per_node} GPUs is too small for {processes} trainer process(es) and {engines} "
            "GPU(s) of engines. Give the engines nodes of their own (engine_nodes), or make either smaller",
        )


def _colocation_faults(site: Site, config: Config) -> Iterator[Fault]:
    """Engines and trainer share the GPUs of all nodes."""
    if site.engine_nodes or config.rollout.urls:
        yield Fault.of(
            "colocated engine_nodes rollout.urls",
            "`colocated` cannot be combined with `engine_nodes` or `rollout.urls`. Leave out either",
        )
    gpus = _gpus_per_node(site, config) * site.nodes
    processes = config.training.parallel.processes
    engines = config.rollout.replicas * config.rollout.tensor_parallel
    if gpus and not processes == engines == gpus:
        yield Fault.of(
            "colocated training.parallel.processes rollout.replicas rollout.tensor_parallel",
            f"with `colocated` each of the {gpus} GPUs must have one trainer process and belong to an engine. There "
            f"are {processes} trainer processes, and the engines need {engines} GPUs",
        )


def _trainer_node_faults(site: Site, config: Config) -> Iterator[Fault]:
    """The trainer's processes are spread over its nodes."""
    processes, nodes = config.training.parallel.processes, site.trainer_nodes
    gpus = _gpus_per_node(site, config) * nodes
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


def _engine_node_faults(site: Site, config: Config) -> Iterator[Fault]:
    """The engines are spread over their nodes; none spans nodes."""
    replicas, each = config.rollout.replicas, config.rollout.tensor_parallel
    nodes = site.engine_nodes or site.nodes
    gpus = _gpus_per_node(site, config)
    engine_gpus = gpus if site.engine_gpus_per_node is None else site.engine_gpus_per_node
    if config.rollout.urls and not site.colocated:
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


def _seconds(time: str) -> float | None:
    """Seconds of a time of Slurm's ("MIN", "MIN:SS", "HH:MM:SS", "D-HH", "D-HH:MM", "D-HH:MM:SS", "infinite").

    None: it is no time.
    """
    if time.lower() in _ENDLESS:
        return math.inf
    match = _TIME.fullmatch(time)
    if match is None:
        return None
    days, *parts = (int(part or 0) for part in match.groups())
    if match[1] is None and match[4] is None:  # minutes come first
        return 60 * parts[0] + parts[1]
    return 86400 * days + 3600 * parts[0] + 60 * parts[1] + parts[2]
