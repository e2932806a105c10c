"""What the roles did in each update of a run, and what it changed in the answers: the tables of README.md.

    python examples/evidence/smollm2/summary.py RUN [--answers BEFORE AFTER]

BEFORE and AFTER are folders of `spell evaluate` with the same questions and number of samples.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from run import estimate, right_answers, rows_of, spread  # noqa: E402

Row = Mapping[str, Any]

ROLES = ("questioner", "responder", "verifier")


def stands(question: Row) -> bool:
    """Whether the reference stands in the passages that the questioner read, word for word but for capitals."""
    passages = question["prompt"].rsplit("Passage:", 1)[1]
    reference, read = (" ".join(text.lower().split()).strip(" .") for text in (question["reference"], passages))
    return reference in read


def of_update(rows: Sequence[Row]) -> dict[str, str]:
    """What the table says of an update; rows as in `rollouts/step_*.jsonl` of a run."""
    asked, answers, votes = ([row for row in rows if row["role"] == role] for role in ROLES)
    read = [row for row in asked if row["prediction"] is not None]
    mixed = [row for row in asked if row["outcome"] == "mixed"]
    answers = [row for row in answers if row["outcome"] == "mixed"]
    votes = [row for row in votes if row["verdict"] in (0, 1)]
    return {
        "questions asked": str(len(asked)),
        "their JSON is read": str(len(read)),
        "of these, reference stands in the passage": _share(read),
        "confirmed by the gate": _share([row for row in read if row["outcome"] in ("mixed", "all_0", "all_1")]),
        "groups with mixed outcomes": _share(mixed),
        "share of their answers right by the rule": _mean(row["rule_score"] for row in answers),
        "mean responder reward": _mean(row["reward"] for row in answers),
        "mean questioner reward": _mean(row["reward"] for row in asked),
        "votes YES on answers right by the rule": _mean(row["verdict"] for row in votes if row["rule_score"]),
        "votes YES on answers wrong by the rule": _mean(row["verdict"] for row in votes if not row["rule_score"]),
    }


def _share(questions: Sequence[Row]) -> str:
    return f"{sum(map(stands, questions))} of {len(questions)}"


def _mean(values: Iterable[float]) -> str:
    numbers = list(values)
    return f"{np.mean(numbers):.2f}" if numbers else "–"


def table(run: Path) -> str:
    """A column for each update."""
    files = sorted((run / "rollouts").glob("step_*.jsonl"))
    columns = [of_update(rows_of(file)) for file in files]
    lines = [f"| update | {' | '.join(str(int(file.stem[5:])) for file in files)} |", "|---" * (len(files) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(column[name] for column in columns)} |" for name in columns[0]]
    return "\n".join(lines)


def difference(before: Path, after: Path) -> str:
    """How many more answers are right, question by question, with a 95 % bootstrap interval over questions."""
    shares = []
    for folder in (before, after):
        samples = json.loads((folder / "scores.json").read_text())["settings"]["samples"]
        shares.append(right_answers(folder, HERE / "heldout.jsonl") / samples)
    change = estimate((shares[1] - shares[0])[None])
    return f"pass@1 {100 * shares[0].mean():.1f} → {100 * shares[1].mean():.1f} %, {spread(change, '+')} points"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--answers", type=Path, nargs=2, metavar=("BEFORE", "AFTER"))
    options = parser.parse_args()
    print(table(options.run))
    if options.answers:
        print(difference(*options.answers))


if __name__ == "__main__":
    main()
