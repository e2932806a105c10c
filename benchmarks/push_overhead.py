"""What does a weight push cost beside its bytes? A model with as many tensors as Qwen3-30B-A3B, at reduced sizes.

    python benchmarks/push_overhead.py [--quick] [--repeats 5]

A Megatron trainer in this process and a real vLLM engine have a random model with the 18,867 tensors of Qwen3-30B-A3B,
under its names: 48 layers of 128 experts, each matrix 384 times smaller. Buckets are smaller in the same proportion, so
that there are as many as in the large model. What such a push takes is what the large model's push takes beside the
copying of its bytes: names, metadata, HTTP, and what vLLM does for each tensor. Two ways take turns:

    one by one  each expert by itself, in buckets of 64 MiB (times 1 / 384): as before version 0.3, and still where
                memory for larger buckets lacks
    fused       the experts of a layer as two tensors, in buckets of 4 GiB (times 1 / 384): what a GPU with 32 GiB to
                spare gets

The CPU seconds of both sides are split into parts. A part is shown without the parts within it. Two parts are not
overhead: the arrival of the bytes, and packing matrices for the CPU's kernels, which GPUs do not do. The first push of
each way is checked by checksums. The last line is one JSON object; `holds` says whether the fused pushes take at most
3 s in all, by the median of the CPU seconds of both sides together. These depend less on other programs than the
duration, which is shown too and is shorter on an idle machine, where the sides work at the same time.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

GOAL_SECONDS = 3.0
LAYERS, EXPERTS, HIDDEN, WIDTH = 48, 128, 64, 32
TENSORS = 18_867
SCALE = (2048 * 768 * 2) / (HIDDEN * WIDTH * 4)
"""Bytes of an expert's matrix in the large model (bfloat16) by those of one here (float32)."""
WAYS = {"one by one": (False, 64 << 20), "fused": (True, 4 << 30)}
"""(experts of a layer as one tensor, bytes of a bucket in the large model)."""
WORKER = "benchmarks.push_overhead_worker.TimedWorker"


class Clock:
    """CPU seconds of the threads that take part, by part. A part is counted without the parts within it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open = threading.local()

    def enter(self, part: str) -> None:
        if not hasattr(self._open, "stack"):
            self._open.stack = []
        self._open.stack.append([part, time.thread_time(), 0.0])

    def leave(self) -> None:
        part, start, inner = self._open.stack.pop()
        whole = time.thread_time() - start
        self.seconds[part] += whole - inner
        if self._open.stack:
            self._open.stack[-1][2] += whole

    def timing(self, part: str, function: Callable) -> Callable:
        """The function, whose time counts as the part."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.enter(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()

        return timed

    def iterating(self, part: str, stream: Iterator) -> Iterator:
        """The stream, the making of whose items counts as the part."""
        following = self.timing(part, lambda: next(stream, None))
        while (item := following()) is not None:
            yield item

    def take(self) -> dict[str, float]:
        """The seconds of each part since the last call."""
        seconds, self.seconds = dict(self.seconds), defaultdict(float)
        return seconds


def watch(clock: Clock, owner: Any, name: str, part: str) -> None:
    """Has a function of a module or class counted as a part."""
    setattr(owner, name, clock.timing(part, getattr(owner, name)))


def write_config(folder: Path) -> None:
    """config.json of the model: Qwen3-30B-A3B with smaller sizes."""
    from transformers import Qwen3MoeConfig

    Qwen3MoeConfig(
        vocab_size=1024,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        intermediate_size=96,
        moe_intermediate_size=WIDTH,
        num_experts=EXPERTS,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=None,
        architectures=["Qwen3MoeForCausalLM"],
    ).save_pretrained(folder)


def process_seconds(processes: list) -> list[float]:
    """CPU seconds of each; 0 for one that has ended (beside each server a guard's `sleep` comes and goes)."""
    import psutil

    seconds = []
    for process in processes:
        try:
            times = process.cpu_times()
            seconds.append(times.user + times.system)
        except psutil.NoSuchProcess:
            seconds.append(0.0)
    return seconds


def start(stack: ExitStack, root: Path) -> tuple[Any, Any]:
    """The trainer's model and the running engine."""
    from spell_megatron.config.schema import Config
    from spell_megatron.rollout.engines import Engines
    from spell_megatron.training import backend
    from spell_megatron.training.model import build_model
    from spell_megatron.training.policy import PolicyModel

    folder = root / "model"
    folder.mkdir()
    write_config(folder)
    config = Config(
        model={"path": folder, "dtype": "float32"},
        data={"documents": folder},
        run={"device": "cpu"},
        rollout={
            "concurrency": 8,
            "cpu_kv_cache_gib": 0.1,
            "sampling": {"max_prompt_tokens": 256, "max_response_tokens": 256},
            "extra_args": ["--load-format", "dummy", "--worker-extension-cls", WORKER],
        },
    )
    policy = PolicyModel.load(folder, config.model.dtype)
    backend.initialise(policy, config.training, config.run.device)
    stack.callback(backend.shutdown)
    model = build_model(policy, config.training)
    engines = Engines.open(config.model, config.rollout, root / "logs", device="cpu", seed=0, routing=False, trainers=1)
    return model, stack.enter_context(engines)


