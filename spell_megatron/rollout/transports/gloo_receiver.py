"""The workers' end of the gloo transport; it runs inside vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from spell_megatron.rollout.transports.gloo import broadcast, gloo_group


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """Where the trainer (rank 0) listens, and this server's place in the group."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    timeout: float


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """The tensors of one bucket, in the order in which they are broadcast."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


class GlooReceiver(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """Receives buckets of weights on CPUs and loads them layer by layer, as vLLM's nccl engine does."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo

    _group = None

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        parallel = self.parallel_config
        self._group = gloo_group(
            init_info.master_address,
            init_info.master_port,
            init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank,
            init_info.world_size,
            init_info.timeout,
        )

    def start_weight_update(self) -> None:
        # Experts are packed for the CPU kernel only where there is no kernel yet: without this a
        # reload leaves the packed experts of the old weights in use.
        for module in self.model.modules():
            method = getattr(module, "quant_method", None)
            if method is not None and getattr(method, "moe_kernel", None) is not None:
                method.moe_kernel = None
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict) -> None:
        # The base class synchronises an accelerator here, and a CPU has none.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        if self._group is None:
            raise RuntimeError("no trainer is connected: init_weight_transfer_engine comes first")
        arriving = []
        for name, dtype, shape in zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            arriving.append((name, tensor, broadcast(self._group, tensor)))

        def arrived() -> Iterator[tuple[str, torch.Tensor]]:
            # A tensor is loaded while those behind it arrive.
            for name, tensor, work in arriving:
                work.wait()
                yield name, tensor

        self.model.load_weights(arrived())

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        # The head's matrix is packed for the CPU kernel when its own weights arrive. Those of a tied
        # head arrive as the embedding, so it has to be packed again.
        if self.model_config.hf_text_config.tie_word_embeddings:
            for module in self.model.modules():
                if isinstance(module, ParallelLMHead):
                    module.quant_method.process_weights_after_loading(module)

    def shutdown(self) -> None:
        self._group = None
