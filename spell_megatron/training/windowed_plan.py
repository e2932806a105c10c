"""The mask of sliding-window attention over prefix trees, cut into rectangles for CPUs.

Query q sees key k iff k <= q < end[k] and depth[q] - depth[k] < window. The queries are cut into blocks of neighbours.
What a block sees before itself lies on the path to its first token, because a key that comes before the block and is
seen from within is an ancestor of all tokens between. So each block meets a few pieces of that path, near its end.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


def depths(end: Tensor) -> Tensor:
    """Number of each token's ancestors [tokens], on the device of `end` [tokens], the end of each token's subtree."""
    places = torch.arange(len(end), device=end.device)
    # Of the tokens before a token, those whose subtrees have ended are no ancestors.
    return places - torch.searchsorted(end.sort().values.contiguous(), places, right=True)


def windowed_blocks(end: Tensor, window: int, size: int) -> Iterator[tuple[int, int, int, int, Tensor | None]]:
    """(first query, stop, first key, stop, mask [queries, keys] or None: all) of rectangles that cover the mask once.

    The first rectangle of each block of queries holds their own keys. In the others a query may see nothing.

    Args:
        end: [tokens] integers, end of each token's subtree.
        window: tokens that a query sees, itself among them.
        size: queries of a block, and most tokens between two pieces of a path that are taken as one.
    """
    ends, depth = end.cpu().numpy(), depths(end.cpu()).numpy()
    starts = np.flatnonzero(np.diff(ends, prepend=-1))
    parents = _parents(starts, ends)
    for start in range(0, len(ends), size):
        stop = min(start + size, len(ends))
        queries = np.arange(start, stop)
        lowest = depth[start:stop].min() - window + 1
        pieces = [(start, stop)]
        run = int(np.searchsorted(starts, start, side="right")) - 1
        piece_stop = start
        while run >= 0:
            begin = int(starts[run])
            if piece_stop > begin:
                begin += max(0, int(lowest - depth[begin]))
                if begin >= piece_stop:
                    break  # its ancestors are farther still
                if pieces[-1][0] - piece_stop < size:
                    pieces[-1] = begin, pieces[-1][1]
                else:
                    pieces.append((begin, piece_stop))
            run = int(parents[run])
            piece_stop = int(starts[run + 1]) if run >= 0 else 0
        for first, last in pieces:
            keys = np.arange(first, last)
            mask = (keys <= queries[:, None]) & (queries[:, None] < ends[keys])
            mask &= depth[queries][:, None] - depth[keys] < window
            if mask.any():
                yield start, stop, first, last, None if mask.all() else torch.from_numpy(mask)


def _parents(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """For each run of tokens with one `end` the run that it continues, -1 for the first of a tree."""
    parents = np.full(len(starts), -1)
    path: list[int] = []
    for run, start in enumerate(starts):
        while path and ends[starts[path[-1]]] <= start:
            path.pop()
        if path:
            parents[run] = path[-1]
        path.append(run)
    return parents
