"""One update of the policy: rows -> prefix trees -> forward and backward -> gradient -> step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

from spell_megatron.config.schema import OptimizerConfig, TrainingConfig
from spell_megatron.training.cost import training_cost
from spell_megatron.training.layout import context_positions, context_split
from spell_megatron.training.logprobs import token_logprobs
from spell_megatron.training.model import TreeGPTModel
from spell_megatron.training.moe import expert_metrics, routers
from spell_megatron.training.objective import LOG_RATIO_LIMIT, importance_weight, policy_loss
from spell_megatron.training.prefix_tree import Row, Tree, plan

Progress = Callable[[int, int], None]
"""Called after each microbatch of this rank with (microbatches done, microbatches in all)."""


_MEANS = (
    "loss",
    "clip_fraction",
    "approx_kl",
    "clip_fraction_lower",
    "entropy",
    "mismatch_abs",
    "mismatch_kl",
    "importance_weight",
    "importance_capped",
    "top_probability",
    "top_share",
)
"""Metrics that are means over response tokens, in the order of the sums that `_loss` returns."""


class Trainer:
    """The policy's Megatron model with its gradients, optimizer and learning rate schedule.

    The weights must be in `model` before the trainer is made: the optimizer copies them. Every rank of the process
    group makes one and calls `update` together.

    Attributes:
        model: this rank's part of the policy.
        policy: what its config.json says.
        optimizer, scheduler: Megatron's; the learning rate of update i (from 1) is the schedule's value at i.
        skipped: updates left out so far because their gradient was not finite.
    """

    def __init__(self, model: TreeGPTModel, training: TrainingConfig, temperature: float, steps: int) -> None:
        """
        Args:
            model: with its weights.
            training: the settings of that name.
            temperature: of the engines' sampling; logits are divided by it.
            steps: updates of the whole run, after which the learning rate has decayed.
        """
        options = training.optimizer
        self.model, self.policy = model, model.policy
        self.skipped = 0
        self._arch, self._training, self._temperature = model.policy.arch, training, temperature
        self._device = next(model.parameters()).device
        self._cost = training_cost(self._arch)
        model.config.finalize_model_grads_func = finalize_model_grads
        self._ddp, self.optimizer = build_optimizer(model, options)
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=options.lr,
            min_lr=min(options.min_lr, options.lr),
            lr_warmup_steps=options.warmup_steps,
            lr_decay_steps=max(steps, options.warmup_steps + 1),
            lr_decay_style=options.decay,
            start_wd=options.weight_decay,
            end_wd=options.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )

    def update(self, rows: Sequence[Row] | None, progress: Progress | None = None) -> dict[str, float]:
        """One optimizer step on all rows; rank 0 passes them, the other ranks pass None.

        The loss is -(1 / N) sum_t weight_t rho_t, where N is the number of response tokens of the whole
        batch over all ranks: it does not depend on how the batch is cut or spread. A row's weights
        (advantage times role weight, and importance weights where `training.importance_sampling` asks for
        them) scale the sum, not N. Of a mixture of experts the rows' routings are replayed.

        Returns, equal on every rank:
            loss, grad_norm (before clipping), lr, skipped (1.0 if the gradient was not finite, so that no
            step was taken), entropy (nats, mean over response tokens);
            top_probability, top_share: mean probability of the most likely token in the place of a response token,
            and share of response tokens that are it, both at the sampling temperature;
            clip_fraction, clip_fraction_lower, approx_kl: 0 on-policy;
            mismatch_abs, mismatch_kl, mismatch_max_ratio: trainer against engine log-probabilities d =
            trainer - engine: mean |d|, mean exp(d) - 1 - d (the k3 estimate of KL(engine || trainer),
            http://joschu.net/blog/kl-approx.html), max exp(|d|);
            importance_weight, importance_capped: mean of the truncated importance weights, and share of those
            that reach the cap; if they are off, of those that there would be per token;
            response_tokens, tokens_unshared (of all rows), tokens_computed (prefixes once), sharing (their
            ratio), microbatches (per rank), seconds, tokens_per_second (unshared, all ranks);
            of a mixture of experts, those of `moe.expert_metrics`: a shared prefix counts once, however the
            batch is cut.

        Raises:
            ValueError: no row has a response, a token id is outside the vocabulary, or a routing is not of the
                policy's layers and experts per token.
        """
        start = time.perf_counter()
        rows = self._broadcast(rows)
        rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        plans = plan(rows, self._training.tokens_per_microbatch, ranks, self._cost)
        trees = plans[rank]
        lengths = [len(tree.tokens) for tree in trees]
        if self._arch.experts and self._training.moe_dispatcher == "allgather":
            # Expert-parallel ranks gather each other's tokens, which takes equal lengths.
            lengths = [max(len(tree.tokens) for tree in together) for together in zip(*plans)]
        count = sum(len(row.weights) for row in rows)
        distinct = int(sum(tree.fresh.sum() for trees in plans for tree in trees))
        routings = _Routings(rows, plans, rank, self.model.layers, self._device)
        for router in routers(self.model):
            router.start_update(aux_scale=count / distinct)  # Megatron divides every gradient by `count`

        self._ddp.train()
        self._ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        outputs = get_forward_backward_func()(
            forward_step_func=partial(self._forward, _ResponseValues(rows), routings),
            data_iterator=_reporting(list(zip(trees, lengths)), progress),
            model=[self._ddp],
            num_microbatches=len(trees),
            seq_length=max(lengths),
            micro_batch_size=1,
            forward_only=False,
        )
        for router in routers(self.model):
            router.forget_routings()
        if progress:
            progress(len(trees), len(trees))
        sums, tops = self._reduce(outputs)
        grad_norm, lr, stepped = self._step()
        seconds = torch.tensor(time.perf_counter() - start, device=self._device)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)

        computed = sum(len(tree.tokens) for trees in plans for tree in trees if len(tree.source))
        unshared = sum(len(row.tokens) for row in rows)
        return {
            **{name: value / count for name, value in zip(_MEANS, sums)},
            "mismatch_max_ratio": math.exp(min(tops[0], LOG_RATIO_LIMIT)),
            "grad_norm": grad_norm,
            "lr": lr,
            "skipped": 0.0 if stepped else 1.0,
            "response_tokens": sums[-1],
            "tokens_unshared": float(unshared),
            "tokens_computed": float(computed),
            "sharing": unshared / computed,
            "microbatches": float(len(trees)),
            "seconds": seconds.item(),
            "tokens_per_second": unshared / seconds.item(),
            **self._expert_metrics(distinct, routings.any),
        }

    def _expert_metrics(self, distinct: int, replays: bool) -> dict[str, float]:
        return expert_metrics(self.model, self._arch.moe_layers, distinct, replays) if self._arch.experts else {}

    def _broadcast(self, rows: Sequence[Row] | None) -> list[Row]:
        """The rows of rank 0 on every rank, checked. Only rank 0 has their routings, others have arrays of zeros
        without memory in their place: see `_Routings`."""
        rows = list(rows) if rows is not None else []
        if not (self._arch.experts and self._training.routing_replay):
            rows = [replace(row, routing=None) for row in rows]
        if dist.get_world_size() > 1:
            shapes = [None if row.routing is None else (row.routing.dtype, row.routing.shape) for row in rows]
            box = [[replace(row, routing=None) for row in rows], shapes]
            dist.broadcast_object_list(box, src=0, device=self._device)
            if dist.get_rank() > 0:
                rows = [
                    row if of is None else replace(row, routing=np.broadcast_to(np.zeros((), of[0]), of[1]))
                    for row, of in zip(*box, strict=True)
                ]
        rows = [row for row in rows if len(row.weights)]
        if not rows:
            raise ValueError("the update batch holds no row with a response; there is nothing to train on")
        vocab = self._arch.vocabulary
        for number, row in enumerate(rows):
            if not (row.tokens.min() >= 0 and row.tokens.max() < vocab):
                raise ValueError(
                    f"row {number} of the update batch holds token ids {row.tokens.min()} to "
                    f"{row.tokens.max()}, but the policy's vocabulary has {vocab} tokens"
                )
            expected = self._arch.layers, self._arch.experts_per_token
            if row.routing is not None and row.routing.shape[1:] != expected:
                raise ValueError(
                    f"row {number} of the update batch holds routings of shape {row.routing.shape}, but the policy "
                    f"has {expected[0]} layers and {expected[1]} experts per token"
                )
        return rows

    def _forward(
        self, values: _ResponseValues, routings: _Routings, trees: Iterator[tuple[Tree, int]], model
    ) -> tuple[torch.Tensor, Callable]:
        """Megatron's forward_step_func: hidden states of the next tree, laid out in at least so many tokens,
        and the loss on them."""
        tree, length = next(trees)
        swapping, groups = context_split(self._arch, self._training.parallel)
        shards = self.model.config.tensor_model_parallel_size if self.model.config.sequence_parallel else 1
        length += -length % (shards * swapping * groups * (2 if groups > 1 else 1))
        tokens, position_ids, end, uncounted = _pad(tree, length)
        mine = context_positions(length, parallel_state.get_context_parallel_rank(), swapping, groups)
        arguments = [tokens[:, mine], position_ids[:, mine], end]
        if self._arch.experts:
            arguments.append(uncounted[:, mine])
        if routings.any:
            arguments.append(routings.of(tree, mine))
        hidden = model(*(self._tensor(np.ascontiguousarray(x)) for x in arguments))
        return hidden, partial(self._loss, values, tree, mine)

    def _loss(self, values: _ResponseValues, tree: Tree, mine: np.ndarray, hidden: torch.Tensor):
        """Sum of the losses of the edges whose source is among this context-parallel rank's positions `mine`,
        their number, and the sums behind the metrics."""
        model = self.model
        group = parallel_state.get_tensor_model_parallel_group()
        if model.config.sequence_parallel:
            # token_logprobs returns the whole gradient on every rank, so its backward is a split.
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False, group=group)
        weight = model.output_layer.weight if model.output_weight is None else model.output_weight
        training = self._training
        place = np.searchsorted(mine, tree.source).clip(max=len(mine) - 1)
        edges = np.flatnonzero(mine[place] == tree.source)
        logprob, entropy, top_probability, is_top = token_logprobs(
            hidden,
            weight,
            self._tensor(place[edges]),
            self._tensor(tree.target[edges]),
            self._temperature,
            training.logprob_chunk,
            self._arch.vocabulary,
            group,
        )
        advantage, rollout = (self._tensor(x[edges]) for x in values.at_edges(tree))
        result = policy_loss(
            logprob, logprob.detach(), advantage, training.clip_low, training.clip_high, training.clip_dual
        )
        difference, losses = logprob.detach() - rollout, result.loss
        log_ratio = difference
        if training.importance_sampling == "sequence":
            log_ratio = self._sums_over_rows(difference, tree, edges)
        importance, capped = importance_weight(log_ratio, training.importance_cap)
        if training.importance_sampling != "none":
            losses = importance * losses
        loss = losses.sum()
        with torch.no_grad():
            delta = difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
            k3 = delta.exp() - 1 - delta
            columns = (
                losses,
                result.clipped,
                result.approx_kl,
                result.clipped_lower,
                entropy,
                delta.abs(),
                k3,
                importance,
                capped,
                top_probability,
                is_top,
            )
            sums = torch.stack([column.double().sum() for column in columns])
            top = delta.abs().amax() if len(delta) else delta.new_zeros(())
        count = torch.tensor(len(edges), dtype=torch.int, device=self._device)
        return loss, count, {"sums": torch.cat([sums, count.double()[None]]), "top": top.double()[None]}

    def _sums_over_rows(self, values: torch.Tensor, tree: Tree, edges: np.ndarray) -> torch.Tensor:
        """For each of this context-parallel rank's `edges` [e] of a tree, the sum of `values` [e] over its row's.

        A row is in one tree with all its edges, and in the same place among the rows on all these ranks.
        """
        rows, row_of_edge = np.unique(tree.row, return_inverse=True)
        row_of_edge = self._tensor(row_of_edge[edges])
        sums = torch.zeros(len(rows), dtype=torch.double, device=self._device)
        sums.index_add_(0, row_of_edge, values.double())
        if parallel_state.get_context_parallel_world_size() > 1 and len(rows):
            dist.all_reduce(sums, group=parallel_state.get_context_parallel_group())
        return sums[row_of_edge].to(values.dtype)

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)

    def _reduce(self, outputs: list[dict[str, torch.Tensor]]) -> tuple[list[float], list[float]]:
        """Metric sums and maxima over microbatches and data-parallel ranks; the last stage has them."""
        sums, top = (torch.zeros(n, dtype=torch.double, device=self._device) for n in (len(_MEANS) + 1, 1))
        if outputs:
            sums = torch.stack([output["sums"] for output in outputs]).sum(0)
            top = torch.stack([output["top"] for output in outputs]).amax(0)
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        dist.all_reduce(sums, group=group)
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            for x in (sums, top):
                dist.broadcast(
                    x,
                    src=parallel_state.get_pipeline_model_parallel_last_rank(),
                    group=parallel_state.get_pipeline_model_parallel_group(),
                )
        return sums.tolist(), top.tolist()

    def _step(self) -> tuple[float, float, bool]:
        """Clip and step, unless the gradient is not finite; returns (norm, learning rate, stepped)."""
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        if not math.isfinite(grad_norm):
            self.skipped += 1
            return grad_norm, self.optimizer.param_groups[0]["lr"], False
        self.scheduler.step(1)
        self.optimizer.step()
        return grad_norm, self.optimizer.param_groups[0]["lr"], True


def build_optimizer(
    model: TreeGPTModel, options: OptimizerConfig, gloo: bool = True
) -> tuple[DistributedDataParallel, MegatronOptimizer]:
    """The model with its gradient buffers, and Megatron's optimizer of them.

    gloo: False on a process group that is not there (`backend.pretend`), which has no gloo groups beside it.
    """
    # Gradients are reduced after the last microbatch, not during the backward pass: the vocabulary
    # head adds to its gradient buffer itself, unseen by the hooks that an overlap relies on.
    ddp = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=options.distributed),
        model,
    )
    dtype = model.policy.dtype
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=options.lr,
            min_lr=options.min_lr,
            weight_decay=options.weight_decay,
            adam_beta1=options.betas[0],
            adam_beta2=options.betas[1],
            adam_eps=options.eps,
            clip_grad=options.clip_grad,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=options.distributed,
        ),
        [ddp],
        use_gloo_process_groups=gloo,
    )
    return ddp, optimizer


class _ResponseValues:
    """Weights and rollout log-probabilities of all rows in two flat arrays, for looking up loss edges."""

    def __init__(self, rows: list[Row]) -> None:
        self._starts = np.cumsum([0] + [len(row.weights) for row in rows])
        self._columns = [
            np.concatenate([getattr(row, name) for row in rows]).astype(np.float32)
            for name in ("weights", "rollout_logprobs")
        ]

    def at_edges(self, tree: Tree) -> list[np.ndarray]:
        """Weights and rollout log-probabilities of a tree's loss edges, each [e]."""
        index = self._starts[tree.row] + tree.offset
        return [column[index] for column in self._columns]


class _Routings:
    """The recorded routings that this rank's trees take, of the layers of its pipeline stage.

    All ranks make one together, from the rows of `Trainer._broadcast`. Rank 0 sends the routings row by row, so that
    no rank but the first ever holds more than one that it does not need.
    """

    def __init__(
        self, rows: list[Row], plans: list[list[Tree]], rank: int, layers: range, device: torch.device
    ) -> None:
        recorded = [row.routing for row in rows if row.routing is not None]
        self.any = bool(recorded)
        self._top_k = recorded[0].shape[2] if recorded else 0
        self._layers = layers
        self._first: dict[int, int] = {}
        self._kept: dict[int, np.ndarray] = {}
        used = [{int(row) for tree in trees for row in np.unique(tree.routed_by)} - {-1} for trees in plans]
        for number in sorted(set.union(*used)):
            routing = _from_rank_0(rows[number].routing, device)
            if number in used[rank]:
                part = routing[:, layers.start : layers.stop]
                self._kept[number] = part.copy() if dist.get_rank() else part  # rank 0 has the whole anyway
                self._first[number] = rows[number].routed.start

    def of(self, tree: Tree, places: np.ndarray) -> np.ndarray:
        """Experts of a tree's tokens at ascending places, padding behind the tree included: int16 [tokens, layers of
        the stage, top_k], -1 where there is no record."""
        result = np.full((len(places), len(self._layers), self._top_k), -1, dtype=np.int16)
        places = places[places < len(tree.tokens)]
        rows, depths = tree.routed_by[places], tree.position_ids[places]
        # Runs of tokens that follow each other in one row.
        cuts = np.flatnonzero((np.diff(rows) != 0) | (np.diff(depths) != 1)) + 1
        for start, stop in zip([0, *cuts], [*cuts, len(rows)]):
            if len(rows) and (row := int(rows[start])) >= 0:
                first = depths[start] - self._first[row]
                result[start:stop] = self._kept[row][first : first + stop - start]
        return result


def _from_rank_0(array: np.ndarray, device: torch.device) -> np.ndarray:
    """The array of rank 0 on all ranks, which have arrays of its type and shape."""
    if dist.get_world_size() == 1:
        return array
    # As bytes: neither gloo nor NCCL knows all types of integers.
    sent = torch.empty(array.nbytes, dtype=torch.uint8, device=device)
    if dist.get_rank() == 0:
        sent.copy_(torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8)))
    dist.broadcast(sent, src=0)
    return sent.cpu().numpy().view(array.dtype).reshape(array.shape) if dist.get_rank() else array


def _pad(tree: Tree, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """tokens [1, length], position_ids [1, length], end [length] and uncounted [1, length], which is True for
    padding and for tokens that another tree counts. Pad tokens see only themselves."""
    t = len(tree.tokens)
    none = np.zeros(length - t, dtype=np.int64)
    end = np.concatenate([tree.end, np.arange(t, length) + 1])
    tokens, position_ids = (np.concatenate([x, none])[None] for x in (tree.tokens, tree.position_ids))
    return tokens, position_ids, end, np.concatenate([~tree.fresh, none == 0])[None]


def _reporting(trees: list, progress: Progress | None):
    """Iterate trees; asking for the next one reports those before as done."""
    for done, tree in enumerate(trees):
        if progress and done:
            progress(done, len(trees))
        yield tree
