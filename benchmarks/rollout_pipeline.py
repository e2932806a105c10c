"""What do the streaming roles cost? Tokens per second, compared with the same engine that gets all prompts at once.

    python benchmarks/rollout_pipeline.py [--quick] [SETTING=VALUE ...]

One engine with the quick start's policy, documents and settings rolls out 4 steps of self-play with 96 groups each
(--quick: 2 steps with 32). The first step warms up and is not counted. Settings of the quick start can be overridden.
Every request that a step completed is recorded, also requests of surplus clusters. The same requests (prompts, seeds,
limits) are then sent again to the same engine:

    pipeline       the project's step: every cluster advances alone, surplus is cancelled
    all at once    no order at all: what the engine can do at best
    four barriers  all questions, then all no-context checks, all answers, all judgments
    used at once   as all at once, without the requests of surplus clusters: what an oracle would send

They take turns, step by step, each from an empty prefix cache. Throughput is the tokens of completed requests over wall
time. Tokens of requests that the pipeline cancels are its loss. Figures are medians over the steps, and ratios are
medians of each step's ratio of throughputs. Only the ratio to "used at once" is a ratio of times. CPU seconds (client,
server, engine) separate computing from waiting. The last line is one JSON object.
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

from spell_megatron.config.reading import load_config
from spell_megatron.config.schema import Config
from spell_megatron.director.director import Director
from spell_megatron.rollout.client import Client, Completion
from spell_megatron.rollout.engine import Engine
from spell_megatron.rollout.engines import Engines
from spell_megatron.selfplay import selfplay
from spell_megatron.selfplay.step_client import StepClient

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart.yaml"
ROLES = ("questioner", "no_context", "responder", "verifier")
WAYS = ("pipeline", "all at once", "four barriers", "used at once")
GOAL = 0.9


@dataclass
class Request:
    """A completed request: place of its cluster in the step, role, and the client's arguments."""

    cluster: int
    role: str
    prompt_ids: list[int]
    arguments: dict


@dataclass
class Recorder:
    """A client that keeps the requests it completed."""

    client: Client
    requests: list[Request] = field(default_factory=list)
    tokens: int = 0
    calling: tuple[int, str] = (0, "")

    async def generate(self, prompt_ids: list[int], **arguments) -> list[Completion]:
        request = Request(*self.calling, prompt_ids, arguments)
        completions = await self.client.generate(prompt_ids, **arguments)
        self.requests.append(request)
        self.tokens += tokens_of(completions)
        return completions


class RecordedStep(StepClient):
    """Tells the recorder whose request comes next."""

    async def generate(self, attempt, purpose, *args, **arguments):
        self.client.calling = (attempt.index, purpose)
        return await super().generate(attempt, purpose, *args, **arguments)


def tokens_of(completions: Iterable[Completion]) -> int:
    return sum(len(completion.token_ids) for completion in completions)


async def send(client: Client, requests: Iterable[Request]) -> int:
    """Send requests at once; returns the number of tokens generated."""
    answers = await asyncio.gather(*(client.generate(r.prompt_ids, **r.arguments) for r in requests))
    return sum(map(tokens_of, answers))


def cpu_seconds() -> float:
    """CPU time of this process and of all that it started."""
    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum(t.user + t.system for t in times)


async def roll_out(director: Director, engine: Engine, step: int, client: Client, unbounded: Client) -> dict:
    """One step in every way: {way: {tokens, seconds, cpu_seconds}}, and counts of the step."""
    (probe,) = await client.generate([1], n=1, seed=0, max_tokens=1, affinity="")
    recorder, rollout = Recorder(client), None
    figures: dict = {}
    for way in WAYS:
        engine.post("/reset_prefix_cache")
        started, cpu = time.perf_counter(), cpu_seconds()
        if way == "pipeline":
            rollout = await director.selfplay.roll_out(recorder, step, probe.weight_version)
            tokens, requests = recorder.tokens, recorder.requests
        elif way == "all at once":
            tokens = await send(unbounded, requests)
        elif way == "four barriers":
            tokens = 0
            for role in ROLES:
                tokens += await send(unbounded, [r for r in requests if r.role == role])
        else:
            tokens = await send(unbounded, [r for r in requests if r.cluster < len(rollout.clusters)])
        seconds = time.perf_counter() - started
        figures[way] = {"tokens": tokens, "seconds": seconds, "cpu_seconds": cpu_seconds() - cpu}
    surplus = rollout.metrics["selfplay/surplus_clusters"]
    counts = {
        "requests": len(requests),
        "samples": sum(r.arguments["n"] for r in requests),
        "clusters": len(rollout.clusters),
        "surplus_clusters": int(surplus),
        "mixed_groups": int(rollout.metrics["selfplay/mixed_groups"]),
        "surplus_token_share": 1 - figures["used at once"]["tokens"] / figures["pipeline"]["tokens"],
    }
    return figures | {"counts": counts}


