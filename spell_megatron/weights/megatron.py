"""Megatron distributed checkpoints (torch_dist), written and read one tensor at a time.

A distributed checkpoint (Megatron's torch_dist format) records for each stored piece its place in the whole tensor, so
that any layout can load it. The layout that it is written for decides into which pieces and files it is divided.
Megatron itself tells what the pieces are: each rank's model is built without memory on a fake process group
(`backend.pretend`), and its `sharded_state_dict` is filled from the files while it is written. Only the tensor at hand
is ever in memory.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from spell_megatron.config.schema import ParallelConfig, TrainingConfig
from spell_megatron.errors import UserError
from spell_megatron.training import backend
from spell_megatron.training.model import EXTRA_STATE, build_model
from spell_megatron.training.policy import PolicyModel
from spell_megatron.training.stored_keys import stored_key
from spell_megatron.weights.hf_checkpoint import Checkpoint, listed
from spell_megatron.weights.names import Rule
from spell_megatron.weights.reshard import local_parameters, shard_place

OnProgress = Callable[[int, int], None]
"""Called with (parameters done, parameters in all)."""

FORMAT = CheckpointingConfig("torch_dist", 1)
TYPES_FILE = "weight_types.json"
"""Types of the Hugging Face tensors that are stored in another type than their own."""


@dataclass(frozen=True)
class _Parameter:
    """A parameter of one rank: what it is made of, and what a checkpoint stores of it."""

    rule: Rule
    shards: int
    shard: int
    shape: torch.Size
    entry: ShardedTensor | ShardedTensorFactory

    def pieces(self, data: Tensor) -> list[ShardedTensor]:
        """The stored pieces as views of the parameter's values."""
        if isinstance(self.entry, ShardedTensorFactory):
            entry = self.entry
            return list(nested_values(entry.build_fn(entry.key, data, entry.replica_id, entry.flattened_range)))
        return [replace(self.entry, data=data, dtype=data.dtype)]

    @property
    def key(self) -> str:
        """Of the stored tensor, which may stack those of several layers and experts."""
        return self.entry.key


def _rank(policy: PolicyModel, parallel: ParallelConfig, rank: int) -> list[_Parameter]:
    """What rank `rank` of the layout holds of the model."""
    with backend.pretend(policy, parallel, rank, parallel.fewest_processes):
        model = build_model(policy, TrainingConfig(parallel=parallel))
        entries = model.sharded_state_dict()
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        return [
            _Parameter(rule, *shard_place(rule), parameter.shape, entries[names[id(parameter)]])
            for rule, parameter in local_parameters(model)
        ]


def _stored_sizes(piece: ShardedTensor) -> torch.Size:
    """Shape of a piece in its whole tensor, which stacks layers and experts."""
    return torch.Size((1,) * piece.prepend_axis_num + tuple(piece.local_shape))


class _Fill(DefaultSavePlanner):
    """Reads the values of a piece when it is its turn to be written."""

    def __init__(self, source: Checkpoint, stored: dict[str, torch.dtype], on_parameter: Callable[[], None]) -> None:
        super().__init__()
        self._source, self._stored, self._on_parameter = source, stored, on_parameter
        self.parameters = 0
        """How many will be written."""
        self._owners: dict[MetadataIndex, tuple[_Parameter, int]] = {}
        self._current: tuple[_Parameter | None, list[ShardedTensor]] = (None, [])

    def add(self, index: MetadataIndex, parameter: _Parameter, number: int) -> None:
        self._owners[index] = parameter, number
        self.parameters += number == 0

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        parameter, number = self._owners[write_item.index]
        if self._current[0] is not parameter:
            self._current = None, []
            rule = parameter.rule
            tensors = [self._source.tensor(name) for name in rule.names]
            values = rule.shard(tensors, parameter.shards, parameter.shard)
            self._current = parameter, parameter.pieces(values.to(self._stored[parameter.key]))
            self._on_parameter()
        piece = self._current[1][number]
        return piece.data.reshape(_stored_sizes(piece))


