"""How much of an update is hidden behind its rollout, and how much shorter does that make a step?

    python benchmarks/overlap.py [--quick] [--steps N]

The quick start, whose engine and trainer have one thread and one core each. In one run, steps whose update waits for
the end of the rollout and steps whose update begins during it take turns, after one of each that does not count.
Printed are, of both kinds, medians of the rollout, of the update and of the whole step without checkpoint and
validation; and the share of the hideable time, which is the shorter of rollout and update, that was hidden. A third
core, if there is one, is for self-play; with two it shares the engine's.

Then the same for the recipe of 100,000 tokens, simulated: the times are those of `spell plan`, the ends of the groups
those of the overlapping steps above, stretched to the rollout's length. The last line is one JSON object; `holds` says
whether the goals were met.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from spell_megatron import leader, train
from spell_megatron.config.reading import load_config
from spell_megatron.config.schema import Config
from spell_megatron.director.messages import Certain
from spell_megatron.director.remote import RemoteDirector
from spell_megatron.processes.channel import Channel

ROOT = Path(__file__).parents[1]
KEY = "SPELL_API_KEY"
ONE_THREAD = ("--rollout.threads=1", "--training.threads=1", "--checkpoint.every=1000", "--validation.questions=null")
QUICK = ("--selfplay.groups=10", "--selfplay.clusters_per_round=30")
GOALS = {"hidden": 0.8, "step": 0.82}
RECIPE = ROOT / "examples" / "qwen3_30b_a3b_thinking_100k.yaml"


def cores() -> tuple[set[int], set[int], set[int]]:
    """For the trainer, for the engine, and for self-play."""
    first, *others = sorted(os.sched_getaffinity(0))
    if not others:
        sys.exit("benchmarks/overlap.py needs two cores: one for the engine, one for the trainer.")
    return {first}, {others[0]}, set(others[1:]) or {others[0]}


@contextmanager
def engine(settings: Sequence[str], core: set[int]):
    """The address of an engine on one core, which other processes of this machine may use."""
    os.environ.setdefault(KEY, "benchmark")
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, core)  # what is started inherits it
    process = subprocess.Popen(
        [sys.executable, "-m", "spell_megatron", "engines", "--config", "examples/quickstart.yaml", *settings],
        stdout=subprocess.PIPE,
        text=True,
    )
    os.sched_setaffinity(0, before)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("ready: "):
                yield line.split("=", 1)[1].strip()
                return
        sys.exit("The engine has not started; what it said last is above.")
    finally:
        process.terminate()
        process.wait()


class Turns:
    """Has the steps of a run wait and overlap in turn, and notes when groups became certain."""

    def __init__(self, own_cores: set[int]) -> None:
        self.certain: dict[int, list[float]] = {}
        """By step: seconds after its beginning."""
        roll_out, receive, start = leader.Leader.roll_out, Channel.receive, RemoteDirector.__init__
        began = [0, 0.0]

        def in_turn(self_: Any, step: int) -> Any:
            self_._overlap = step % 2 == 0
            began[:] = step, leader.time.monotonic()
            self.certain[step] = []
            return roll_out(self_, step)

        def noted(self_: Any) -> Any:
            message, arrays = receive(self_)
            if isinstance(message, Certain):
                self.certain[int(began[0])].append(leader.time.monotonic() - began[1])
            return message, arrays

        def placed(self_: Any, *args: Any, **kwargs: Any) -> None:
            start(self_, *args, **kwargs)
            psutil.Process(self_.process.pid).cpu_affinity(sorted(own_cores))

        leader.Leader.roll_out = in_turn  # type: ignore[method-assign]
        Channel.receive = noted  # type: ignore[method-assign]
        RemoteDirector.__init__ = placed  # type: ignore[method-assign]


def work(row: dict[str, float]) -> float:
    """Seconds of a step without what is not in every step."""
    return row["time/step"] - row.get("time/checkpoint", 0.0)


def measured(folder: Path) -> dict[str, Any]:
    """Figures of the run, whose steps took turns."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][3:]
    waiting = [row for row in rows if row["step"] % 2]
    overlapping = [row for row in rows if row["step"] % 2 == 0]
    hideable = [min(row["time/rollout"], row["train/seconds"]) for row in overlapping]
    figures = {
        f"{kind}_{name}": round(statistics.median(work(row) if name == "step" else row[key] for row in some), 2)
        for kind, some in (("waiting", waiting), ("overlapping", overlapping))
        for name, key in (("rollout", "time/rollout"), ("update", "train/seconds"), ("step", "time/step"))
    }
    hidden = sum(row["time/hidden"] for row in overlapping) / sum(hideable)
    step = statistics.median(map(work, overlapping)) / statistics.median(map(work, waiting))
    early = sum(row["batch/responder/rows"] for row in rows) / sum(
        row.get(f"batch/{role}/rows", 0) for row in rows for role in ("questioner", "responder", "verifier")
    )
    return figures | {"hidden": round(hidden, 3), "step": round(step, 3), "early_rows": round(early, 3)}


