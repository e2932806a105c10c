"""Hugging Face checkpoints: loading into a Megatron model, saving a stream of tensors."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import torch
from megatron.core import parallel_state
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig

from spell_megatron.errors import UserError
from spell_megatron.weights.names import rules
from spell_megatron.weights.reshard import local_parameters

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

SIDE_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
"""Files beside the weights that make a checkpoint usable: configuration, tokenizer, chat template."""


class _Checkpoint:
    """The tensors of a checkpoint folder, opened file by file and read one by one."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self._stack = folder, stack
        self._opened: dict[str, object] = {}
        self.files = self._locate()

    def _locate(self) -> dict[str, str]:
        """File name of each tensor."""
        if (self.folder / INDEX).is_file():
            try:
                return dict(json.loads((self.folder / INDEX).read_text())["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{self.folder / INDEX} is not an index of safetensors files ({error!r}). Copy it "
                    "again from where the checkpoint came from."
                ) from error
        if not (self.folder / SINGLE).is_file():
            raise UserError(
                f"{self.folder} holds no weights: there is neither {SINGLE} nor {INDEX}. Only safetensors "
                "are read; convert other formats with transformers' save_pretrained."
            )
        return dict.fromkeys(self._open(SINGLE).keys(), SINGLE)

    def _open(self, file: str):
        if file not in self._opened:
            path = self.folder / file
            if not path.is_file():
                raise UserError(
                    f"{self.folder / INDEX} names {file}, but that file is missing. Copy the whole "
                    "checkpoint."
                )
            try:
                self._opened[file] = self._stack.enter_context(safe_open(str(path), framework="pt"))
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{path} is not a complete safetensors file ({error}). It was probably cut short; copy "
                    "it again."
                ) from error
        return self._opened[file]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        return self._open(self.files[name]).get_tensor(name)

    def _slice(self, name: str):
        try:
            return self._open(self.files[name]).get_slice(name)
        except SafetensorError as error:
            raise UserError(
                f"{self.folder / INDEX} places {name} in {self.files[name]}, but it is not there "
                f"({error}). Copy the whole checkpoint."
            ) from error


@torch.no_grad()
def load_weights(model: torch.nn.Module, hf_config: PretrainedConfig, folder: Path | str) -> None:
    """Fill this rank's part of `model` from a Hugging Face checkpoint, one parameter at a time.

    Names and shapes are checked against the configuration before the first parameter changes. Values are
    converted to the type of the parameters.

    Raises:
        UserError: a file or tensor is missing, damaged, unexpected or of the wrong shape.
    """
    folder = Path(folder)
    with ExitStack() as stack:
        checkpoint = _Checkpoint(folder, stack)
        parameters = local_parameters(model, hf_config, tied_head=True)
        _check(checkpoint, hf_config, {n for rule, _ in parameters for n in rule.names})
        for rule, parameter in parameters:
            if rule.expert:
                size = parallel_state.get_expert_tensor_parallel_world_size()
                rank = parallel_state.get_expert_tensor_parallel_rank()
            else:
                size = parallel_state.get_tensor_model_parallel_world_size()
                rank = parallel_state.get_tensor_model_parallel_rank()
            parameter.copy_(rule.shard([checkpoint.tensor(name) for name in rule.names], size, rank))


def _check(checkpoint: _Checkpoint, hf_config: PretrainedConfig, own: set[str]) -> None:
    """All tensors of the model are there, no others are, and those that this rank reads have their shapes."""
    shapes = {
        name: shape for rule in rules(hf_config).values() for name, shape in zip(rule.names, rule.shapes)
    }
    missing = [name for name in shapes if name not in checkpoint.files]
    if missing:
        raise UserError(
            f"{checkpoint.folder} lacks {len(missing)} tensors that its config.json asks for, such as "
            f"{missing[0]}. Copy the whole checkpoint, or mend config.json."
        )
    ignored = {"lm_head.weight"} if hf_config.tie_word_embeddings else set()
    unexpected = [
        name
        for name in checkpoint.files
        if name not in shapes and name not in ignored and not name.endswith("rotary_emb.inv_freq")
    ]
    if unexpected:
        raise UserError(
            f"{checkpoint.folder} holds {len(unexpected)} tensors that its config.json does not explain, "
            f"such as {unexpected[0]}. The model would not compute what it was trained to; mend "
            "config.json."
        )
    for name in sorted(own, key=lambda name: (checkpoint.files[name], name)):
        if checkpoint.shape(name) != shapes[name]:
            raise UserError(
                f"{name} in {checkpoint.folder / checkpoint.files[name]} has shape "
                f"{list(checkpoint.shape(name))}; config.json asks for {list(shapes[name])}. Weights and "
                "configuration are of different models."
            )


def save_checkpoint(
    stream: Iterable[tuple[str, Tensor]],
    source_folder: Path | str,
    out_folder: Path | str,
    shard_bytes: int = 2_000_000_000,
) -> None:
    """Write a stream of (name, tensor) as a Hugging Face checkpoint.

    The folder appears under its name only when it is complete; one that is already there is replaced.
    Configuration, tokenizer and chat template are copied from `source_folder`.

    Args:
        stream: whole tensors under Hugging Face names; read once, at most `shard_bytes` held at a time.
        source_folder: checkpoint of the same architecture.
        out_folder: where to write.
        shard_bytes: most bytes per file; larger models are written as several files and an index.

    Raises:
        UserError: the disk is full or the place cannot be written to.
    """
    source, out = Path(source_folder), Path(out_folder)
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        dtype = _write_shards(stream, partial, shard_bytes)
        _copy_side_files(source, partial, dtype)
        _replace(partial, out)
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        reason = "the disk is full" if full else str(error)
        raise UserError(
            f"The checkpoint {out} could not be written: {reason}. What was there before is unchanged. "
            "Free some space or choose another folder."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_shards(stream: Iterable[tuple[str, Tensor]], folder: Path, shard_bytes: int) -> torch.dtype:
    """Write the weights and, for more than one file, their index. Returns the type of the tensors."""
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    size = total = 0
    dtype = torch.float32

    def flush() -> None:
        nonlocal size
        save_file(pending, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()
        size = 0

    for name, tensor in stream:
        if pending and size + tensor.nbytes > shard_bytes:
            flush()
        # A copy of its own: safetensors refuses views that share memory, and the parameter may change.
        pending[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        size += tensor.nbytes
        total += tensor.nbytes
        dtype = tensor.dtype
    if pending or not shards:
        flush()
    if len(shards) == 1:
        os.rename(folder / "shard-0", folder / SINGLE)
        return dtype
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        os.rename(folder / f"shard-{number}", folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return dtype


def _copy_side_files(source: Path, folder: Path, dtype: torch.dtype) -> None:
    for pattern in SIDE_FILES:
        for file in source.glob(pattern):
            if not file.name.endswith(".index.json"):
                shutil.copyfile(file, folder / file.name)
    config = json.loads((source / "config.json").read_text())
    config.pop("torch_dtype", None)  # the older name of the same key
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _replace(partial: Path, out: Path) -> None:
    """Put `partial` in the place of `out`."""
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.rename(out, old)
    os.rename(partial, out)
    shutil.rmtree(old, ignore_errors=True)
