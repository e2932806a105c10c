"""What training a model costs, in FLOPs."""

from __future__ import annotations

from spell_megatron.training.delta_rule import CHUNK
from spell_megatron.training.policy import Architecture
from spell_megatron.training.prefix_tree import Cost


def training_cost(arch: Architecture) -> Cost:
    """FLOPs of forward and backward of one token, one attended pair and one predicting position.

    Linear layers take 6 FLOPs per parameter that a token meets; attention 12 per pair, layer and query
    channel (q k and p v, each 2 forward and 4 backward). The chunks of a gated delta net take time in proportion to
    its tokens.
    """
    moe = arch.hidden * (3 * arch.expert_ffn * arch.experts_per_token + arch.experts + 3 * arch.shared_ffn)
    sparse, linear = sum(arch.moe_layers), sum(arch.delta_layers)
    feed_forwards = sparse * moe + (arch.layers - sparse) * 3 * arch.hidden * arch.ffn
    return Cost(
        token=6.0 * (mixers(arch) + feed_forwards),
        pair=12.0 * (arch.layers - linear) * arch.heads * arch.head_dim,
        source=6.0 * arch.hidden * arch.vocabulary,
    )


def mixers(arch: Architecture) -> int:
    """Multiplications of one token, forward, in all layers' attention or gated delta nets, but for those of attended
    pairs."""
    attention = arch.hidden * arch.head_dim * ((2 + arch.output_gate) * arch.heads + 2 * arch.groups)
    linear = sum(arch.delta_layers)
    total = (arch.layers - linear) * attention
    if net := arch.delta_net:
        projections = arch.hidden * (net.channels + 2 * net.heads * (net.value_dim + 1))
        # A chunk's products of keys and of queries with keys, its solution for keys and values, and what goes into the
        # state and comes out of it.
        chunk = CHUNK * (5 * net.key_dim + 3 * net.value_dim) // 2 + 3 * net.key_dim * net.value_dim
        total += linear * (projections + net.heads * chunk)
    return total
