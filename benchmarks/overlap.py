"""How much of an update is hidden behind its rollout, and how much shorter does that make a step?

    python benchmarks/overlap.py [--quick] [--shuffled] [--steps N] [--recipe]

The quick start, whose engine and trainer have one thread and one core each. In one run, steps whose update waits for
the end of the rollout and steps whose update begins during it take turns, after one of each that does not count.
Printed are, of both kinds, medians of the rollout, of the update and of the whole step without checkpoint and
validation; and the share of the hideable time, which is the shorter of rollout and update, that was hidden. A third
core, if there is one, is for self-play; with two it shares the engine's.

Questions cannot be hidden: their advantages depend on all questions of their task. What could be hidden at best is the
share of the other rows in the FLOPs of an update. In the quick start, questions are a third of an update, and an update
is a small part of a step. With --shuffled each answer sees the documents in an order of its own. Then answers share no
prompt: an update is a third of a step, and 6 % of it are questions. The engine has 32 requests at a time, as with long
documents; with all at once most groups would end together, at the end of the rollout.

Then the same for the recipe of 100,000 tokens, simulated with the times and lengths that `spell plan` assumes (see
benchmarks/simulated_step.py), the mean of several seeds; --recipe: only this. The last line is one JSON object; `holds`
says whether the goals were met.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from simulated_step import certain_groups

from spell_megatron import leader, train
from spell_megatron.config.reading import load_config
from spell_megatron.config.schema import Config
from spell_megatron.director.messages import Certain, RolledOut, unpack_rows
from spell_megatron.director.remote import RemoteDirector
from spell_megatron.planner.gpus import Assumptions, find_gpu
from spell_megatron.planner.model_size import ModelSize
from spell_megatron.planner.plan import make_plan
from spell_megatron.processes.channel import Channel
from spell_megatron.training.cost import training_cost
from spell_megatron.training.policy import PolicyModel
from spell_megatron.training.prefix_tree import pack

ROOT = Path(__file__).parents[1]
KEY = "SPELL_API_KEY"
ONE_THREAD = ("--rollout.threads=1", "--training.threads=1", "--checkpoint.every=1000", "--validation.questions=null")
QUICK = ("--selfplay.groups=10", "--selfplay.clusters_per_round=30")
SHUFFLED = (
    "--selfplay.responder.shuffle_documents=true",
    "--selfplay.groups=20",
    "--selfplay.clusters_per_round=60",
    "--rollout.concurrency=32",
)
GOALS = {"hidden": 0.8, "step": 0.82, "recipe_hidden": 0.85}
SEEDS = 10
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
    """Has the steps of a run wait and overlap in turn, and notes how much work comes before the end of a rollout."""

    def __init__(self, config: Config, own_cores: set[int]) -> None:
        self.work: dict[type, float] = {Certain: 0.0, RolledOut: 0.0}
        """FLOPs of the rows that came early, and of those that came last."""
        policy = PolicyModel.load(config.model.path, config.model.dtype)
        cost, max_tokens = training_cost(policy.arch), config.training.tokens_per_microbatch
        roll_out, receive, start = leader.Leader.roll_out, Channel.receive, RemoteDirector.__init__
        overlapping = [False]

        def in_turn(self_: Any, step: int) -> Any:
            self_._overlap = overlapping[0] = step % 2 == 0
            return roll_out(self_, step)

        def noted(self_: Any) -> Any:
            message, arrays = receive(self_)
            if isinstance(message, Certain | RolledOut) and overlapping[0]:
                trees = pack(unpack_rows(message.rows, arrays), max_tokens)
                self.work[type(message)] += sum(map(cost.of, trees))
            return message, arrays

        def placed(self_: Any, *args: Any, **kwargs: Any) -> None:
            start(self_, *args, **kwargs)
            psutil.Process(self_.process.pid).cpu_affinity(sorted(own_cores))

        leader.Leader.roll_out = in_turn  # type: ignore[method-assign]
        Channel.receive = noted  # type: ignore[method-assign]
        RemoteDirector.__init__ = placed  # type: ignore[method-assign]

    @property
    def early(self) -> float:
        """Share of the work that comes before the end of a rollout."""
        return self.work[Certain] / sum(self.work.values())


def work(row: dict[str, float]) -> float:
    """Seconds of a step without what is not in every step."""
    return row["time/step"] - row.get("time/checkpoint", 0.0)


def measured(folder: Path, early: float) -> dict[str, Any]:
    """Figures of the run, whose steps took turns, and of whose updates a share can begin `early`."""
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
    best = min(1.0, early * sum(row["train/seconds"] for row in overlapping) / sum(hideable))
    step_at_best = 1 - best * min(figures["waiting_rollout"], figures["waiting_update"]) / figures["waiting_step"]
    shares = {"hidden": hidden, "hidden_at_best": best, "step": step, "step_at_best": step_at_best}
    return figures | {name: round(share, 3) for name, share in shares.items()}


def hidden_seconds(times: Sequence[float], end: float, ranks: int, cost: float) -> float:
    """Seconds of work on groups before the end of their rollout.

    Args:
        times: when groups became certain, in order.
        ranks: microbatches that a call needs, each of one group.
        cost: seconds of a group's work.
    """
    now = hidden = 0.0
    done = 0
    while done + ranks <= len(times):
        start = max(now, times[done + ranks - 1])
        ready = bisect_right(times, start) - done  # a call takes all that have come
        now, done = start + cost * ready, done + ready
        hidden += max(0.0, min(now, end) - start)
    return hidden


def recipe() -> dict[str, float]:
    """The recipe of 100,000 tokens by the planner's figures: minutes, and what is hidden of the hideable time."""
    config, assume = load_config(RECIPE), Assumptions(8, None)
    model = ModelSize.of(PolicyModel.load(config.model.path, config.model.dtype))
    parallel = config.training.parallel
    plan = make_plan(model, config, parallel.processes, find_gpu("H100-80G"), assume)
    update, early = plan.times.update, plan.times.hidden / plan.times.update
    cost, ranks = update * early / config.selfplay.groups, parallel.processes // parallel.dense_ranks
    simulated = [certain_groups(plan, model.cost, seed) for seed in range(SEEDS)]
    seconds = [hidden_seconds(times, end, ranks, cost) for times, end in simulated]
    rollout, hidden = statistics.mean(end for _, end in simulated), statistics.mean(seconds)
    waiting = rollout + update + plan.times.push
    return {
        "rollout_minutes": rollout / 60,
        "update_minutes": update / 60,
        "hidden": hidden / min(rollout, update),
        "hidden_at_best": early * update / min(rollout, update),
        "step_minutes": (waiting - hidden) / 60,
        "waiting_step_minutes": waiting / 60,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10 groups instead of 40, 4 steps")
    parser.add_argument(
        "--shuffled", action="store_true", help="20 groups whose answers share no prompt, 32 requests at a time"
    )
    parser.add_argument("--steps", type=int, help="of each kind (default 5, of --quick 2)")
    parser.add_argument("--recipe", action="store_true", help="only the simulated recipe")
    options = parser.parse_args()
    os.chdir(ROOT)
    settings = (*(QUICK if options.quick else ()), *(SHUFFLED if options.shuffled else ()))
    figures = {} if options.recipe else run(settings, options.steps or (2 if options.quick else 5))
    planned = {name: round(value, 3) for name, value in recipe().items()}
    print("recipe of 100,000 tokens, simulated: " + ", ".join(f"{name} {value}" for name, value in planned.items()))
    holds = planned["hidden"] >= GOALS["recipe_hidden"]
    if figures:
        holds &= figures["hidden"] >= GOALS["hidden"] and figures["step"] <= GOALS["step"]
    print(json.dumps({"benchmark": "overlap", "figures": figures, "recipe": planned, "goal": GOALS, "holds": holds}))
    return 0


def run(settings: Sequence[str], steps: int) -> dict[str, Any]:
    """The figures of the quick start with `settings`, with so many steps of each kind that count."""
    trainer, engines, selfplay = cores()
    settings = [*ONE_THREAD, *settings]
    turns = Turns(load_config("examples/quickstart.yaml", settings), selfplay)
    with tempfile.TemporaryDirectory() as runs, engine([*settings, f"--run.output_dir={runs}"], engines) as urls:
        os.sched_setaffinity(0, trainer)
        overrides = [f"--run.output_dir={runs}", "--run.name=turns", f"--run.steps={2 * (1 + steps)}"]
        train.run(load_config("examples/quickstart.yaml", [*settings, *overrides, f"--rollout.urls={urls}"]))
        figures = measured(Path(runs) / "turns", turns.early)
    for kind in ("waiting", "overlapping"):
        parts = ", ".join(f"{name} {figures[f'{kind}_{name}']:.1f} s" for name in ("rollout", "update", "step"))
        print(f"{kind:<12} {parts}")
    print(
        f"hidden {figures['hidden']:.0%} of the hideable time, at best {figures['hidden_at_best']:.0%}; "
        f"a step takes {figures['step']:.2f} of waiting, "
        f"at best {figures['step_at_best']:.2f}"
    )
    return figures


if __name__ == "__main__":
    sys.exit(main())
