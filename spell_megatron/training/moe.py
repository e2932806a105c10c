"""Mixture of experts: routers that replay, count and add to the loss, and experts computed as grouped products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplayAction
from torch import Tensor


class Router(TopKRouter):
    """Megatron's router, which also replays recorded routings, counts the tokens of each expert and scales its
    auxiliary loss by tokens.

    Attributes:
        aux_scale: a microbatch of T tokens adds `aux_scale` * coefficient * T * auxiliary loss to the loss, before that
            is divided by the batch's response tokens.
        recorded: experts of the next microbatch's tokens, integers [tokens, top_k], or None: the router chooses.
            A token whose experts are not `top_k` different ones (-1, say) has no record and gets the router's own.

    Megatron's `RouterReplay` takes the experts as given. Their weights are the router's: with normalised weights
    the softmax over the chosen experts' logits, otherwise their share of the softmax over all, with gradients.

    Tokens under the padding mask (True: padding) count in neither. Megatron's own auxiliary loss assumes that
    every token it computes bears a loss, so that it would weigh more the longer the prompts are; it is not a
    number for microbatches that hold only padding, and too small in 0.16 where ranks share the tokens.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.aux_scale = 1.0
        self.recorded: Tensor | None = None
        self.start_update()

    def start_update(self) -> None:
        """Forget counts and routings."""
        device = torch.cuda.current_device()
        # No buffers: they must stay as exact as they are, and out of checkpoints.
        self.tokens_per_expert = torch.zeros(self.num_experts, dtype=torch.double, device=device)
        self.aux_loss = torch.zeros((), dtype=torch.double, device=device)
        # Tokens whose routing was replayed, and those of them for which the router would have chosen otherwise.
        self.replayed, self.changed = (torch.zeros((), dtype=torch.double, device=device) for _ in range(2))
        self.forget_routings()

    def forget_routings(self) -> None:
        """Free what was recorded and replayed."""
        self.recorded = None
        if self.router_replay is not None:
            self.router_replay.clear_indices()

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.router_replay is not None:
            self._prepare_replay(logits.detach().view(-1, self.num_experts), padding_mask)
        probs, routing_map = super().routing(logits, padding_mask)
        # A layer that is recomputed runs twice, the first time without gradients.
        if self.training and torch.is_grad_enabled():
            counted = routing_map if padding_mask is None else routing_map & ~padding_mask.reshape(-1, 1)
            self.tokens_per_expert += counted.sum(0)
        return probs, routing_map

    def _prepare_replay(self, logits: Tensor, padding_mask: Tensor | None) -> None:
        """Tell Megatron's replay what to do in the call that follows."""
        replay, recompute = self.router_replay, self.config.recompute_granularity is not None
        if self.recorded is None:
            replay.clear_router_replay_action()
            return
        if recompute and torch.is_grad_enabled():  # the second run; microbatches come back in their order
            replay.set_router_replay_action(RouterReplayAction.REPLAY_BACKWARD)
            return
        # As Megatron chooses: equal probabilities may come from logits that are not.
        scores = logits.softmax(-1, dtype=torch.float32) if self.config.moe_router_pre_softmax else logits
        own = scores.topk(self.topk, dim=1).indices
        recorded = self.recorded.long()
        ordered = recorded.sort(dim=1).values
        known = (ordered[:, 0] >= 0) & (ordered[:, -1] < self.num_experts) & (ordered.diff(dim=1) > 0).all(1)
        replay.set_target_indices(torch.where(known[:, None], recorded, own))
        replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        if not recompute:
            replay.replay_backward_list.clear()  # nobody would take from it
        counted = known if padding_mask is None else known & ~padding_mask.reshape(-1)
        self.replayed += counted.sum()
        self.changed += (counted & (ordered != own.sort(dim=1).values).any(1)).sum()

    def _apply_aux_loss(
        self, probs: Tensor, scores_for_aux_loss: Tensor, routing_map: Tensor, with_padding_mask: bool = False
    ) -> Tensor:
        """Attach T E sum_i f_i P_i of this microbatch: f_i is the share of its T tokens' choices that fell on
        expert i, P_i the mean probability of i (softmax over all experts), E the number of experts. Each rank
        adds its own tokens' part. `scores_for_aux_loss` [tokens, experts] and `routing_map` are 0 at padding.
        """
        coefficient = self.get_aux_loss_coeff("aux_loss")
        if not coefficient:
            return probs
        chosen = routing_map.sum(0)
        dist.all_reduce(chosen, group=self.tp_cp_group)
        share = chosen / chosen.sum().clamp(min=1)
        loss = self.num_experts * (share * scores_for_aux_loss.sum(0)).sum()
        self.aux_loss += loss.detach()
        return MoEAuxLossAutoScaler.apply(probs, self.aux_scale * coefficient * loss)


