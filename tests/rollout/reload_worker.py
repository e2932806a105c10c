"""Loads a checkpoint into vLLM's model, then another one as a push does, without an engine; see `test_reload`.

usage: reload_worker.py FOLDER OTHER   (prints what differs from what the folders hold, as JSON)
"""

import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"

import torch
from hf_models import apart
from safetensors.torch import load_file
from vllm.config import set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model

from spell_megatron.rollout.checksum import checksum
from spell_megatron.rollout.transports.gloo_receiver import GlooReceiver
from spell_megatron.rollout.worker import WorkerExtension


def differences(worker: WorkerExtension, tensors: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that the worker does not have, or not with these values, and of others that it has."""
    held = {name: (start, shape, found) for name, start, shape, _, found in worker.spell_weights()}
    expected = {name: ((0,) * x.dim(), tuple(x.shape), checksum(x + 0.0)) for name, x in tensors.items()}
    return sorted(name for name in held.keys() | expected.keys() if held.get(name) != expected.get(name))


def main(first: Path, second: Path) -> None:
    torch.accelerator.empty_cache = lambda: None  # vLLM's loader asks for one, and there is none outside of a worker
    old, new = (apart(load_file(folder / "model.safetensors")) for folder in (first, second))
    settings = {"dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True, "max_model_len": 512}
    config = EngineArgs(model=str(first), **settings).create_engine_config()
    with TemporaryDirectory() as folder, set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        model = get_model(vllm_config=config)
        worker = WorkerExtension()
        worker.vllm_config, worker.model_runner = config, SimpleNamespace(get_model=lambda: model)
        worker.weight_transfer_engine = SimpleNamespace(model=model, model_config=config.model_config)
        found = {"loaded": differences(worker, old)}
        GlooReceiver.start_weight_update(worker.weight_transfer_engine)
        worker.spell_watch_update("no")
        model.load_weights(iter(new.items()))
        report = worker.spell_report_update()
        GlooReceiver.finish_weight_update(worker.weight_transfer_engine)
        found |= {name: report[name] for name in ("unused", "missing")} | {"pushed": differences(worker, new)}
        sinks = [module.impl.sinks for module in model.modules() if hasattr(getattr(module, "impl", None), "sinks")]
        names = [name for name in new if name.endswith(".sinks")]
        found["attention"] = [n for n, held in zip(names, sinks, strict=True) if not torch.equal(held, new[n])]
    print("FOUND " + json.dumps(found))


main(*map(Path, sys.argv[1:]))
