"""No text of a model makes a parser, a scorer or a prompt raise, hang, or run anything."""

import json
import sys
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spell_megatron.selfplay import scoring
from spell_megatron.selfplay.outcomes import Outcome
from spell_megatron.selfplay.parsing import (
    Question,
    extract_answer,
    parse_answer,
    parse_question,
    parse_verdict,
    question_from_record,
)
from spell_megatron.selfplay.prompts import PromptSet
from spell_megatron.selfplay.scoring import parse_number, rule_score

TASKS = ("docmath_qa", "doc_general_qa", "doc_mc")
PROMPTS = PromptSet.load("full")

PIECES = [
    *(
        "<think>",
        "</think>",
        "```json",
        "```",
        "```JSON",
        "\n",
        "\r",
        "\t",
        "\x00",
        "\x1b",
        "*",
        ".",
        ",",
        "{",
        "}",
    ),
    *(
        "the answer is ",
        "The correct answer is ",
        "answer is (",
        ")",
        r"\boxed{",
        "}}",
        "A",
        "D",
        "e",
        "0",
        "7",
    ),
    *(
        "[[YES]]",
        "[[NO]]",
        "YES",
        "NO",
        "NOT",
        "{{documents}}",
        "{{letter}}",
        "\\g<1>",
        "(",
        "-",
        "+",
        "^",
        "**",
    ),
    *('{"question": "q", "answer": "', '"}', '"options": {"A": 1}', "nan", "inf", " or ", "million", "1,000"),
    *("10^10^10", "9" * 400, "1e999", " x ", " \u00d7 ", "=", "\u2248", "%", "$", "\u0663", "\u00bd"),
    *("\ud800", "\udfff", "\u202e", "\u00e9", "\U0001f600"),
    *("__import__('os')._exit(1)", "exit()", "lambda: 0"),
]
hostile = st.lists(
    st.sampled_from(PIECES) | st.text(st.characters(exclude_categories=()), max_size=8), max_size=30
).map("".join)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | hostile,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*"ABCDE", "question", "answer"]), inner, max_size=5)
    ),
    max_leaves=10,
)
records = st.dictionaries(st.sampled_from(["question", "answer", "options", "extra"]), json_values)


def count_tokens(text):
    """Strict about Unicode, as real tokenizers are."""
    return len(text.encode("utf-8"))


def check_everything(text, other="7"):
    for task in TASKS:
        question = parse_question(task, text, False, count_tokens, 40)
        assert isinstance(question, Question | Outcome)
        if isinstance(question, Question):
            question.text.encode(), question.reference.encode()
            assert question.text.strip() and question.reference.strip()
        prediction = parse_answer(task, text, False)
        assert prediction is None or isinstance(prediction, str)
        extract_answer(task, text)
        for a, b in ((text, other), (other, text), (prediction, text), (text, text)):
            assert rule_score(task, a, b) in (0, 1)
        PROMPTS.responder(task, text, [other])
    number = parse_number(text)
    assert number is None or number - number == 0  # finite
    assert parse_verdict(text, False) in (1, 0, -1)


@settings(max_examples=300, deadline=10_000)
@given(hostile, hostile)
def test_hostile_text_has_an_outcome(text, other):
    check_everything(text, other)


@settings(max_examples=300, deadline=10_000)
@given(st.sampled_from(TASKS), records)
@example("docmath_qa", {"question": "q", "answer": 10**5000})
@example("docmath_qa", {"question": "q", "answer": float("inf")})
def test_any_json_record_has_an_outcome(task, record):
    direct = question_from_record(task, record, count_tokens, 40)
    assert isinstance(direct, Question | Outcome)
    try:
        text = f"```json\n{json.dumps(record)}\n```"
    except ValueError:  # Python does not print integers of more than 4,300 digits
        return
    if "```" not in text[7:-3] and "think>" not in text:
        assert parse_question(task, text, False, count_tokens, 40) == direct


