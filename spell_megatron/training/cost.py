"""What training a model costs, in FLOPs."""

from __future__ import annotations

from spell_megatron.training.policy import Architecture
from spell_megatron.training.prefix_tree import Cost


def training_cost(arch: Architecture) -> Cost:
    """FLOPs of forward and backward of one token, one attended pair and one predicting position.

    Linear layers take 6 FLOPs per parameter that a token meets; attention 12 per pair, layer and query
    channel (q k and p v, each 2 forward and 4 backward).
    """
    attention = arch.hidden * arch.head_dim * (2 * arch.heads + 2 * arch.groups)
    moe = arch.hidden * (3 * arch.expert_ffn * arch.experts_per_token + arch.experts)
    sparse = sum(arch.moe_layers)
    feed_forwards = sparse * moe + (arch.layers - sparse) * 3 * arch.hidden * arch.ffn
    return Cost(
        token=6.0 * (arch.layers * attention + feed_forwards),
        pair=12.0 * arch.layers * arch.heads * arch.head_dim,
        source=6.0 * arch.hidden * arch.vocabulary,
    )
