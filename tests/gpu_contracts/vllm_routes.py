"""vLLM's routes for generation and for weights, as its server on GPUs has them, in front of an engine that only notes
what it is told.

Prints its port. `/told` gives what the engine was told, in order. It ends with its standard input. Requests pass vLLM's
own routes, request models and `AsyncLLM`. What would go to its workers is bound to the signatures of its worker's
methods and parsed by its weight transfer engines.
"""

# ruff: noqa: E402  (imports after what they depend on)

from __future__ import annotations

import dataclasses
import inspect
import sys
import threading
from typing import Any

import numpy as np
import uvicorn
import vllm.platforms
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from vllm.platforms.cpu import CpuPlatform

vllm.platforms._current_platform = CpuPlatform()  # the routes are the same

from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.entrypoints.rl.online import api_router as weights
from vllm.entrypoints.scale_out.token_in_token_out import api_router as generation
from vllm.entrypoints.scale_out.token_in_token_out.protocol import (
    GenerateLogProbs,
    GenerateLogProbsContent,
    GenerateRequest,
    GenerateTokensChoice,
    GenerateTokensResponse,
)
from vllm.entrypoints.serve.dev.cache import api_router as cache
from vllm.entrypoints.serve.dev.rpc import api_router as rpc
from vllm.entrypoints.serve.dev.sleep import api_router as sleep
from vllm.entrypoints.serve.instrumentator import health
from vllm.outputs import WeightVersionSpan
from vllm.utils.serial_utils import numpy2base64
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import AsyncMPClient
from vllm.v1.worker.gpu_worker import Worker

from spell_megatron.rollout.worker import RequireKey, WorkerExtension

TRANSFER = {"backend": "nccl"}  # /transfer?backend=... changes it
told: list[list] = []


class Core:
    """vLLM's client of its engine's processes: calls are bound to the real one's signatures, and noted."""

    def __getattr__(self, name: str) -> Any:
        signature = inspect.signature(getattr(AsyncMPClient, name))

        async def call(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(None, *args, **kwargs)
            bound.apply_defaults()
            told.append([name, {key: value for key, value in bound.arguments.items() if key != "self"}])
            return ANSWERS.get(name, True)

        return call


class Renderer:
    async def clear_mm_cache_async(self) -> None:
        pass


class Engine(AsyncLLM):
    def __init__(self) -> None:
        self.engine_core, self.renderer, self.logger_manager = Core(), Renderer(), None

    def __del__(self) -> None:
        pass

    async def check_health(self) -> None:
        pass

    async def collective_rpc(
        self, method: str, timeout: float | None = None, args: tuple = (), kwargs: dict | None = None
    ) -> list:
        ours = hasattr(WorkerExtension, method)
        signature = inspect.signature(getattr(WorkerExtension if ours else Worker, method))
        values = dict(list(signature.bind(None, *args, **kwargs or {}).arguments.items())[1:])
        receiver = object.__new__(WeightTransferEngineFactory._registry[TRANSFER["backend"]]())
        for name, parse in (("init_info", receiver.parse_init_info), ("update_info", receiver.parse_update_info)):
            if name in values:
                values[name] = dataclasses.asdict(parse(values[name]))
        told.append([method, values])
        return [ANSWERS.get(method)]


ANSWERS = {
    "spell_describe": {"workers": 2},
    "is_scheduler_paused_async": False,
    "get_weight_version_async": "7",
    "spell_report_update": {"received": dict.fromkeys(("a", "b", "c"), ""), "unused": [], "missing": []},
}


class Serving:
    """Samples tokens 5, 6, ... as vLLM's `ServingTokens` would hand them over."""

    async def serve_tokens(self, request: GenerateRequest, raw_request: Request) -> GenerateTokensResponse:
        wanted = request.sampling_params
        told.append(["generate", {"tokens": request.token_ids, "params": {n: getattr(wanted, n) for n in PARAMS}}])
        tokens = list(range(5, 5 + wanted.max_tokens))
        routed = len(request.token_ids) - wanted.routed_experts_prompt_start + len(tokens) - 1
        return GenerateTokensResponse(
            choices=[
                GenerateTokensChoice(
                    index=index,
                    finish_reason="length",
                    token_ids=tokens,
                    logprobs=GenerateLogProbs(
                        content=[GenerateLogProbsContent(token_id=t, logprob=-t / 4) for t in tokens]
                    ),
                    routed_experts=numpy2base64(np.full((routed, 3, 2), index, dtype=np.uint8)),
                    weight_versions=[WeightVersionSpan("1", 0, len(tokens))],
                )
                for index in range(wanted.n)
            ]
        )


PARAMS = (
    "n",
    "seed",
    "temperature",
    "top_p",
    "max_tokens",
    "logprobs",
    "stop_token_ids",
    "detokenize",
    "routed_experts_prompt_start",
)

app = FastAPI()
for routes in (weights, generation, cache, rpc, sleep, health):
    app.include_router(routes.router)
app.state.engine_client, app.state.serving_tokens = Engine(), Serving()
app.add_middleware(RequireKey)


@app.get("/told")
async def what_it_was_told() -> JSONResponse:
    answer = JSONResponse(told)
    told.clear()
    return answer


@app.post("/transfer")
async def set_transfer(backend: str) -> JSONResponse:
    TRANSFER["backend"] = backend
    return JSONResponse({})


server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
thread = threading.Thread(target=server.run)
thread.start()
while not server.started and thread.is_alive():
    thread.join(0.1)
if thread.is_alive():
    print("PORT", server.servers[0].sockets[0].getsockname()[1], flush=True)
    sys.stdin.read()
server.should_exit = True
