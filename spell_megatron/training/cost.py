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
    full, delta = attention_parameters(arch), delta_net_parameters(arch)
    moe = arch.hidden * (3 * arch.expert_ffn * arch.experts_per_token + arch.experts + 3 * arch.shared_ffn)
    sparse, linear = sum(arch.moe_layers), sum(arch.delta_layers)
    feed_forwards = sparse * moe + (arch.layers - sparse) * 3 * arch.hidden * arch.ffn
    mixers = (arch.layers - linear) * full + linear * (delta + delta_rule_products(arch))
    return Cost(
        token=6.0 * (mixers + feed_forwards),
        pair=12.0 * (arch.layers - linear) * arch.heads * arch.head_dim,
        source=6.0 * arch.hidden * arch.vocabulary,
    )


def attention_parameters(arch: Architecture) -> int:
    """Weights of an attention layer's projections."""
    return arch.hidden * arch.head_dim * ((2 + arch.output_gate) * arch.heads + 2 * arch.groups)


def delta_net_parameters(arch: Architecture) -> int:
    """Weights of a gated delta net's projections; 0 without one."""
    if (net := arch.delta_net) is None:
        return 0
    return arch.hidden * (net.channels + 2 * net.heads * (net.value_dim + 1))


def delta_rule_products(arch: Architecture) -> int:
    """Multiplications of a token in a chunk of the delta rule, forward; 0 without one.

    The chunk's products of keys and of queries with keys, its solution for keys and values, and what goes into its
    state and comes out of it.
    """
    if (net := arch.delta_net) is None:
        return 0
    return net.heads * (CHUNK * (5 * net.key_dim + 3 * net.value_dim) // 2 + 3 * net.key_dim * net.value_dim)
