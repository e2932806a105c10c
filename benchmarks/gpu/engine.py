"""Stage 2: two processes on one GPU, the trainer and a vLLM engine, with one layer of Qwen3-30B-A3B.

    colocated   the engine samples with weights that it got by IPC (checksums compared), frees its memory (sleep mode),
                the trainer updates on the samples, the engine wakes and gets the new weights, and samples again. The
                engine's log-probabilities are compared with the trainer's, of both versions of the weights
    second_gpu  the same with an engine on a second GPU, which gets the weights by NCCL
    loop        `spell train`: two small steps of the quick start, trainer and engine on one GPU

On a CPU the weights go by gloo.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from suite import device, main, random_model, run_config, seconds, sizes

DTYPE = "bfloat16" if torch.cuda.is_available() else "float32"
MISMATCH = 0.1 if torch.cuda.is_available() else 1e-4
"""Between log-probabilities of engine and trainer, on average. Their kernels differ, and in bfloat16 a router of random
weights sends some tokens to other experts; other weights would make a difference of about 1."""


def engine_and_trainer(way: str, gpus: list[str], tiny: bool) -> dict:
    if find_spec("vllm") is None:
        return {"skipped": "vLLM is not installed", "holds": True}
    if len(gpus) > max(1, torch.cuda.device_count()):
        return {"skipped": f"needs {len(gpus)} GPUs", "holds": True}
    # These need what is there only beside vLLM.
    from spell_megatron.config.schema import RolloutConfig
    from spell_megatron.rollout.engines import Engines
    from spell_megatron.training.swap import Swap
    from spell_megatron.training.trainer import Trainer
    from spell_megatron.weights.push import WeightPusher
    from spell_megatron.weights.reshard import Export

    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        architecture = sizes(tiny, num_hidden_layers=1)
        architecture.architectures = ["Qwen3MoeForCausalLM"]
        architecture.save_pretrained(folder)
        config = run_config(DTYPE, 1024, 64, folder)
        # Otherwise the engine's log-probabilities are those of a part of the vocabulary.
        config.rollout.sampling.top_p = 1.0
        config.rollout = RolloutConfig(
            sampling=config.rollout.sampling,
            concurrency=8,
            gpu_memory_utilization=0.3,
            cpu_kv_cache_gib=0.25,
            extra_args=["--load-format", "dummy", "--enforce-eager"],
        )
        if torch.cuda.is_available():  # of the engines; this process has its GPU already
            before = os.environ.get("CUDA_VISIBLE_DEVICES")
            stack.callback(restore, "CUDA_VISIBLE_DEVICES", before)
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        engines = stack.enter_context(
            Engines.open(
                config.model,
                config.rollout,
                folder / "logs",
                device=config.run.device,
                seed=config.run.seed,
                routing=config.training.routing_replay,
                trainers=1,
            )
        )
        expected = way if torch.cuda.is_available() else "gloo"
        assert engines.transport.name == expected, engines.transport.name
        model = random_model(architecture, config.training, DTYPE)
        trainer = Trainer(model, config.training, config.rollout.sampling.temperature, config.run.steps)
        swap = Swap(trainer.model, trainer.optimizer, "all" if engines.transport.colocated else "none")
        pusher, export = WeightPusher(engines), Export(model, fuse_experts=True)
        stack.callback(pusher.close)

        def stream() -> Iterator[tuple[str, torch.Tensor]]:
            return export.stream(pusher.fit_buckets(), pusher.everywhere)

        figures: dict[str, object] = {"transport": expected}
        for version in ("1", "2"):
            push = pusher.push(stream(), version, verify=True)
            before_leaving = gigabytes_in_use()
            swap.leave()
            left = before_leaving - gigabytes_in_use()
            engines.wake("kv_cache")
            rows = samples(engines, config.rollout, version)
            engines.sleep()
            swap.come_back()
            swapping, swap.seconds = swap.seconds, 0.0
            asleep = gigabytes_in_use()
            metrics = trainer.update(rows)
            swap.leave(weights=False)
            engines.wake("weights")
            figures[f"version_{version}"] = {
                "mismatch_abs": metrics["mismatch_abs"],
                "grad_norm": metrics["grad_norm"],
                "checksums_compared": push.verified,
                "gigabytes_left_by_the_trainer": left,
                "seconds_of_leaving_and_return": swapping,
                "gigabytes_in_use_asleep": asleep,
                "gigabytes_in_use_awake": gigabytes_in_use(),
            }
        pushes = [pusher.push(stream(), str(number)).seconds for number in range(3, 5)]
        source = torch.zeros(push.bytes, dtype=torch.uint8, device=device())
        copy = seconds(lambda: source.clone())
    figures |= {"gigabytes": push.bytes / 1e9, "push_seconds": min(pushes), "copy_seconds": copy}
    worst = max(figures[f"version_{version}"]["mismatch_abs"] for version in ("1", "2"))
    return figures | {"worst_mismatch_abs": worst, "holds": worst <= MISMATCH}


def restore(variable: str, value: str | None) -> None:
    os.environ.pop(variable, None)
    if value is not None:
        os.environ[variable] = value


def gigabytes_in_use() -> float:
    """Memory of the GPU that all processes have taken."""
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 1e9


def samples(engines, rollout, version: str) -> list:
    """Rows of 8 samples of one prompt, with the engine's log-probabilities."""
    from spell_megatron.rollout.client import Client
    from spell_megatron.training.prefix_tree import Row

    prompt = np.random.default_rng(0).integers(0, 1000, 200)

    async def sampled() -> list:
        async with Client(engines.urls, engines.api_key, rollout.sampling, stop_token_ids=[1000]) as client:
            return await client.generate(prompt.tolist(), n=8, seed=0, max_tokens=32, affinity="")

    found = asyncio.run(sampled())
    assert {completion.weight_version for completion in found} == {version}
    return [
        Row(
            np.concatenate([prompt, completion.token_ids]),
            len(prompt),
            np.full(len(completion.token_ids), 1 - 2 * (number % 2), np.float32),
            np.array(completion.logprobs, np.float32),
            completion.routing,
        )
        for number, completion in enumerate(found)
    ]