async def measure(config: Config, engines: Engines, steps: int) -> list[dict]:
    """The figures of each step; one step before them warms up."""
    director = Director(config)
    sampling = config.rollout.sampling
    arguments = (engines.urls, engines.api_key, sampling)
    stops = sorted(director._tokenizer.eos_ids)
    async with (
        Client(*arguments, stop_token_ids=stops, concurrency=config.rollout.concurrency) as client,
        # Here the engine, not the client, chooses which requests wait.
        Client(*arguments, stop_token_ids=stops, concurrency=10**6) as unbounded,
    ):
        results = []
        for step in range(steps + 1):
            figures = await roll_out(director, engines.engines[0], step, client, unbounded)
            results.append(figures)
            print(f"step {step}{' (warm-up)' if step == 0 else ''}, {describe(figures['counts'])}")
            for way in WAYS:
                f = figures[way]
                print(
                    f"  {way:14s} {f['tokens']:7d} tokens {f['seconds']:7.2f} s "
                    f"{f['tokens'] / f['seconds']:7.0f} tokens/s {f['cpu_seconds']:7.2f} s of CPU",
                    flush=True,
                )
        return results[1:]


def describe(counts: dict) -> str:
    return (
        f"{counts['requests']} requests for {counts['samples']} samples; {counts['clusters']} clusters used "
        f"({counts['mixed_groups']} mixed), {counts['surplus_clusters']} surplus "
        f"({counts['surplus_token_share']:.0%} of the tokens)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small step (under two minutes)")
    parser.add_argument("settings", nargs="*", metavar="SETTING=VALUE", help="such as rollout.threads=2")
    options = parser.parse_args()
    groups, steps = (32, 1) if options.quick else (96, 3)
    config = load_config(QUICKSTART, [f"selfplay.groups={groups}", *options.settings])
    print(
        f"{config.selfplay.groups} groups a step, {config.selfplay.group_size} answers, "
        f"{config.selfplay.votes} votes; engine: {config.rollout.threads} thread(s), at most "
        f"{config.rollout.concurrency} sequences; {os.cpu_count()} cores, load before "
        f"{os.getloadavg()[0]:.1f}"
    )
    selfplay.StepClient = RecordedStep
    with tempfile.TemporaryDirectory() as folder:
        engines = Engines.open(
            config.model,
            config.rollout,
            Path(folder),
            device=config.run.device,
            seed=config.run.seed,
            routing=config.training.routing_replay,
            trainers=1,
        )
        with engines:
            results = asyncio.run(measure(config, engines, steps))
    print(f"load after {os.getloadavg()[0]:.1f}; medians of {len(results)} step(s):")

    def median(figure) -> float:
        return round(statistics.median(map(figure, results)), 3)

    figures = {}
    for way in WAYS:
        figures[way] = {
            "tokens_per_second": median(lambda r: r[way]["tokens"] / r[way]["seconds"]),
            "seconds": median(lambda r: r[way]["seconds"]),
            "cpu_seconds": median(lambda r: r[way]["cpu_seconds"]),
        }
        if way != "pipeline":
            # The tokens are those of the pipeline, up to rounding; those used are fewer.
            figures[way]["pipeline_ratio"] = median(
                lambda r: (
                    (r[way]["seconds"] / r["pipeline"]["seconds"])
                    * (1 if way == "used at once" else r["pipeline"]["tokens"] / r[way]["tokens"])
                )
            )
        ratio = figures[way].get("pipeline_ratio", 1.0)
        print(
            f"  {way:14s} {figures[way]['tokens_per_second']:7.0f} tokens/s {figures[way]['seconds']:7.2f} s "
            f"{figures[way]['cpu_seconds']:7.2f} s of CPU; pipeline {ratio:.2f} x"
        )
    figures["surplus_token_share"] = median(lambda r: r["counts"]["surplus_token_share"])
    print(
        json.dumps(
            {
                "benchmark": "rollout_pipeline",
                "figures": figures,
                "goal": f"pipeline >= {GOAL} of all at once",
                "holds": figures["all at once"]["pipeline_ratio"] >= GOAL,
            }
        )
    )


if __name__ == "__main__":
    main()
