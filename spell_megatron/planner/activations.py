"""Bytes of activations: what the backward pass keeps, and what the layer and the vocabulary head at work need.

Activations are a formula, because mixture-of-experts layers cannot be traced without data. The formula lists what
autograd keeps of every layer with the plain-torch layer spec; tests and `benchmarks/planner_memory.py` compare it with
measured peaks. transformer-engine's fused layers keep less.
"""

from __future__ import annotations

import math
from collections import Counter

from spell_megatron.config.schema import Config
from spell_megatron.training.delta_rule import CHUNK
from spell_megatron.training.layout import context_split
from spell_megatron.training.logprobs import VOCABULARY_BLOCK
from spell_megatron.training.policy import Architecture, DeltaNet
from spell_megatron.training.prefix_tree import largest_tree


def element_bytes(config: Config) -> int:
    """Bytes of a weight or activation."""
    return 2 if config.model.dtype == "bfloat16" else 4


def row_tokens(config: Config) -> int:
    """Number of tokens of the largest tree that the trainer may meet."""
    sampling = config.rollout.sampling
    return largest_tree(
        config.training.tokens_per_microbatch, sampling.max_prompt_tokens + sampling.max_response_tokens
    )


def stage_activations(
    arch: Architecture, config: Config, layers: range, tokens: int, microbatches: int, gpu: bool
) -> tuple[int, int]:
    """(most bytes of activations that a pipeline stage keeps, bytes that the layer at work needs besides).

    Args:
        layers: numbers of the stage's layers.
        tokens: length of each row.
        microbatches: number of microbatches that have passed the stage forward and not yet backward.
        gpu: whether RMSNorm is fused, as on GPUs, and keeps only its input. On CPUs it keeps float32 copies.
    """
    training = config.training
    own = math.ceil(tokens / training.parallel.context)
    kept = whole = largest_feed_forward = 0
    kinds = Counter((arch.moe_layers[layer], arch.delta_layers[layer]) for layer in layers)
    for (moe, delta), count in kinds.items():
        attention, feed_forward = layer_activations(arch, config, moe, delta, own, gpu)
        whole = max(whole, attention + feed_forward)
        if training.recompute == "full":
            each = 0 if training.offload else own * arch.hidden * element_bytes(config) // training.parallel.tensor
        else:
            each = attention + (feed_forward if training.recompute == "none" else 0)
        kept += count * each
        largest_feed_forward = max(largest_feed_forward, feed_forward)
    again = {"full": whole, "selective": largest_feed_forward, "none": 0}[training.recompute]
    sparse = any(arch.moe_layers[layer] for layer in layers)
    return microbatches * kept, again + _passing(arch, config, sparse, own)


def offloaded_bytes(
    arch: Architecture, config: Config, layers: range, tokens: int, microbatches: int, gpu: bool
) -> int:
    """Bytes of a stage's activations in host memory (`training.offload`): the inputs of its layers and the final norm.

    Arguments as in `stage_activations`. gpu: whether host memory is pinned, which torch allocates in powers of two.
    """
    training = config.training
    if not training.offload:
        return 0
    own = math.ceil(tokens / training.parallel.context)
    one = own * arch.hidden * element_bytes(config) // training.parallel.tensor
    if gpu:
        one = 1 << (one - 1).bit_length()
    return microbatches * (len(layers) + (arch.layers - 1 in layers)) * one


def layer_activations(
    arch: Architecture, config: Config, moe: bool, delta: bool, tokens: int, gpu: bool
) -> tuple[int, int]:
    """(bytes that a layer's attention or delta net and norms keep for the backward pass, bytes that its feed-forward
    keeps).

    `tokens` is the number of tokens on this context-parallel rank.
    """
    size, tensor = element_bytes(config), config.training.parallel.tensor
    hidden = arch.hidden / tensor  # sequence parallelism cuts the residual stream and what the norms keep
    normed = size if gpu else 8  # per element: the input, or float32 copies of input and result
    mixer = 2 * (hidden * normed + 4 / tensor + hidden * size)  # norms, and the inputs of the layers after them
    if arch.delta_net and delta:
        mixer += _delta_net(arch.delta_net, size, gpu) / tensor
    else:
        mixer += _attention(arch, config, normed)
    return int(mixer * tokens), int(_feed_forward(arch, config, moe) * tokens)


