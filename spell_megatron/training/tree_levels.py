"""A forest of prefix trees cut into pieces that recurrent layers walk level by level.

A recurrent layer needs, before a token, the state after the token's parent in the tree. Tokens that follow each other
without a branch are a chain; long chains are cut into pieces. All pieces of a level begin with states that the level
before has left, so that they can be computed together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Level:
    """Pieces that are computed together; their tokens lie one after the other, the longest piece first."""

    lengths: tuple[int, ...]
    """Tokens of each piece."""
    parents: Tensor | None
    """[pieces] which of the states that the level before has left each piece begins with. None: the pieces begin
    trees."""
    bearing: Tensor | None
    """Numbers of the pieces whose last state the next level needs. None: there is no next level."""

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


@dataclass(frozen=True)
class Forest:
    """The pieces of a forest of t tokens in depth-first order, and what precedes each chain.

    `window` [t + chains * (width - 1)] are places in the row: for each chain the width - 1 tokens before it on its
    path, t where there are none, then the chain's own tokens. A causal convolution over these gives the outputs of
    the chains' tokens at `convolved` [t], in the order of the levels. `order` [t] are the tokens in that order, and
    `places` [t] is where the tokens of the row stand in it.
    """

    window: Tensor
    convolved: Tensor
    order: Tensor
    places: Tensor
    levels: tuple[Level, ...]


def chains(end: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """(first tokens, ends, numbers of the parent chains, -1 for none) of a forest's unbranched chains.

    Args:
        end: [t] end of each token's subtree. Tokens of one `end` that follow each other are a chain, and what
            branches off a chain does so after its last token.
    """
    starts = np.flatnonzero(np.diff(end, prepend=-1))
    stops = np.append(starts[1:], len(end))
    parents: list[int] = []
    open_chains: list[int] = []
    for number, start in enumerate(starts):
        while open_chains and end[starts[open_chains[-1]]] <= start:
            open_chains.pop()
        parents.append(open_chains[-1] if open_chains else -1)
        open_chains.append(number)
    return starts, stops, parents


def forest(end: Tensor, width: int, longest: int | None) -> Forest:
    """Cut a forest into the pieces of its levels.

    Args:
        end: [t] integers, end of each token's subtree.
        width: of the convolution, in tokens, its own token included.
        longest: most tokens of a piece; None: whole chains.
    """
    row = end.cpu().numpy()
    starts, stops, parents = chains(row)
    pieces = _pieces(starts, stops, parents, longest)
    order, levels = _levels(pieces, end.device)
    window, convolved = _windows(starts, stops, parents, width, len(row))
    places = np.empty_like(order)
    places[order] = np.arange(len(order))

    def tensor(x: np.ndarray) -> Tensor:
        return torch.from_numpy(x).to(end.device)

    return Forest(tensor(window), tensor(convolved[order]), tensor(order), tensor(places), levels)


def _pieces(
    starts: np.ndarray, stops: np.ndarray, parents: list[int], longest: int | None
) -> list[list[tuple[int, int, int, int]]]:
    """For each level its pieces, the longest first: (tokens, first token, number, number of the parent or -1)."""
    found: list[list[tuple[int, int, int, int]]] = []
    last: list[tuple[int, int]] = []  # of each chain (level, number) of its last piece
    number = 0
    for start, stop, parent in zip(starts.tolist(), stops.tolist(), parents):
        level, before = last[parent] if parent >= 0 else (-1, -1)
        step = longest or stop - start
        for first in range(start, stop, step):
            level += 1
            if level == len(found):
                found.append([])
            found[level].append((min(step, stop - first), first, number, before))
            before = number
            number += 1
        last.append((level, before))
    return [sorted(level, key=lambda piece: (-piece[0], piece[1])) for level in found]


def _levels(
    pieces: list[list[tuple[int, int, int, int]]], device: torch.device
) -> tuple[np.ndarray, tuple[Level, ...]]:
    """(tokens in the order of the levels, the levels)."""
    order = [np.arange(first, first + length) for level in pieces for length, first, _, _ in level]
    levels: list[Level] = []
    kept: dict[int, int] = {}  # which of the kept states is that of a piece
    for depth, level in enumerate(pieces):
        parents = torch.tensor([kept[parent] for *_, parent in level], device=device) if depth else None
        needed = {parent for *_, parent in pieces[depth + 1]} if depth + 1 < len(pieces) else set()
        bearing = [place for place, (_, _, number, _) in enumerate(level) if number in needed]
        kept = {level[place][2]: state for state, place in enumerate(bearing)}
        left = torch.tensor(bearing, device=device) if bearing else None
        levels.append(Level(tuple(length for length, *_ in level), parents, left))
    return np.concatenate(order), tuple(levels)


def _windows(
    starts: np.ndarray, stops: np.ndarray, parents: list[int], width: int, tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """(`Forest.window`, place of each token's output in the convolution over it)."""
    before: list[np.ndarray] = []
    parts, convolved = [], []
    for number, (start, stop, parent) in enumerate(zip(starts, stops, parents)):
        path = np.full(width - 1, tokens)
        if parent >= 0:
            own = np.arange(max(starts[parent], stops[parent] - width + 1), stops[parent])
            path = np.concatenate([before[parent], own])[len(own) :]
        before.append(path)
        parts += [path, np.arange(start, stop)]
        convolved.append(np.arange(start, stop) + number * (width - 1))
    return np.concatenate(parts), np.concatenate(convolved)