def measure(repeats: int, root: Path) -> dict[str, list[dict]]:
    """Figures of each push, by its way."""
    import psutil
    import requests

    from spell_megatron.rollout.transports.gloo import GlooChannel
    from spell_megatron.weights.push import WeightPusher
    from spell_megatron.weights.reshard import Export

    clock = Clock()
    watch(clock, GlooChannel, "send", "trainer: sending")
    watch(clock, requests.Session, "post", "trainer: metadata as JSON, HTTP")
    found: dict[str, list[dict]] = {way: [] for way in WAYS}
    with ExitStack() as stack:
        model, engines = start(stack, root)
        (engine,) = engines.engines
        me = psutil.Process()
        everybody = [me, *me.children(recursive=True)]
        exports = {way: Export(model, fuse_experts=fused) for way, (fused, _) in WAYS.items()}

        def push(way: str, verify: bool = False) -> dict:
            bucket_bytes = int(WAYS[way][1] / SCALE)
            pusher = WeightPusher(engines, bucket_bytes=bucket_bytes)  # the engine knows one at a time
            engine.call("spell_times")
            clock.take()
            before, begin = process_seconds(everybody), time.perf_counter()
            stream = clock.iterating("trainer: resharding and naming", exports[way].stream(bucket_bytes))
            done = pusher.push(stream, "benchmark", verify=verify)
            seconds = time.perf_counter() - begin
            mine, *theirs = (b - a for a, b in zip(before, process_seconds(everybody), strict=True))
            buckets, parts = engine.call("spell_times")[0]
            pusher.close()
            parts = clock.take() | {f"engine: {part}": value for part, value in parts.items()}
            for side, all_of_it in (("trainer", mine), ("engine", sum(theirs))):
                known = sum(value for part, value in parts.items() if part.startswith(side))
                parts[f"{side}: the rest"] = max(0.0, all_of_it - known)
            return {
                "seconds": seconds,
                "cpu_seconds": mine + sum(theirs),
                "tensors": done.tensors,
                "bytes": done.bytes,
                "buckets": buckets,
                "parts": parts,
            }

        assert push("one by one", verify=True)["tensors"] == TENSORS
        push("fused", verify=True)
        for _ in range(repeats):
            for way in WAYS:
                found[way].append(push(way))
    return found


def show(found: dict[str, list[dict]]) -> None:
    """Prints the medians of both ways side by side."""

    def line(title: str, values: list[str]) -> None:
        print(f"{title:46}" + "".join(f"{value:>14}" for value in values))

    def middle(way: str, get: Callable[[dict], float]) -> float:
        return statistics.median(get(one) for one in found[way])

    line("", list(found))
    for title in ("tensors", "buckets", "bytes"):
        line(title, [f"{ones[0][title]:,}" for ones in found.values()])
    for title in ("seconds", "cpu_seconds"):
        line(title.replace("_", " ").replace("cpu", "CPU"), [f"{middle(w, lambda o: o[title]):.2f}" for w in found])
    print("CPU seconds by part:")
    parts = {part for ones in found.values() for one in ones for part in one["parts"]}
    taken = {part: [middle(way, lambda o: o["parts"].get(part, 0.0)) for way in found] for part in parts}
    for part in sorted(parts, key=lambda part: (part.startswith("engine"), -taken[part][0])):
        line(f"  {part}", [f"{value:.2f}" for value in taken[part]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one push of each way (under two minutes)")
    parser.add_argument("--repeats", type=int, default=5, help="pushes of each way (default 5)")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    print(f"{os.cpu_count()} cores, load before {os.getloadavg()[0]:.1f}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        found = measure(1 if options.quick else options.repeats, Path(temporary))
    show(found)
    print(f"load after {os.getloadavg()[0]:.1f}")
    figures = {
        way: {
            name: round(statistics.median(one[name] for one in ones), 3)
            for name in ("seconds", "cpu_seconds", "tensors", "buckets")
        }
        for way, ones in found.items()
    }
    holds = figures["fused"]["cpu_seconds"] <= GOAL_SECONDS
    goal = f"fused <= {GOAL_SECONDS:g} CPU seconds"
    result = {"benchmark": "push_overhead", "figures": figures, "goal": goal, "holds": holds}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
