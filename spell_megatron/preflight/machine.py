"""The machine: packages, GPUs, the run's folder and its disk."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from spell_megatron.config.schema import Config, RunConfig
from spell_megatron.monitoring.run_lock import in_use_by_another
from spell_megatron.preflight.findings import Findings
from spell_megatron.ranks import launched_processes

if TYPE_CHECKING:
    from spell_megatron.training.policy import PolicyModel

WITHOUT_CHECKPOINT = "its settings, metrics, logs and rollouts"
"""What the folder of a run holds before its first checkpoint."""


def check_packages(found: Findings, config: Config) -> None:
    """The packages that the run needs are installed."""
    if config.logging.wandb and not is_installed("wandb"):
        found.fault(
            "logging.wandb",
            "the wandb package is not installed. Install it (pip install wandb), or set this to false",
        )
    for package in ("torch", "megatron.core", *(() if config.rollout.urls else ("vllm",))):
        if not is_installed(package):
            found.fault(
                "run.device",
                f"the package {package} is not installed in this Python. Install spell_megatron with the "
                "extra 'cpu' (machines without a GPU) or 'gpu'",
            )


def check_trainer(found: Findings, config: Config) -> None:
    """The trainer's device exists, with a GPU for each process."""
    gpus, launched, processes = uses_gpus(config), launched_processes(), config.training.parallel.processes
    if config.run.device == "cuda" and not gpus:
        found.fault(
            "run.device",
            "this is cuda, but torch sees no GPU here. Set run.device to cpu or auto, or check that "
            "`nvidia-smi` lists a GPU and that torch is a CUDA build",
        )
    elif not gpus and config.model.dtype == "bfloat16":
        found.warn(
            "model.dtype = bfloat16 is slow on CPUs; float32 is usually faster there (a model with linear-attention "
            "layers needs bfloat16)"
        )
    elif gpus and launched is None:
        import torch

        if processes > (visible := torch.cuda.device_count()):
            found.fault(
                "training.parallel.processes",
                f"{processes} trainer processes need a GPU each, and this machine shows {visible}. Lower it, or start "
                "the processes on several machines with srun or torchrun",
            )
        elif config.training.staleness and not config.rollout.urls and shares_all_gpus(config, processes):
            found.fault(
                "training.staleness training.parallel.processes",
                "trainer and engines would work at the same time, but here they share all GPUs, which each of them has "
                "in its turn. Set training.staleness to 0, or give either of them fewer GPUs",
            )
    if launched not in (None, processes):
        found.warn(
            f"training.parallel.processes = {processes} is not used: {launched} processes were started from outside"
        )


def check_run_folder(found: Findings, run: RunConfig, resume: Path | None, restarted: bool) -> None:
    """The run's folder is new or continued, no other process works in it, and it can be written."""
    folder = run.output_dir / run.name
    has_checkpoint = (folder / "checkpoints" / "latest").exists()
    if in_use := in_use_by_another(folder):
        found.fault("run.name run.output_dir", in_use)
    elif resume is not None and not resume.is_dir():
        found.fault("run.name", f"there is no run in {resume}. Check the folder given to --resume")
    elif resume is not None and not has_checkpoint:
        found.fault(
            "run.name",
            f"the run in {folder} has no checkpoint to continue from. Start without --resume and with another "
            f"--run.name, or first remove the folder, which loses {WITHOUT_CHECKPOINT}",
        )
    elif resume is None and holds_run(folder) and (has_checkpoint or not restarted):
        remedy = "continue that run with --resume"
        if not has_checkpoint:
            remedy = f"remove the folder, which loses {WITHOUT_CHECKPOINT} (it has no checkpoint)"
        found.fault(
            "run.name run.output_dir",
            f"{folder} already holds a run. Choose another name with --run.name=…, or {remedy}",
        )
    for path in (folder / name for name in ("metrics.jsonl", "tensorboard", "rollouts", "checkpoints", "logs")):
        what, right = ("file", path.is_file()) if path.suffix else ("folder", path.is_dir())
        if path.exists() and not (right and os.access(path, os.R_OK | os.W_OK)):
            found.fault("run.name", f"{path} is no {what} that can be read and written. Correct that, or move it away")
    existing = nearest_existing(folder)
    if not existing.is_dir():
        found.fault("run.output_dir run.name", f"{existing} is a file. Choose another output folder")
    elif not os.access(existing, os.W_OK):
        found.fault("run.output_dir", f"{existing} is not writable. Choose another folder")


def check_disk(found: Findings, config: Config, policy: PolicyModel) -> None:
    """The disk has room for the checkpoints."""
    from spell_megatron.weights.sizes import checkpoint_bytes

    needed, kept = checkpoint_bytes(policy), config.checkpoint.keep
    folder = config.run.output_dir.absolute()
    free = shutil.disk_usage(nearest_existing(folder)).free
    message = (
        f"a checkpoint takes about {needed / 1e9:.2f} GB, and the disk of {folder} has {free / 1e9:.2f} "
        "GB left. Free some space, or choose another output_dir"
    )
    if free < needed:
        found.fault("run.output_dir", message)
    elif free < (kept + 1) * needed:
        found.warn(f"checkpoint.keep = {kept} may not fit: {message}")


def is_installed(package: str) -> bool:
    """Whether Python finds a package, which is not imported."""
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # the package that holds it
        return False


def uses_gpus(config: Config) -> bool:
    """Whether the run would use GPUs."""
    if config.run.device == "cpu" or not is_installed("torch"):
        return False
    import torch

    return torch.cuda.is_available()


def shares_all_gpus(config: Config, trainers: int) -> bool:
    """Whether engines that the run starts here get the trainer's GPUs."""
    from spell_megatron.rollout.placement import shares_gpus

    rollout = config.rollout
    return shares_gpus(rollout.replicas * rollout.tensor_parallel, config.run.device, trainers, rollout.colocated)


def capability(config: Config) -> tuple[int, int] | None:
    """Compute capability of the GPUs that the run would use; None: it uses CPUs."""
    if not uses_gpus(config):
        return None
    import torch

    return torch.cuda.get_device_capability()


def holds_run(folder: Path) -> bool:
    """Whether a run has left results here. Logs of engines that died at the start are none."""
    metrics, checkpoints = folder / "metrics.jsonl", folder / "checkpoints"
    return (metrics.is_file() and metrics.stat().st_size > 0) or (checkpoints.is_dir() and any(checkpoints.iterdir()))


def nearest_existing(path: Path) -> Path:
    """The path itself, or the nearest of its parents that exists."""
    path = path.absolute()
    return next(candidate for candidate in (path, *path.parents) if candidate.exists())
