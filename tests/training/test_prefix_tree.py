"""Prefix trees against their definitions, on generated rows."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spell_megatron.training.prefix_tree import EMPTY, Cost, Earlier, Row, pack, plan


def make_row(tokens, prompt_length, seed=0, routed=None):
    """`routed`: the last but one so many tokens have a routing; None: there is no record at all."""
    n = len(tokens) - prompt_length
    rng = np.random.default_rng(seed)
    return Row(
        np.array(tokens, dtype=np.int64),
        prompt_length,
        rng.normal(size=n).astype(np.float32),
        rng.normal(size=n).astype(np.float32),
        None if routed is None else np.zeros((routed, 1, 1), np.uint8),
    )


@st.composite
def row_lists(draw):
    """Rows over three token ids, so that prefixes coincide often: also inside responses and whole rows."""
    rows = []
    for _ in range(draw(st.integers(1, 9))):
        if rows and draw(st.booleans()):
            tokens = list(draw(st.sampled_from(rows)).tokens)
            tokens = tokens[: draw(st.integers(1, len(tokens)))]
        else:
            tokens = [draw(st.integers(0, 2))]
        tokens += draw(st.lists(st.integers(0, 2), max_size=8))
        routed = draw(st.none() | st.integers(0, len(tokens) - 1))
        rows.append(make_row(tokens, draw(st.integers(1, len(tokens))), routed=routed))
    return rows


def ancestors(tree, q):
    """Flat positions that q may attend to, from the mask's definition."""
    k = np.arange(q + 1)
    return k[tree.end[: q + 1] > q]