def write_megatron(
    folder: Path,
    source: Checkpoint,
    policy: PolicyModel,
    parallel: ParallelConfig,
    on_progress: OnProgress | None = None,
) -> torch.dtype:
    """Write a Hugging Face checkpoint, which was checked, as a distributed checkpoint, cut for a layout.

    Megatron joins tensors, so that each is stored in a type that holds the values of all that it is joined with. The
    own types of those that are stored in another one are noted in a file, so that all get them back.

    Returns:
        The most common type.
    """
    ranks = [_rank(policy, parallel, rank) for rank in range(parallel.fewest_processes)]
    types = source.types()
    keys = {name: parameter.key for parameter in itertools.chain(*ranks) for name in parameter.rule.names}
    stored: dict[str, torch.dtype] = {}
    for name, key in keys.items():
        stored[key] = torch.promote_types(stored.get(key, types[name]), types[name])
    common = Counter(types.values()).most_common(1)[0][0]
    done = 0

    def on_parameter() -> None:
        nonlocal done
        done += 1
        if on_progress:
            on_progress(min(done, total), total)

    planner = _Fill(source, stored, on_parameter)
    plans = [_save_plan(planner, parameters, stored) for parameters in ranks]
    total = planner.parameters
    plans, metadata = create_default_global_save_plan(plans)
    writer = FileSystemWriter(str(folder), single_file_per_rank=True, thread_count=1)
    writer.set_up_storage_writer(True)
    plans = writer.prepare_global_plan([writer.prepare_local_plan(plan) for plan in plans])
    try:
        results = [writer.write_data(plan, planner).wait() for plan in plans if plan.items]
    except RuntimeError as error:  # of torch.save, which does not say why it cannot write
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise
    writer.finish(metadata, results)
    save_config(FORMAT, str(folder))
    if noted := {
        name: str(dtype).removeprefix("torch.") for name, dtype in types.items() if dtype != stored[keys[name]]
    }:
        (folder / TYPES_FILE).write_text(json.dumps(noted, indent=2) + "\n", encoding="utf-8")
    return common


def _save_plan(planner: _Fill, parameters: list[_Parameter], stored: dict[str, torch.dtype]) -> SavePlan:
    """What one rank writes."""
    items = []
    for parameter in parameters:
        dtype = stored[parameter.key]
        pieces = parameter.pieces(torch.empty(parameter.shape, dtype=dtype, device="meta"))
        for number, piece in enumerate(pieces):
            if not is_main_replica(piece.replica_id):
                continue
            offset = torch.Size(piece.global_offset)
            index = MetadataIndex(piece.key, offset)
            planner.add(index, parameter, number)
            data = TensorWriteData(
                ChunkStorageMetadata(offset, _stored_sizes(piece)),
                TensorProperties(dtype=dtype),
                torch.Size(piece.global_shape),
            )
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
    return SavePlan(items)


class _Into(DefaultLoadPlanner):
    """Reads pieces straight into their places."""

    def __init__(self, pieces: list[ShardedTensor]) -> None:
        super().__init__()
        self._places = {
            MetadataIndex(piece.key, torch.Size(piece.global_offset)): piece.data.view(_stored_sizes(piece))
            for piece in pieces
        }

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        index = read_item.dest_index
        place = self._places[MetadataIndex(index.fqn, index.offset)]
        for axis, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            place = place.narrow(axis, offset, length)
        return place

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


class _Stored:
    """The pieces of a distributed checkpoint."""

    def __init__(self, reader: FileSystemReader, metadata: Metadata, folder: Path) -> None:
        self._reader, self._metadata, self._folder = reader, metadata, folder
        # Layers and experts are stacked to tensors of thousands of pieces, which are not to be searched each time.
        self._chunks: dict[tuple[str, tuple[int, ...]], list[ChunkStorageMetadata]] = {}
        for key, stored in metadata.state_dict_metadata.items():
            for chunk in getattr(stored, "chunks", ()):
                leading = sum(1 for _ in itertools.takewhile(lambda size: size == 1, chunk.sizes[:-1]))
                for axes in range(leading + 1):
                    self._chunks.setdefault((key, tuple(chunk.offsets[:axes])), []).append(chunk)
        reader.set_up_storage_reader(metadata, True)

    def dtype(self, key: str) -> torch.dtype | None:
        """The type of a stored tensor; None if there is none."""
        known = self._metadata.state_dict_metadata
        properties = getattr(known.get(stored_key(key, known)), "properties", None)
        return properties and properties.dtype

    def refuse_others(self, parameters: list[_Parameter]) -> None:
        """UserError if the checkpoint holds other weights than those of the parameters."""
        known = self._metadata.state_dict_metadata
        nothing = (p.pieces(torch.empty(p.shape, device="meta")) for p in parameters)
        wanted = {stored_key(piece.key, known) for pieces in nothing for piece in pieces}
        others = [key for key, entry in known.items() if _is_weight(key, entry) and key not in wanted]
        if others:
            raise UserError(
                f"{self._folder} holds {listed(others)}, which its config.json does not explain. The model would not "
                "compute what it was trained to; correct config.json."
            )

    def read(self, pieces: list[ShardedTensor]) -> None:
        """Fill pieces with their values."""
        pieces = [replace(piece, key=stored_key(piece.key, self._metadata.state_dict_metadata)) for piece in pieces]
        items = []
        for piece in pieces:
            stored = self._metadata.state_dict_metadata.get(piece.key)
            if stored is None:
                raise UserError(
                    f"{self._folder} lacks {piece.key}, which its config.json asks for. The checkpoint is of another "
                    "model, or incomplete."
                )
            fits = len(stored.size) == len(piece.global_shape) and all(
                have == want or (piece.allow_shape_mismatch and have > want)
                for have, want in zip(stored.size, piece.global_shape, strict=True)
            )
            if not fits:
                raise UserError(
                    f"{piece.key} in {self._folder} has shape {list(stored.size)}; config.json asks for "
                    f"{list(piece.global_shape)}. Weights and configuration are of different models."
                )
            chunks = self._chunks[piece.key, tuple(piece.global_offset[: piece.prepend_axis_num])]
            wanted = ChunkStorageMetadata(torch.Size(piece.global_offset), _stored_sizes(piece))
            items += create_read_items_for_chunk_list(piece.key, replace(stored, chunks=chunks), [wanted])
        try:
            plan = self._reader.prepare_local_plan(LoadPlan(items))
            self._reader.read_data(plan, _Into(pieces)).wait()
        except (OSError, RuntimeError, EOFError) as error:
            raise UserError(f"{self._folder} is damaged or incomplete ({error}). Copy it again.") from error


