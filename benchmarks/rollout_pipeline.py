"""Tokens per second of the streaming roles against the same engine with all prompts known.

    python benchmarks/rollout_pipeline.py [--quick] [--groups N] [--steps N] [--threads N]

One engine with the quick start's policy, documents and settings rolls out steps of self-play. Every
request that a step completed, those of surplus clusters included, is recorded, and the same requests
(prompts, seeds, limits) are sent again to the same engine in two other orders:

    pipeline       the project's step: every cluster advances alone, surplus is cancelled
    all at once    no order at all: what the engine can do at best
    four barriers  all questions, then all no-context checks, all answers, all judgments

The prefix cache is emptied before each, and they take turns, step by step. Throughput counts the
tokens of completed requests in wall time; ratios are medians over the steps. What the pipeline
computes for requests that it then cancels is its loss. CPU seconds (client, server and engine) are
printed to tell apart what is computed more and what is waited for. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from spell_megatron.config import Config, load_config
from spell_megatron.director import Director
from spell_megatron.rollout.client import Client, Completion
from spell_megatron.rollout.engines import Engines
from spell_megatron.selfplay import pipeline

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart.yaml"
ROLES = ("questioner", "no_context", "responder", "verifier")
WAYS = ("pipeline", "all at once", "four barriers")
GOAL = 0.9


@dataclass
class Recorder:
    """A client that keeps the requests that were completed, by role."""

    client: Client
    requests: list[tuple[str, tuple, dict]] = field(default_factory=list)
    tokens: int = 0
    role: str = ""

    async def generate(self, *args, **arguments) -> list[Completion]:
        role = self.role  # set by the caller just before, without a chance for others to run
        completions = await self.client.generate(*args, **arguments)
        self.requests.append((role, args, arguments))
        self.tokens += tokens_of(completions)
        return completions


class StepClient(pipeline._StepClient):
    """Tells the recorder the role of each request."""

    async def generate(self, attempt, role, *args, **arguments):
        self.client.role = role
        return await super().generate(attempt, role, *args, **arguments)


def tokens_of(completions: Iterable[Completion]) -> int:
    return sum(len(completion.token_ids) for completion in completions)


async def send(client: Client, requests: Iterable[tuple[str, tuple, dict]]) -> int:
    """Send requests at once; returns the number of tokens generated."""
    answers = await asyncio.gather(*(client.generate(*args, **arguments) for _, args, arguments in requests))
    return sum(map(tokens_of, answers))


def cpu_seconds() -> float:
    """CPU time of this process and of all that it started."""
    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum(t.user + t.system for t in times)


async def measure(config: Config, engines: Engines, steps: int) -> list[dict]:
    """Figures of each step; the first step only warms up."""
    director = Director(config, engines)
    async with (
        director._client as client,
        Client(
            engines.urls,
            engines.api_key,
            config.rollout.sampling,
            stop_token_ids=client._stop_token_ids,
            concurrency=10**6,  # the engine, not the client, chooses what waits
        ) as unbounded,
    ):
        (probe,) = await client.generate([1], n=1, seed=0, max_tokens=1, affinity="")
        results = []
        for step in range(steps + 1):
            recorder = Recorder(client)
            seconds, cpu, tokens = {}, {}, {}
            for way in WAYS:
                engines.engines[0].post("/reset_prefix_cache")
                started, cpu_before = time.perf_counter(), cpu_seconds()
                if way == "pipeline":
                    rollout = await director.selfplay.roll_out(recorder, step, probe.weight_version)
                    tokens[way] = recorder.tokens
                elif way == "all at once":
                    tokens[way] = await send(unbounded, recorder.requests)
                else:
                    tokens[way] = 0
                    for role in ROLES:
                        tokens[way] += await send(unbounded, (r for r in recorder.requests if r[0] == role))
                seconds[way] = time.perf_counter() - started
                cpu[way] = cpu_seconds() - cpu_before
            metrics = rollout.metrics
            used, surplus = metrics["selfplay/clusters"], metrics["selfplay/surplus_clusters"]
            results.append(
                {
                    "seconds": seconds,
                    "cpu": cpu,
                    "tokens": tokens,
                    "requests": len(recorder.requests),
                    "prompt_tokens": sum(len(args[0]) for _, args, _ in recorder.requests),
                    "used_tokens": None,
                    "clusters": used,
                    "surplus": surplus / (used + surplus),
                    "mixed": metrics["selfplay/mixed_groups"],
                }
            )
            print(f"step {step}" + (" (warm-up)" if step == 0 else ""), flush=True)
            for way in WAYS:
                print(
                    f"  {way:14s} {tokens[way]:7d} tokens {seconds[way]:7.2f} s {tokens[way] / seconds[way]:7.0f}"
                    f" tokens/s  {cpu[way]:7.2f} s of CPU",
                    flush=True,
                )
            print(
                f"  {len(recorder.requests)} requests, {used:.0f} clusters used, {surplus:.0f} surplus, "
                f"{metrics['selfplay/mixed_groups']:.0f} mixed"
            )
        return results[1:]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one small step (under two minutes)")
    parser.add_argument("--groups", type=int, default=None)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("overrides", nargs="*", help="settings of the quick start, such as rollout.threads=1")
    options = parser.parse_args()
    groups = options.groups or (16 if options.quick else 64)
    steps = options.steps or (1 if options.quick else 3)
    config = load_config(QUICKSTART, [f"selfplay.groups={groups}", *options.overrides])
    pipeline._StepClient = StepClient
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder, Engines.open(config, Path(folder)) as engines:
        results = asyncio.run(measure(config, engines, steps))
    print(load, os.getloadavg())
    print({w: statistics.median(r["tokens"][w] / r["seconds"][w] for r in results) for w in WAYS})
    print([r["tokens"]["pipeline"]/r["seconds"]["pipeline"] / (r["tokens"]["all at once"]/r["seconds"]["all at once"]) for r in results])


if __name__ == "__main__":
    main()
