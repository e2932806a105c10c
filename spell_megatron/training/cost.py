"""What training a model costs, in FLOPs."""

from __future__ import annotations

from spell_megatron.training.delta_rule import CHUNK
from spell_megatron.training.policy import Architecture
from spell_megatron.training.prefix_tree import Cost


def training_cost(arch: Architecture) -> Cost:
    """FLOPs of forward and backward of one token, one attended pair and one predicting position.

    Linear layers take 6 FLOPs per parameter that a token meets; attention 12 per pair, layer and query
    channel (q k and p v, each 2 forward and 4 backward). The chunks of a gated delta net take time in proportion to
    its tokens, and so do windows, which are taken as full.
    """
    windowed = sum(arch.window_layers)
    return Cost(
        token=6.0 * (mixers(arch) + sum(_feed_forward(arch, sparse) for sparse in arch.moe_layers))
        + _pair(arch) * windowed * arch.window,
        pair=_pair(arch) * (arch.layers - sum(arch.delta_layers) - windowed),
        source=head_flops(arch),
    )


def layer_flops(arch: Architecture, layer: int, tokens: int) -> float:
    """FLOPs of forward and backward of one token in a layer, on average over a row of so many tokens."""
    delta = arch.delta_layers[layer]
    linear = 6.0 * (_mixer(arch, delta) + _feed_forward(arch, arch.moe_layers[layer]))
    seen = min(tokens / 2, arch.window) if arch.window_layers[layer] else tokens / 2
    return linear + (0.0 if delta else _pair(arch) * seen)


def head_flops(arch: Architecture) -> float:
    """FLOPs of forward and backward of one predicting position in the vocabulary head."""
    return 6.0 * arch.hidden * arch.vocabulary


def mixers(arch: Architecture) -> int:
    """Multiplications of one token, forward, in all layers' attention or gated delta nets, but for those of attended
    pairs."""
    return sum(_mixer(arch, delta) for delta in arch.delta_layers)


def _pair(arch: Architecture) -> float:
    return 12.0 * arch.heads * arch.head_dim


def _feed_forward(arch: Architecture, sparse: bool) -> int:
    if sparse:
        return arch.hidden * (3 * arch.expert_ffn * arch.experts_per_token + arch.experts + 3 * arch.shared_ffn)
    return 3 * arch.hidden * arch.ffn


def _mixer(arch: Architecture, delta: bool) -> int:
    net = arch.delta_net
    if not (delta and net):
        return arch.hidden * arch.head_dim * ((2 + arch.output_gate) * arch.heads + 2 * arch.groups)
    projections = arch.hidden * (net.channels + 2 * net.heads * (net.value_dim + 1))
    # A chunk's products of keys and of queries with keys, its solution for keys and values, and what goes into the
    # state and comes out of it.
    chunk = CHUNK * (5 * net.key_dim + 3 * net.value_dim) // 2 + 3 * net.key_dim * net.value_dim
    return projections + net.heads * chunk
