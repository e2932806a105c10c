"""Tree attention against a dense-mask oracle."""

import importlib
import math
import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from spell_megatron.training import attention, attention_cpu, attention_gpu
from spell_megatron.training.layout import context_positions, query_ranges


def random_forest(rng: random.Random, depth: int, longest: int, trees: int) -> list[int]:
    """`end` of a random forest: runs of 1..longest tokens, up to 4 children per node, some of them empty."""
    end: list[int] = []

    def grow(level: int) -> None:
        start = len(end)
        length = rng.choice([1, 1, rng.randint(1, longest)])
        end.extend([0] * length)
        if level < depth:
            for _ in range(rng.randint(0, 4)):
                grow(level + 1)
        end[start : start + length] = [len(end)] * length

    for _ in range(trees):
        grow(1)
    return end


def dense_mask(end, window=0):
    """O(tokens^2): the definition of the mask, written out."""
    positions = torch.arange(len(end))
    mask = (positions[None, :] <= positions[:, None]) & (positions[:, None] < end[None, :])
    depth = mask.sum(1)
    return mask & (depth[:, None] - depth[None, :] < window) if window else mask


def dense_attention(query, key, value, end, scale, window=0, sinks=None):
    """O(tokens^2): by a mask, and with sinks by a key of any score whose value is 0."""
    mask = dense_mask(end, window)
    repeat = query.size(1) // key.size(1)
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    scores = (torch.einsum("qhd,khd->hqk", query, key) * scale).masked_fill(~mask, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, len(query), 1)], dim=-1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., : len(key)], value)


def output_and_gradients(function, tensors, end, scale, upstream, *more):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*leaves, end, scale, *more)
    (out * upstream).sum().backward()
    return out.detach(), *(x.grad for x in leaves)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("small", [1, 24, 256])
def test_equals_dense_attention(depth, small, monkeypatch):
    """Random forests, every way to cut them: forward and gradients within 1e-5 of the oracle."""
    monkeypatch.setattr(attention_cpu, "SMALL", small)
    rng = random.Random(depth)
    worst = 0.0
    for trial in range(6):
        end = torch.tensor(random_forest(rng, depth, longest=rng.choice([3, 30, 90]), trees=rng.randint(1, 4)))
        groups = rng.choice([1, 2, 3])
        heads, dim = groups * rng.choice([1, 2, 4]), rng.choice([8, 20, 32])
        torch.manual_seed(trial)
        tensors = [torch.randn(len(end), n, dim) for n in (heads, groups, groups)]
        upstream = torch.randn(len(end), heads, dim)
        ours = output_and_gradients(attention.tree_attention, tensors, end, dim**-0.5, upstream)
        double = [x.double() for x in tensors]
        oracle = output_and_gradients(dense_attention, double, end, dim**-0.5, upstream.double())
        for got, expected in zip(ours, oracle):
            worst = max(worst, ((got - expected).abs().max() / expected.abs().max().clamp(min=1)).item())
    print(f"depth {depth}, small {small}: largest error {worst:.1e}")
    assert worst <= 1e-5


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("small", [1, 24, 256])
def test_windows_and_sinks_equal_dense_attention(depth, small, monkeypatch):
    """The same with windows of any width, learned scores and a part of the queries, and with gradients of these."""
    monkeypatch.setattr(attention_cpu, "SMALL", small)
    rng = random.Random(depth)
    for trial in range(6):
        end = random_forest(rng, depth, longest=rng.choice([3, 30, 90]), trees=rng.randint(1, 4))
        end = torch.tensor(end + [len(end) + i + 1 for i in range(-len(end) % 4)])
        window, groups = rng.choice([0, 1, 2, 5, 17, 40, 1000]), rng.choice([1, 2])
        torch.manual_seed(trial)
        tensors = [torch.randn(len(end), n, 16) for n in (4, groups, groups)] + [torch.randn(4)]
        upstream = torch.randn(len(end), 4, 16)

        def ours(query, key, value, sinks, queries=None, end=end, window=window):
            return attention.tree_attention(query, key, value, end, 0.25, queries, window, sinks)

        def oracle(query, key, value, sinks, end=end, window=window):
            return dense_attention(query, key, value, end, 0.25, window, sinks)

        expected = gradients(oracle, [x.double() for x in tensors], upstream.double())
        for got, right in zip(gradients(ours, tensors, upstream), expected):
            torch.testing.assert_close(got.double(), right, rtol=0, atol=3e-5)
        summed = [torch.zeros_like(x) for x in expected]
        for group in range(2):
            ranges = query_ranges(len(end), group, 2)
            rows = torch.cat([torch.arange(*r) for r in ranges])
            parts = gradients(lambda *x, r=ranges: ours(*x, r), [tensors[0][rows], *tensors[1:]], upstream[rows])
            for total, part in zip(summed[:2], parts[:2]):
                total[rows] = part.double()
            for total, part in zip(summed[2:], parts[2:]):
                total += part
        for got, right in zip(summed, expected):
            torch.testing.assert_close(got, right, rtol=0, atol=3e-5)