def simulated(
    ends: Sequence[float], settings: Config, ranks: int, rollout: float, update: float, early: float
) -> float:
    """The share of the hideable time that would be hidden.

    Args:
        ends: when groups became certain, as shares of their rollouts, in order.
        ranks: microbatches that a call needs, each of one group.
        rollout, update: seconds of both.
        early: share of the update that is of the groups' answers.
    """
    groups = settings.selfplay.groups
    times = [rollout * ends[i * len(ends) // groups] for i in range(groups)]
    cost, now, hidden = update * early / groups, 0.0, 0.0
    for last in range(ranks - 1, groups, ranks):
        start = max(now, times[last])
        now = start + cost * ranks
        hidden += max(0.0, min(now, rollout) - start)
    return hidden / min(rollout, update)


def recipe(ends: Sequence[float]) -> dict[str, float]:
    """The recipe of 100,000 tokens: the planner's times in minutes, and what would be hidden."""
    from spell_megatron.planner.gpus import Assumptions, find_gpu
    from spell_megatron.planner.model_size import ModelSize
    from spell_megatron.planner.plan import make_plan
    from spell_megatron.training.policy import PolicyModel

    config, assume = load_config(RECIPE), Assumptions(8, None)
    model = ModelSize.of(PolicyModel.load(config.model.path, config.model.dtype))
    parallel = config.training.parallel
    plan = make_plan(model, config, parallel.processes, find_gpu("H100-80G"), assume).times
    rollout, update = plan.rollout, plan.update
    early = plan.hidden / update  # of the answers
    ranks = parallel.processes // parallel.dense_ranks
    hidden = simulated(ends, config, ranks, rollout, update, early)
    return {
        "rollout_minutes": rollout / 60,
        "update_minutes": update / 60,
        "early_share": early,
        "hidden": hidden,
        "step_minutes": (plan.waiting - hidden * min(rollout, update)) / 60,
        "waiting_step_minutes": plan.waiting / 60,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10 groups instead of 40, 4 steps")
    parser.add_argument("--steps", type=int, help="of each kind (default 5, of --quick 2)")
    options = parser.parse_args()
    os.chdir(ROOT)
    trainer, engines, selfplay = cores()
    settings = [*ONE_THREAD, *(QUICK if options.quick else ())]
    steps = 2 * (1 + (options.steps or (2 if options.quick else 5)))
    turns = Turns(selfplay)
    with tempfile.TemporaryDirectory() as runs, engine([*settings, f"--run.output_dir={runs}"], engines) as urls:
        os.sched_setaffinity(0, trainer)
        overrides = [f"--run.output_dir={runs}", "--run.name=turns", f"--run.steps={steps}", f"--rollout.urls={urls}"]
        train.run(load_config("examples/quickstart.yaml", [*settings, *overrides]))
        figures = measured(Path(runs) / "turns")
        rows = [json.loads(line) for line in (Path(runs) / "turns" / "metrics.jsonl").read_text().splitlines()]
    rollouts = {row["step"]: row["time/rollout"] for row in rows if row["step"]}
    ends = sorted(min(t / rollouts[step], 1.0) for step, times in turns.certain.items() for t in times)
    planned = {name: round(value, 3) for name, value in recipe(ends).items()}
    for kind in ("waiting", "overlapping"):
        parts = ", ".join(f"{name} {figures[f'{kind}_{name}']:.1f} s" for name in ("rollout", "update", "step"))
        print(f"{kind:<12} {parts}")
    print(f"hidden {figures['hidden']:.0%} of the hideable time; a step takes {figures['step']:.2f} of waiting")
    print("recipe of 100,000 tokens, simulated: " + ", ".join(f"{name} {value}" for name, value in planned.items()))
    holds = figures["hidden"] >= GOALS["hidden"] and figures["step"] <= GOALS["step"] and planned["hidden"] >= 0.85
    goal = GOALS | {"recipe_hidden": 0.85}
    result = {"benchmark": "overlap", "figures": figures, "recipe": planned, "goal": goal, "holds": holds}
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
