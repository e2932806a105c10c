"""Evaluation: pass@k, cut prompts, scores of benchmarks.

Decided: unbiased pass@k; the rule check of text is used.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any

from spell_megatron.evaluation.pass_at_k import pass_at_k
from spell_megatron.evaluation.prompt_cut import middle_truncate
from spell_megatron.selfplay import parsing, scoring
from vectors.answers import covered
from vectors.functions import function
from vectors.numbers import as_written, decide_match
from vectors.only_reference import token_f1


@function("eval.pass_at_k_unbiased")
def _(input: dict) -> Any:
    return pass_at_k(input["n"], input["c"], input["k"])


def decide_best_at_k(input: dict, expected: dict) -> dict:
    n, wrong = len(input["scores"]), input["scores"].count(0)
    decided = {}
    for key in expected:
        kind, k = re.match(r"(mean|best)@([0-9]+)", key).groups()
        every_wrong = math.prod(Fraction(wrong - i, n - i) for i in range(int(k)))
        decided[key] = expected[key] if kind == "mean" else float(1 - max(every_wrong, 0))
    return decided


@function("eval.bootstrap_best_at_k", decide_best_at_k)
def _(input: dict) -> Any:
    n, right = len(input["scores"]), sum(input["scores"])
    ks = [*(k for k in (2, 4, 8, 16, 32, 64) if k < n), n]  # those that the reference reports
    best = {f"best@{k}/mean": pass_at_k(n, right, k) for k in ks}
    return {f"mean@{n}": pass_at_k(n, right, 1), **best}


@function("eval.middle_truncate")
def _(input: dict) -> Any:
    return middle_truncate(input["tokens"], input["max_len"])


EVALUATION_NAMES = {name: f"longbench-{name}" for name in ("2wikimqa", "hotpotqa", "musique")}


def decide_evaluation(input: dict, expected: dict) -> dict:
    kind = scoring.answer_kind(EVALUATION_NAMES.get(input["task"], input["task"]))
    if kind == "number":
        prediction = as_written(input["response"], expected["pred"])
        known = expected["judge"] if prediction == expected["pred"] else {}
        return {
            **expected,
            "pred": prediction,
            "judge": decide_match(prediction, input["ground_truth"], known),
        }
    if kind == "letter":
        return expected
    score = int(expected["pred"] is not None and covered(expected["pred"], input["ground_truth"]))
    f1 = 0.0 if expected["pred"] is None else expected["f1_score"]
    return {**expected, "judge": score, "em_score": score, "f1_score": f1}


@function("eval.process_answer", decide_evaluation)
def _(input: dict) -> Any:
    task, reference = EVALUATION_NAMES.get(input["task"], input["task"]), input["ground_truth"]
    prediction = parsing.parse_answer(task, input["response"], truncated=False)
    score = scoring.rule_score(task, prediction, reference)
    result = {"pred": prediction, "judge": score, "em_score": None, "f1_score": None}
    if scoring.answer_kind(task) == "text":
        f1 = 0.0 if prediction is None else token_f1(prediction, reference)[0]
        result.update(em_score=score, f1_score=f1)
    return result