class BiasedRouter(Router):
    """A router with a bias, which Megatron's `add_bias_linear` would give to all other layers too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bias = torch.nn.Parameter(torch.zeros_like(self.weight[:, 0]))
        self.bias.sequence_parallel = self.config.sequence_parallel


class GroupedExperts(SequentialMLP):
    """Megatron's sequential experts, computed as two grouped matrix products of torch.

    The parameters are the same, so that checkpoints and names are too. It is for GPUs without
    transformer-engine, where many small products would take longer to launch than to compute.
    """

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """Output [tokens, hidden] of tokens [tokens, hidden] that are sorted by expert, times `permuted_probs`
        [tokens]. With expert tensor parallelism it is this rank's summand, as of the sequential experts."""
        hidden = permuted_local_hidden_states
        fc1, fc2 = ([getattr(e, name).weight for e in self.local_experts] for name in ("linear_fc1", "linear_fc2"))
        # The kernels want rows that begin at multiples of 16 bytes.
        if not len(hidden) or any(size * hidden.element_size() % 16 for size in (*fc1[0].shape, *fc2[0].shape)):
            return super().forward(hidden, tokens_per_expert, permuted_probs)
        counts = tokens_per_expert.to(hidden.device)
        ends = counts.cumsum(0).to(torch.int32)
        both = _GroupedLinear.apply(hidden, ends, *fc1)
        if (biases := [e.linear_fc1.bias for e in self.local_experts])[0] is not None:
            both = both + torch.stack(biases).repeat_interleave(counts, dim=0)
        gate, up = both.chunk(2, dim=-1)
        if limit := self.config.activation_func_clamp_value:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        inner = self.config.activation_func(gate) * (up + self.config.glu_linear_offset)
        inner = (inner * permuted_probs[:, None]).to(inner.dtype)
        output = _GroupedLinear.apply(inner, ends, *fc2)
        if biases := [e.linear_fc2.own_bias() for e in self.local_experts if e.linear_fc2.bias is not None]:
            weighted = torch.stack(biases).repeat_interleave(counts, dim=0) * permuted_probs[:, None]
            output = (output + weighted).to(output.dtype)
        return output, None


class _GroupedLinear(torch.autograd.Function):
    """x[group] @ weight.T for the rows of each expert; `ends` [experts] int32 are the ends of their groups.

    The weights are copied side by side for each product rather than kept so for the backward pass, which
    would take the experts' memory again for every layer.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, ends: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, ends, *weights)
        return F.grouped_mm(x, torch.stack(weights).transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, ends, *weights = ctx.saved_tensors
        gradient = gradient.contiguous()
        of_weights = F.grouped_mm(gradient.t(), x, offs=ends)
        return F.grouped_mm(gradient, torch.stack(weights), offs=ends), None, *of_weights.unbind()


def routers(model: torch.nn.Module) -> list[Router]:
    """The routers of this rank's layers; none in a dense model or a stage of dense layers."""
    return [module for module in model.modules() if isinstance(module, Router)]


def expert_metrics(model: torch.nn.Module, moe_layers: Sequence[bool], tokens: int, replays: bool) -> dict[str, float]:
    """What the routers of all ranks have counted since `start_update`, equal on every rank; all call it.

    Args:
        model: this rank's part.
        moe_layers: of the whole model: has the layer a router?
        tokens: how many each layer has counted, over all ranks.
        replays: whether there were routings to replay.

    Returns:
        moe_load_imbalance, moe_load_imbalance_max: tokens of the busiest expert over the mean of its layer's
        experts (1 is balanced), mean and maximum over layers; moe_unused_experts: share of experts without a
        token; moe_aux_loss, if it is on: auxiliary loss without its coefficient (1 is balanced), mean over
        layers and over microbatches by their tokens; with `replays`: routing_replayed, share of the tokens, in
        all layers, whose routing was replayed, and routing_changed, share of these for which the trainer's
        router would have chosen other experts.
    """
    columns = model.config.num_moe_experts + 3
    table = torch.zeros(len(moe_layers), columns, dtype=torch.double, device=torch.cuda.current_device())
    for router in routers(model):
        row = table[router.layer_number - 1]
        row[:-3], row[-3] = router.tokens_per_expert, router.aux_loss
        row[-2], row[-1] = router.replayed, router.changed
    # With tensor parallelism too every rank routes tokens of its own: sequence parallelism splits them.
    dist.all_reduce(table)
    table = table[list(moe_layers)].cpu()
    load = table[:, :-3]
    imbalance = load.amax(1) / load.mean(1)
    metrics = {
        "moe_load_imbalance": imbalance.mean().item(),
        "moe_load_imbalance_max": imbalance.max().item(),
        "moe_unused_experts": (load == 0).double().mean().item(),
    }
    if model.config.moe_aux_loss_coeff:
        metrics["moe_aux_loss"] = table[:, -3].mean().item() / tokens
    if replays:
        replayed, changed = table[:, -2:].sum(0).tolist()
        metrics["routing_replayed"] = replayed / (tokens * len(table))
        metrics["routing_changed"] = changed / max(1, replayed)
    return metrics
