"""What does self-play teach a tiny policy, and which settings teach it most? Trains, evaluates, compares.

    python examples/evidence/run.py [--out runs/evidence] [--seeds 3] [--updates 24] [--jobs 2] [--arms NAME ...]
    python examples/evidence/run.py --world rich --out runs/rich ...
    python examples/evidence/run.py --summary [--world ...] [--out runs/evidence] [--seeds 3]

Every arm is trained from the same weights for the same number of updates, once per seed, and its last checkpoint
answers the 500 held-out questions of its world 8 times each; so does the policy they all start from. The world is the
quick start's, or the rich one (examples/evidence/rich), where an answer counts in any of its names. All train on
the first 300 clusters of the world's documents, so that each is met again and its history counts. Arms:

    recipe             the released recipe: the history shows the questioner all documents it asked about, no gate
    new_documents      the history shows only the documents that were new to each remembered question (the paper's text)
    solved_only        the history holds the solved questions alone, as examples
    no_history         the questioner never sees what was asked before
    gate               the recipe with the gate: a question is used only if answers from its documents confirm it
    gate_new_documents, gate_solved_only, gate_no_history     the gate with each kind of history
    gate_and_names     no history, the gate, and no questions about names that the documents do not hold
    rlvr               the baseline: one question with its right answer for each cluster, rewards by rule
    fixed_questioner   the recipe without the questioner's rows in the update
    fixed_verifier     the recipe without the verifier's rows in the update
    no_verifier        the recipe without judgments: rewards by rule

Killed and called again, it goes on where it was: a run that has begun is resumed, one that has ended is not run
again. It writes into the folder of --out: results.json, table.md (the arms, then what the roles did in the first and
in the last four updates) and curves.svg (held-out accuracy while training; needs matplotlib:
`pip install -e ".[bench]"`); `spell report` shows any of the runs. --summary does only that. The time of each run is
printed. docs/evidence.md says what came out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent))

from worlds import CLUSTERS, ROOT, WORLDS, Answers, World

from spell_megatron.evaluation.pass_at_k import pass_at_k
from spell_megatron.selfplay.parsing import parse_answer
from spell_megatron.selfplay.scoring import rule_score


def self_play(documents: str = "all", gate: bool = False, names: bool = False, **settings: object) -> list[str]:
    """Settings of an arm: what the history shows (`off`: there is no history), the two checks, others by their keys."""
    history = ["history=0"] if documents == "off" else ["history=3", f"history_documents={documents}"]
    return [
        *(f"--selfplay.questioner.{setting}" for setting in history),
        f"--selfplay.gate.enabled={str(gate).lower()}",
        f"--selfplay.questioner.known_names={str(names).lower()}",
        *(f"--{key.replace('__', '.')}={value}" for key, value in settings.items()),
    ]


ARMS = {
    "recipe": self_play(),
    "new_documents": self_play("new"),
    "solved_only": self_play("none"),
    "no_history": self_play("off"),
    "gate": self_play(gate=True),
    "gate_new_documents": self_play("new", gate=True),
    "gate_solved_only": self_play("none", gate=True),
    "gate_no_history": self_play("off", gate=True),
    "gate_and_names": self_play("off", gate=True, names=True),
    "rlvr": self_play(selfplay__questioner__enabled="false", selfplay__verifier__enabled="false"),
    "fixed_questioner": self_play(training__role_weights="{questioner: 0}"),
    "fixed_verifier": self_play(training__role_weights="{verifier: 0}"),
    "no_verifier": self_play(selfplay__verifier__enabled="false"),
}
"""What differs from the world's configuration; rlvr has other `data.documents` too."""
START, SAMPLES, RESAMPLES = "start", 8, 4000
KS = (1, 8)
BASES = (START, "recipe", "rlvr")
SPAN = 4
"""Updates that the roles are looked at over, at the start and at the end of a run."""


# ------------------------------------------------------------------------------------------ training and evaluation


