"""Answers of text and letters, rewards by data source, and what follows the thinking.

Decided: the answer stated last counts, in any case, with or without a colon, after a phrase or in a box; the whole text
after the thinking is read; a letter may stand alone and be lower-case, but not be part of a word. A text is compared
word by word: points stay in numbers, other punctuation separates, accents and quotes have one form. Strict cover exact
match only; a reference of which nothing is left matches nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from spell_megatron.selfplay import parsing, scoring, texts
from vectors.functions import LETTER, TEXT, compute_score, function
from vectors.only_reference import token_f1, words


def decided_words(text: str) -> list[str]:
    """The words by which we compare: numbers with their points, no articles but as the last word."""
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3})", "", text.lower().replace("’", "'").replace("&", " and "))
    text = re.sub(r"(?<=[a-z])\.(?=[a-z])", "", text)
    found = re.findall(r"[0-9]+(?:\.[0-9]+)*|[^\W_]+(?:'s)?", re.sub(r"(?<=[0-9])\s*percent", "", text))
    return [word for word in found[:-1] if word not in ("a", "an", "the")] + found[-1:]


def covered(prediction: str, reference: str) -> bool:
    """Whether the words of the reference stand in the prediction, one after the other."""
    ours, theirs = decided_words(prediction), decided_words(reference)
    places = range(len(ours) - len(theirs) + 1)
    return bool(theirs) and any(ours[place : place + len(theirs)] == theirs for place in places)


@function("docqa.normalize_answer", lambda input, expected: " ".join(decided_words(input["text"])))
def _(input: dict) -> Any:
    return texts.normalize_text(input["text"])


def decide_cover(input: dict, expected: Any) -> Any:
    return covered(input["prediction"], input["ground_truth"])


@function("docqa.sub_em_strict", decide_cover)
def _(input: dict) -> Any:
    return texts.cover_exact_match(input["prediction"], input["ground_truth"])


@function("docqa.sub_em_loose", decide_cover)
def _(input: dict) -> Any:
    return texts.cover_exact_match(input["prediction"], input["ground_truth"])


def decide_region(input: dict, expected: Any) -> Any:
    """All that follows the thinking, where the reference takes the end of a text without a phrase."""
    text = input["text"].rpartition("</think>")[2]
    return expected if "<think>" in text else text.strip()


@function("docqa.extract_solution", decide_region)
def _(input: dict) -> Any:
    region = parsing.after_thinking(input["text"])
    return "Empty" if region is None else region


def decide_text(input: dict, expected: Any) -> Any:
    """The line after the last phrase, without marks around it."""
    stated = re.findall(r"answer is[:\s]*([^\n]+)", (input["text"] or "").replace("*", ""), re.IGNORECASE)
    last = re.split(r"answer is[:\s]*", stated[-1], flags=re.IGNORECASE)[-1].strip(" .") if stated else ""
    return None if not last or "insert answer here" in last else last


@function("docqa.parse_model_answer", decide_text)
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
    decided["score"] = float(covered(decided["pred"] or "", decided["gt"] or ""))
    return decided


@function("docqa.compute_score", decide_text_score)
def _(input: dict) -> Any:
    result = compute_score(TEXT, input)
    both = result["pred"] is not None and result["gt"] is not None
    result["weight"] = token_f1(result["pred"], result["gt"])[0] if both else 0
    return result


def decide_letter(input: dict, expected: Any) -> Any:
    """The last letter after a phrase or in a box that is no part of a word; a letter that is the whole text."""
    text = re.sub(" because .*", "", (input["text"] or "").replace("*", "").strip())
    stated = r"(?:answer is:? |\\boxed\{)\(?([A-D](?!\w)|[a-d](?=[).}]|$))"
    found = re.findall(stated, text, re.IGNORECASE) if text.upper() not in tuple("ABCD") else [text]
    return found[-1].upper() if found and not re.search(rf"{found[-1]} [a-z]", text) else None


@function("mc.parse_model_answer", decide_letter)
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
