"""Answers of text and letters, rewards by data source, and what follows the thinking.

Decided: strict cover exact match only; a reference of which nothing is left matches nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from spell_megatron.selfplay import parsing, scoring
from vectors.functions import LETTER, TEXT, compute_score, function
from vectors.only_reference import token_f1


def words(text: str) -> str:
    text = "".join(c for c in text.lower() if c not in r"""!"#$%&'()*+,-./:;<=>?@[\]^_`{|}~""")
    return " ".join(w for w in re.sub(r"\b(a|an|the)\b", " ", text).split())


def decide_cover(input: dict, expected: Any) -> Any:
    return expected if words(input["ground_truth"]) else False


@function("docqa.normalize_answer")
def _(input: dict) -> Any:
    return scoring.normalize_text(input["text"])


@function("docqa.sub_em_strict", decide_cover)
def _(input: dict) -> Any:
    return scoring.cover_exact_match(input["prediction"], input["ground_truth"])


def decide_loose(input: dict, expected: Any) -> Any:
    reference, prediction = words(input["ground_truth"]), words(input["prediction"])
    return bool(reference) and reference in prediction


@function("docqa.sub_em_loose", decide_loose)
def _(input: dict) -> Any:
    return scoring.cover_exact_match(input["prediction"], input["ground_truth"])


@function("docqa.extract_solution")
def _(input: dict) -> Any:
    region = parsing.answer_region(TEXT, input["text"])
    return "Empty" if region is None else region


@function("docqa.parse_model_answer")
def _(input: dict) -> Any:
    return None if input["text"] is None else parsing.extract_answer(TEXT, input["text"])


def decide_text_score(input: dict, expected: dict) -> dict:
    decided = dict(expected)
    if "answer is" not in input["ground_truth"]:
        decided["gt"] = input["ground_truth"]
    prediction, reference = words(decided["pred"] or ""), words(decided["gt"] or "")
    if decided["gt"] != expected["gt"] and prediction:
        common = sum((Counter(prediction.split()) & Counter(reference.split())).values())
        decided["weight"] = 2 * common / (len(prediction.split()) + len(reference.split()))
        decided["score"] = float(bool(reference) and reference in prediction)
    elif input.get("metric") != "sub_em_strict" or not reference:
        decided["score"] = float(bool(reference) and reference in prediction)
    return decided


@function("docqa.compute_score", decide_text_score)
def _(input: dict) -> Any:
    result = compute_score(TEXT, input)
    both = result["pred"] is not None and result["gt"] is not None
    result["weight"] = token_f1(result["pred"], result["gt"])[0] if both else 0
    return result


@function("mc.parse_model_answer")
def _(input: dict) -> Any:
    return None if input["text"] is None else parsing.extract_answer(LETTER, input["text"])


def decide_letter_score(input: dict, expected: dict) -> dict:
    if "answer is" in input["ground_truth"]:
        return expected
    return {**expected, "gt": input["ground_truth"], "score": int(expected["pred"] == input["ground_truth"])}


@function("mc.compute_score", decide_letter_score, ignored=["weight"])
def _(input: dict) -> Any:
    return compute_score(LETTER, input)


@function("reward_router")
def _(input: dict) -> Any:
    return {"number": "docmath", "text": "docqa", "letter": "long"}[scoring.answer_kind(input["data_source"])]


@function("generic.extract_solution")
def _(input: dict) -> Any:
    text = parsing.after_thinking(input["text"])
    return "Empty" if text is None else text