class MegatronCheckpoint:
    """The weights of a distributed checkpoint, or of one of a run, read one by one.

    Attributes:
        side_files: folder of config.json, the tokenizer and the tensors that are not trained.
        policy: what that config.json says.
        types: of all Hugging Face tensors.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or holds other weights than its config.json asks for.
    """

    def __init__(self, folder: Path) -> None:
        weights, self.side_files = locate(folder)
        reader = FileSystemReader(str(weights))
        try:
            metadata = reader.read_metadata()
        except Exception as error:  # damaged files fail in many ways
            raise UserError(
                f"{weights / '.metadata'} is damaged ({error}). Copy the whole checkpoint again."
            ) from error
        self.policy = PolicyModel.load(self.side_files)
        self._parameters = _rank(self.policy, ParallelConfig(), 0)
        self._stored = _Stored(reader, metadata, weights)
        self._stored.refuse_others(self._parameters)
        noted = _noted_types(weights)
        self.types = {
            name: noted.get(name) or self._type(parameter)
            for parameter in self._parameters
            for name in parameter.rule.names
        }

    def tensors(self, on_progress: OnProgress | None = None) -> Iterator[tuple[str, Tensor]]:
        """Every (Hugging Face name, tensor), in the order of the Hugging Face model."""
        for number, parameter in enumerate(self._parameters):
            values = torch.empty(parameter.shape, dtype=self._type(parameter))
            self._stored.read(parameter.pieces(values))
            for name, tensor in zip(parameter.rule.names, parameter.rule.whole([values]), strict=True):
                yield name, tensor.to(self.types[name])
            if on_progress:
                on_progress(number + 1, len(self._parameters))

    def _type(self, parameter: _Parameter) -> torch.dtype:
        return self._stored.dtype(parameter.key) or self.policy.dtype


def _noted_types(folder: Path) -> dict[str, torch.dtype]:
    """What `write_megatron` has noted."""
    path = folder / TYPES_FILE
    if not path.is_file():
        return {}
    try:
        return {name: getattr(torch, kind) for name, kind in json.loads(path.read_text(encoding="utf-8")).items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}). Copy the whole checkpoint again.") from error


def _is_weight(key: str, metadata: object) -> bool:
    return hasattr(metadata, "properties") and not key.startswith("optimizer.") and EXTRA_STATE not in key


def locate(folder: Path) -> tuple[Path, Path]:
    """(folder of the distributed checkpoint, folder of config.json and tokenizer)."""
    for weights, side_files in ((folder, folder), (folder / "trainer", folder / "hf")):
        if (weights / "metadata.json").is_file() and (side_files / "config.json").is_file():
            if not (weights / ".metadata").is_file():
                raise UserError(f"{weights} lacks .metadata: it is incomplete. Copy the whole checkpoint.")
            return weights, side_files
    raise UserError(
        f"{folder} is no Megatron distributed checkpoint with a config.json (nor a checkpoint of a run, a folder "
        "step_…). Copy the model's config.json and tokenizer beside its metadata.json."
    )
