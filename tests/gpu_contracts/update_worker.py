"""Two updates, a checkpoint's states and an export of a mixture of experts on a pretended GPU: see `pretended_device`.

usage: update_worker.py FOLDER [mistake]   (FOLDER has the policy; `mistake` leaves a tensor of the loss on the CPU)
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from pretended_device import GPU, Devices, Operations, on_gpu
from trainer_cases import initialise, make_config, make_routed_rows, make_trainer

from spell_megatron.training import attention, backend, loss
from spell_megatron.training.attention_gpu import flex_block_mask
from spell_megatron.training.state import random_states
from spell_megatron.weights.reshard import export

config = make_config(
    Path(sys.argv[1]),
    training__moe_aux_loss=0.01,
    training__importance_sampling="sequence",
    training__optimizer__distributed=True,
)
initialise(config)
# What `training.cpu` redirects to the CPU is on the pretended GPU.
torch.cuda.current_device = lambda: GPU
for factory in ("tensor", "zeros", "ones", "empty", "full", "arange", "zeros_like", "empty_like"):
    setattr(torch, factory, getattr(torch, factory).__wrapped__)
torch.Tensor.cuda = lambda tensor, *_, **__: tensor.to(GPU)
torch.nn.Module.cuda = lambda module, *_: module._apply(lambda tensor: tensor.to(GPU))


def dense_attention(query, key, value, end, scale, queries=None, window=0, sinks=None):
    """In the place of FlexAttention, whose mask is made too."""
    mask = flex_block_mask(end, queries, window).mask_mod
    at = torch.arange(len(end), device=end.device)
    seen = mask(0, 0, at[:, None], at[None, :])
    key, value = (x.repeat_interleave(query.size(1) // x.size(1), 1) for x in (key, value))
    scores = (torch.einsum("qhd,khd->hqk", query, key) * scale).masked_fill(~seen, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, len(query), 1)], dim=-1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., : len(key)], value)


attention.tree_attention = dense_attention
if sys.argv[2:] == ["mistake"]:
    loss.TreeLoss._tensor = lambda self, array: torch.from_numpy(array)

with Devices(), Operations():
    trainer = make_trainer(config)
    outside = [name for name, parameter in trainer.model.named_parameters() if not on_gpu(parameter)]
    assert not outside, outside
    for seed in range(2):
        metrics = trainer.update(make_routed_rows(seed))
    random_states()
    exported = list(export(trainer.model))
    assert all(on_gpu(tensor) for _, tensor in exported)
print("METRICS", metrics["loss"], metrics["grad_norm"], metrics["routing_replayed"], len(exported))
backend.shutdown()
