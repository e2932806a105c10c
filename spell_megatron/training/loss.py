"""The loss of packed prefix trees, and the metrics of response tokens that come with it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

from spell_megatron.config.schema import TrainingConfig
from spell_megatron.training.logprobs import TokenLogprobs, token_logprobs
from spell_megatron.training.model import TreeGPTModel
from spell_megatron.training.objective import LOG_RATIO_LIMIT, importance_weight, policy_loss
from spell_megatron.training.prefix_tree import Row, Tree

MEANS = (
    "loss",
    "entropy",
    "mismatch_abs",
    "mismatch_kl",
    "importance_weight",
    "importance_capped",
    "top_probability",
    "top_share",
)
"""Metrics that are means over response tokens, in the order of the sums that `TreeLoss` returns."""


class TreeLoss:
    """The loss on hidden states of the trees that were made of `rows`."""

    def __init__(self, model: TreeGPTModel, training: TrainingConfig, temperature: float, rows: Sequence[Row]) -> None:
        self._model, self._training, self._temperature = model, training, temperature
        self._device = next(model.parameters()).device
        # Weights and rollout log-probabilities of all rows in flat arrays, where loss edges look them up.
        self._starts = np.cumsum([0] + [len(row.weights) for row in rows])
        self._columns = [
            np.concatenate([getattr(row, name) for row in rows]).astype(np.float32)
            for name in ("weights", "rollout_logprobs")
        ]

    def __call__(
        self, tree: Tree, mine: np.ndarray, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """The loss as Megatron wants it from a last pipeline stage.

        Args:
            mine: places in the tree of this context-parallel rank's tokens, ascending.
            hidden: [tokens, 1, hidden] after the final norm; with sequence parallelism this rank's part of them.

        Returns:
            The sum of the losses of the edges whose source is in `mine`; the number of these edges; "sums" behind the
            metrics (in the order of `MEANS`, then the number of edges) and "top", the largest mismatch.
        """
        training = self._training
        edges, (logprob, entropy, top_probability, is_top) = edge_logprobs(
            self._model, tree, mine, hidden, self._temperature, training.logprob_chunk
        )
        index = self._starts[tree.row] + tree.offset
        advantage, rollout = (self._tensor(column[index][edges]) for column in self._columns)
        clips = training.clip_low, training.clip_high, training.clip_dual
        losses = policy_loss(logprob, logprob.detach(), advantage, *clips)
        mismatch = logprob.detach() - rollout
        log_ratio = mismatch
        if training.importance_sampling == "sequence":
            log_ratio = self._sums_over_rows(mismatch, tree, edges)
        importance, capped = importance_weight(log_ratio, training.importance_cap)
        if training.importance_sampling != "none":
            losses = importance * losses
        with torch.no_grad():
            delta = mismatch.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
            k3 = delta.exp() - 1 - delta
            columns = losses, entropy, delta.abs(), k3, importance, capped, top_probability, is_top
            sums = torch.stack([column.double().sum() for column in columns])
            top = delta.abs().amax() if len(delta) else delta.new_zeros(())
        count = torch.tensor(len(edges), dtype=torch.int, device=self._device)
        return losses.sum(), count, {"sums": torch.cat([sums, count.double()[None]]), "top": top.double()[None]}

    def _sums_over_rows(self, values: torch.Tensor, tree: Tree, edges: np.ndarray) -> torch.Tensor:
        """For each of this context-parallel rank's `edges` [e] of a tree, the sum of `values` [e] over its row's.

        A row is in one tree with all its edges, and in the same place among the rows on all these ranks.
        """
        rows, row_of_edge = np.unique(tree.row, return_inverse=True)
        own = self._tensor(row_of_edge[edges])
        sums = torch.zeros(len(rows), dtype=torch.double, device=self._device)
        sums.index_add_(0, own, values.double())
        if parallel_state.get_context_parallel_world_size() > 1 and len(rows):
            dist.all_reduce(sums, group=parallel_state.get_context_parallel_group())
        return sums[own].to(values.dtype)

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)


class RowMismatch:
    """What `TreeLoss` is, for rows that are only compared with the engines that sampled them."""

    def __init__(self, model: TreeGPTModel, training: TrainingConfig, temperature: float, rows: Sequence[Row]) -> None:
        self._model, self._chunk, self._temperature, self._rows = model, training.logprob_chunk, temperature, rows

    def __call__(
        self, tree: Tree, mine: np.ndarray, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """As of `TreeLoss`, without a loss; "sums" [rows]: of each row |trainer - engine| of its log-probabilities
        whose sources are in `mine`."""
        edges, found = edge_logprobs(self._model, tree, mine, hidden, self._temperature, self._chunk)
        rows, offsets = tree.row[edges], tree.offset[edges]
        engine = np.array([self._rows[r].rollout_logprobs[i] for r, i in zip(rows, offsets)], dtype=np.float32)
        device = found.logprob.device
        difference = (found.logprob - torch.from_numpy(engine).to(device)).abs().double()
        sums = torch.zeros(len(self._rows), dtype=torch.double, device=device)
        sums.index_add_(0, torch.from_numpy(rows).to(device), difference)
        count = torch.tensor(len(edges), dtype=torch.int, device=device)
        return torch.zeros((), device=device), count, {"sums": sums}


def edge_logprobs(
    model: TreeGPTModel, tree: Tree, mine: np.ndarray, hidden: torch.Tensor, temperature: float, chunk: int
) -> tuple[np.ndarray, TokenLogprobs]:
    """Numbers of a tree's loss edges whose source is in `mine`, and their log-probabilities; see `TreeLoss`."""
    group = parallel_state.get_tensor_model_parallel_group()
    if model.config.sequence_parallel:
        # token_logprobs returns the whole gradient on every rank, so its backward is a split.
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False, group=group)
    place = np.searchsorted(mine, tree.source).clip(max=len(mine) - 1)
    edges = np.flatnonzero(mine[place] == tree.source)
    source, target = (torch.from_numpy(x[edges]).to(hidden.device) for x in (place, tree.target))
    weight = model.output_layer.weight if model.output_weight is None else model.output_weight
    return edges, token_logprobs(
        hidden, weight, source, target, temperature, chunk, model.policy.arch.vocabulary, group
    )


