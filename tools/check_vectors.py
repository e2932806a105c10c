#!/usr/bin/env python
"""Run test vectors of the reference implementation against this package.

    python tools/check_vectors.py FILE

FILE is a JSON list of {function, input, expected, note}: what a function of the released SPELL code
returned for an input. Floats are rounded to 6 decimals (compared within 1e-5), "NaN" and "Infinity" are
strings, booleans equal 0 and 1, and {"raises": name} says that the reference raised.

For each function this script knows how to call ours (`run`) and, where the project decided to behave
otherwise than the reference (docs/algorithm.md), by which rule (`decide`: from input and the reference's
result to the result we want). A case passes if the wanted result is the reference's and ours equals it;
it is "decided otherwise" if the wanted result differs and ours equals it; anything else is a failure.
The rules are written apart from the package, so that they check it.

Prints each failure and, last, `N passed, M failed, K decided otherwise`. Exit status 1 if any failed.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import math
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from spell_megatron.config.schema import QuestionerConfig, SelfPlayConfig, VerifierConfig
from spell_megatron.evaluation.pass_at_k import pass_at_k
from spell_megatron.evaluation.prompt_cut import middle_truncate
from spell_megatron.selfplay import batch, context, parsing, prompts, rewards, sampler, scoring
from spell_megatron.selfplay.advantages import assign_advantages
from spell_megatron.selfplay.history import Entry, History
from spell_megatron.selfplay.outcomes import Outcome

NUMBER, TEXT, LETTER = "docmath_qa", "doc_general_qa", "doc_mc"


def as_reference(input: Any, expected: Any) -> Any:
    """The rule of functions in which we follow the reference."""
    return expected


class Function(NamedTuple):
    run: Callable[[Any], Any]
    decide: Callable[[Any, Any], Any] = as_reference
    ignored: frozenset[str] = frozenset()  # keys of the result that we have no concept of


FUNCTIONS: dict[str, Function] = {}


def function(name: str, decide: Callable[[Any, Any], Any] = as_reference, ignored: Sequence[str] = ()):
    def register(run: Callable[[Any], Any]) -> Callable[[Any], Any]:
        FUNCTIONS[name] = Function(run, decide, frozenset(ignored))
        return run

    return register


# ---------------------------------------------------------------- what only the reference computes
# This project has no use for these functions: rule checks decide instead of token F1, engines end a response at
# its first end of sequence, the trainer divides a sum over all tokens, and evaluations have averages of their own.
# They stand here so that every vector can be run.


def token_f1(prediction: str, reference: str) -> tuple[float, float, float]:
    """F1, precision and recall of the normalised words, as LongBench reports them.

    All are 0 when one side is yes, no or noanswer and the other is not the same.
    """
    predicted, expected = scoring.normalize_text(prediction), scoring.normalize_text(reference)
    if predicted != expected and {predicted, expected} & {"yes", "no", "noanswer"}:
        return 0.0, 0.0, 0.0
    found, wanted = predicted.split(), expected.split()
    common = (Counter(found) & Counter(wanted)).total()
    if not common:
        return 0.0, 0.0, 0.0
    precision, recall = common / len(found), common / len(wanted)
    return 2 * precision * recall / (precision + recall), precision, recall


@function("docqa.f1_score")
def _(input: dict) -> Any:
    return token_f1(input["prediction"], input["ground_truth"])


@function("response_mask")
def _(input: dict) -> Any:
    """1 up to and including the first end of sequence."""
    ends = {input["eos"]} if isinstance(input["eos"], int) else set(input["eos"])
    masks = []
    for ids in input["response_ids"]:
        length = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
        masks.append([int(i < length) for i in range(len(ids))])
    return masks


@function("agg_loss")
def _(input: dict) -> Any:
    """Padded losses of tokens, as one number."""
    rows = zip(input["loss"], input["mask"], strict=True)
    sums = [sum(x * m for x, m in zip(loss, mask, strict=True)) for loss, mask in rows]
    counts = [sum(mask) for mask in input["mask"]]
    match input["mode"]:
        case "token-mean":
            return sum(sums) / sum(counts)
        case "seq-mean-token-sum":
            return mean(sums)
        case "seq-mean-token-mean":
            return mean(total / count for total, count in zip(sums, counts, strict=True))
    raise ValueError(f"unknown mode {input['mode']!r}")


@function("eval.aggregate")
def _(input: dict) -> Any:
    """Mean score of every task over its questions, and the mean of the tasks."""
    tasks = {
        task: mean(mean(samples) for samples in questions.values())
        for task, questions in input["task_question_scores"].items()
    }
    return {**tasks, "overall": mean(tasks.values())}


@function("train_validation.aggregate")
def _(input: dict) -> Any:
    """Mean score of every task over its questions, and the mean of all questions."""
    samples: dict[tuple[str, str], list[float]] = {}
    for task, question, score in input["rows"]:
        samples.setdefault((task, question), []).append(score)
    tasks: dict[str, list[float]] = {}
    for (task, _), values in samples.items():
        tasks.setdefault(task, []).append(mean(values))
    means = {task: mean(values) for task, values in tasks.items()}
    return {**means, "overall": mean(itertools.chain(*tasks.values()))}


# ---------------------------------------------------------------- numbers
# Decided: arithmetic only, nothing is executed; what is no finite number (also yes and no, option letters,
# lists) matches nothing; signs count; scientific notation is read and never written; commas go only
# where they separate thousands; leading zeros do no harm; ^ is a power.

UNPARSABLE = 999999999  # what the reference makes of text that it cannot evaluate
MARKS = "£€¥`%$°"


def arithmetic(text: str) -> float | None:
    """Value of the text as Python arithmetic on real numbers. SyntaxError if it is no Python at all."""

    def value(node: ast.AST) -> float:
        if isinstance(node, ast.Expression):
            return value(node.body)
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return float(node.value)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
            return -value(node.operand) if isinstance(node.op, ast.USub) else value(node.operand)
        if isinstance(node, ast.BinOp):
            a, b = value(node.left), value(node.right)
            match node.op:
                case ast.Add():
                    return a + b
                case ast.Sub():
                    return a - b
                case ast.Mult():
                    return a * b
                case ast.Div():
                    return a / b
                case ast.Pow():
                    return math.pow(a, b)
        raise ValueError("not arithmetic")

    if re.search("[0-9][xXoObB_]", text):
        return None
    text = re.sub(r"(?<![\w.])0+(?=[0-9])", "", text.replace("^", "**"))
    tree = ast.parse(text.strip(), mode="eval")
    try:
        result = value(tree)
    except (ValueError, ArithmeticError):
        return None
    return result if math.isfinite(result) else None


def bare(text: str) -> str:
    """The text without what surrounds a number."""
    text = re.split("[=≈]", text)[-1]
    for mark in (*MARKS, "million", "billion", "thousand", "approximately", "USD", "US", "RMB"):
        text = text.replace(mark, "")
    text = text.split(" or ")[0].replace(" x ", "*").replace("×", "*").replace("÷", "/").replace("−", "-")
    text = " ".join(text.split()).rstrip(". ")
    return text.replace(",", "") if re.fullmatch(r"-?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?", text) else text


def unit_removed(text: str) -> str | None:
    """The number of a text that is one number and one unit."""
    number = r"([-+]?[0-9.,]*[0-9])"
    found = re.fullmatch(rf"{number}(?: [^0-9 ]+|[^0-9]{{1,2}})", text) or re.fullmatch(
        rf"(?:[^-+0-9 ][^0-9 ]* |[^-+0-9]{{1,2}}){number}", text
    )
    return found and found[1]


def is_code(text: str) -> bool:
    """Whether the reference's evaluation can give a value that arithmetic does not."""
    text = bare(text)
    try:
        node = ast.parse(text.replace("^", "**"), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return not isinstance(node, ast.Name) and arithmetic_or_none(text) is None and not unit_removed(text)


def arithmetic_or_none(text: str) -> float | None:
    try:
        return arithmetic(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def decided_number(text: str) -> float | None:
    text = bare(text)
    value = arithmetic_or_none(text)
    if value is None and not is_code(text) and (number := unit_removed(text)):
        value = arithmetic_or_none(bare(number))
    return value


def is_real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def decide_number(input: dict, expected: Any) -> Any:
    text = input["text"]
    if is_real(expected) and expected != UNPARSABLE and not is_code(text) and not re.search(r"(?<!10)\^", text):
        return expected
    value = decided_number(text)
    return UNPARSABLE if value is None else value


def decide_match(prediction: str | None, reference: str | None, expected: Any) -> int:
    """Score of two texts with numbers, given the score of the reference."""
    if prediction is None or reference is None:
        return 0
    a, b = decided_number(prediction), decided_number(reference)
    if a is None or b is None or a * b < 0:
        return 0
    if isinstance(expected, dict) or is_code(prediction) or is_code(reference):
        return int(numbers_agree(a, b))
    return expected


def numbers_agree(a: float, b: float) -> bool:
    """The comparison of spell-algorithm section 4.1.3 in exact fractions."""
    p, gt = Fraction(a), Fraction(b)
    large, small, tolerance = max(abs(p), abs(gt)), min(abs(p), abs(gt)), Fraction("0.0015")
    if any(small <= 2 * large / s and abs(small * s - large) <= tolerance * large for s in (100, 10**3, 10**6, 10**9)):
        return p * gt >= 0
    if math.ceil(1000 * small) == math.ceil(1000 * large):
        return p * gt >= 0
    return abs(p - gt) <= tolerance * abs(gt)


def without_separators(text: str) -> str:
    """The text without those commas that separate thousands."""

    def plain(run: re.Match[str]) -> str:
        first, *groups = run[0].partition(".")[0].split(",")
        separated = len(first) <= 3 and first[0] != "0" and all(len(group) == 3 for group in groups)
        return run[0].replace(",", "") if separated else run[0]

    return re.sub(r"[0-9]+(,[0-9]+)+(\.[0-9]+)?", plain, text)


def as_written(text: str | None, extracted: str | None) -> str | None:
    """The number that the reference extracted, as the text has it: exponent kept, odd commas too."""
    if text is None:
        return None
    text = text.replace("*", "").rpartition("</think>")[2]
    number = rf"[=≈{MARKS}]*-?[0-9.,]*[0-9][0-9.,]*"
    if extracted is None:  # the reference does not find an exponent in parentheses
        found = re.findall(rf"answer is \(({number}e[-+]?[0-9]+)\)", text, re.IGNORECASE)
        return without_separators(found[-1]) if found and r"\boxed{" not in text else None
    if r"\boxed{" in text:
        box = text.rpartition(r"\boxed{")[2]
        candidates = [box[:end] for end in range(len(box), 0, -1)]
    else:
        candidates = re.findall(rf"answer is \(?({number}(?:e[-+]?[0-9]+)?)", text, re.IGNORECASE)[::-1]
    for candidate in candidates:
        candidate = candidate.rstrip(".,")
        mantissa = candidate if r"\boxed{" in text else re.split("[eE]", candidate)[0]
        if mantissa.replace(",", "").rstrip(".") == extracted:
            return without_separators(candidate)
    return extracted


def number_or_nothing(value: Any) -> float | None:
    return float(value) if is_real(value) else None


@function("docmath.normalize", decide_number)
def _(input: dict) -> Any:
    value = scoring.parse_number(input["text"])
    return UNPARSABLE if value is None else value


@function("docmath.is_number")
def _(input: dict) -> Any:
    return bool(scoring.WELL_FORMED.fullmatch(input["text"]))


@function("docmath.parse_model_answer", lambda input, expected: as_written(input["text"], expected))
def _(input: dict) -> Any:
    return None if input["text"] is None else parsing.extract_answer(NUMBER, input["text"])


@function("docmath.extract_solution")
def _(input: dict) -> Any:
    region = parsing.answer_region(NUMBER, input["text"])
    return "Empty" if region is None else region


@function("docmath.within_eps")
def _(input: dict) -> Any:
    return scoring.within_tolerance(input["pred"], input["gt"])


def decide_comparison(input: dict, expected: Any) -> Any:
    if not is_real(input["pred"]) or not is_real(input["gt"]):
        return False
    return expected and input["pred"] * input["gt"] >= 0


@function("docmath.compare_two_numbers", decide_comparison)
def _(input: dict) -> Any:
    # Our comparison takes what our parser gives: numbers.
    prediction, reference = number_or_nothing(input["pred"]), number_or_nothing(input["gt"])
    return prediction is not None and reference is not None and scoring.numbers_match(prediction, reference)


@function("docmath.get_acc", lambda input, expected: decide_match(input["prediction"], input["gt"], expected))
def _(input: dict) -> Any:
    return scoring.rule_score(NUMBER, input["prediction"], input["gt"])


def stated_reference(task: str, text: str) -> str | None:
    """A reference out of its phrase; ours need none (decided), so that a bare one stands for itself."""
    return parsing.extract_answer(task, text) if "answer is" in text else text


def compute_score(task: str, input: dict) -> dict[str, Any]:
    prediction = parsing.parse_answer(task, input["response"], False)
    reference = stated_reference(task, input["ground_truth"])
    score = 0 if reference is None else scoring.rule_score(task, prediction, reference)
    return {"score": score, "pred": prediction, "gt": reference}


def decide_number_score(input: dict, expected: dict) -> dict:
    prediction = as_written(input["response"], expected["pred"])
    reference = as_written(input["ground_truth"], expected["gt"])
    if "answer is" not in input["ground_truth"]:
        reference = input["ground_truth"]
    same = (prediction, reference) == (expected["pred"], expected["gt"])
    score = decide_match(prediction, reference, expected["score"] if same else {})
    return {**expected, "score": score, "pred": prediction, "gt": reference}


@function("docmath.compute_score", decide_number_score, ignored=["weight"])
def _(input: dict) -> Any:
    return compute_score(NUMBER, input)


# ---------------------------------------------------------------- text
# Decided: strict cover exact match only; a reference of which nothing is left matches nothing.


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


# ---------------------------------------------------------------- letters, routing, thinking


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


# ---------------------------------------------------------------- questioner
# Decided: true is no answer; blank questions and options that are no text are format errors; the letter
# is filled in; penalties are rewards of their own and not means.


@function("questioner.get_record")
def _(input: dict) -> Any:
    text = parsing.after_thinking(input["text"])
    return {} if text is None else parsing.read_record(text)


def parse_record(task: str, record: dict) -> Any:
    question = parsing.question_from_record(task, record, lambda text: len(text.split()), 40)
    if isinstance(question, Outcome):
        return -1 if question is Outcome.BAD_FORMAT else 0
    return question


def is_blank(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()


def decide_text_record(input: dict, expected: Any) -> Any:
    record = input["record"]
    return -1 if is_blank(record.get("question")) or is_blank(record.get("answer")) else expected


def decide_number_record(input: dict, expected: Any) -> Any:
    record = input["record"]
    answer = record.get("answer")
    if isinstance(answer, bool) or is_blank(record.get("question")) or expected == -1:
        return -1
    plain = isinstance(expected, dict) and re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", expected.get("ground_truth", ""))
    if plain and not is_code(str(answer)) and not re.search("[0-9][eE,^][0-9]", str(answer)):
        return expected
    value = decided_number(str(answer))
    if isinstance(answer, str) and (found := re.findall(r"answer is \(?([^ )]+)", answer, re.IGNORECASE)):
        value = decided_number(found[-1])
    if not value:  # zero or no number
        return 0
    return {
        "question": record["question"],
        "ground_truth": format(Decimal(repr(value)), "f").removesuffix(".0"),
    }


@function("questioner.parse.doc_general_qa", decide_text_record)
def _(input: dict) -> Any:
    question = parse_record(TEXT, input["record"])
    if isinstance(question, int):
        return question
    return {"question": question.text, "ground_truth": question.reference}


@function("questioner.parse.docmath_qa", decide_number_record)
def _(input: dict) -> Any:
    question = parse_record(NUMBER, input["record"])
    if isinstance(question, int):
        return question
    return {"question": question.text, "ground_truth": question.reference}


def decide_choice_record(input: dict, expected: Any) -> Any:
    options = input["record"].get("options")
    texts = [options.get(letter) for letter in "ABCD"] if isinstance(options, dict) else []
    if is_blank(input["record"].get("question")):
        return -1
    return -1 if any(is_blank(t) or not isinstance(t, str | int | float) for t in texts) else expected


@function("questioner.parse.doc_mc", decide_choice_record)
def _(input: dict) -> Any:
    question, options = parse_record(LETTER, input["record"]), input["record"].get("options")
    if isinstance(question, int):
        return question
    places = [question.text.find(f"({letter}) {options[letter]}") for letter in "ABCD"]
    contains = {
        "question": input["record"]["question"] in question.text,
        "labelled_options_in_order": -1 not in places and places == sorted(places),
        "extra_options_dropped": not any(f"({letter})" in question.text for letter in set(options) - set("ABCD")),
    }
    return {"ground_truth": question.reference, "formatted_question_contains": contains}


@function("questioner.prompt.mc_target_letter_unfilled", lambda input, expected: False)
def _(input: dict) -> Any:
    sets = (prompts.PromptSet.load(path) for path in prompts.SETS.iterdir())
    filled = [s.questioner(input["task"], ["a document"], (), "B") for s in sets]
    return any("{{letter}}" in prompt for prompt in filled)


@function("questioner.context")
def _(input: dict) -> Any:
    entries = [Entry(tuple(indices), question, answer) for indices, question, answer in input["history"]]
    chosen = context.choose_context(random.Random(0), input["n_docs"], input["m"], entries)
    texts = [f"<document number {i}>" for i in chosen]
    prompt = prompts.PromptSet.load("full").questioner(TEXT, texts, entries, None)
    n_examples = sum(f"Question: {entry.question}\nAnswer: {entry.answer}" in prompt for entry in entries)
    return {
        "n_evidence": len(chosen),
        "sorted": list(chosen) == sorted(set(chosen)),
        "contains_history": all(set(entry.documents) <= set(chosen) for entry in entries),
        "n_examples": n_examples,
        "from_history": n_examples > 0,
        "n_docs_in_prompt": sum(text in prompt for text in texts),
    }


REWARDS = {"gaussian": "gaussian", "rzero": "r_zero", "reverse": "azr"}


def decide_questioner_reward(input: dict, expected: Any) -> Any:
    return 0.0 if input["mean"] in (0, 1) else expected


@function("questioner_reward", decide_questioner_reward)
def _(input: dict) -> Any:
    config = QuestionerConfig(reward=REWARDS[input["kind"]])
    penalties = {-1.0: config.bad_format_reward, -0.5: config.ungrounded_reward}
    return penalties.get(input["mean"], rewards.questioner_reward(input["mean"], config))


# ---------------------------------------------------------------- verifier and responder
# Decided: brackets before words, words as wholes; strict majority of the valid votes, ties 0, no verdict with
# fewer than half valid; the responder's reward is the maximum.


def decide_vote(input: dict, expected: Any) -> Any:
    text = input.get("text", input.get("judge_output"))
    if "<think>" in text and "</think>" not in text:
        return -1
    text = text.rpartition("</think>")[2]
    yes, no = "[[YES]]" in text, "[[NO]]" in text
    if not yes and not no:
        found = re.split(r"\W+", text)
        yes, no = "YES" in found, "NO" in found
    return -1 if yes == no else int(yes)


@function("verifier.parse_decision", decide_vote)
def _(input: dict) -> Any:
    return parsing.parse_verdict(input["text"], truncated=False)


def judge_result(vote: int) -> dict[str, Any]:
    return {"judge_gpt": float(vote == 1), "judge_pred": {1: "YES", 0: "NO", -1: "INVALID"}[vote]}


@function("eval.judge_parse", lambda input, expected: judge_result(decide_vote(input, expected)))
def _(input: dict) -> Any:
    return judge_result(parsing.parse_verdict(input["judge_output"], truncated=False))


def decided_majority(votes: Sequence[int]) -> int:
    """The verdict; -1 for none."""
    valid = [vote for vote in votes if vote != -1]
    if len(valid) < len(votes) / 2:
        return -1
    return 1 if sum(valid) > len(valid) / 2 else 0


def decide_majority(input: dict, expected: Any) -> Any:
    return expected if isinstance(input["decisions"], str) else decided_majority(input["decisions"])


@function("verifier.majority", decide_majority)
def _(input: dict) -> Any:
    if isinstance(input["decisions"], str):  # the verifier was skipped: no votes
        return -100 if rewards.majority([]) is None else "a verdict without votes"
    verdict = rewards.majority(input["decisions"])
    return -1 if verdict is None else verdict


def decide_selection(input: dict, expected: Any) -> Any:
    votes, (low, high) = input["decisions"], input["bounds"]
    verdict = decided_majority(votes)
    valid = [vote for vote in votes if vote != -1]
    judge_rewards = [-1 if verdict == -1 or vote == -1 else int(vote == verdict) for vote in votes]
    kept = verdict != -1 and low <= valid.count(verdict) / len(valid) <= high
    if input["label"] == "maj_cons":
        kept = kept and verdict == input["rule_score"]
    kept_indices = list(range(len(votes))) if kept else []
    return {"majority": [verdict], "judge_rewards": judge_rewards, "kept_indices": kept_indices}


@function("verifier.training_selection", decide_selection)
def _(input: dict) -> Any:
    votes, (low, high) = input["decisions"], input["bounds"]
    strict = {"maj_cons": True, "maj": False}[input["label"]]
    config = VerifierConfig(agreement_low=low, agreement_high=high, require_rule_agreement=strict)
    verdict = rewards.majority(votes)
    kept = rewards.trainable(votes, verdict, input["rule_score"], config)
    return {
        "majority": [-1 if verdict is None else verdict],
        "judge_rewards": rewards.judgment_rewards(votes, verdict),
        "kept_indices": list(range(len(votes))) if kept else [],
    }


def decide_combination(input: dict, expected: Any) -> Any:
    return [max(rule, verdict, 0) for rule, verdict in zip(input["rule"], input["verifier"], strict=True)]


@function("responder.combine", decide_combination)
def _(input: dict) -> Any:
    pairs = zip(input["rule"], input["verifier"], strict=True)
    return [rewards.responder_reward(rule, None if verdict < 0 else verdict) for rule, verdict in pairs]


# ---------------------------------------------------------------- groups, batch, advantages
# Decided: only mixed questions enter the history, none twice; no truncation of rows to the number of GPUs, as
# many verifier groups as there are; questioner rows are normalised per task (or batch) and a task with fewer
# than two has advantage 0.


def decide_filter(input: dict, expected: Any) -> Any:
    memory = {key: [list(entry) for entry in entries] for key, entries in input.get("history", {}).items()}
    for uid, values in input["scores"].items():
        entries = memory.setdefault(f"t_{uid}", [])
        if 0 < mean(values) < 1 and f"Q{uid}" not in [question for _, question, _ in entries]:
            entries.append([[0], f"Q{uid}", f"A{uid}"])
        memory[f"t_{uid}"] = entries[-3:]
    return {**expected, "memory": {key: entries for key, entries in memory.items() if entries}}


@function("group_filter", decide_filter)
def _(input: dict) -> Any:
    config = QuestionerConfig()
    history = History(config.history)
    stored = input.get("history", {})
    history.load_state_dict({"entries": [["t", key.removeprefix("t_"), stored[key]] for key in stored]})
    keys = [*stored, *(f"t_{uid}" for uid in input["scores"])]
    for uid, values in input["scores"].items():
        if rewards.admissible(mean(values), config):
            history.admit("t", uid, Entry((0,), f"Q{uid}", f"A{uid}"))
    memory = {
        key: [[list(e.documents), e.question, e.answer] for e in history.entries("t", key.removeprefix("t_"))]
        for key in keys
    }
    return {
        "kept": [uid for uid, values in input["scores"].items() if rewards.mixed(values)],
        "zero_variance": [uid for uid, values in input["scores"].items() if not rewards.mixed(values)],
        "memory": {key: entries for key, entries in memory.items() if entries},
    }


KINDS = {
    "good": Outcome.MIXED,
    "bad_format": Outcome.BAD_FORMAT,
    "bad_ground": Outcome.UNGROUNDED,
    "zero_variance": Outcome.ALL_0,
}
"""The reference's kinds of questions, and how the attempts at them end here."""


def kind_of(sample: batch.Sample) -> str:
    return next(kind for kind, outcome in KINDS.items() if outcome is sample.outcome)


def sample(uid: str, role: batch.Role, task: str, kind: str = "good", reward: float = 0.0) -> batch.Sample:
    return batch.Sample(
        uid=uid,
        group=uid,
        role=role,
        task=task,
        outcome=KINDS[kind],
        cluster_id=uid,
        prompt_ids=[],
        response_ids=[],
        logprobs=[],
        weight_version="0",
        reward=reward,
    )


def merged_kinds(input: dict, result: dict) -> dict:
    """Where a task has negatives of several kinds, chance decides which are drawn: count them together."""
    tasks = [key.partition("/")[0] for key in input["bad"]]
    if len(set(tasks)) == len(tasks):
        return result
    kinds = Counter(result["by_role_type"])
    negative = sum(kinds.pop(f"questioner/{k}", 0) for k in ("bad_format", "bad_ground", "zero_variance"))
    return {**result, "by_role_type": {**kinds, "questioner/negative": negative}}


def decide_batch(input: dict, expected: dict) -> dict:
    n, ratio, share = input["n"], input.get("bad_ratio", 1), input.get("verifier_ratio", 0.125)
    available = Counter()
    for key, count in input["bad"].items():
        available[key.partition("/")[0]] += count
    positives, left = {}, input["batch"]  # the first groups, in the order given
    for task, count in input["good_per_task"].items():
        positives[task] = min(count, left)
        left -= positives[task]
    wanted, by_kind = 0.0, Counter()
    for task in sorted(positives, key=lambda task: -positives[task]):
        if positives[task]:
            wanted += ratio * positives[task]
            drawn = min(available[task], int(wanted))
            wanted -= drawn
            kind = next((key.partition("/")[2] for key in input["bad"] if key.startswith(f"{task}/")), "none")
            by_kind[f"questioner/{kind}"] += drawn
    good, negative = sum(positives.values()), sum(by_kind.values())
    judged = n * min(input["verifier_groups_available"], int(good * n * share / n))
    by_kind += Counter({"questioner/good": good, "responder/good": good * n, "verifier/good": judged})
    roles = Counter({"responder": good * n, "questioner": good + negative, "verifier": judged})
    result = {
        "ready": good >= input["batch"],
        "total": sum(roles.values()),
        "by_role": {role: count for role, count in roles.items() if count},
        "by_role_type": dict(by_kind),
    }
    merged = merged_kinds(input, result)
    return expected if equal(merged, merged_kinds(input, expected)) else merged


def run_batch(input: dict) -> dict:
    n = input["n"]
    config = SelfPlayConfig(
        groups=input["batch"],
        group_size=n,
        negatives_per_positive=input.get("bad_ratio", 1),
        verifier=VerifierConfig(share=input.get("verifier_ratio", 0.125)),
    )
    groups = []
    for task, count in input["good_per_task"].items():
        for i in range(count):
            uid = f"{task}/{i}"
            answers = [sample(uid, "responder", task) for _ in range(n)]
            groups.append(batch.Group(uid, task, sample(uid, "questioner", task), answers))
    negatives = [
        sample(f"{key}/{i}", "questioner", key.partition("/")[0], key.partition("/")[2])
        for key, count in input["bad"].items()
        for i in range(count)
    ]
    judgments = [
        [sample(f"v{i}", "verifier", "t") for _ in range(n)] for i in range(input["verifier_groups_available"])
    ]
    rows = batch.compose(groups, negatives, judgments, config, random.Random(0))
    return {
        "ready": len(groups) >= config.groups,
        "total": len(rows),
        "by_role": dict(Counter(row.role for row in rows)),
        "by_role_type": dict(Counter(f"{row.role}/{kind_of(row)}" for row in rows)),
    }


def run_batch_as(input: dict, like: dict) -> dict:
    """Ours, with kinds counted together where the wanted result has them so."""
    ours = run_batch(input)
    return merged_kinds(input, ours) if "questioner/negative" in like["by_role_type"] else ours


function("batch_composition", decide_batch)(run_batch)


def row_rewards(input: dict) -> list[float]:
    """Rewards of rows: given for responder and verifier, the mapped ones for the questioner."""
    config = QuestionerConfig(reward=REWARDS[input["questioner_reward"]])
    result = []
    for row in input["rows"]:
        if row["role"] != "questioner":
            result.append(float(row["score"]))
        else:
            answers = [r["score"] for r in input["rows"] if r["uid"] == row["uid"] and r["role"] == "responder"]
            result.append(rewards.question_reward(KINDS[row["type"]], mean(answers or [0]), config))
    return result


def decide_advantages(input: dict, expected: dict) -> dict:
    """Ours are the reference's but for questioner rows, which are normalised per task."""
    decided = list(expected["advantage"])
    for task in {row["task"] for row in input["rows"]}:
        members = [i for i, r in enumerate(input["rows"]) if r["role"] == "questioner" and r["task"] == task]
        values = [expected["score"][i] for i in members]
        for i in members:
            spread = stdev(values) if len(values) > 1 else 0.0
            decided[i] = (expected["score"][i] - mean(values)) / (spread + 1e-6)
    return {**expected, "advantage": decided}


@function("advantages", decide_advantages)
def _(input: dict) -> Any:
    values = row_rewards(input)
    rows = [
        sample(row["uid"], row["role"], row["task"], row["type"], value)
        for row, value in zip(input["rows"], values, strict=True)
    ]
    assign_advantages(rows, "task")  # what the reference calls "batch" is per task
    return {"advantage": [row.advantage for row in rows], "score": values}


@function("domain_sampler.counts")
def _(input: dict) -> Any:
    return sampler.round_counts(input["sizes"], input["weights"], input["batch"])


# ---------------------------------------------------------------- loss (needs torch)


@function("policy_loss")
def _(input: dict) -> Any:
    import torch

    from spell_megatron.training.objective import policy_loss

    mask = torch.tensor(input["mask"], dtype=torch.bool)
    names = ("logprob", "old_logprob", "advantage")
    tensors = [torch.tensor(input[name], dtype=torch.float64)[mask] for name in names]
    result = policy_loss(*tensors, *input["clip"], input.get("dual_clip", 3.0))
    return [
        value.double().mean().item() for value in (result.loss, result.clipped, result.approx_kl, result.clipped_lower)
    ]


# ---------------------------------------------------------------- evaluation
# Decided: unbiased pass@k; the rule check of text is used.


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
    covered = expected["pred"] is not None and decide_loose(
        {"prediction": expected["pred"], "ground_truth": input["ground_truth"]}, None
    )
    f1 = 0.0 if expected["pred"] is None else expected["f1_score"]
    return {**expected, "judge": int(covered), "em_score": int(covered), "f1_score": f1}


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


# ---------------------------------------------------------------- running

Result = Any


def equal(a: Any, b: Any) -> bool:
    """Equality of results; `b` may be written as JSON has it ("NaN", "Infinity", {"raises": name})."""
    if isinstance(a, Exception):
        return isinstance(b, dict) and set(b) == {"raises"}
    if isinstance(b, dict):
        return isinstance(a, dict) and set(a) == set(b) and all(equal(a[key], b[key]) for key in b)
    if isinstance(b, list | tuple):
        return isinstance(a, list | tuple) and len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, int | float) and isinstance(b, int | float):
        return a == b or math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-5)
    if isinstance(a, float) and b in ("NaN", "Infinity"):
        return a == float("inf") if b == "Infinity" else math.isnan(a)
    return a == b


def without(result: Any, keys: frozenset[str]) -> Any:
    return {k: v for k, v in result.items() if k not in keys} if keys and isinstance(result, dict) else result


def check(case: dict[str, Any]) -> tuple[str, str]:
    """(passed | failed | decided otherwise, what to say about it) of one case."""
    name, input, expected = case["function"], case["input"], case["expected"]
    if name not in FUNCTIONS:
        return "failed", "this script knows no such function"
    run, decide, ignored = FUNCTIONS[name]
    expected = without(expected, ignored)
    try:
        wanted = without(decide(input, case["expected"]), ignored)
    except Exception as error:  # the rule of this script does not cover the case
        return "failed", f"the rule for decided behaviour failed: {error!r}"
    try:
        ours = run_batch_as(input, wanted) if run is run_batch else run(input)
    except Exception as error:  # whatever our code raises is its result for this case
        ours = error
    if not equal(ours, wanted):
        what = f"expected {wanted!r}" if equal(wanted, expected) else f"decided {wanted!r}, reference {expected!r}"
        return "failed", f"{what}, got {ours!r}"
    if equal(wanted, expected):
        return "passed", ""
    return "decided otherwise", f"reference {expected!r}, decided {wanted!r}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run test vectors of the reference implementation.")
    parser.add_argument("file", type=Path, help="JSON list of {function, input, expected, note}")
    parser.add_argument("--verbose", action="store_true", help="also print the cases decided otherwise")
    options = parser.parse_args(arguments)
    try:
        cases = json.loads(options.file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        parser.error(f"{options.file} cannot be read: {error}")
    counts: Counter[str] = Counter()
    for number, case in enumerate(cases):
        outcome, detail = check(case)
        counts[outcome] += 1
        if outcome == "failed" or (options.verbose and detail):
            shown = json.dumps(case["input"], ensure_ascii=False)
            print(f"{outcome.upper()} case {number}: {case['function']}({shown[:500]})\n    {detail}")
    print(f"{counts['passed']} passed, {counts['failed']} failed, {counts['decided otherwise']} decided otherwise")
    return int(counts["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
