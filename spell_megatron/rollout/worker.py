"""What runs inside vLLM's processes: the checks of received weights, and the guard of the routes.

Named on vLLM's command line: `WorkerExtension` by --worker-extension-cls (importing it registers the receivers of our
own transports), `RequireKey` by --middleware.
"""

from __future__ import annotations

import functools
import os
import secrets
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm import envs
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from spell_megatron.rollout.checksum import checksum
from spell_megatron.rollout.expert_loading import load_experts
from spell_megatron.rollout.sink_loading import load_sinks
from spell_megatron.rollout.transports import TRANSPORTS


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


class WorkerExtension:
    """Methods that /collective_rpc can call on each worker of a server. vLLM makes it a base class of its worker."""

    vllm_config: Any
    model_runner: Any
    weight_transfer_engine: Any

    def spell_describe(self) -> dict[str, Any]:
        """What the trainer has to know about a server before it uses the server."""
        config = self.vllm_config
        text_config = config.model_config.hf_text_config
        transfer = config.weight_transfer_config
        return {
            "architecture": config.model_config.architecture,
            "sizes": [getattr(text_config, name, None) for name in ("hidden_size", "num_hidden_layers", "vocab_size")],
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "quantization": config.model_config.quantization,
            "batch_invariant": envs.VLLM_BATCH_INVARIANT,
            "max_model_len": config.model_config.max_model_len,
            "logprobs_mode": config.model_config.logprobs_mode,
            "weight_transfer": None if transfer is None else transfer.backend,
            "language_model_only": (multimodal := config.model_config.multimodal_config) is not None
            and multimodal.language_model_only,
            "routed_experts": config.aux_output_config.enable_return_routed_experts,
            "workers": config.parallel_config.world_size_across_dp,
            "free_bytes": torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None,
        }

    def spell_weights(self) -> list[tuple[str, tuple[int, ...], tuple[int, ...], str, str]]:
        """(name, start, shape, dtype, checksum) of each block of a Hugging Face tensor that this worker computes
        with, read back from where its kernels take it. Negative zeros count as zeros.

        Raises:
            NotImplementedError: vLLM quantises the weights, or keeps them in a way that cannot be turned back.
        """
        # It knows the insides of vLLM's kernels, which serving and training must not depend on.
        from spell_megatron.rollout.read_back import pieces
        from spell_megatron.training.families import FAMILIES

        if quantization := self.vllm_config.model_config.quantization:
            raise NotImplementedError(f"weights that vLLM quantises ({quantization}) cannot be compared with others")
        hf_config = self.vllm_config.model_config.hf_text_config
        family, tied = FAMILIES[hf_config.model_type], hf_config.tie_word_embeddings
        return [
            (
                piece.name,
                piece.start,
                tuple(piece.values.shape),
                str(piece.values.dtype).removeprefix("torch."),
                checksum(piece.values + 0.0),
            )
            for piece in pieces(self.model_runner.get_model(), family, tied)
        ]

    def spell_watch_update(self, checksums: str) -> None:
        """Starts to record what the weight update that has just been started does, with checksums if "yes".

        Until the report, fused experts are loaded by `load_experts`, and sinks by `load_sinks`.
        """
        model = self.weight_transfer_engine.model
        record = _Record()
        load = type(model).load_weights

        def arriving(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
            # vLLM loads a tensor before it takes the next one.
            for name, tensor in weights:
                record.received[name] = checksum(tensor) if checksums == "yes" else ""
                record.current = name
                if own := load_sinks(model, name, tensor):
                    record.loaded.add(own)
                else:
                    yield name, tensor

        def load_weights(weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
            loaded = load(model, arriving(weights))
            record.loaded |= loaded
            return loaded

        model.load_weights = load_weights
        for module in model.modules():
            if isinstance(module, RoutedExperts):
                module.load_weights = functools.partial(load_experts, module)
        for name, parameter in model.named_parameters():
            record.wanted.append(name)
            parameter.weight_loader = record.noting(parameter.weight_loader)
        self._spell_record = record

    def spell_report_update(self) -> dict[str, Any]:
        """What arrived since `spell_watch_update`, to be asked before finish_weight_update.

        Returns:
            received: checksum of each received tensor by its Hugging Face name.
            unused: received tensors of which this worker has loaded nothing into a parameter.
            missing: parameters that nothing was loaded into, or only a part.
        """
        model = self.weight_transfer_engine.model
        for module in model.modules():
            if module is model or isinstance(module, RoutedExperts):
                module.__dict__.pop("load_weights", None)
        record = self._spell_record
        tied = self.vllm_config.model_config.hf_text_config.tie_word_embeddings
        heads = {name for name, module in model.named_modules() if tied and isinstance(module, ParallelLMHead)}
        missing = [name for name in record.wanted if name not in record.loaded and name.rpartition(".")[0] not in heads]
        for name, module in model.named_modules():
            info = get_layerwise_info(module)
            # A layer is complete when it has been processed, which resets its counts. Vocabulary
            # layers never are before the end if the vocabulary is padded.
            begun = info.can_load() and 0 < info.load_numel < info.load_numel_total
            if begun and not isinstance(module, VocabParallelEmbedding):
                missing.append(f"{name} ({info.load_numel} of {info.load_numel_total} elements)")
        unused = [name for name in record.received if name not in record.used]
        return {"received": record.received, "unused": unused, "missing": missing}


@dataclass
class _Record:
    """What arrived in a weight update.

    Attributes:
        wanted: parameters of vLLM's model as checkpoints have them. (A kernel may have others, such as scales.)
        received: checksum of each tensor ("": none was asked for) by its Hugging Face name.
        current: name of the tensor that vLLM loads.
        used: names of the tensors of which something was loaded into a parameter.
        loaded: parameters of vLLM's model that something was loaded into.
    """

    wanted: list[str] = field(default_factory=list)
    received: dict[str, str] = field(default_factory=dict)
    current: str = ""
    used: set[str] = field(default_factory=set)
    loaded: set[str] = field(default_factory=set)

    def noting(self, loader: Callable[..., Any]) -> Callable[..., Any]:
        """A parameter's weight loader that notes the tensor it is given.

        vLLM knows its own wrappers of loaders by their name and `__wrapped__`, and this one too.
        """

        @functools.wraps(loader)
        def noting(*args: Any, **kwargs: Any) -> Any:
            result = loader(*args, **kwargs)
            if result is not False:  # of an expert that another worker has
                self.used.add(self.current)
            return result

        return noting


for _transport in TRANSPORTS.values():
    if _transport.receiver and _transport.name not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(_transport.name, *_transport.receiver.split(":"))