def row_mismatches(outputs: list[dict[str, torch.Tensor]], rows: Sequence[Row], device: torch.device) -> list[float]:
    """Of each row the mean of what `RowMismatch` has summed, equal on every rank; all ranks call it."""
    sums = torch.zeros(len(rows), dtype=torch.double, device=device)
    if outputs:
        sums = torch.stack([output["sums"] for output in outputs]).sum(0)
    _over_ranks(sums, dist.ReduceOp.SUM)
    return [total / len(row.weights) for total, row in zip(sums.tolist(), rows, strict=True)]


def _over_ranks(x: torch.Tensor, op: dist.ReduceOp) -> None:
    """Reduce over the ranks of the last pipeline stage, and give all stages the result."""
    dist.all_reduce(x, op=op, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(x, src=last, group=parallel_state.get_pipeline_model_parallel_group())


def token_metrics(outputs: list[dict[str, torch.Tensor]], device: torch.device) -> dict[str, float]:
    """Metrics of an update's response tokens, equal on every rank; all ranks call it.

    outputs: the dictionaries of `TreeLoss` for this rank's microbatches; only the last pipeline stage has any.
    """
    sums, top = (torch.zeros(n, dtype=torch.double, device=device) for n in (len(MEANS) + 1, 1))
    if outputs:
        sums = torch.stack([output["sums"] for output in outputs]).sum(0)
        top = torch.stack([output["top"] for output in outputs]).amax(0)
    _over_ranks(sums, dist.ReduceOp.SUM)
    _over_ranks(top, dist.ReduceOp.MAX)
    *totals, count = sums.tolist()
    means = {name: total / count for name, total in zip(MEANS, totals, strict=True)}
    return means | {"mismatch_max_ratio": math.exp(min(top.item(), LOG_RATIO_LIMIT))}
