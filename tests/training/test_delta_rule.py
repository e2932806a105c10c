"""The gated delta rule and the convolution over prefix trees against token-by-token recurrences over every path."""

import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spell_megatron.training import delta_rule
from spell_megatron.training.delta_rule import tree_convolution, tree_delta_rule
from spell_megatron.training.tree_levels import forest


def ends(parents: list[int]) -> torch.Tensor:
    """End of each token's subtree, for tokens in depth-first order with these parents (-1: a root)."""
    end = list(range(1, len(parents) + 1))
    for token in reversed(range(len(parents))):
        if parents[token] >= 0:
            end[parents[token]] = max(end[parents[token]], end[token])
    return torch.tensor(end)


def paths(parents: list[int]) -> list[list[int]]:
    """The path to each leaf."""
    found = []
    for token in set(range(len(parents))) - set(parents):
        path = []
        while token >= 0:
            path.append(token)
            token = parents[token]
        found.append(path[::-1])
    return found


def tree(lengths: list) -> list[int]:
    """Parents of the tokens of a tree: [tokens, subtrees ...] with subtrees of the same kind."""

    def add(parent: int, node: list) -> None:
        for _ in range(node[0]):
            parents.append(parent)
            parent = len(parents) - 1
        for child in node[1:]:
            add(parent, child)

    parents: list[int] = []
    for root in lengths:
        add(-1, root)
    return parents