def run(arm: str, seed: int, out: Path, updates: int, world: World) -> None:
    """Train one arm with one seed, unless it has been, and evaluate it, unless that has been done.

    Raises:
        RuntimeError: a command failed; with the end of what it printed.
    """
    folder, began = out / f"{arm}-{seed}", time.monotonic()
    if arm != START and not (folder / "checkpoints" / f"step_{updates:06d}" / "hf").exists():
        if (folder / "checkpoints" / "latest").exists():
            spell(folder, "train", "--resume", folder, f"--run.steps={updates}")
        else:
            spell(
                *(folder, "train", "--config", world.config, f"--run.output_dir={out}", f"--run.name={folder.name}"),
                *(f"--run.seed={seed}", f"--run.steps={updates}", "--rollout.threads=1", "--training.threads=1"),
                *("--validation.every=4", "--validation.limit=250", "--checkpoint.keep=1"),
                f"--data.documents={out / ('questions.jsonl' if arm == 'rlvr' else 'documents.parquet')}",
                *ARMS[arm],
            )
    scored = out / f"{folder.name}-answers"
    if not (scored / "scores.json").exists():
        model = world.policy if arm == START else folder / "checkpoints" / f"step_{updates:06d}"
        spell(
            *(scored, "evaluate", "--model", model, "--config", world.config, f"--run.seed={seed}"),
            *("--benchmark", f"heldout={world.heldout}", "--samples", SAMPLES, "--out", scored, "--rollout.threads=1"),
            *("--max-input", 900, "--max-output", 48, *(["--aliases"] if world.synonyms else [])),
        )
    print(f"{folder.name}: {time.monotonic() - began:.0f} s", flush=True)


def spell(name: Path, *arguments: object) -> None:
    """Run a command of `spell`; what it prints goes to NAME.log."""
    command = [sys.executable, "-m", "spell_megatron", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    log = name.with_name(f"{name.name}.log")
    with log.open("ab") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT).returncode
    if code:
        raise RuntimeError(f"{log} ends with:\n{log.read_text(errors='replace')[-1500:]}")


# ------------------------------------------------------------------------------------------ summary


def rows_of(file: Path) -> list[dict[str, Any]]:
    """What the lines of a file of JSON hold."""
    with file.open(encoding="utf-8") as lines:
        return list(map(json.loads, lines))


def right_answers(folder: Path, heldout: Path, aliases: bool = True) -> np.ndarray:
    """Number of right answers to each held-out question, [questions], of the samples of an evaluation.

    Without `aliases` only the first reference of a question counts, not its other names.
    """
    questions = {str(row["id"]): row for row in rows_of(heldout)}
    right = dict.fromkeys(questions, 0)
    for row in rows_of(folder / "samples.jsonl"):
        question = questions[row["id"]]
        prediction = parse_answer(question["task"], row["text"], row["cut"])
        references = (question["answer"], *(question.get("aliases", ()) if aliases else ()))
        right[row["id"]] += matches(question["task"], prediction, references)
    return np.array(list(right.values()))


