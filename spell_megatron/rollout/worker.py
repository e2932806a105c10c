"""What runs inside vLLM's processes: weight reception, its checks, and the guard of the routes.

Named on vLLM's command line: `WorkerExtension` by --worker-extension-cls (importing it registers
the gloo backend), `RequireKey` by --middleware.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Awaitable, Iterable, Iterator
from dataclasses import dataclass

import torch
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from spell_megatron.rollout.transfer import broadcast, checksum, gloo_group


class RequireKey:
    """ASGI middleware that demands the API key on every route but /health.

    vLLM's own check leaves out the development routes, through which weights are replaced.
    """

    def __init__(self, app: ASGIApp) -> None:
        key = os.environ.get("VLLM_API_KEY")
        if not key:
            raise ValueError("set the environment variable VLLM_API_KEY: RequireKey needs a key to demand")
        self._app = app
        self._expected = f"Bearer {key}".encode()

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if scope["type"] not in ("http", "websocket") or scope["path"] == "/health":
            return self._app(scope, receive, send)
        given = Headers(scope=scope).get("Authorization", "").encode()
        if secrets.compare_digest(given, self._expected):
            return self._app(scope, receive, send)
        return JSONResponse({"error": "Unauthorized"}, status_code=401)(scope, receive, send)


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


class GlooWeightTransferEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
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
            if getattr(method, "moe_kernel", None) is not None:
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


class WorkerExtension:
    """Methods that /collective_rpc can call on each worker of a server."""

    def spell_describe(self) -> dict:
        """What the trainer has to know of a server before it uses it."""
        config = self.vllm_config
        text_config = config.model_config.hf_text_config
        transfer = config.weight_transfer_config
        return {
            "architecture": config.model_config.architecture,
            "sizes": [getattr(text_config, name, None) for name in ("hidden_size", "num_hidden_layers", "vocab_size")],
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "max_model_len": config.model_config.max_model_len,
            "logprobs_mode": config.model_config.logprobs_mode,
            "weight_transfer": None if transfer is None else transfer.backend,
            "routed_experts": config.aux_output_config.enable_return_routed_experts,
            "workers": config.parallel_config.world_size_across_dp,
        }

    def spell_weights(self) -> list[tuple[str, tuple[int, ...], tuple[int, ...], str, str]]:
        """(name, start, shape, dtype, checksum) of each block of a Hugging Face tensor that this worker computes
        with, read back from where its kernels take it. Negative zeros count as zeros."""
        # It knows the insides of vLLM's kernels, which serving and training must not depend on.
        from spell_megatron.rollout.read_back import pieces

        tied = self.vllm_config.model_config.hf_text_config.tie_word_embeddings
        return [
            (
                piece.name,
                piece.start,
                tuple(piece.values.shape),
                str(piece.values.dtype).removeprefix("torch."),
                checksum(piece.values + 0.0),
            )
            for piece in pieces(self.model_runner.get_model(), tied)
        ]

    def spell_watch_update(self, checksums: str) -> None:
        """Starts to record what arrives in the next weight update, with checksums if "yes"."""
        model = self.weight_transfer_engine.model
        record = _Record({}, set())
        load = type(model).load_weights

        def arriving(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                record.received[name] = checksum(tensor) if checksums == "yes" else ""
                yield name, tensor

        def load_weights(weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
            loaded = load(model, arriving(weights))
            record.loaded |= loaded
            return loaded

        model.load_weights = load_weights
        self._spell_record = record

    def spell_report_update(self) -> dict:
        """What arrived since `spell_watch_update`, to be asked before finish_weight_update.

        Returns:
            received: checksum of each received tensor by its Hugging Face name.
            missing: parameters that nothing was loaded into, or only a part.
        """
        model = self.weight_transfer_engine.model
        model.__dict__.pop("load_weights", None)
        record = self._spell_record
        tied = self.vllm_config.model_config.hf_text_config.tie_word_embeddings
        heads = {name for name, module in model.named_modules() if tied and isinstance(module, ParallelLMHead)}
        missing = [
            name
            for name, _ in model.named_parameters()
            if name not in record.loaded and name.rpartition(".")[0] not in heads
        ]
        for name, module in model.named_modules():
            info = get_layerwise_info(module)
            # A layer is complete when it has been processed, which resets its counts. Vocabulary
            # layers never are before the end if the vocabulary is padded.
            begun = info.can_load() and 0 < info.load_numel < info.load_numel_total
            if begun and not isinstance(module, VocabParallelEmbedding):
                missing.append(f"{name} ({info.load_numel} of {info.load_numel_total} elements)")
        return {"received": record.received, "missing": missing}


@dataclass
class _Record:
    received: dict[str, str]
    loaded: set[str]


if "gloo" not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine("gloo", GlooWeightTransferEngine)
