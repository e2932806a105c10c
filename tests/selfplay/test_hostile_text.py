"""No text of a model makes a parser, a scorer or a prompt raise, hang, or run anything."""

import json
import sys
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spell_megatron.selfplay.numbers import parse_number
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
from spell_megatron.selfplay.scoring import rule_score
from spell_megatron.selfplay.statements import statements

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


# Each hostile text for a size, in characters.
LONG = {
    "nested lists": lambda size: "```json\n" + "[" * size + "\n```",
    "nested objects": lambda size: '{"a":' * (size // 5),
    "nested in a question": lambda size: '```json\n{"question": ' + "[" * size + "]" * size + ', "answer": "a"}\n```',
    "digits": lambda size: "the answer is " + "9" * size,
    "a JSON integer of many digits": lambda size: '```json\n{"question": "q", "answer": ' + "9" * size + "}\n```",
    "zeros": lambda size: "0" * size + "1",
    "powers": lambda size: "10" + "^10" * (size // 3),
    "tower of powers": lambda size: "10^10^10",
    "factors": lambda size: "9*" * (size // 2) + "9",
    "parentheses": lambda size: "(" * size + "1" + ")" * size,
    "open parentheses": lambda size: r"\boxed{" + "(" * size + "}",
    "signs": lambda size: r"\boxed{" + "-" * size + "1}",
    "commas": lambda size: "the answer is " + "1," * (size // 2),
    "points": lambda size: "the answer is " + "." * size,
    "commas and points without digits": lambda size: "the answer is " + ".," * (size // 2) + "x",
    "thousands": lambda size: "answer is " + "1" + ",000" * (size // 4),
    "open boxes": lambda size: r"\boxed{" * (size // 7),
    "nested boxes": lambda size: r"\boxed{" * (size // 8) + "}" * (size // 8),
    "fences": lambda size: "```json" * (size // 7),
    "closed fences": lambda size: "```json\n{\n```" * (size // 13),
    "backticks": lambda size: "`" * size,
    "phrases": lambda size: "the answer is " * (size // 14),
    "phrases with parentheses": lambda size: "the answer is (" * (size // 15),
    "phrases with currency": lambda size: "the answer is =≈`%$°£€¥-" * (size // 24),
    "tags": lambda size: "<think></think>" * (size // 15),
    "brackets": lambda size: "[[YES" * (size // 5),
    "blanks": lambda size: " " * size + "the answer is",
    "blank lines": lambda size: "the answer is" + "\n" * size,
    "articles": lambda size: "a the an " * (size // 9),
    "equals": lambda size: "=" * size + "5",
    "units": lambda size: "5 " + "x " * (size // 2),
    "exponent": lambda size: "the answer is 1e" + "9" * size,
    "control characters": lambda size: "\x00\x1b" * (size // 2),
    "surrogates": lambda size: "\ud800" * size,
    "emphasis": lambda size: "*" * size,
    "reasons": lambda size: "since the answer is " * (size // 20),
    "answers in": lambda size: "answer in " * (size // 10),
    "qualified options": lambda size: "correct option " * (size // 15),
    "headings": lambda size: "answer\n" * (size // 7),
    "contrasts": lambda size: "the answer is not " * (size // 18) + "but",
    "a contrast without an end": lambda size: "the answer is not " + "x " * (size // 2),
    "letters": lambda size: "the answer is " + "A, " * (size // 3),
    "alternatives": lambda size: S + "Oslo, " * (size // 6) + "or",
    "negations": lambda size: S + "not 7 " * (size // 6),
    "sentences": lambda size: S + "Oslo. A" * (size // 7),
    "initials": lambda size: S + "J. " * (size // 3),
    "genitives": lambda size: S + "7's " * (size // 4),
    "hyphens": lambda size: S + "7-" * (size // 2),
    "words of LaTeX": lambda size: r"\boxed{" + r"\text{" * (size // 6),
    "fractions": lambda size: r"\boxed{" + r"\frac" * (size // 5) + "}",
    "groups of three": lambda size: "the answer is " + "1 234 " * (size // 6),
    "slashes": lambda size: "the answer is " + "1/" * (size // 2),
    "scales": lambda size: "the answer is 5" + " million" * (size // 8),
    "sides": lambda size: "the answer is " + "x = " * (size // 4) + "7",
    "objects": lambda size: '{"question":' * (size // 12),
    "escaped quotes": lambda size: '{"question": "' + '\\"' * (size // 2),
    "backslashes": lambda size: '{"question": "' + "\\" * size,
    "commas in an object": lambda size: '{"question": "q"' + "," * size,
    "decisions": lambda size: "decision " * (size // 9) + ":",
    "forms": lambda size: "[[YES]] or [[NO]] " * (size // 18),
    "unfinished forms": lambda size: "[[YES]] (" + "x" * size,
    "exponents": lambda size: S + "\u00b9" * size,
    "a long word": lambda size: S + "x" * size,
    "a long word in a fence": lambda size: "```" + "x" * size,
    "blanks in a fence": lambda size: "```" + " " * size,
    "ligatures": lambda size: S + "\ufdfa" * (size // 18),
    "capital I with a dot": lambda size: "\u0130" * size + "answer is 7",
}
S = "The correct answer is "


def seconds(text):
    """CPU time of all functions on a text; the smallest of three, as a busy machine adds to it."""
    times = []
    for _ in range(3):
        started = time.process_time()
        check_everything(text)
        times.append(time.process_time() - started)
    return min(times)


@pytest.mark.parametrize("name", LONG)
def test_work_grows_with_the_length_of_a_hostile_text_and_no_faster(name):
    """Of a text 16 times as long it is about 16 times as much (256 times if it were quadratic)."""
    check_everything(LONG[name](100))
    assert seconds(LONG[name](1 << 15)) < 64 * max(seconds(LONG[name](1 << 11)), 0.002)


def test_of_a_long_response_hardly_more_than_the_end_is_read():
    """Which places are looked at is counted: the statement is the last one, whatever stands before."""
    looked_at = []

    class Watched(str):
        def __getitem__(self, place):
            looked_at.append(place)
            return str.__getitem__(self, place)

    for count in (10, 10_000):
        looked_at.clear()
        response = Watched("The answer is 8, since the answer is 9. " * count + "The answer is 13")
        assert next(statements(response)) == ("13", False)
        assert len(looked_at) <= 5


@pytest.mark.parametrize("name", ["digits", "powers", "parentheses", "signs", "factors"])
def test_numbers_from_text_of_a_megabyte_take_no_time(name):
    text = LONG[name](1 << 20)
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
    assert parse_number(code) is None
