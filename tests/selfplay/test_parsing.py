"""From model text to questions, answers and votes."""

import json

import pytest

from spell_megatron.selfplay.outcomes import Outcome
from spell_megatron.selfplay.parsing import (
    Question,
    answer_region,
    parse_answer,
    parse_question,
    parse_verdict,
    read_record,
)

OPTIONS = {"A": "red", "B": "green", "C": "blue", "D": "grey"}


def question(task, record, text="Reasoning.\n```json\n{}\n```", truncated=False):
    shown = text.replace("{}", record if isinstance(record, str) else json.dumps(record))
    return parse_question(task, shown, truncated, lambda reference: len(reference.split()), 40)


def test_general_question():
    parsed = question("doc_general_qa", {"question": "Who?", "answer": "The correct answer is Ada."})
    assert parsed == Question("doc_general_qa", "Who?", "Ada")


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        (12.5, "12.5"),
        (7, "7"),
        ("$1,200", "1200"),
        ("0.00001", "0.00001"),
        (1e-7, "0.0000001"),
        (1e22, "1" + "0" * 22),
        ("The answer is 5%", "5"),
        ("the answer is 1e5", "100000"),
        ("2 * 3", "6"),
        (-4, "-4"),
    ],
)
def test_math_references_are_decimals(answer, reference):
    assert question("docmath_qa", {"question": "How many?", "answer": answer}).reference == reference


def test_choice_question_shows_stem_and_labelled_options():
    record = {"question": "Which colour?", "options": {**OPTIONS, "E": "pink"}, "answer": "The answer is (C)"}
    parsed = question("doc_mc", record)
    assert parsed.reference == "C"
    assert parsed.text == "Which colour?\n\nChoices:\n(A) red\n(B) green\n(C) blue\n(D) grey"


def test_permuted_options_take_the_reference_along():
    parsed = question("doc_mc", {"question": "Which colour?", "options": OPTIONS, "answer": "C"})
    permuted = parsed.permuted([2, 0, 3, 1])
    assert permuted.options == ("blue", "red", "grey", "green")
    assert permuted.reference == "A"
    assert permuted.text.endswith("(A) blue\n(B) red\n(C) grey\n(D) green")
    assert permuted.permuted([1, 3, 0, 2]) == parsed
    with pytest.raises(ValueError, match="order"):
        parsed.permuted([0, 0, 1, 2])


@pytest.mark.parametrize(
    ("task", "record", "outcome"),
    [
        ("doc_general_qa", {"question": "q"}, Outcome.BAD_FORMAT),
        ("doc_general_qa", {"question": "q", "answer": ""}, Outcome.BAD_FORMAT),
        ("doc_general_qa", {"question": " ", "answer": "x"}, Outcome.BAD_FORMAT),
        ("doc_general_qa", {"question": "q", "answer": 5}, Outcome.BAD_FORMAT),
        ("doc_general_qa", {"question": "q", "answer": "w " * 41}, Outcome.LONG_REFERENCE),
        ("doc_general_qa", '{"question": "q", "answer": "a",}', Outcome.BAD_FORMAT),
        ("doc_general_qa", "[1]", Outcome.BAD_FORMAT),
        ("docmath_qa", {"question": "q", "answer": True}, Outcome.BAD_FORMAT),
        ("docmath_qa", {"question": "q", "answer": None}, Outcome.BAD_FORMAT),
        ("docmath_qa", {"question": "q", "answer": "0.0"}, Outcome.ZERO_ANSWER),
        ("docmath_qa", {"question": "q", "answer": "abc"}, Outcome.UNPARSABLE_NUMBER),
        ("docmath_qa", {"question": "q", "answer": "1, 2"}, Outcome.UNPARSABLE_NUMBER),
        ("docmath_qa", '{"question": "q", "answer": 1e999}', Outcome.UNPARSABLE_NUMBER),
        ("docmath_qa", '{"question": "q", "answer": NaN}', Outcome.UNPARSABLE_NUMBER),
        ("doc_mc", {"question": "q", "options": OPTIONS, "answer": "b"}, Outcome.BAD_FORMAT),
        ("doc_mc", {"question": "q", "options": OPTIONS, "answer": "AB"}, Outcome.BAD_FORMAT),
        ("doc_mc", {"question": "q", "options": {"A": "x"}, "answer": "A"}, Outcome.BAD_FORMAT),
        ("doc_mc", {"question": "q", "options": {**OPTIONS, "B": None}, "answer": "A"}, Outcome.BAD_FORMAT),
    ],
)
def test_outcomes(task, record, outcome):
    assert question(task, record) is outcome
    assert outcome.negative == (outcome is Outcome.BAD_FORMAT)


