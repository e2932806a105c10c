"""Hugging Face checkpoints to Megatron distributed checkpoints and back, one tensor at a time."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
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
from spell_megatron.weights.megatron import MegatronCheckpoint, OnProgress, write_megatron
from spell_megatron.weights.side_files import read_side_files, write_side_files
from spell_megatron.weights.untrained import FILE as UNTRAINED_FILE
from spell_megatron.weights.untrained import Untrained, note


def hf_to_megatron(hf: Path, megatron: Path, parallel: ParallelConfig, on_progress: OnProgress | None = None) -> str:
    """Write a Hugging Face checkpoint as a distributed checkpoint, cut for a layout.

    Configuration, tokenizer and chat template are copied beside it, and the tensors that are not trained. The folder
    appears when it is complete.

    Returns:
        Which tensors are not trained; "": there are none.

    Raises:
        UserError: the architecture is unknown, a file or tensor is missing or damaged, the layout does not fit
            the model, the output exists already, or the disk is full.
    """
    policy, side_files = PolicyModel.load(hf), read_side_files(Path(hf))
    out = Path(megatron)
    with ExitStack() as stack:
        source = stack.enter_context(Checkpoint(hf, policy))
        stack.enter_context(_alone(out))
        partial = stack.enter_context(appearing_folder(_new(out)))
        source.check(set(source.files))
        untrained = stack.enter_context(Untrained(Path(hf), policy))
        _check_room(partial, source.nbytes() + untrained.nbytes)
        dtype = write_megatron(partial, source, policy, parallel, on_progress)
        note(untrained.names, partial)
        if untrained.names:
            untrained.write(partial / UNTRAINED_FILE)
        write_side_files(side_files, partial, dtype)
        return str(untrained) if untrained.names else ""


def megatron_to_hf(megatron: Path, hf: Path, on_progress: OnProgress | None = None) -> str:
    """Write a distributed checkpoint, or one of a run of `spell train`, as a Hugging Face checkpoint.

    Returns:
        Which tensors are not trained; "": there are none.

    Raises:
        UserError: the checkpoint is incomplete, damaged or of another model than its config.json says, the
            output exists already, or the disk is full.
    """
    source, out = MegatronCheckpoint(Path(megatron)), Path(hf)
    with _alone(out):
        save_checkpoint(source.tensors(on_progress), source.side_files, _new(out), types=source.types)
    with Untrained(source.side_files, source.policy) as untrained:
        return str(untrained) if untrained.names else ""


def compare(megatron: Path, hf: Path, on_progress: OnProgress | None = None) -> int:
    """Compare every tensor of the two checkpoints bit by bit; returns how many there are.

    Raises:
        UserError: names the first tensor that differs, or those that one of the two lacks.
    """
    source, policy = MegatronCheckpoint(Path(megatron)), PolicyModel.load(hf)
    with Checkpoint(hf, policy) as checkpoint:
        checkpoint.check(set(checkpoint.files))
        count = 0
        for name, tensor in source.tensors(on_progress):
            count += 1
            other = checkpoint.tensor(name)
            if other.dtype != tensor.dtype or other.shape != tensor.shape or _bits(other).ne(_bits(tensor)).any():
                raise _differs(name, megatron, hf)
    with Untrained(hf, policy) as ours, Untrained(source.side_files, policy) as theirs:
        if name := ours.first_difference(theirs):
            raise _differs(name, megatron, hf)
        return count + len(ours.names)


def _differs(name: str, megatron: Path, hf: Path) -> UserError:
    return UserError(
        f"{name} differs between {megatron} and {hf}: the converted checkpoint is wrong, the other one is as it was. "
        "Convert it again to another place. If that differs too, suspect the disk or report a defect."
    )


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
