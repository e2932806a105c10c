"""One update of the policy: rows -> prefix trees -> forward and backward -> gradient -> step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from spell_megatron.config.schema import TrainingConfig
from spell_megatron.training.cost import training_cost
from spell_megatron.training.layout import context_positions, context_split
from spell_megatron.training.loss import RowMismatch, TreeLoss, row_mismatches, token_metrics
from spell_megatron.training.model import TreeGPTModel
from spell_megatron.training.moe import expert_metrics, routers
from spell_megatron.training.optimizer import build_optimizer, build_schedule
from spell_megatron.training.optimizer_on_host import keep_on_host
from spell_megatron.training.prefix_tree import Earlier, Row, Tree, plan
from spell_megatron.training.rows import Routings, broadcast_rows, check_rows

Progress = Callable[[int, int], None]
"""Called after each microbatch of this rank with (microbatches done, microbatches in all)."""


@dataclass
class _UnderWay:
    """An update that has begun, and what its rows add up to so far: equal on every rank, but for `outputs`, which are
    what `TreeLoss` has returned on this rank, and `held`, the rows of rank 0 that wait for the others."""

    loads: list[float]  # cost of the trees of each data-parallel rank
    earlier: Earlier = field(default_factory=Earlier)  # of a mixture of experts the rows
    held: list[Row] = field(default_factory=list)
    outputs: list[dict[str, torch.Tensor]] = field(default_factory=list)
    response_tokens: int = 0
    tokens_unshared: int = 0
    tokens_computed: int = 0
    distinct: int = 0  # tokens, each once; of a mixture of experts
    microbatches: int = 0
    routed: bool = False
    seconds: float = 0.0


class Trainer:
    """The policy's Megatron model with its gradients, optimizer and learning rate schedule.

    The weights must be in `model` before the trainer is made: the optimizer copies them. Every rank of the process
    group makes one, and all call the same methods together. An update is `update(rows)`, or in pieces, as the rows
    come: `begin()`, `accumulate(rows)` any number of times, `finish()`.

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
        # The weight of the auxiliary loss beside the policy's, and the cut that it depends on, need all rows.
        self._all_at_once = bool(model.config.moe_aux_loss_coeff)
        self._under_way: _UnderWay | None = None
        self._ddp, self.optimizer = build_optimizer(model, options)
        if options.offload:
            keep_on_host(self.optimizer)
        self.scheduler = build_schedule(self.optimizer, options, steps)

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
            mismatch_abs, mismatch_kl, mismatch_max_ratio: trainer against engine log-probabilities d =
            trainer - engine: mean |d|, mean exp(d) - 1 - d (the k3 estimate of KL(engine || trainer),
            http://joschu.net/blog/kl-approx.html), max exp(|d|);
            importance_weight, importance_capped: mean of the truncated importance weights, and share of those
            that reach the cap; if they are off, of those that there would be per token;
            response_tokens, tokens_unshared (of all rows), tokens_computed (prefixes once), sharing (their
            ratio), microbatches (per rank), seconds, tokens_per_second (unshared, all ranks);
            of a mixture of experts, the metrics of `moe.expert_metrics`: a shared prefix counts once, however the
            batch is cut.

        Raises:
            ValueError: no row has a response, a token id is outside the vocabulary, or a routing is not of the
                policy's layers and experts per token.
        """
        self.begin()
        self.accumulate(rows, progress)
        return self.finish(progress)

    @property
    def under_way(self) -> bool:
        """Whether an update has begun and not ended."""
        return self._under_way is not None

    def begin(self) -> None:
        """Begin an update that gets its rows in pieces."""
        self.drop()
        self._ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        for router in routers(self.model):
            router.start_update()
        self._under_way = _UnderWay([0.0] * parallel_state.get_data_parallel_world_size())

    def accumulate(self, rows: Sequence[Row] | None, progress: Progress | None = None) -> None:
        """Forward and backward on more rows of the update that has begun; rank 0 passes them, the other ranks None.

        Gradients stay on their rank until `finish`. Rows of one call share their prefixes, so rows with a common
        prompt belong in one call. A data-parallel rank that has had more work than others gets less of this. With
        `training.moe_aux_loss` the rows wait for `finish`.

        Raises:
            ValueError: as of `update`.
        """
        start, update = time.perf_counter(), self._begun()
        if self._all_at_once:
            update.held += rows or []
        else:
            self._add(update, rows, progress)
        update.seconds += time.perf_counter() - start

    def finish(self, progress: Progress | None = None) -> dict[str, float]:
        """Reduce, divide and clip the gradient of all rows since `begin`, and step; returns what `update` does.

        Another cut into calls gives the same gradient up to rounding. (Where engines have recorded different routings
        of a token, rows of different calls that share it are each replayed by a record of their own call.)
        `tokens_computed` and `microbatches` count what was computed: what calls share is computed in each.

        Raises:
            ValueError: no row had a response; and as of `update`.
        """
        start, update = time.perf_counter(), self._begun()
        if self._all_at_once:
            self._add(update, update.held, progress)
        self.drop()
        if not update.response_tokens:
            raise ValueError("the update batch holds no row with a response; there is nothing to train on")
        metrics = token_metrics(update.outputs, self._device)
        finalize_model_grads([self._ddp])
        self._ddp.scale_gradients(1 / update.response_tokens)
        metrics |= self._step()
        seconds = torch.tensor(update.seconds + time.perf_counter() - start, device=self._device)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        metrics |= {
            "response_tokens": float(update.response_tokens),
            "tokens_unshared": float(update.tokens_unshared),
            "tokens_computed": float(update.tokens_computed),
            "sharing": update.tokens_unshared / update.tokens_computed,
            "microbatches": float(update.microbatches),
            "seconds": seconds.item(),
            "tokens_per_second": update.tokens_unshared / seconds.item(),
        }
        if self._arch.experts:
            metrics |= expert_metrics(self.model, self._arch.moe_layers, update.distinct, update.routed)
        return metrics

    def drop(self) -> None:
        """Leave the update that is under way, if there is one: it is as if it had never begun."""
        self._under_way = None

    def _begun(self) -> _UnderWay:
        if self._under_way is None:
            raise RuntimeError("no update is under way; begin() comes before accumulate() and finish()")
        return self._under_way

    def _add(self, update: _UnderWay, rows: Sequence[Row] | None, progress: Progress | None) -> None:
        """Add the gradient of more rows, which rank 0 has, to this rank's buffers, and what they are to `update`."""
        shared = self._shared(rows)
        if not shared:
            return
        earlier = update.earlier if self._arch.experts and update.microbatches else None
        rank, ranks = parallel_state.get_data_parallel_rank(), len(update.loads)
        plans = plan(shared, self._training.tokens_per_microbatch, ranks, self._cost, update.loads, earlier)
        routings = Routings(shared, plans, rank, self.model.layers, self._device)
        update.response_tokens += sum(len(row.weights) for row in shared)
        update.tokens_unshared += sum(len(row.tokens) for row in shared)
        update.tokens_computed += sum(len(tree.tokens) for trees in plans for tree in trees if len(tree.source))
        update.distinct += int(sum(tree.fresh.sum() for trees in plans for tree in trees))
        update.microbatches += len(plans[rank])
        update.routed |= routings.any
        update.loads = [
            load + sum(self._cost.of(tree) for tree in trees) for load, trees in zip(update.loads, plans, strict=True)
        ]
        if self._arch.experts:
            update.earlier.add(shared)
        for router in routers(self.model):
            # The gradient is divided by the number of response tokens.
            router.aux_scale = update.response_tokens / update.distinct
        loss = TreeLoss(self.model, self._training, self._temperature, shared)
        update.outputs += self._run(plans, rank, partial(self._forward, loss, routings), progress)
        for router in routers(self.model):
            router.forget_routings()

    @torch.no_grad()
    def mismatch(self, rows: Sequence[Row] | None) -> list[float]:
        """How far the trainer's log-probabilities are from those of the engines that sampled the rows.

        It computes forward only, and changes neither weights, nor optimizer, nor random states. Rank 0 passes the
        rows, each with a response; the other ranks pass None.

        Returns, equal on every rank:
            Mean |trainer - engine| over the response tokens of each row; not a number where one of them is not.
        """
        rows = self._shared(rows)
        rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        plans = plan(rows, self._training.tokens_per_microbatch, ranks, self._cost)
        routings = Routings(rows, plans, rank, self.model.layers, self._device)
        compare = RowMismatch(self.model, self._training, self._temperature, rows)
        outputs = self._run(plans, rank, partial(self._forward, compare, routings), forward_only=True)
        for router in routers(self.model):
            router.forget_routings()
        return row_mismatches(outputs, rows, self._device)

    def _shared(self, rows: Sequence[Row] | None) -> list[Row]:
        """The rows of rank 0 that bear a loss on every rank, checked."""
        if rows is not None and not (self._arch.experts and self._training.routing_replay):
            rows = [replace(row, routing=None) for row in rows]
        shared = [row for row in broadcast_rows(rows, self._device) if len(row.weights)]
        check_rows(shared, self._arch)
        return shared

    def _run(
        self,
        plans: list[list[Tree]],
        rank: int,
        forward: Callable,
        progress: Progress | None = None,
        forward_only: bool = False,
    ) -> list[dict[str, torch.Tensor]]:
        """Megatron's schedule over this data-parallel rank's trees; what the loss has returned for each."""
        trees = plans[rank]
        lengths = [len(tree.tokens) for tree in trees]
        if self._arch.experts and self._training.moe_dispatcher == "allgather":
            # Expert-parallel ranks gather each other's tokens, which takes equal lengths.
            lengths = [max(len(tree.tokens) for tree in together) for together in zip(*plans)]
        self._ddp.train()
        outputs = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=_reporting(list(zip(trees, lengths)), progress),
            model=[self._ddp],
            num_microbatches=len(trees),
            seq_length=max(lengths),
            micro_batch_size=1,
            forward_only=forward_only,
        )
        if progress:
            progress(len(trees), len(trees))
        return outputs

    def _forward(
        self,
        loss: TreeLoss | RowMismatch,
        routings: Routings,
        trees: Iterator[tuple[Tree, int]],
        model: torch.nn.Module,
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
        hidden = model(*(torch.from_numpy(np.ascontiguousarray(x)).to(self._device) for x in arguments))
        return hidden, partial(loss, tree, mine)

    def _step(self) -> dict[str, float]:
        """Clip and step, unless the gradient is not finite."""
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        finite = math.isfinite(norm)
        if finite:
            self.scheduler.step(1)
            self.optimizer.step()
        else:
            self.skipped += 1
        return {"grad_norm": norm, "lr": self.optimizer.param_groups[0]["lr"], "skipped": 0.0 if finite else 1.0}


def _pad(tree: Tree, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """tokens [1, length], position_ids [1, length], end [length] and uncounted [1, length], which is True for
    padding and for tokens that another tree counts. Pad tokens see only themselves."""
    t = len(tree.tokens)
    none = np.zeros(length - t, dtype=np.int64)
    end = np.concatenate([tree.end, np.arange(t, length) + 1])
    tokens, position_ids = (np.concatenate([x, none])[None] for x in (tree.tokens, tree.position_ids))
    return tokens, position_ids, end, np.concatenate([~tree.fresh, none == 0])[None]


def _reporting(trees: list, progress: Progress | None) -> Iterator:
    """Iterate trees; asking for the next one reports those before as done."""
    for done, tree in enumerate(trees):
        if progress and done:
            progress(done, len(trees))
        yield tree