def test_exactly_forty_tokens_are_allowed():
    assert question("doc_general_qa", {"question": "q", "answer": "w " * 40}).reference.split() == ["w"] * 40


def test_truncation_comes_from_the_engine_and_is_not_penalised():
    record = {"question": "q", "answer": "a"}
    assert question("doc_general_qa", record, truncated=True) is Outcome.TRUNCATED
    assert question("doc_general_qa", record, text="<think>```json\n{}\n```") is Outcome.TRUNCATED
    assert Outcome.TRUNCATED.dropped and not Outcome.TRUNCATED.negative


def test_record_is_the_last_block_that_parses():
    good, other = '```json\n{"question": "1"}\n```', '```json\n{"question": "2"}\n```'
    assert read_record(good + other) == {"question": "2"}
    assert read_record(good + "```json\n{bad}\n```") == {"question": "1"}
    assert read_record(good + "```json\n[1]\n```") == {}
    assert read_record('{"question": "1"}') == {"question": "1"}
    assert read_record('so: {"question": "1"}') == {}


def test_lone_surrogates_and_control_characters_are_cleaned_from_questions():
    parsed = question("doc_general_qa", r'{"question": "a\ud800b\u0007c \ud83d\ude00", "answer": "x\u0000y"}')
    assert parsed.text == "a?bc \N{GRINNING FACE}"
    assert parsed.reference == "xy"


@pytest.mark.parametrize(
    ("task", "text", "answer"),
    [
        ("doc_general_qa", "Thus.\nThe correct answer is **Port Adria**.\nDone", "Port Adria"),
        ("doc_general_qa", "<think>the answer is Rome</think>The answer is Oslo.", "Oslo"),
        ("doc_general_qa", "Port Adria", None),
        ("doc_general_qa", "The correct answer is ...", None),
        ("docmath_qa", "Therefore, the answer is 1,234.5.", "1234.5"),
        ("docmath_qa", r"so \boxed{3} and \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("docmath_qa", "the answer is 12,5", "12,5"),
        ("docmath_qa", "The answer is 1e5", "1e5"),
        ("docmath_qa", "the answer is many", None),
        ("doc_mc", "The correct answer is (B).", "B"),
        ("doc_mc", "The correct answer is b", None),
        ("doc_mc", r"the correct answer is (A), but \boxed{B}", "B"),
    ],
)
def test_answers(task, text, answer):
    assert parse_answer(task, text, truncated=False) == answer
    assert parse_answer(task, text, truncated=True) is None


def test_without_a_phrase_only_the_end_of_a_response_counts():
    assert answer_region("doc_mc", "x" * 2000) == "x" * 300
    assert answer_region("doc_general_qa", "x" * 2000) == "x" * 1000
    assert answer_region("docmath_qa", "x" * 2000 + r"\boxed{7}") == "x" * 2000 + r"\boxed{7}"
    assert answer_region("docmath_qa", "<think> the answer is 7") is None


@pytest.mark.parametrize(
    ("text", "vote"),
    [
        ("Decision: [[YES]]", 1),
        ("Decision: [[NO]]", 0),
        ("They are NOT equal but [[YES]]", 1),
        ("NO, well: [[YES]]", 1),
        ("[[YES]] or [[NO]]", -1),
        ("YES", 1),
        ("NO.", 0),
        ("YES and NO", -1),
        ("EYES", -1),
        ("NOT", -1),
        ("yes", -1),
        ("", -1),
        ("<think>[[YES]]", -1),
        ("<think>[[NO]]</think>[[YES]]", 1),
        ("YES_NO", -1),
        ("[[YES ]]", 1),
    ],
)
def test_votes(text, vote):
    assert parse_verdict(text, truncated=False) == vote
    assert parse_verdict(text, truncated=True) == -1