def check(rows, trees, max_tokens):
    seen = set()
    for tree in trees:
        longest = max(len(rows[row].tokens) for row in tree.row)
        assert len(tree.tokens) <= max_tokens or (max_tokens < longest and len(tree.tokens) <= longest * 9 // 8)
        children = set()
        for q in range(len(tree.tokens)):
            path = ancestors(tree, q)
            assert path[-1] == q
            np.testing.assert_array_equal(tree.position_ids[path], np.arange(len(path)))
            parent = int(path[-2]) if len(path) > 1 else -1
            assert (parent, tree.tokens[q]) not in children, "an identical prefix is computed twice"
            children.add((parent, tree.tokens[q]))
        for source, target, row, offset in zip(tree.source, tree.target, tree.row, tree.offset):
            assert (row, offset) not in seen, "a loss edge appears twice"
            seen.add((row, offset))
            position = rows[row].prompt_length + offset
            # The path to the source is the row up to the predicted token: unpacking gives the row back.
            np.testing.assert_array_equal(tree.tokens[ancestors(tree, source)], rows[row].tokens[:position])
            assert target == rows[row].tokens[position]
    assert len(seen) == sum(len(r.weights) for r in rows), "a loss edge is missing"
    fresh = [tuple(tree.tokens[ancestors(tree, q)]) for tree in trees for q in np.flatnonzero(tree.fresh)]
    prefixes = {tuple(r.tokens[:i]) for r in rows if len(r.weights) for i in range(1, len(r.tokens) + 1)}
    assert len(fresh) == len(set(fresh)) and set(fresh) == prefixes, "a token is not fresh exactly once"

    providers = {}
    for number in sorted((i for i, r in enumerate(rows) if len(r.weights)), key=lambda i: list(rows[i].tokens)):
        for place in rows[number].routed:
            providers.setdefault(tuple(rows[number].tokens[: place + 1]), number)
    for tree in trees:
        found = [providers.get(tuple(tree.tokens[ancestors(tree, q)]), -1) for q in range(len(tree.tokens))]
        assert tree.routed_by.tolist() == found, "a token does not take the routing of the first row that has one"


@settings(max_examples=300, deadline=None)
@given(row_lists(), st.integers(1, 60))
def test_every_edge_once_and_every_prefix_once(rows, max_tokens):
    check(rows, pack(rows, max_tokens), max_tokens)


@settings(max_examples=150, deadline=None)
@given(row_lists(), st.integers(1, 60), st.integers(1, 4))
def test_plan_gives_every_rank_the_same_number_and_loses_nothing(rows, max_tokens, ranks):
    plans = plan(rows, max_tokens, ranks, Cost(1.0, 0.1, 0.5))
    assert len(plans) == ranks and len({len(trees) for trees in plans}) == 1 and plans[0]
    check(rows, [tree for trees in plans for tree in trees if tree is not EMPTY], max_tokens)


@settings(max_examples=100, deadline=None)
@given(row_lists(), st.integers(4, 30))
def test_cuts_repeat_the_fewest_tokens(rows, max_tokens):
    """Against all ways to cut the sorted rows into runs."""
    rows = [r for r in rows if len(r.weights)]
    ordered = sorted(rows, key=lambda r: list(r.tokens))

    def prefixes(run):
        return {tuple(r.tokens[:i]) for r in run for i in range(1, len(r.tokens) + 1)}

    def fits(run):
        longest = max(len(r.tokens) for r in run)
        half_shared = all(len(prefixes([a]) & prefixes([b])) * 2 >= len(b.tokens) for a, b in itertools.pairwise(run))
        limit = longest * 9 // 8 if longest > max_tokens and half_shared else max_tokens
        return len(run) == 1 or len(prefixes(run)) <= limit

    best = {0: 0}
    for last in range(1, len(ordered) + 1):
        best[last] = min(
            best[first] + len(prefixes(ordered[first:last])) for first in range(last) if fits(ordered[first:last])
        )
    packed = sum(len(tree.tokens) for tree in pack(rows, max_tokens))
    # Forests may merge prefixes that cut runs share; free cuts cost nothing, and each cut is priced one
    # token above what it repeats, so the total may exceed the optimum by at most one token per run.
    assert packed <= best[len(ordered)] + len(ordered)


@st.composite
def branching_rows(draw):
    """Rows of a tree of depth 1 to 4 whose branches hold 0 to 3 tokens: rows end and prompts end at any branching
    point or inside a branch, so that rows repeat, begin others, and continue others' responses."""
    rows = []

    def grow(prefix, boundaries, level):
        tokens = prefix + draw(st.lists(st.integers(0, 1), max_size=3))
        boundaries = [*boundaries, len(tokens)]
        for _ in range(draw(st.integers(0, 2)) if tokens else 0):
            ends = [n for n in boundaries if n]
            rows.append(make_row(tokens, draw(st.sampled_from(ends) | st.integers(1, len(tokens)))))
        for _ in range(draw(st.integers(0, 3)) if level < depth else 0):
            grow(tokens, boundaries, level + 1)

    depth = draw(st.integers(1, 4))
    grow([], [], 1)
    return rows


@settings(max_examples=200, deadline=None)
@given(branching_rows(), st.integers(1, 40), st.integers(1, 3))
def test_branches_of_any_depth_and_length(rows, max_tokens, ranks):
    check(rows, pack(rows, max_tokens), max_tokens)
    trees = [tree for trees in plan(rows, max_tokens, ranks) for tree in trees if tree is not EMPTY]
    check(rows, trees, max_tokens)


PATHOLOGICAL = {
    "single tokens": ([([1, 2], 1), ([1, 3], 1), ([1, 1], 1)], 4),
    "one sequence, prompts of all lengths": ([([1, 2, 3, 4], p) for p in (1, 2, 3, 4)], 4),
    "duplicates of whole rows": ([([1, 2, 3], 2)] * 5, 3),
    "a prompt that is another's prompt and response": ([([1, 2, 3], 1), ([1, 2, 3, 4, 5], 3)], 5),
    "a prompt that ends inside another's response": ([([1, 2, 3, 4], 1), ([1, 2, 3, 5], 2)], 5),
    "a response that is the beginning of another": ([([1, 2], 1), ([1, 2, 3], 1), ([1, 2, 3, 4], 1)], 4),
    "a chain of four turns": ([([1, *range(2, n)], n - 3) for n in (4, 5, 6, 7)] + [([1, 9], 1)], 7),
    "no response beside one": ([([1, 2, 3, 4, 5], 5), ([1, 2, 6], 2)], 3),
}


@pytest.mark.parametrize("shape", PATHOLOGICAL)
def test_pathological_trees(shape):
    """Each as one tree of as few tokens as there are distinct prefixes, and cut to pieces."""
    rows, tokens = PATHOLOGICAL[shape]
    rows = [make_row(*row) for row in rows]
    (tree,) = pack(rows, 100)
    assert len(tree.tokens) == tokens
    for budget in (1, 3, 4, 100):
        check(rows, pack(rows, budget), budget)


def test_known_tree():
    rows = [
        make_row([5, 6, 7, 8], 2),
        make_row([5, 6, 7, 9], 2),
        make_row([5, 6, 7, 8], 2),
        make_row([4, 1], 1),
    ]
    (tree,) = pack(rows, 100)
    np.testing.assert_array_equal(tree.tokens, [4, 1, 5, 6, 7, 8, 9])
    np.testing.assert_array_equal(tree.position_ids, [0, 1, 0, 1, 2, 3, 3])
    np.testing.assert_array_equal(tree.end, [2, 2, 7, 7, 7, 6, 7])
    edges = set(zip(tree.source.tolist(), tree.target.tolist(), tree.row.tolist(), tree.offset.tolist()))
    assert edges == {
        (0, 1, 3, 0),
        (3, 7, 0, 0),
        (4, 8, 0, 1),
        (3, 7, 1, 0),
        (4, 9, 1, 1),
        (3, 7, 2, 0),
        (4, 8, 2, 1),
    }


def test_groups_stay_whole():
    """Prompts of 100 tokens with 8 responses of 10 each: a budget of two groups cuts between groups only."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(7):
        prompt = rng.integers(0, 1000, 100)
        rows += [make_row(np.concatenate([prompt, rng.integers(0, 1000, 10)]), 100) for _ in range(8)]
    order = rng.permutation(len(rows))
    trees = pack([rows[i] for i in order], 2 * 180)
    assert sum(len(tree.tokens) for tree in trees) <= 7 * 180
    assert len(trees) == 4
    groups = [{int(order[r]) // 8 for r in tree.row} for tree in trees]
    assert sorted(g for group in groups for g in group) == list(range(7))


def long_rows(count, prompt, response, first=0):
    head = np.arange(first, first + prompt)
    return [make_row(np.concatenate([head, 10_000 + count * np.arange(response) + i]), prompt) for i in range(count)]


def test_rows_over_the_budget_share_their_prefix():
    (tree,) = pack(long_rows(8, 1000, 2), 1001)
    assert len(tree.tokens) == 1016 == 1000 + 8 * 2
    (tree,) = pack([long_rows(1, 1000, 2)[0]] * 8, 1001)
    assert len(tree.tokens) == 1002
    # an eighth of 1,300 tokens has room for five more responses of 30
    trees = pack(long_rows(12, 1270, 30), 1001)
    assert [len(tree.tokens) for tree in trees] == [1270 + 30 * 6] * 2
    check(long_rows(12, 1270, 30), trees, 1001)


def test_what_shares_nothing_stays_away_from_a_row_over_the_budget():
    long, short = long_rows(2, 1000, 2), long_rows(2, 40, 20, first=5000)
    beginning = make_row([*range(10), 7, 7, 7, 7], 10)  # shares less than half of the row behind it
    assert sorted(len(tree.tokens) for tree in pack([*long, *short, beginning], 1001)) == [80 + 14, 1004]


def test_smaller_trees_for_many_ranks_are_cut_as_before():
    """Only the budget of the device lets a row exceed it, not the smaller one that spreads rows over ranks."""
    plans = plan(long_rows(8, 80, 8), 1000, 8)
    assert [[len(tree.tokens) for tree in trees] for trees in plans] == [[88]] * 8


def test_one_group_over_two_ranks_is_cut_only_if_that_pays():
    rng = np.random.default_rng(1)

    def group(prompt, response):
        head = rng.integers(0, 1000, prompt)
        return [make_row(np.concatenate([head, rng.integers(0, 1000, response)]), prompt) for _ in range(8)]

    short = plan(group(10, 100), 10_000, 2)
    assert [len(trees) for trees in short] == [1, 1] and all(len(t.source) for trees in short for t in trees)
    long = plan(group(1000, 1), 10_000, 2)
    assert sorted(len(trees[0].source) for trees in long) in ([0, 8], [4, 4])
    costs = [
        sum(len(t.tokens) for t in trees) for trees in plan(group(50, 20) + group(50, 20) + group(50, 20), 10_000, 2)
    ]
    assert max(costs) <= 1.35 * sum(costs) / 2


@settings(max_examples=150, deadline=None)
@given(st.lists(row_lists(), min_size=2, max_size=4), st.integers(1, 30), st.integers(1, 3))
def test_a_token_that_an_earlier_call_has_computed_is_not_fresh(calls, max_tokens, ranks):
    """Each prefix of all rows is fresh once, in the first call that has it."""
    earlier, fresh = Earlier(), []
    for rows in calls:
        for tree in itertools.chain(*plan(rows, max_tokens, ranks, Cost(), (), earlier)):
            fresh += [tuple(tree.tokens[ancestors(tree, q)]) for q in np.flatnonzero(tree.fresh)]
        rows = [row for row in rows if len(row.weights)]
        earlier.add(rows)
        prefixes = {tuple(r.tokens[:i]) for r in rows for i in range(1, len(r.tokens) + 1)}
        assert len(fresh) == len(set(fresh)) and prefixes <= set(fresh)
    everything = {
        tuple(r.tokens[:i]) for rows in calls for r in rows if len(r.weights) for i in range(1, len(r.tokens) + 1)
    }
    assert set(fresh) == everything


def test_ranks_are_balanced_over_all_calls():
    """Groups that come one after the other: the rank with less so far gets the next one."""
    rng = np.random.default_rng(0)
    loads, cost = [0.0] * 3, Cost()
    for _ in range(40):
        prompt = rng.integers(0, 1000, rng.integers(10, 300))
        rows = [make_row(np.concatenate([prompt, rng.integers(0, 1000, 5)]), len(prompt)) for _ in range(8)]
        plans = plan(rows, 400, 3, cost, loads)
        loads = [load + sum(map(cost.of, trees)) for load, trees in zip(loads, plans, strict=True)]
    assert max(loads) - min(loads) <= 340  # one group


def test_nothing_to_train_on_gives_empty_trees():
    assert plan([make_row([1, 2], 2)], 10, 3) == [[EMPTY]] * 3


def test_faulty_rows_are_refused():
    with pytest.raises(ValueError, match="at least one token"):
        make_row([1, 2], 0)
    with pytest.raises(ValueError, match="2 response tokens"):
        Row(np.arange(4), 2, np.zeros(1, np.float32), np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="whose last has none"):
        make_row([1, 2], 1, routed=2)


def test_planning_a_full_batch_is_fast():
    """1,400 rows of 16K tokens, 8 to a prompt, 8 ranks: measured 1.5 s on one core; the limit is 5 s."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(175):
        prompt = rng.integers(0, 150_000, 15_000)
        rows += [make_row(np.concatenate([prompt, rng.integers(0, 150_000, 1_384)]), 15_000) for _ in range(8)]
    start = time.process_time()
    plans = plan(rows, 32_768, 8, Cost(1.0, 1e-4, 0.1))
    seconds = time.process_time() - start
    totals = [sum(Cost(1.0, 1e-4, 0.1).of(tree) for tree in trees) for trees in plans]
    assert sum(len(tree.source) for trees in plans for tree in trees) == 1_400 * 1_384
    assert max(totals) <= 1.1 * sum(totals) / len(totals)
    assert seconds <= 5, f"{seconds:.1f} s"
    print(f"{seconds:.2f} s, balance {max(totals) * len(totals) / sum(totals):.3f}")
