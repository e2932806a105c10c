"""What runs inside vLLM's worker for `push_overhead.py`: the worker's extension, with a clock on each part."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.models.utils import AutoWeightsLoader

from benchmarks.push_overhead import Clock, watch
from spell_megatron.rollout import worker
from spell_megatron.rollout.transports import gloo_receiver

CLOCK = Clock()
BUCKETS: list[int] = []
"""Tensors in each bucket that arrived."""

for _method in (UnquantizedFusedMoEMethod, UnquantizedLinearMethod, UnquantizedEmbeddingMethod):
    watch(CLOCK, _method, "process_weights_after_loading", "packing for the CPU's kernels")
watch(CLOCK, AutoWeightsLoader, "load_weights", "vLLM's matching of names")
watch(CLOCK, layerwise, "_layerwise_process", "vLLM's loaders, second pass")
watch(CLOCK, gloo_receiver.GlooReceiver, "start_weight_update", "vLLM's start of the update")
watch(CLOCK, gloo_receiver.GlooReceiver, "finish_weight_update", "vLLM's end of the update")
watch(CLOCK, gloo_receiver.GlooReceiver, "receive_weights", "receiving")
watch(CLOCK, worker.WorkerExtension, "spell_watch_update", "checks: before")
watch(CLOCK, worker.WorkerExtension, "spell_report_update", "checks: after")


class _Arriving:
    def __init__(self, work: Any) -> None:
        self._work = work

    def wait(self) -> None:
        CLOCK.timing("arrival of the bytes", self._work.wait)()


_parse = gloo_receiver.GlooReceiver.parse_update_info


def _counted(receiver: gloo_receiver.GlooReceiver, update_info: dict) -> gloo_receiver.GlooUpdateInfo:
    BUCKETS.append(len(update_info["names"]))
    return _parse(receiver, update_info)


gloo_receiver.GlooReceiver.parse_update_info = _counted
_broadcast = gloo_receiver.broadcast
gloo_receiver.broadcast = lambda group, tensor: _Arriving(_broadcast(group, tensor))

_noting = worker._Record.noting
worker._Record.noting = lambda record, loader: _noting(record, _first_pass(loader))


def _first_pass(loader):
    # vLLM knows its own wrappers by their names, so that this one takes the name over.
    return CLOCK.timing("vLLM's loaders, first pass", loader)


class TimedWorker(worker.WorkerExtension):
    """The extension, which also tells what its parts took."""

    def spell_times(self) -> tuple[int, dict[str, float]]:
        """Number of buckets and CPU seconds of each part since the last call."""
        buckets = len(BUCKETS)
        BUCKETS.clear()
        return buckets, CLOCK.take()