def gradients(function, tensors, upstream):
    """The result of a function of tensors, and the gradients by them."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*leaves)
    (out * upstream).sum().backward()
    return out.detach(), *(x.grad for x in leaves)


@pytest.mark.parametrize("window", [0, 3, 50])
def test_plan_covers_the_mask_once(window):
    rng = random.Random(5)
    for _ in range(30):
        end = torch.tensor(random_forest(rng, rng.randint(1, 4), longest=rng.choice([2, 40, 300]), trees=3))
        total = len(end)
        counts = torch.zeros(total, total, dtype=torch.int)
        for r in attention_cpu.plan(end, window=window):
            assert r.mask is None or len(r.mask) <= attention_cpu.SMALL
            shape = (r.q_stop - r.q_start, r.k_stop - r.k_start)
            covered = torch.ones(shape, dtype=torch.int) if r.mask is None else r.mask.int()
            counts[r.q_start : r.q_stop, r.k_start : r.k_stop] += covered.tril() if r.causal else covered
        assert torch.equal(counts, dense_mask(end, window).int())


def test_windows_cost_no_more_than_their_keys():
    """A long path: each block of queries meets its own keys and those of the window."""
    end = torch.full((5_000,), 5_000)
    rectangles = attention_cpu.plan(end, window=100)
    pairs = sum((r.q_stop - r.q_start) * (r.k_stop - r.k_start) for r in rectangles)
    assert pairs <= 5_000 * (attention_cpu.SMALL + 100)
    assert len(rectangles) == math.ceil(5_000 / attention_cpu.SMALL)


def test_some_queries_against_all_keys(monkeypatch):
    """What groups of context-parallel ranks compute: the rows of the whole result, the sums of their gradients."""
    rng = random.Random(7)
    for trial in range(12):
        monkeypatch.setattr(attention_cpu, "SMALL", rng.choice([1, 24, 256]))
        end = random_forest(rng, depth=3, longest=rng.choice([3, 30, 90]), trees=rng.randint(1, 4))
        groups = rng.choice([2, 3])
        end = torch.tensor(end + [len(end) + i + 1 for i in range(-len(end) % (2 * groups))])
        torch.manual_seed(trial)
        tensors = [torch.randn(len(end), n, 16) for n in (4, 2, 2)]
        upstream = torch.randn(len(end), 4, 16)
        double = [x.double() for x in tensors]
        out, grad_q, grad_k, grad_v = output_and_gradients(dense_attention, double, end, 0.25, upstream.double())
        sums = [torch.zeros_like(x) for x in tensors[1:]]
        for group in range(groups):
            ranges = query_ranges(len(end), group, groups)
            rows = torch.cat([torch.arange(*r) for r in ranges])
            some = [tensors[0][rows], *tensors[1:]]
            part, *grads = output_and_gradients(attention.tree_attention, some, end, 0.25, upstream[rows], ranges)
            torch.testing.assert_close(part.double(), out[rows], rtol=0, atol=1e-5)
            torch.testing.assert_close(grads[0].double(), grad_q[rows], rtol=0, atol=1e-5)
            for total, grad in zip(sums, grads[1:]):
                total += grad
        torch.testing.assert_close(sums[0].double(), grad_k, rtol=0, atol=3e-5)
        torch.testing.assert_close(sums[1].double(), grad_v, rtol=0, atol=3e-5)


@pytest.mark.parametrize(("swapping", "groups"), [(1, 1), (4, 1), (1, 3), (2, 2)])
def test_context_parallel_ranks_hold_every_position_once(swapping, groups):
    ranks = swapping * groups
    held = [context_positions(12 * ranks, rank, swapping, groups) for rank in range(ranks)]
    assert sorted(p for positions in held for p in positions) == list(range(12 * ranks))
    assert all(len(p) == 12 and (p[1:] > p[:-1]).all() for p in held)
    if groups > 1:  # causal work is the same for all groups
        work = {sum(int(held[g * swapping + i].sum()) for i in range(swapping)) for g in range(groups)}
        assert len(work) == 1


def test_bfloat16_is_as_exact_as_its_type():
    end = torch.tensor(random_forest(random.Random(3), 3, longest=60, trees=2))
    torch.manual_seed(0)
    tensors = [torch.randn(len(end), n, 32).bfloat16() for n in (4, 2, 2)]
    upstream = torch.randn(len(end), 4, 32)
    ours = output_and_gradients(attention.tree_attention, tensors, end, 32**-0.5, upstream)
    oracle = output_and_gradients(dense_attention, [x.double() for x in tensors], end, 32**-0.5, upstream)
    for got, expected in zip(ours, oracle):
        assert got.dtype == torch.bfloat16
        error = ((got - expected).norm() / expected.norm()).item()
        print(f"bfloat16 relative error {error:.1e}")
        assert error <= 1e-2


def test_rows_in_the_same_memory_are_not_confused():
    """The plan is kept per row; a new row of the same length must get its own."""
    torch.manual_seed(0)
    tensors = [torch.randn(64, 2, 8) for _ in range(3)]
    for _ in range(20):
        for cut in (16, 40):
            end = torch.tensor([cut] * cut + [64] * (64 - cut))
            ours = attention.tree_attention(*tensors, end, 1.0)
            torch.testing.assert_close(ours, dense_attention(*tensors, end, 1.0), rtol=0, atol=1e-5)
            del end


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns, in the backward pass too."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.numel = max([self.numel, *(x.numel() for x in tensors)])
        return out


def test_long_rows_need_no_square_of_memory():
    """No tensor is larger than the inputs, where a mask of the whole row would have 100 million entries."""
    prompt, answer, answers = 8_000, 250, 8
    end = [prompt + answer * answers] * prompt
    for i in range(answers):
        end += [prompt + answer * (i + 1)] * answer
    tensors = [torch.randn(len(end), n, 8, requires_grad=True) for n in (2, 1, 1)]
    with LargestTensor() as largest:
        attention.tree_attention(*tensors, torch.tensor(end), 1.0).sum().backward()
    assert largest.numel == tensors[0].numel()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("window", [1, 60, 300])
def test_flex_blocks_of_windows_lose_nothing(window, groups):
    """No block is missing, none is falsely called full, and what the mask says is right. Without a GPU."""
    rng = random.Random(window)
    ends: list[int] = []
    while len(ends) < 1024:
        ends += [len(ends) + e for e in random_forest(rng, 3, longest=200, trees=1)]
    end, size = torch.tensor(ends[:1024]).clamp(max=1024), attention_gpu.FLEX_BLOCK
    ranges = query_ranges(1024, 0, groups)
    mask = dense_mask(end, window)[torch.cat([torch.arange(*r) for r in ranges])]
    block_mask = attention_gpu.flex_block_mask(end, ranges if groups > 1 else None, window)
    tiles = mask.view(-1, size, 1024 // size, size).permute(0, 2, 1, 3)
    dense = block_mask.to_dense()[0, 0].bool()
    assert not (tiles.any(-1).any(-1) & ~dense).any()
    assert dense.float().mean() < 0.9
    for row in range(len(tiles)):
        chosen = block_mask.full_kv_indices[0, 0, row, : block_mask.full_kv_num_blocks[0, 0, row]]
        assert all(tiles[row, c].all() for c in chosen)
    told = block_mask.mask_mod(0, 0, torch.arange(len(mask))[:, None], torch.arange(1024)[None, :])
    assert torch.equal(told, mask)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("window", [0, 5])
def test_flex_attention_with_sinks_equals_dense_attention(window, monkeypatch):
    """The GPU path's arithmetic, by torch's own definition of FlexAttention and its gradients."""
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)  # its definition runs on CPUs too
    monkeypatch.setattr(attention_gpu, "compiled_flex_attention", lambda: flex.flex_attention)
    end = torch.tensor(random_forest(random.Random(3), 3, longest=30, trees=3))
    torch.manual_seed(0)
    tensors = [torch.randn(len(end), n, 16) for n in (4, 2, 2)] + [torch.randn(4)]
    upstream = torch.randn(len(end), 4, 16)

    def ours(*leaves):
        heads = [attention_cpu.heads_first(x) for x in leaves[:3]]
        block_mask = attention_gpu.flex_block_mask(end, None, window)
        return attention_gpu.attend_in_blocks(heads, block_mask, 0.25, leaves[3])[0].transpose(0, 1)

    def oracle(query, key, value, sinks):
        return dense_attention(query, key, value, end, 0.25, window, sinks)

    with torch._dynamo.config.patch(disable=False):  # `training.cpu` may have switched it off
        found = gradients(ours, tensors, upstream)
    for got, right in zip(found, gradients(oracle, tensors, upstream)):
        torch.testing.assert_close(got, right, rtol=0, atol=3e-5)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("total", [700, 1024])
def test_flex_blocks_describe_the_same_mask(total, groups):
    """The GPU path's blocks, checked without a GPU: needed and full blocks are exactly those of the mask, if
    queries are contiguous; otherwise none is missing and none falsely called full."""
    rng = random.Random(total)
    ends: list[int] = []
    while len(ends) < total:
        ends += [len(ends) + e for e in random_forest(rng, 3, longest=200, trees=1)]
    end = torch.tensor(ends[:total]).clamp(max=total)
    size = attention_gpu.FLEX_BLOCK
    blocks = -(-total // size)
    mask = torch.zeros(blocks * size, blocks * size, dtype=torch.bool)
    positions = torch.arange(total)
    mask[:total, :total] = (positions[None, :] <= positions[:, None]) & (positions[:, None] < end[None, :])
    if groups > 1:
        ranges = query_ranges(total, 1, groups)
        mask = mask[torch.cat([torch.arange(*r) for r in ranges])]
        mask = torch.nn.functional.pad(mask, (0, 0, 0, -len(mask) % size))
        block_mask = attention_gpu.flex_block_mask(end, ranges)
        dense = block_mask.to_dense()[0, 0].bool()
        tiles = mask.view(-1, size, blocks, size).permute(0, 2, 1, 3)
        assert not (tiles.any(-1).any(-1) & ~dense).any()
        for row in range(len(tiles)):
            chosen = block_mask.full_kv_indices[0, 0, row, : block_mask.full_kv_num_blocks[0, 0, row]]
            real = slice(0, min(size, total // 2 - row * size))
            assert all(tiles[row, c, real].all() for c in chosen)
        index = torch.arange(total // 2)
        told = block_mask.mask_mod(0, 0, index[:, None], positions[None, :])
        assert torch.equal(told, mask[: total // 2, :total])
        return
    tiles = mask.view(blocks, size, blocks, size).permute(0, 2, 1, 3)
    block_mask = attention_gpu.flex_block_mask(end)
    assert torch.equal(block_mask.to_dense()[0, 0].bool(), tiles.any(-1).any(-1))
    for row in range(blocks):
        chosen = block_mask.full_kv_indices[0, 0, row, : block_mask.full_kv_num_blocks[0, 0, row]]
        # Rows of the last block that lie past the end of the sequence are never computed.
        real = slice(0, min(size, total - row * size))
        expected = [c for c in range(blocks) if c < row and tiles[row, c, real].all()]
        assert set(chosen.tolist()) <= set(expected)
        if (row + 1) * size <= total:
            assert sorted(chosen.tolist()) == expected
