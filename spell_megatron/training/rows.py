"""The rows of an update on all ranks. Only rank 0 has them; routings, which are large, go only where they are used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist

from spell_megatron.training.policy import Architecture
from spell_megatron.training.prefix_tree import Row, Tree


def broadcast_rows(rows: Sequence[Row] | None, device: torch.device) -> list[Row]:
    """The rows of rank 0 on every rank; all ranks call it together.

    Only rank 0 has the routings. The others have arrays of zeros without memory in their place: see `Routings`.
    """
    rows = list(rows) if rows is not None else []
    if dist.get_world_size() == 1:
        return rows
    shapes = [None if row.routing is None else (row.routing.dtype, row.routing.shape) for row in rows]
    box = [[replace(row, routing=None) for row in rows], shapes]
    dist.broadcast_object_list(box, src=0, device=device)
    if dist.get_rank() == 0:
        return rows
    return [
        row if of is None else replace(row, routing=np.broadcast_to(np.zeros((), of[0]), of[1]))
        for row, of in zip(*box, strict=True)
    ]


def check_rows(rows: Sequence[Row], arch: Architecture) -> None:
    """ValueError if a row does not belong to a model of this architecture."""
    for number, row in enumerate(rows):
        if not (row.tokens.min() >= 0 and row.tokens.max() < arch.vocabulary):
            raise ValueError(
                f"row {number} of the update batch holds token ids {row.tokens.min()} to "
                f"{row.tokens.max()}, but the policy's vocabulary has {arch.vocabulary} tokens"
            )
        expected = arch.layers, arch.experts_per_token
        if row.routing is not None and row.routing.shape[1:] != expected:
            raise ValueError(
                f"row {number} of the update batch holds routings of shape {row.routing.shape}, but the policy "
                f"has {expected[0]} layers and {expected[1]} experts per token"
            )


class Routings:
    """The recorded routings that this rank's trees take, of the layers of its pipeline stage.

    All ranks make one together, from the rows of `broadcast_rows`. Rank 0 sends the routings row by row, so that
    no rank but the first ever holds more than one that it does not need.

    Args:
        plans: trees of each data-parallel rank.
        rank: this data-parallel rank.
        layers: of this pipeline stage.
    """

    def __init__(
        self, rows: list[Row], plans: list[list[Tree]], rank: int, layers: range, device: torch.device
    ) -> None:
        recorded = [row.routing for row in rows if row.routing is not None]
        self.any = bool(recorded)
        self._top_k = recorded[0].shape[2] if recorded else 0
        self._layers = layers
        self._first: dict[int, int] = {}
        self._kept: dict[int, np.ndarray] = {}
        used = [{int(row) for tree in trees for row in np.unique(tree.routed_by)} - {-1} for trees in plans]
        for number in sorted(set.union(*used)):
            own = rows[number].routing
            assert own is not None  # trees take routings only of rows that have one
            routing = _from_rank_0(own, device)
            if number in used[rank]:
                part = routing[:, layers.start : layers.stop]
                self._kept[number] = part.copy() if dist.get_rank() else part  # rank 0 has the whole anyway
                self._first[number] = rows[number].routed.start

    def of(self, tree: Tree, places: np.ndarray) -> np.ndarray:
        """Experts of a tree's tokens at ascending places, padding behind the tree included: int16 [tokens, layers of
        the stage, top_k], -1 where there is no record."""
        result = np.full((len(places), len(self._layers), self._top_k), -1, dtype=np.int16)
        places = places[places < len(tree.tokens)]
        rows, depths = tree.routed_by[places], tree.position_ids[places]
        # Runs of tokens that follow each other in one row.
        cuts = np.flatnonzero((np.diff(rows) != 0) | (np.diff(depths) != 1)) + 1
        for start, stop in zip([0, *cuts], [*cuts, len(rows)]):
            if len(rows) and (row := int(rows[start])) >= 0:
                first = depths[start] - self._first[row]
                result[start:stop] = self._kept[row][first : first + stop - start]
        return result


def _from_rank_0(array: np.ndarray, device: torch.device) -> np.ndarray:
    """The array of rank 0 on all ranks, which have arrays of its type and shape."""
    if dist.get_world_size() == 1:
        return array
    # As bytes: neither gloo nor NCCL knows all types of integers.
    sent = torch.empty(array.nbytes, dtype=torch.uint8, device=device)
    if dist.get_rank() == 0:
        sent.copy_(torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8)))
    dist.broadcast(sent, src=0)
    return sent.cpu().numpy().view(array.dtype).reshape(array.shape) if dist.get_rank() else array