class Layer:
    """Random inputs of a layer, and its output over a forest and over every path of it."""

    def __init__(self, tokens: int, seed: int, dtype: torch.dtype) -> None:
        rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        self.key_heads, share = int(rng.integers(1, 3)), int(rng.integers(1, 3))
        self.heads = self.key_heads * share
        self.key_dim, self.value_dim, self.width = (int(x) for x in rng.integers(1, [12, 12, 6]))
        channels = 2 * self.key_heads * self.key_dim + self.heads * self.value_dim
        self.inputs = [
            torch.randn(tokens, channels, dtype=dtype),
            torch.randn(channels, 1, self.width, dtype=dtype),
            -torch.rand(tokens, self.heads, dtype=dtype) * rng.choice([0.01, 1.0, 10.0]),
            torch.rand(tokens, self.heads, dtype=dtype),
        ]
        for x in self.inputs:
            x.requires_grad_()
        self.upstream = torch.randn(tokens, self.heads, self.value_dim, dtype=dtype)

    def _heads(self, mixed: torch.Tensor) -> list[torch.Tensor]:
        keys = self.key_heads * self.key_dim
        parts = mixed.split([keys, keys, self.heads * self.value_dim], dim=1)
        return [x.unflatten(1, (-1, size)) for x, size in zip(parts, (self.key_dim, self.key_dim, self.value_dim))]

    def over_the_tree(self, end: torch.Tensor, longest: int | None) -> torch.Tensor:
        x, weight, decay, rate = self.inputs
        trees = forest(end, self.width, longest)
        mixed = self._heads(tree_convolution(x, weight, trees))
        return tree_delta_rule(*mixed, decay[trees.order], rate[trees.order], trees)[trees.places]

    def over_a_path(self, path: list[int]) -> torch.Tensor:
        x, weight, decay, rate = self.inputs
        before = torch.cat([x.new_zeros(self.width - 1, x.size(1)), x[path]])
        mixed = sum(before[i : i + len(path)] * weight[:, 0, i] for i in range(self.width))
        query, key, value = self._heads(torch.nn.functional.silu(mixed))
        query, key = (
            (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt()).repeat_interleave(self.heads // self.key_heads, 1)
            for y in (query, key)
        )
        state = x.new_zeros(self.heads, self.key_dim, self.value_dim)
        outputs = []
        for place, token in enumerate(path):
            state = state * decay[token].exp()[:, None, None]
            held = torch.einsum("hkv,hk->hv", state, key[place])
            state = state + key[place][:, :, None] * ((value[place] - held) * rate[token][:, None])[:, None]
            outputs.append(torch.einsum("hkv,hk->hv", state, query[place]) / self.key_dim**0.5)
        return torch.stack(outputs)

    def gradients(self, output: torch.Tensor, upstream: torch.Tensor) -> list[torch.Tensor]:
        return torch.autograd.grad((output * upstream).sum(), self.inputs)


def worst_error(parents: list[int], seed: int, longest: int | None, dtype: torch.dtype) -> float:
    """Largest relative difference of outputs and gradients over the tree from those over every path."""
    layer = Layer(len(parents), seed, dtype)
    output = layer.over_the_tree(ends(parents), longest)
    found = [output.detach(), *layer.gradients(output, layer.upstream)]
    expected = [torch.zeros_like(x) for x in found]  # with the gradient of each token's output once
    seen: set[int] = set()
    for path in paths(parents):
        own = layer.over_a_path(path)
        new = torch.tensor([token not in seen for token in path])
        seen.update(path)
        expected[0][path] = own.detach()
        for total, part in zip(expected[1:], layer.gradients(own, layer.upstream[path] * new[:, None, None])):
            total += part
    return max(float((a - b).norm() / b.norm().clamp(min=1e-9)) for a, b in zip(found, expected))


SHAPES = {
    "one token": [[1]],
    "one row": [[150]],
    "several rows and single tokens": [[70], [1], [1], [3]],
    "prompt with answers": [[130, [5], [1], [64], [65]]],
    "branches in the convolution's window": [[2, [1, [1, [2], [1]], [1]], [3]]],
    "four levels": [[63, [1, [64, [2], [7]], [1]], [80, [3, [1], [1]]]], [9, [4], [4]]],
}


@pytest.mark.parametrize("longest", [None, 64, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_tree_equals_paths(shape, longest):
    """1e-5 relative in float32; `longest` cuts chains into pieces whose states pass on."""
    error = worst_error(tree(SHAPES[shape]), 1, longest, torch.float32)
    print(f"{shape}, pieces of {longest}: {error:.1e}")
    assert error <= 1e-5


@st.composite
def parents(draw) -> list[int]:
    """Parents of the tokens of a random forest in depth-first order."""
    found: list[int] = []
    path: list[int] = []
    for token in range(draw(st.integers(1, 40))):
        depth = draw(st.one_of(st.just(len(path)), st.integers(0, len(path))))
        path = path[:depth]
        found.append(path[-1] if path else -1)
        path.append(token)
    return found


@settings(max_examples=40)
@given(parents(), st.integers(0, 1000), st.sampled_from([None, 1, 2, 5]), st.sampled_from([1, 4, 64]))
def test_random_trees_equal_paths(parents, seed, longest, chunk):
    """In float64, where only a mistake is as large as 1e-9."""
    kept, delta_rule.CHUNK = delta_rule.CHUNK, chunk
    try:
        assert worst_error(parents, seed, longest, torch.float64) <= 1e-9
    finally:
        delta_rule.CHUNK = kept


def test_kernels_for_gpus_are_asked_for_the_same(monkeypatch):
    """A function with the arguments of flash-linear-attention's stands in for its kernels, which need a GPU."""

    def chunk_gated_delta_rule(
        q, k, v, g, beta, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens
    ):
        assert use_qk_l2norm_in_kernel and q.dim() == v.dim() == 4
        inputs = [x.squeeze(0) for x in (q, k, v, g, beta)]
        output, last = delta_rule._pieces(tuple(cu_seqlens.diff().tolist()), initial_state, *inputs)
        return output[None], last if output_final_state else None

    kernels = types.ModuleType("fla.ops.gated_delta_rule")
    kernels.chunk_gated_delta_rule = chunk_gated_delta_rule
    for name, module in (("fla", None), ("fla.ops", None), ("fla.ops.gated_delta_rule", kernels)):
        monkeypatch.setitem(sys.modules, name, module or types.ModuleType(name))
    monkeypatch.setattr(delta_rule, "_on_cpu", delta_rule._on_gpu)
    assert worst_error(tree(SHAPES["four levels"]), 1, None, torch.float64) <= 1e-9


def test_only_states_between_pieces_are_kept():
    """What the backward pass keeps of the rule: its inputs and a state for each branching point or piece."""
    end = ends(tree([[100, *[[50]] * 8]]))
    trees = forest(end, 4, None)
    tokens, heads, size = len(end), 2, 16
    inputs = [torch.randn(tokens, heads, size, requires_grad=True) for _ in range(3)]
    inputs += [-torch.rand(tokens, heads, requires_grad=True), torch.rand(tokens, heads, requires_grad=True)]
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        tree_delta_rule(*inputs, trees)
    state = 4 * heads * size * size
    # Inputs share their storages; the state of the prompt is one.
    assert sum(kept.values()) <= sum(x.nbytes for x in inputs) + 2 * state
