"""Hugging Face checkpoints to Megatron distributed checkpoints and back, one tensor at a time."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from spell_megatron.config.schema import ParallelConfig
from spell_megatron.errors import UserError
from spell_megatron.files import appearing_folder
from spell_megatron.processes.folder_lock import FolderLock
from spell_megatron.training.policy import PolicyModel
from spell_megatron.weights.hf_checkpoint import Checkpoint
from spell_megatron.weights.huggingface import save_checkpoint
from spell_megatron.weights.megatron import OnProgress, locate, read_megatron, write_megatron
from spell_megatron.weights.side_files import read_side_files, write_side_files


def hf_to_megatron(hf: Path, megatron: Path, parallel: ParallelConfig, on_progress: OnProgress | None = None) -> None:
    """Write a Hugging Face checkpoint as a distributed checkpoint, cut for a layout.

    Configuration, tokenizer and chat template are copied beside it. The folder appears when it is complete.

    Raises:
        UserError: the architecture is unknown, a file or tensor is missing or damaged, the layout does not fit
            the model, the output exists already, or the disk is full.
    """
    described, side_files = PolicyModel.load(hf), read_side_files(Path(hf))
    out = Path(megatron)
    with Checkpoint(hf) as source, _alone(out), appearing_folder(_new(out)) as partial:
        _check_room(partial, source.nbytes())
        source.check(described, set(source.files))
        policy = replace(described, dtype=source.dtype())
        write_megatron(partial, source, policy, parallel, on_progress)
        write_side_files(side_files, partial, policy.dtype)


def megatron_to_hf(megatron: Path, hf: Path, on_progress: OnProgress | None = None) -> None:
    """Write a distributed checkpoint, or one of a run of `spell train`, as a Hugging Face checkpoint.

    Raises:
        UserError: the checkpoint is incomplete, damaged or of another model than its config.json says, the
            output exists already, or the disk is full.
    """
    _, side_files = locate(Path(megatron))
    out = Path(hf)
    with _alone(out):
        save_checkpoint(read_megatron(megatron, on_progress), side_files, _new(out))


def compare(megatron: Path, hf: Path, on_progress: OnProgress | None = None) -> int:
    """Compare every tensor of the two checkpoints bit by bit; returns how many there are.

    Raises:
        UserError: names the first tensor that differs, or those that one of the two lacks.
    """
    with Checkpoint(hf) as checkpoint:
        checkpoint.check(PolicyModel.load(hf), set(checkpoint.files))
        count = 0
        for name, tensor in read_megatron(megatron, on_progress):
            count += 1
            other = checkpoint.tensor(name)
            if other.dtype != tensor.dtype or other.shape != tensor.shape or _bits(other).ne(_bits(tensor)).any():
                raise UserError(
                    f"{name} differs between {megatron} and {hf}: the converted checkpoint is wrong, the other one is "
                    "as it was. Convert it again to another place. If that differs too, suspect the disk or report a "
                    "defect."
                )
    return count


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _alone(out: Path) -> FolderLock:
    """Keep other conversions away from what this one makes."""
    remedy = "Wait for it, or choose another place."
    return FolderLock(out.parent, f"a conversion to {out.name}", remedy, f".{out.name}.lock")


def _new(out: Path) -> Path:
    """The folder to be made; UserError if it is there."""
    if out.exists():
        raise UserError(f"{out} exists already. Choose another place, or move it away.")
    return out


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"The checkpoint takes about {needed / 1e9:.2f} GB, and the disk of {folder.parent} has "
            f"{free / 1e9:.2f} GB left. Free some space, or choose another place."
        )
