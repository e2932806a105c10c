"""The safetensors files of a Hugging Face checkpoint: which tensors they hold, and these one by one."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spell_megatron.errors import UserError
from spell_megatron.training.families import ALONE, WITHIN
from spell_megatron.training.policy import PolicyModel
from spell_megatron.weights.mxfp4 import Packed, packed_pairs, packed_parts, unpacked
from spell_megatron.weights.names import ExpertPart, expert_parts, hf_shapes
from spell_megatron.weights.weight_files import INDEX, SINGLE, read_index

TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
"""Types of weights by their names in safetensors files."""

MAPPED_BYTES = 64 << 20

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
"""Megatron's names of the embedding and the vocabulary head."""

COMPUTED = "rotary_emb.inv_freq"
"""End of the names of tensors that old checkpoints store, although they follow from config.json."""

_COMPARED_ROWS = 4096


class Checkpoint:
    """The policy's tensors in a checkpoint folder, opened file by file and read one by one. A context manager.

    Experts that are stored as one tensor of them all have the names of single experts here, and tensors of a language
    model that was a part of another model the names of one that stands alone, if the policy does. Those that no policy
    trains (`Untrained`) are left out.
    """

    def __init__(self, folder: Path, policy: PolicyModel) -> None:
        self.folder, self._stack, self._policy = Path(folder), ExitStack(), policy
        self._opened: dict[str, object] = {}
        self._mapped = 0
        self._parts: dict[str, ExpertPart] = {}
        self._packed: dict[str, Packed] = {}
        self._scales: dict[str, str] = {}  # file names of stored tensors of scales
        self._stored: dict[str, str] = {}  # the names of tensors that have other ones here
        self.files: dict[str, str] = self._renamed(self._locate())
        """File name of each tensor."""
        self._split_experts()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _locate(self) -> dict[str, str]:
        """File name of each tensor: of those that the index lists, and of others that its files hold."""
        if not (self.folder / INDEX).is_file():
            if not (self.folder / SINGLE).is_file():
                raise UserError(
                    f"{self.folder} holds no weights: there is neither {SINGLE} nor {INDEX}. Only safetensors "
                    "are read; convert other formats with transformers' save_pretrained."
                )
            return dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        indexed = read_index(self.folder)
        files = sorted(set(indexed.values()))
        if SINGLE not in files and (self.folder / SINGLE).is_file():
            raise UserError(
                f"{self.folder} holds weights twice: {SINGLE}, which transformers reads, and the files of {INDEX}, "
                "which vLLM reads. Remove the older of the two."
            )
        return {name: file for file in files for name in self._open(file).keys()} | indexed

    def _renamed(self, files: dict[str, str]) -> dict[str, str]:
        """The file names by the names that tensors have here."""
        files = {name: file for name, file in files.items() if not name.startswith(self._policy.untrained)}
        if self._policy.whole:
            return files
        self._stored = {ALONE + name.removeprefix(WITHIN): name for name in files if name.startswith(WITHIN)}
        if twice := self._stored.keys() & files.keys():
            name = min(twice)
            raise UserError(f"{self.folder} holds {name} twice: also as {self._stored[name]}. Remove one of the two.")
        names = {stored: name for name, stored in self._stored.items()}
        return {names.get(name, name): file for name, file in files.items()}

    def _open(self, file: str):
        if file not in self._opened:
            path = self.folder / file
            if not path.is_file():
                raise UserError(
                    f"{self.folder / INDEX} names {file}, but that file is missing. Copy the whole checkpoint."
                )
            try:
                self._opened[file] = self._stack.enter_context(safe_open(str(path), framework="pt"))
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{path} is not a complete safetensors file ({error}). It was probably cut short; copy it again."
                ) from error
        return self._opened[file]

    def _split_experts(self) -> None:
        """Give each expert names of its own, where a tensor holds all of them."""
        for blocks, scales in packed_pairs(set(self.files)):
            packed = packed_parts(blocks, scales, tuple(self._slice(blocks).get_shape()))
            self._scales[scales] = self.files.pop(scales)
            self._packed |= packed
            self.files |= dict.fromkeys(packed, self.files.pop(blocks))
        for stored in [name for name in self.files if ".experts." in name and name not in self._packed]:
            shape = tuple(self._slice(stored).get_shape())
            parts = expert_parts(stored, shape, self._policy.arch.biased_experts)
            if twice := self.files.keys() & parts.keys():
                raise UserError(
                    f"{self.folder} holds {min(twice)} twice: by itself and within {stored}. Remove one of the two."
                )
            if parts:
                self._parts |= parts
                self.files |= dict.fromkeys(parts, self.files.pop(stored))

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self._packed:
            return self._packed[name].shape
        return self._parts[name].shape if name in self._parts else tuple(self._slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        """A tensor, which lies in the file's pages until it is used."""
        part = self._parts.get(name)
        if name in self._packed:
            tensor = self._unpacked(name)
        elif part:
            tensor = self._slice(name)[part.expert : part.expert + 1, part.rows][0]
        else:
            tensor = self._open(self.files[name]).get_tensor(self._stored.get(name, name))
        self._mapped += tensor.nbytes
        if self._mapped > MAPPED_BYTES:  # pages that were read stay in memory as long as the file is open
            self._stack.close()
            self._opened.clear()
            self._mapped = 0
        return tensor

    def types(self) -> dict[str, torch.dtype]:
        """The type of each tensor of the policy, of which `check` must know all."""
        return {name: TYPES[self._kind(name)] for name in hf_shapes(self._policy)}

    def _unpacked(self, name: str) -> Tensor:
        packed = self._packed[name]
        places = (self.files[name], packed.blocks), (self._scales[packed.scales], packed.scales)
        return unpacked(*(self._open(file).get_slice(stored)[packed.expert] for file, stored in places))

    def _kind(self, name: str) -> str:
        """The type of a tensor, as safetensors calls it. Packed ones are bfloat16 when they are plain."""
        return "BF16" if name in self._packed else self._slice(name).get_dtype()

    @property
    def packed(self) -> bool:
        """Whether some tensors are stored in fewer bits than those that `tensor` returns."""
        return bool(self._packed)

    def nbytes(self) -> int:
        """Size of the files that are there."""
        paths = {self.folder / file for file in self.files.values()}
        return sum(path.stat().st_size for path in paths if path.is_file())

    def check(self, own: set[str]) -> None:
        """All tensors of the model are there, no others are, and those named in `own` have their shapes and are plain.

        The vocabulary head of a model with tied embeddings may be stored too if it is the embedding, bit by bit.

        Raises:
            UserError: with the names of the tensors that are wrong.
        """
        policy = self._policy
        shapes = hf_shapes(policy)
        embedding, head = (policy.named(policy.family.names[name][0]) for name in (EMBEDDING, HEAD))
        missing = [name for name in shapes if name not in self.files]
        if missing:
            tie = f", or set tie_word_embeddings to true if {head} is the embedding" if head in missing else ""
            raise UserError(
                f"{self.folder} lacks {listed(missing)}, which its config.json asks for. Copy the whole checkpoint, "
                f"or correct config.json{tie}."
            )
        ignored = {head} if policy.arch.tied else set()
        unexpected = [name for name in self.files if name not in shapes and name not in ignored]
        unexpected = [name for name in unexpected if not name.endswith(COMPUTED)]
        if unexpected:
            raise UserError(
                f"{self.folder} holds {listed(unexpected)}, which its config.json does not explain. The model would "
                "not compute what it was trained to; correct config.json."
            )
        for name in sorted(shapes.keys() & own, key=lambda name: (self.files[name], name)):
            if self.shape(name) != shapes[name]:
                raise UserError(
                    f"{name} in {self.folder / self.files[name]} has shape "
                    f"{list(self.shape(name))}; config.json asks for {list(shapes[name])}. Weights and "
                    "configuration are of different models."
                )
            if (kind := self._kind(name)) not in TYPES:
                raise UserError(
                    f"{name} in {self.folder / self.files[name]} has the type {kind}; {', '.join(TYPES)} can be read. "
                    "Quantised weights cannot be trained: convert the checkpoint to bfloat16."
                )
        if ignored and head in self.files and not self._equal(head, embedding):
            raise UserError(
                f"{self.folder} holds {head} with other values than {embedding}, and its config.json says "
                "tie_word_embeddings true, so that the head would not be used. Set tie_word_embeddings to false in "
                f"config.json to use it, or remove {head} from the checkpoint."
            )

    def _equal(self, one: str, other: str) -> bool:
        """Whether two matrices have the same type, shape and bits."""
        slices = [self._slice(name) for name in (one, other)]
        if len({(part.get_dtype(), *part.get_shape()) for part in slices}) > 1:
            return False
        starts = range(0, self.shape(one)[0], _COMPARED_ROWS)
        blocks = ([part[start : start + _COMPARED_ROWS].view(torch.uint8) for part in slices] for start in starts)
        return all(torch.equal(*pair) for pair in blocks)

    def _slice(self, name: str):
        try:
            whole = self._parts[name].stored if name in self._parts else name
            return self._open(self.files[name]).get_slice(self._stored.get(whole, whole))
        except SafetensorError as error:
            raise UserError(
                f"{self.folder / INDEX} places {name} in {self.files[name]}, but it is not there "
                f"({error}). Copy the whole checkpoint."
            ) from error


def listed(names: list[str]) -> str:
    """Some names, and how many more there are."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more tensors"