def _attention(arch: Architecture, config: Config, normed: int) -> float:
    """Bytes per token that attention keeps for the backward pass."""
    size, tensor = element_bytes(config), config.training.parallel.tensor
    queries = arch.heads * arch.head_dim / tensor
    keys = max(arch.groups / tensor, 1) * arch.head_dim
    attention = (queries + 2 * keys) * size
    if arch.qk_norm:
        attention += (queries + keys) * normed + 4 * (queries + keys) / arch.head_dim
    attention += 4 * arch.rotary_dim * size  # cosine and sine, twice
    attention += (2 * queries + keys) * size + 4 * queries / arch.head_dim  # query, key, output; log-sum-exp
    if arch.output_gate:
        attention += queries * (4 + 2 * size)  # the gate, its sigmoid in float32, the output without it
    swapping, groups = context_split(arch, config.training.parallel)
    spread = math.lcm(max(arch.groups // tensor, 1), swapping) * arch.head_dim
    return attention + 2 * (groups * spread - keys) * size  # copies of keys and values, and those of other ranks


def _delta_net(net: DeltaNet, size: int, gpu: bool) -> float:
    """Bytes per token that a gated delta net keeps for the backward pass, of all heads. Its states, one for each
    branching point, are small beside them."""
    values = net.heads * net.value_dim
    kept = 2.0 * net.channels * size  # the convolution's input and output
    kept += (net.channels + values) * size  # queries, keys and values, and the latter head by head
    kept += net.heads * (8 + 2 * size)  # decays and rates
    kept += values * (12 + 3 * size)  # the gated norm and its result
    if gpu:  # keys and queries of each head, and the kernels' solutions of chunks
        kept += net.heads * (2 * net.key_dim + CHUNK) * size
    return kept


def _feed_forward(arch: Architecture, config: Config, moe: bool) -> float:
    """Bytes per token that a layer's feed-forward keeps for the backward pass."""
    size, parallel = element_bytes(config), config.training.parallel
    if not moe:
        return 5 * arch.ffn / parallel.tensor * size
    width = arch.expert_ffn / parallel.expert_tensor
    copies = arch.experts_per_token * parallel.expert_tensor / parallel.tensor
    routing = arch.experts * 5 / parallel.tensor + 20 * copies
    if arch.shared_ffn:
        routing += (5 * arch.shared_ffn + arch.hidden) / parallel.tensor * size
    return copies * (arch.hidden + 6 * width) * size + routing


def _passing(arch: Architecture, config: Config, moe: bool, tokens: int) -> int:
    """Bytes of gradients and intermediate results in the layer at work. The coefficients are fitted to measurements."""
    size, parallel = element_bytes(config), config.training.parallel
    passing = 3 * arch.hidden / parallel.tensor
    if moe:
        width = arch.expert_ffn / parallel.expert_tensor
        copies = arch.experts_per_token * parallel.expert_tensor / parallel.tensor
        sent = parallel.expert * parallel.expert_tensor > 1  # what the dispatcher sends and receives, there and back
        passing += copies * (3 * width + (6 if sent else 2) * arch.hidden)
    else:
        passing += 3 * arch.ffn / parallel.tensor
    return int(passing * size * tokens)


def head_bytes(arch: Architecture, config: Config, tokens: int) -> int:
    """Bytes that the vocabulary head needs for a row of `tokens` tokens, if all of them predict (an upper bound).

    These are the gradient of the hidden states, one chunk of float32 logits, and what a block of the vocabulary needs
    besides.
    """
    parallel, sampling, size = config.training.parallel, config.rollout.sampling, element_bytes(config)
    own = math.ceil(tokens / parallel.context)
    predicting = min(own, config.selfplay.group_size * sampling.max_response_tokens)
    chunk, vocabulary = min(config.training.logprob_chunk, predicting), math.ceil(arch.vocabulary / parallel.tensor)
    block = min(VOCABULARY_BLOCK, vocabulary)
    forward = 4 * chunk * block  # exponentials
    # Gradients of all hidden states and of a chunk's; a block's logits or their gradient in the model's type.
    backward = own * arch.hidden * size + chunk * arch.hidden * (4 + size) + chunk * block * size
    if size < 4:  # the product of that gradient and the hidden states, which CPUs copy to add it up in float32
        backward += max(chunk, block) * arch.hidden * (size + 4)
    gathered = own * arch.hidden * size if parallel.tensor > 1 else 0
    return 4 * chunk * vocabulary + gathered + max(forward, backward)
