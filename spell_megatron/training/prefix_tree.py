"""Rows of tokens merged into packed prefix trees, and trees spread over data-parallel ranks.

Rows that begin with the same tokens share the computation of those tokens. Sorting rows
lexicographically is a depth-first walk of their radix tree: each row adds, to what the row before it
has laid out, only the tokens after their longest common prefix. So a tree is made from the sorted order
and the common prefix lengths of neighbours, with array comparisons and no per-token Python.

Everything here is NumPy on one core; nothing knows about models or roles.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Row:
    """One sequence of an update: a prompt and the response to train on.

    tokens: int64 [n], prompt and response; prompt_length: at least 1, since the first response token is
    predicted from the last prompt token; weights: float32 [n - prompt_length], factor of each response
    token in the loss (advantage times role weight); rollout_logprobs: float32 [n - prompt_length], the
    engine's log-probability of each response token; routing: the experts to which the engine sent the m
    tokens before the last, integers [m, layers, top_k], or None. An engine never computes a row's last token.
    """

    tokens: np.ndarray
    prompt_length: int
    weights: np.ndarray
    rollout_logprobs: np.ndarray
    routing: np.ndarray | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.prompt_length <= len(self.tokens):
            raise ValueError(
                f"prompt_length is {self.prompt_length} in a row of {len(self.tokens)} tokens; "
                "a prompt needs at least one token and lies within the row"
            )
        response = len(self.tokens) - self.prompt_length
        for name in ("weights", "rollout_logprobs"):
            if len(getattr(self, name)) != response:
                raise ValueError(f"{name} has {len(getattr(self, name))} values for {response} response tokens")
        if self.routing is not None and len(self.routing) >= len(self.tokens):
            raise ValueError(
                f"routing is of {len(self.routing)} tokens in a row of {len(self.tokens)}, whose last has none"
            )

    @property
    def routed(self) -> range:
        """Places of the tokens that `routing` is of."""
        stop = len(self.tokens) - 1
        return range(stop - len(self.routing), stop) if self.routing is not None else range(0)


@dataclass(frozen=True, eq=False)
class Tree:
    """A forest of prefix trees in one flat row, depth first; all arrays but `fresh` are int64.

    tokens, position_ids (depth in the tree) and end are [t]. `end[k]` is the end of the subtree of token
    k: q may attend to k iff k <= q < end[k]. The loss edges source, target, row and offset are [e]: the
    hidden state at flat position `source` predicts token id `target`, which is response token `offset`
    of row number `row`. fresh, bool [t], is False where a token repeats what another tree of the batch
    computes too, or one of `Earlier` rows: however the rows are cut, each token of their common radix tree is
    fresh once.
    routed_by [t] is the row whose recorded routing a token takes, -1 if no row has any for it: of the rows
    that share the token the first, in the order of their token ids, however the rows are cut.
    """

    tokens: np.ndarray
    position_ids: np.ndarray
    end: np.ndarray
    source: np.ndarray
    target: np.ndarray
    row: np.ndarray
    offset: np.ndarray
    fresh: np.ndarray
    routed_by: np.ndarray


@dataclass(frozen=True)
class Cost:
    """Relative cost of a tree: per token, per attended (query, key) pair, per predicting position."""

    token: float = 1.0
    pair: float = 0.0
    source: float = 0.0

    def of(self, tree: Tree) -> float:
        """Cost of one tree. Pairs are counted exactly: a token at depth d attends to d + 1 tokens."""
        pairs = int(tree.position_ids.sum()) + len(tree.tokens)
        return self.token * len(tree.tokens) + self.pair * pairs + self.source * len(np.unique(tree.source))


# One token that predicts nothing: what a rank without work runs, so that all ranks run the same number
# of microbatches (expert parallel ranks exchange tokens in each).
_NONE = np.zeros(0, dtype=np.int64)
EMPTY = Tree(
    tokens=np.array([0]),
    position_ids=np.array([0]),
    end=np.array([1]),
    source=_NONE,
    target=_NONE,
    row=_NONE,
    offset=_NONE,
    fresh=np.array([False]),
    routed_by=np.array([-1]),
)


class Earlier:
    """Token ids of the rows that an update has computed already, to know what later ones share with them."""

    def __init__(self) -> None:
        self._keys: list[bytes] = []  # in the order of their token ids
        self._added: list[np.ndarray] = []  # nobody has asked since

    def add(self, rows: Iterable[Row]) -> None:
        self._added += [row.tokens for row in rows]

    def shared(self, row: Row) -> int:
        """Length of the longest prefix of a row that one of these rows begins with."""
        if self._added:
            self._keys = sorted([*self._keys, *map(_key, self._added)])
            self._added = []
        key = _key(row.tokens)
        place = bisect.bisect(self._keys, key)
        neighbours = (np.frombuffer(k, dtype=">u4") for k in self._keys[max(0, place - 1) : place + 1])
        return max((_common_prefix(row.tokens, tokens) for tokens in neighbours), default=0)


def pack(rows: Sequence[Row], max_tokens: int) -> list[Tree]:
    """Merge rows into trees of at most `max_tokens` tokens.

    A tree over the budget is cut between rows where that repeats the fewest tokens. A row longer than the budget
    exceeds it, and rows that share most of their tokens with it may do so with it (see `largest_tree`). Trees that
    fit together share one forest. Rows without a response are left out. Tree.row counts in `rows`.
    """
    return _Sorted(rows, max_tokens).pack(max_tokens)


def largest_tree(max_tokens: int, longest_row: int) -> int:
    """Most tokens of a tree whose longest row has `longest_row` tokens: the budget, or for a row over the budget an
    eighth more than that row, so that rows which differ from it in few tokens share its computation."""
    return max_tokens if longest_row <= max_tokens else longest_row + longest_row // 8


def plan(
    rows: Sequence[Row],
    max_tokens: int,
    ranks: int,
    cost: Cost = Cost(),
    loads: Sequence[float] = (),
    earlier: Earlier | None = None,
) -> list[list[Tree]]:
    """Trees of each data-parallel rank: the same number on every rank, costs balanced.

    The longest processing time first rule assigns trees to ranks. Where whole trees leave ranks idle
    (few rows, many ranks), smaller budgets are tried too; a finer cut is taken if it lets the slowest
    rank end at least 5 % sooner, repeated prefixes included. Ranks with fewer trees get `EMPTY` ones.
    Each rank's trees come in descending cost, so that ranks that exchange tokens meet similar sizes.

    loads, earlier: cost that each rank has had already in this update, none by default, and the rows that it was for.
    """
    table = _Sorted(rows, max_tokens, earlier)
    loads = list(loads) or [0.0] * ranks
    whole = table.pack(max_tokens)
    best, shortest = _assign(whole, loads, cost)
    if ranks > 1:
        total = sum(len(tree.tokens) for tree in whole)
        budgets = [int(1.1 * total / (ranks * parts)) + 1 for parts in (1, 2, 3, 4)]  # 10 % for uneven cuts
        for budget in dict.fromkeys(b for b in budgets if b < max_tokens):
            assigned, slowest = _assign(table.pack(budget), loads, cost)
            if slowest < 0.95 * shortest:
                best, shortest = assigned, slowest
    count = max(1, *(len(trees) for trees in best))
    return [trees + [EMPTY] * (count - len(trees)) for trees in best]


def _assign(trees: list[Tree], loads: Sequence[float], cost: Cost) -> tuple[list[list[Tree]], float]:
    """Longest processing time first, on top of each rank's load; returns the trees of each rank and how much more the
    fullest rank has in the end than the emptiest had before."""
    heap = [(load, 0, rank) for rank, load in enumerate(loads)]
    heapq.heapify(heap)
    assigned: list[list[Tree]] = [[] for _ in loads]
    for value, tree in sorted(((cost.of(tree), tree) for tree in trees), key=lambda x: -x[0]):
        load, count, rank = heapq.heappop(heap)
        assigned[rank].append(tree)
        heapq.heappush(heap, (load + value, count + 1, rank))
    return assigned, max(load for load, _, _ in heap) - min(loads)


class _Sorted:
    """Rows in depth-first order with the common prefix length of each with the one before."""

    def __init__(self, rows: Sequence[Row], max_tokens: int, earlier: Earlier | None = None) -> None:
        """max_tokens: the budget of the device. `pack` may be asked for smaller trees than that."""
        self.rows = rows
        keys = {i: _key(row.tokens) for i, row in enumerate(rows) if len(row.tokens) > row.prompt_length}
        self.order = sorted(keys, key=keys.__getitem__)
        del keys
        self.lengths = np.array([len(rows[i].tokens) for i in self.order], dtype=np.int64)
        # Most tokens of a tree because of a row that no tree can hold within the budget; 0 for the other rows.
        self.allowed = np.where(self.lengths > max_tokens, self.lengths + self.lengths // 8, 0)
        self.shared = np.zeros(len(self.order), dtype=np.int64)
        for k in range(1, len(self.order)):
            self.shared[k] = _common_prefix(rows[self.order[k - 1]].tokens, rows[self.order[k]].tokens)
        self.before = _previous_smaller(self.shared)
        # known[k]: tokens with which row k begins that rows before it, or earlier ones, have computed.
        self.known = self.shared
        if earlier is not None:
            shared_with_earlier = [earlier.shared(rows[i]) for i in self.order]
            self.known = np.maximum(self.shared, np.array(shared_with_earlier, dtype=np.int64))
        # own[k]: tokens that the rows before k add to the common radix tree. Row k adds those numbered from there.
        self.own = np.concatenate([[0], np.cumsum(self.lengths - self.shared)])
        self.routed_by = self._routed_by()

    def _nodes(self, k: int, begin: int, end: int) -> Iterator[tuple[int, slice]]:
        """Numbers in the common radix tree of the tokens begin..end-1 of sorted row k, as (first place, numbers)."""
        while begin < end:
            first = max(begin, int(self.shared[k]))
            if first < end:
                number = int(self.own[k] - self.shared[k])
                yield first, slice(number + first, number + end)
                end = first
            k = self.before[k]  # what a row shares with the one before it are that one's tokens, or of one further back

    def _routed_by(self) -> np.ndarray:
        """int32, for each token of the common radix tree: the row whose routing it takes (see `Tree`)."""
        routed_by = np.full(self.own[-1], -1, dtype=np.int32)
        for k in reversed(range(len(self.order))):  # so that the first row has the last word
            routed = self.rows[self.order[k]].routed
            for _, numbers in self._nodes(k, routed.start, routed.stop):
                routed_by[numbers] = self.order[k]
        return routed_by

    def pack(self, max_tokens: int) -> list[Tree]:
        """See the function `pack`."""
        bins: list[list[tuple[int, int]]] = []  # runs of sorted rows
        runs = [(self._tokens(first, last), first, last) for first, last in self._cut(max_tokens)]
        room = np.zeros(len(runs) + 1, dtype=np.int64)  # of each bin, the next one included
        for tokens, first, last in sorted(runs, key=lambda run: (-run[0], run[1])):  # first fit decreasing
            room[len(bins)] = max(max_tokens, tokens)
            b = int(np.argmax(room[: len(bins) + 1] >= tokens))
            if b == len(bins):
                bins.append([])
            bins[b].append((first, last))
            room[b] -= tokens
        return [self._build([k for first, last in sorted(members) for k in range(first, last)]) for members in bins]

    def _tokens(self, first: int, last: int) -> int:
        """Tokens of the tree of sorted rows first..last-1."""
        return int(self.lengths[first] + (self.lengths - self.shared)[first + 1 : last].sum())

    def _cut(self, max_tokens: int) -> list[tuple[int, int]]:
        """Runs of sorted rows, each within the budget, that compute the fewest tokens in all.

        Dynamic programme over the place of the last cut. A cut before row i computes the prefix that i
        shares with its predecessor once more; one token is added so that free cuts stay few. Only rows that share
        half of their tokens with their predecessors let a run exceed the budget because of a row that does.
        """
        n = len(self.order)
        own = self.own
        begin = self.shared - own[:-1]  # a run first..last-1 holds own[last] + begin[first] tokens
        best = np.zeros(n + 1, dtype=np.int64)
        came_from = np.zeros(n + 1, dtype=np.int64)
        limit = np.full(n, max_tokens, dtype=np.int64)  # of a run from each row to the last one looked at
        largest = max(max_tokens, int(self.allowed.max(initial=0)))
        low = joined = 0  # no run that starts before `low` fits any more, or before `joined` may exceed the budget
        for last in range(1, n + 1):
            while low < last - 1 and own[last] - own[low] > largest:
                low += 1
            if 2 * self.shared[last - 1] < self.lengths[last - 1]:
                limit[low : last - 1] = max_tokens
                joined = last - 1
            if self.allowed[last - 1]:
                np.maximum(limit[joined:last], self.allowed[last - 1], out=limit[joined:last])
            price = best[low:last] + self.shared[low:last] + 1
            fits = begin[low:last] + own[last] <= limit[low:last]
            fits[-1] = True  # a single row may exceed the budget
            first = low + int(np.argmin(np.where(fits, price, np.iinfo(np.int64).max)))
            best[last], came_from[last] = best[first] + self.shared[first] + 1, first
        runs, last = [], n
        while last > 0:
            runs.append((int(came_from[last]), last))
            last = int(came_from[last])
        return runs[::-1]

    def _build(self, members: list[int]) -> Tree:
        """Lay out sorted rows (ascending numbers) as one flat forest."""
        shared = [0]
        for before, this in itertools.pairwise(members):
            # In sorted order the common prefix of two rows is the shortest between neighbours on the way.
            shared.append(int(self.shared[before + 1 : this + 1].min()))
        lengths = self.lengths[members]
        total = int((lengths - shared).sum())
        tokens, depth, end = (np.empty(total, dtype=np.int64) for _ in range(3))
        fresh, routed_by = np.empty(total, dtype=bool), np.empty(total, dtype=np.int64)
        path = np.empty(int(lengths.max()), dtype=np.int64)  # flat position of each depth
        edges = []
        start = previous = 0
        for k, common in zip(members, shared):
            row = self.rows[self.order[k]]
            n, p = len(row.tokens), row.prompt_length
            end[path[common:previous]] = start  # these subtrees end where this row departs
            stop = start + n - common
            path[common:n] = np.arange(start, stop)
            tokens[start:stop] = row.tokens[common:]
            depth[start:stop] = np.arange(common, n)
            # Tokens that k shares with the sorted row before it are that row's, in whichever tree it is.
            fresh[start:stop] = depth[start:stop] >= self.known[k]
            for first, numbers in self._nodes(k, common, n):
                at = start + first - common
                routed_by[at : at + numbers.stop - numbers.start] = self.routed_by[numbers]
            edges.append((path[p - 1 : n - 1].copy(), row.tokens[p:], np.full(n - p, self.order[k]), np.arange(n - p)))
            start, previous = stop, n
        end[path[:previous]] = total
        source, target, rows, offset = (np.concatenate(column).astype(np.int64) for column in zip(*edges))
        return Tree(tokens, depth, end, source, target, rows, offset, fresh, routed_by)


def _previous_smaller(values: np.ndarray) -> list[int]:
    """For each number the place of the nearest one before it that is smaller; -1 if there is none."""
    result: list[int] = []
    numbers = values.tolist()
    for place, number in enumerate(numbers):
        before = place - 1
        while before >= 0 and numbers[before] >= number:
            before = result[before]
        result.append(before)
    return result


def _key(tokens: np.ndarray) -> bytes:
    """Big-endian bytes compare like the token ids do, at memcmp speed; a prefix sorts first."""
    return tokens.astype(">u4").tobytes()


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    different = a[:n] != b[:n]
    first = int(different.argmax())
    return first if n and different[first] else n