# About 16 times the characters of the longest response (4,096 tokens of four characters).
SIZE = 1 << 18
LONG = {
    "nested lists": "```json\n" + "[" * SIZE + "\n```",
    "nested objects": '{"a":' * (SIZE // 5),
    "nested in a question": '```json\n{"question": ' + "[" * SIZE + "]" * SIZE + ', "answer": "a"}\n```',
    "digits": "the answer is " + "9" * SIZE,
    "a JSON integer of many digits": '```json\n{"question": "q", "answer": ' + "9" * SIZE + "}\n```",
    "zeros": "0" * SIZE + "1",
    "powers": "10" + "^10" * (SIZE // 3),
    "tower of powers": "10^10^10",
    "factors": "9*" * (SIZE // 2) + "9",
    "parentheses": "(" * SIZE + "1" + ")" * SIZE,
    "open parentheses": r"\boxed{" + "(" * SIZE + "}",
    "signs": r"\boxed{" + "-" * SIZE + "1}",
    "commas": "the answer is " + "1," * (SIZE // 2),
    "points": "the answer is " + "." * SIZE,
    "commas and points without digits": "the answer is " + ".," * (SIZE // 2) + "x",
    "thousands": "answer is " + "1" + ",000" * (SIZE // 4),
    "open boxes": r"\boxed{" * (SIZE // 7),
    "nested boxes": r"\boxed{" * (SIZE // 8) + "}" * (SIZE // 8),
    "fences": "```json" * (SIZE // 7),
    "closed fences": "```json\n{\n```" * (SIZE // 13),
    "backticks": "`" * SIZE,
    "phrases": "the answer is " * (SIZE // 14),
    "phrases with parentheses": "the answer is (" * (SIZE // 15),
    "phrases with currency": "the answer is =≈`%$°£€¥-" * (SIZE // 24),
    "tags": "<think></think>" * (SIZE // 15),
    "brackets": "[[YES" * (SIZE // 5),
    "blanks": " " * SIZE + "the answer is",
    "blank lines": "the answer is" + "\n" * SIZE,
    "articles": "a the an " * (SIZE // 9),
    "equals": "=" * SIZE + "5",
    "units": "5 " + "x " * (SIZE // 2),
    "exponent": "the answer is 1e" + "9" * SIZE,
    "control characters": "\x00\x1b" * (SIZE // 2),
    "surrogates": "\ud800" * SIZE,
    "emphasis": "*" * SIZE,
}


@pytest.mark.parametrize("name", LONG)
def test_time_is_bounded_on_long_hostile_text(name):
    """Each text takes all functions under 5 s (1.1 s at most when written)."""
    started = time.process_time()
    check_everything(LONG[name])
    assert time.process_time() - started < 5


@pytest.mark.parametrize("name", ["digits", "powers", "parentheses", "signs", "factors"])
def test_numbers_from_text_of_a_megabyte_take_no_time(name):
    text = LONG[name] * 4
    started = time.process_time()
    assert parse_number(text) is None
    assert time.process_time() - started < 0.1


def test_no_text_is_evaluated():
    """Audit events tell of every compilation, execution, import and file that model text might cause."""
    seen = []
    active = True

    def hook(event, arguments):
        if active and event in ("compile", "exec", "import", "open", "os.system", "subprocess.Popen"):
            seen.append((event, arguments))

    code = "__import__('os').system('true')"
    texts = [
        f"Therefore, the answer is {code}",
        rf"\boxed{{{code}}}",
        code,
        f"[[YES]] {code}",
        json.dumps({"question": code, "answer": code, "options": dict.fromkeys("ABCD", code)}),
    ]
    check_everything(code)  # warm up: imports and caches of the standard library
    sys.addaudithook(hook)
    try:
        for text in texts:
            check_everything(text, text)
    finally:
        active = False  # audit hooks cannot be removed
    assert seen == []
    assert scoring.parse_number(code) is None