def loop(tiny: bool) -> dict:
    if find_spec("vllm") is None:
        return {"skipped": "vLLM is not installed", "holds": True}
    with tempfile.TemporaryDirectory() as folder:
        options = ["run.steps=2", f"run.output_dir={folder}", "run.name=loop"]
        options += ["selfplay.groups=4", "selfplay.group_size=4"]
        options += ["selfplay.clusters_per_round=20", "rollout.concurrency=64", "rollout.cpu_kv_cache_gib=0.25"]
        options += ["rollout.threads=1", "training.threads=1", "rollout.verify_weights=true", "validation.limit=10"]
        if torch.cuda.is_available():
            options += ["run.device=cuda", "model.dtype=bfloat16", "rollout.gpu_memory_utilization=0.3"]
            options += ["rollout.extra_args=[--enforce-eager]"]
        command = [sys.executable, "-m", "spell_megatron", "train", "--config", "examples/quickstart.yaml"]
        command += [f"--{option}" for option in options]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise RuntimeError(f"spell train ended with {done.returncode}:\n{done.stdout[-3000:]}")
        lines = (Path(folder) / "loop" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    names = ("step", "train/mismatch_abs", "train/grad_norm", "push/verified", "time/push", "time/rollout")
    figures = {name: last[name] for name in names if name in last}
    return figures | {"holds": last["step"] == 2 and last["train/mismatch_abs"] <= MISMATCH}


PARTS = {
    "colocated": partial(engine_and_trainer, "ipc", ["0"]),
    "second_gpu": partial(engine_and_trainer, "nccl", ["0", "1"]),
    "loop": loop,
}

if __name__ == "__main__":
    main(PARTS, __doc__)