def matches(task: str, prediction: str | None, references: Iterable[str]) -> bool:
    """Whether an answer passes the rule check against one of some references."""
    return any(rule_score(task, prediction, reference) for reference in references)


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of [seeds, questions]: seeds and questions are drawn with replacement."""
    rng = np.random.default_rng(0)
    seeds, questions = values.shape
    means = [
        values[rng.integers(seeds, size=seeds)][:, rng.integers(questions, size=questions)].mean()
        for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def summary(out: Path, seeds: Iterable[int], world: World) -> dict:
    """pass@1 and pass@8 of every arm of which all seeds are there, and how much more that is than of each of BASES,
    question by question and seed by seed.

    Returns {arm: {"pass@k": {mean, low, high, seeds: [...], "over start", "over recipe", ...: {mean, low, high}},
    "curve": [(update, pass@1)], "roles": {"first" or "last": {what: number}}}}. Where answers have several names, also
    "pass@1 by rule": {mean, low, high}, with the first name alone.
    """
    answers = world.answers()
    table = np.array([[pass_at_k(SAMPLES, c, k) for c in range(SAMPLES + 1)] for k in KS])
    measured: dict[str, np.ndarray] = {}  # [ks, seeds, questions]
    curves: dict[str, list[tuple[int, float]]] = {}
    for arm in (START, *ARMS):
        folders = [out / f"{arm}-{seed}-answers" for seed in seeds]
        if all((folder / "scores.json").exists() for folder in folders):
            measured[arm] = table[:, np.stack([right_answers(folder, world.heldout) for folder in folders])]
            curves[arm] = [] if arm == START else held_out_curve([out / f"{arm}-{seed}" for seed in seeds])
    results: dict = {}
    for arm, values in measured.items():
        runs = [out / f"{arm}-{seed}" for seed in seeds]
        updates = sorted(int(file.stem[5:]) for file in (runs[0] / "rollouts").glob("step_*.jsonl"))
        spans = {"first": updates[:SPAN], "last": updates[-SPAN:]}
        of_roles = {name: roles(runs, answers, some, world) for name, some in spans.items()}
        results[arm] = {"curve": curves[arm], "roles": {name: some for name, some in of_roles.items() if some}}
        for number, k in enumerate(KS):
            results[arm][f"pass@{k}"] = estimate(values[number]) | {
                "seeds": values[number].mean(1).tolist(),
                **{f"over {base}": estimate((values - measured[base])[number]) for base in BASES if base in measured},
            }
        if world.synonyms:
            folders = [out / f"{arm}-{seed}-answers" for seed in seeds]
            by_rule = np.stack([right_answers(folder, world.heldout, aliases=False) for folder in folders])
            results[arm]["pass@1 by rule"] = estimate(by_rule / SAMPLES)
    return results


def estimate(values: np.ndarray) -> dict[str, float]:
    low, high = interval(values)
    return {"mean": float(values.mean()), "low": low, "high": high}


def held_out_curve(folders: Sequence[Path]) -> list[tuple[int, float]]:
    """(update, pass@1 on the 250 questions of the runs' own validation), mean over runs."""
    points: dict[int, list[float]] = {}
    for folder in folders:
        for row in rows_of(folder / "metrics.jsonl"):
            if "validation/pass@1" in row:
                points.setdefault(row["step"], []).append(row["validation/pass@1"])
    return [(step, float(np.mean(values))) for step, values in sorted(points.items())]


def roles(
    folders: Sequence[Path], answers: Mapping[str, Answers], updates: Iterable[int], world: World
) -> dict[str, float]:
    """What the roles did in these updates of some runs: means and shares over all that was written.

    Args:
        answers: those that the documents give, as of `World.answers`.
    """
    seen: dict[str, list[float]] = {}
    for file in (folder / "rollouts" / f"step_{update:06d}.jsonl" for folder in folders for update in updates):
        rows = rows_of(file)
        asked = {row["uid"]: row["prediction"] for row in rows if row["role"] == "questioner"}
        for row in rows:
            if row["role"] == "questioner":
                said = of_question(row, answers[row["cluster_id"]])
            elif row["role"] == "verifier" and row["verdict"] in (0, 1):
                said = of_vote(row, asked.get(row["uid"]), answers, world)
            else:
                continue
            for name, value in said.items():
                seen.setdefault(name, []).append(value)
    return {name: float(np.mean(seen[name])) for name in ORDER if name in seen}


MIXED, REFUSED = "questions with mixed answers", "questions that the gate refuses"
GIVEN, GIVEN_OF_MIXED = "references that the documents give", "... of questions with mixed answers"
BY_RULE = {1: "votes YES on answers right by the rule", 0: "votes YES on answers wrong by the rule"}
IN_DOCUMENTS = {1: "votes YES on answers that the documents give", 0: "... on others"}
BY_NAME = {1: "votes YES on other names of the reference", 0: "... on answers that mean something else"}
ORDER = (
    MIXED,
    REFUSED,
    GIVEN,
    GIVEN_OF_MIXED,
    *(kind[right] for kind in (BY_RULE, IN_DOCUMENTS, BY_NAME) for right in (1, 0)),
)
"""What is counted of the roles, in the order of the table. Of the last four only where things have several names."""


def of_question(row: Mapping[str, Any], answers: Answers) -> dict[str, float]:
    """What a questioner's row adds to the counts."""
    kept = row["reward"] > 0
    counts = {MIXED: float(kept), REFUSED: float(row["outcome"] == "unconfirmed")}
    if row["prediction"] is not None:
        given = float(matches(row["task"], row["reference"], answers(row["prediction"].strip()) or ()))
        counts |= {GIVEN: given} | ({GIVEN_OF_MIXED: given} if kept else {})
    return counts


def of_vote(
    row: Mapping[str, Any], asked: str | None, answers: Mapping[str, Answers], world: World
) -> dict[str, float]:
    """What a valid vote adds to the counts; `asked` is the question, if it was asked in this run."""
    vote = row["verdict"]
    counts = {BY_RULE[int(row["rule_score"])]: vote}
    if not world.synonyms:
        return counts
    right = answers[row["cluster_id"]](asked.strip()) if asked else None
    if right is not None:
        counts[IN_DOCUMENTS[matches(row["task"], row["prediction"], right)]] = vote
    if not row["rule_score"]:
        counts[BY_NAME[matches(row["task"], row["prediction"], world.names(row["reference"]))]] = vote
    return counts


def as_table(results: Mapping[str, dict]) -> str:
    """The results as a Markdown table, in percent."""
    over = [f"over {base}" for base in BASES]
    heads = [head for k in KS for head in (f"pass@{k} (95 %)", *(["seeds"] if k == 1 else []), *over)]
    by_rule = [name for name in ("pass@1 by rule",) if all(name in result for result in results.values())]
    heads += by_rule
    lines = [f"| arm | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for arm, result in results.items():
        cells = []
        for k in KS:
            of = result[f"pass@{k}"]
            each = ", ".join(f"{100 * value:.1f}" for value in of["seeds"])
            cells += [spread(of), *([each] if k == 1 else [])]
            cells += [spread(of[name], "+") if name in of and name != f"over {arm}" else "–" for name in over]
        cells += [spread(result[name]) for name in by_rule]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    played = {arm: result["roles"] for arm, result in results.items() if result["roles"]}
    kinds = list(dict.fromkeys(kind for of in played.values() for part in of.values() for kind in part))
    lines += ["", f"| first and last {SPAN} updates | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    for arm, of in played.items():
        cells = [" → ".join(f"{100 * p[kind]:.0f}" if kind in p else "–" for p in of.values()) for kind in kinds]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def spread(of: Mapping[str, float], sign: str = "") -> str:
    mean, low, high = (f"{100 * of[name]:{sign}.1f}" for name in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def draw(results: Mapping[str, dict], file: Path) -> None:
    """Held-out accuracy over updates, a line for each arm."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "evidence"}
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for arm, result in results.items():
        if result["curve"]:
            steps, values = zip(*result["curve"], strict=True)
            axes.plot(steps, [100 * value for value in values], marker="o", label=arm)
    axes.set(xlabel="updates", ylabel="held-out questions answered rightly, %")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


# ------------------------------------------------------------------------------------------ command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=WORLDS, default="quickstart")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=24)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time; each wants a core and 3 GB")
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--summary", action="store_true", help="only compare what is there")
    options = parser.parse_args()
    if find_spec("matplotlib") is None:
        parser.error('the curves need matplotlib: pip install -e ".[bench]"')
    out, world = options.out.resolve(), WORLDS[options.world]
    out.mkdir(parents=True, exist_ok=True)
    if not options.summary:
        pq.write_table(pq.read_table(world.documents).slice(0, CLUSTERS), out / "documents.parquet")
        lines = (json.dumps(row) + "\n" for row in world.training_questions(CLUSTERS))
        (out / "questions.jsonl").write_text("".join(lines), encoding="utf-8")
        todo = [(arm, seed) for seed in range(options.seeds) for arm in (START, *options.arms)]
        with ThreadPoolExecutor(options.jobs) as pool:
            for done in [pool.submit(run, arm, seed, out, options.updates, world) for arm, seed in todo]:
                done.result()
    results = summary(out, range(options.seeds), world)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "table.md").write_text(as_table(results))
    draw(results, out / "curves.svg")
    print(as_table(results), end="")


if __name__ == "__main__":
    main()
