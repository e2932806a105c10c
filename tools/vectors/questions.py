"""The questioner: its text, its prompt, its reward.

Decided: a record is read where its form leaves no doubt (other fences or none, a comma too many); the letter of an
answer may be lower-case; true is no answer; blank questions and options that are no text are format errors; the letter
is filled in; penalties are rewards of their own and not means.
"""

from __future__ import annotations

import json
import random
import re
from decimal import Decimal
from typing import Any

from spell_megatron.config.selfplay_sections import QuestionerConfig
from spell_megatron.selfplay import context, parsing, prompts, rewards
from spell_megatron.selfplay.history import Entry
from spell_megatron.selfplay.outcomes import Outcome
from vectors.functions import LETTER, NUMBER, TEXT, function
from vectors.numbers import decided_number, is_code


def decide_record(input: dict, expected: Any) -> Any:
    """Where the reference finds nothing: the object in the text, without a comma too many."""
    found = re.search(r'\{"[^{}]*\}', input["text"].rpartition("</think>")[2])
    return expected or (json.loads(re.sub(r",\s*\}", "}", found[0])) if found else {})


@function("questioner.get_record", decide_record)
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
    if any(is_blank(text) or not isinstance(text, str | int | float) for text in texts) or len(texts) < 4:
        return -1
    letter = input["record"].get("answer")
    if expected != -1 or letter not in tuple("abcd"):
        return expected
    shown = dict.fromkeys(("question", "labelled_options_in_order", "extra_options_dropped"), True)
    return {"ground_truth": letter.upper(), "formatted_question_contains": shown}


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
