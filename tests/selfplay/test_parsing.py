"""From model text to questions, answers and votes."""

import json

import pytest

from spell_megatron.selfplay.outcomes import Outcome
from spell_megatron.selfplay.parsing import Question, parse_answer, parse_question, parse_verdict
from spell_megatron.selfplay.records import read_record
from spell_megatron.selfplay.references import known_answer

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
        ("doc_general_qa", {"question": "q", "answer": ["a"]}, Outcome.BAD_FORMAT),
        ("doc_general_qa", {"question": "q", "answer": "w " * 41}, Outcome.LONG_REFERENCE),
        ("doc_general_qa", "[1]", Outcome.BAD_FORMAT),
        ("docmath_qa", {"question": "q", "answer": True}, Outcome.BAD_FORMAT),
        ("docmath_qa", {"question": "q", "answer": None}, Outcome.BAD_FORMAT),
        ("docmath_qa", {"question": "q", "answer": "0.0"}, Outcome.ZERO_ANSWER),
        ("docmath_qa", {"question": "q", "answer": "abc"}, Outcome.UNPARSABLE_NUMBER),
        ("docmath_qa", {"question": "q", "answer": "1, 2"}, Outcome.UNPARSABLE_NUMBER),
        ("docmath_qa", '{"question": "q", "answer": 1e999}', Outcome.UNPARSABLE_NUMBER),
        ("docmath_qa", '{"question": "q", "answer": NaN}', Outcome.UNPARSABLE_NUMBER),
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
        ("doc_mc", "The correct answer is b", "B"),
        ("doc_mc", "The correct answer is 'C'", "C"),
        ("doc_mc", "The correct answer is ‘C’.", "C"),
        ("doc_mc", r"the correct answer is (A), but \boxed{B}", "B"),
    ],
)
def test_answers(task, text, answer):
    assert parse_answer(task, text, truncated=False) == answer
    assert parse_answer(task, text, truncated=True) is None


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
        ("[[Yes]]", 1),
        ("[[no]].", 0),
        ("**Decision:** **[[NO]]**", 0),
        ("The form is [[YES]] or [[NO]].\nDecision: [[NO]]", 0),
        ("Decision: [[YES]]/[[NO]]", -1),
        ("Decision: [[YES]] or [[NO]]", -1),
        ("They are the same: [[YES]].\nDecision: [[YES]] or [[NO]]", -1),
        ("[[YES]].\nDecision:", 1),
        ("At first [[YES]], then [[NO]]", 0),
        ("not [[NO]], so [[YES]]", 1),
        ("Decision: NOT [[YES]]", -1),
        ("Decision: [[YES]], as [[NO]] would need a contradiction", 1),
        ("Decision: [[YES]] at first, but rather [[NO]]", 1),
        ("Decision: not [[YES]] but [[NO]]", 0),
        ("[[NO]] [[YES]]", -1),
        ("Decision: [[NO]] [[YES]] [[YES]]", -1),
        ("[[YES]] [[YES]]", 1),
        ("There is NO gap between them.\nDecision: YES", 1),
        ("There is NO doubt that they differ.\nDecision: NO", 0),
        ("There is NO gap between them.", -1),
        ("The first says NO, and so does the second.\nDecision: [[YES]]", 1),
        ("First: YES. Second: NO.\nVerdict: [[NO]]", 0),
        ("NO, they differ", 0),
        ("The decision is hard.\n[[NO]]", 0),
        ("Decision: yes", -1),
        ("判断：[[YES]]", 1),
    ],
)
def test_votes(text, vote):
    assert parse_verdict(text, truncated=False) == vote
    assert parse_verdict(text, truncated=True) == -1


GOOD = '{"question": "Who?", "answer": "Ada"}'


@pytest.mark.parametrize(
    "text",
    [
        f"So:\n```JSON\n{GOOD}\n```",
        f"```\n{GOOD}\n```",
        f"```json5\n{GOOD}\n```\n",
        f"```json\n{GOOD}",
        f"So: {GOOD} That is it.",
        f"```\n1 + 1\n```\n```json\n{GOOD}\n```\n```\n2\n```",
        '```json\n{"question": "Who?", "answer": "Ada",}\n```',
        '{"answer": "Ada",\n "question": "Who?",\n}',
        '{"Question": "Who?", "Answer": "Ada"}',
        "{“question”: “Who?”, “answer”: “Ada”}",
        '```json\n{"question": "Who\nis it?", "answer": "Ada"}\n```',
        '```json\n{"question": "Who\tis it?", "answer": "Ada"}\n```',
        '```json\n{"question": "Who wrote ```f```?", "answer": "Ada"}\n```',
        r'{"question": "Who found \frac{1}{2} \times \( \nu \)?", "answer": "Ada"}',
        f"<think>no</think>{GOOD}",
    ],
)
def test_records_are_read_where_their_form_leaves_no_doubt(text):
    assert question("doc_general_qa", "", text=text).reference == "Ada"


@pytest.mark.parametrize(
    "text",
    [
        *("{'question': 'Who?', 'answer': 'Ada'}", f"[{GOOD}]", f"```json\n[{GOOD}, {GOOD}]\n```", '"Ada"', ""),
        *('{"question": "Who?" "answer": "Ada"}', '{"question": "Who?", "answer": "Ada"', "```json\nAda\n```"),
        *(
            '{"question": "Who?", "answer": true}',
            '{"question": 5, "answer": "Ada"}',
            '{"question": "", "answer": "x"}',
        ),
    ],
)
def test_what_is_no_record(text):
    assert question("doc_general_qa", "", text=text) is Outcome.BAD_FORMAT


def test_strings_of_a_record_mean_what_is_written():
    record = read_record(r'{"question": "\frac{1}{2} \times \text{x} \beta\nThe \"end\", a\\b, }", "answer": "\u00e9"}')
    assert record == {"question": '\\frac{1}{2} \\times \\text{x} \\beta\nThe "end", a\\b, }', "answer": "é"}


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        (1815, "1815"),
        (-2.5, "-2.5"),
        ("No", "No"),
        ("A", "A"),
        ("Not guilty", "Not guilty"),
        ("Unknown Soldier", "Unknown Soldier"),
        ("None of the three", "None of the three"),
        ("Nobody", "Nobody"),
        ("Unknown author", "Unknown author"),
        ("The Answer to Everything", "The Answer to Everything"),
        ("No Country for Old Men", "No Country for Old Men"),
        ("Answer: Ada", "Ada"),
        ("The correct answer is:\nAda", "Ada"),
    ],
)
def test_text_references(answer, reference):
    assert question("doc_general_qa", {"question": "q", "answer": answer}).reference == reference


@pytest.mark.parametrize(
    "answer",
    [
        *("Unknown", "unknown.", "N/A", "None", "Not specified", "Not mentioned in the texts", "It is not stated"),
        *(
            "Cannot be determined",
            "Can't be determined",
            "Information not available",
            "Unknown (not stated)",
            "{answer}",
            "The text doesn't say",
            "No answer can be given",
            "None of the documents says so",
            "No information",
            "There is no answer",
            "The documents do not say",
            "I don't know",
        ),
        *(
            "Insufficient information is given",
            "Not enough information",
            "The",
            "an",
            "\N{EM DASH}",
            "...",
            "?!",
            None,
            True,
        ),
    ],
)
def test_text_references_that_say_nothing_are_refused(answer):
    assert question("doc_general_qa", {"question": "q", "answer": answer}) is Outcome.BAD_FORMAT


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("2 million", "2000000"),
        ("4.35 million", "4350000"),
        ("$1.5 billion", "1500000000"),
        ("(7)", "-7"),
        ("$(1,250)", "-1250"),
        ("\N{MINUS SIGN}7", "-7"),
        ("7.5%", "7.5"),
        ("3/8", "0.375"),
        (r"\frac{3}{8}", "0.375"),
        ("1,500 - 1,200", "300"),
        ("about 7 km", "7"),
        ("7 (rounded)", "7"),
    ],
)
def test_a_number_reference_means_what_was_written(answer, reference):
    assert question("docmath_qa", {"question": "q", "answer": answer}).reference == reference


@pytest.mark.parametrize(
    "answer", ["2018-2021", "2021-06-30", "7 or 8", "<7", "more than 7", "7:8", "seven", "n/a", ""]
)
def test_references_that_are_not_one_number_are_dropped(answer):
    assert question("docmath_qa", {"question": "q", "answer": answer}) is Outcome.UNPARSABLE_NUMBER


@pytest.mark.parametrize(
    "answer", ["C", "(C)", "c", "c)", "C.", "C) blue", "Option C", "**C**", '"C"', "Answer: C", "C: blue"]
)
def test_letters_of_references(answer):
    assert question("doc_mc", {"question": "q", "options": OPTIONS, "answer": answer}).reference == "C"


@pytest.mark.parametrize("answer", ["A and C", "A, C", "AC", "Crimson", "blue", "E", "all of them", "none", 3])
def test_no_letters_of_references(answer):
    assert question("doc_mc", {"question": "q", "options": OPTIONS, "answer": answer}) is Outcome.BAD_FORMAT


@pytest.mark.parametrize(
    "options",
    [
        ["red", "green", "blue", "grey"],
        ["A) red", "B) green", "C) blue", "D) grey"],
        {"a": "red", "b": "green", "c": "blue", "d": "grey"},
        {"A": "(A) red", "B": "(B) green", "C": "(C) blue", "D": "(D) grey"},
        {"A": "A. red", "B": "B. green", "C": "C. blue", "D": "D. grey"},
    ],
)
def test_options_in_other_forms(options):
    assert question("doc_mc", {"question": "q", "options": options, "answer": "C"}).options == tuple(OPTIONS.values())


@pytest.mark.parametrize("twin", ["red", "Red.", " RED ", "re\N{ZERO WIDTH SPACE}d"])
def test_two_equal_options_are_refused(twin):
    record = {"question": "q", "options": {**OPTIONS, "D": twin}, "answer": "C"}
    assert question("doc_mc", record) is Outcome.BAD_FORMAT


def test_options_that_differ_in_a_sign_are_different():
    options = {"A": "5", "B": "-5", "C": "5%", "D": "0.5"}
    assert question("doc_mc", {"question": "q", "options": options, "answer": "B"}).reference == "B"


def test_answers_of_files_are_read_in_the_same_way():
    assert known_answer("doc_mc", "(b)") == "B" and known_answer("doc_mc", "D) grey") == "D"
    assert known_answer("docmath_qa", 5.0) == "5" and known_answer("docmath_qa", "\N{MINUS SIGN}5") == "\N{MINUS SIGN}5"
    for task, value in (("doc_mc", "A or B"), ("doc_mc", "Blue"), ("docmath_qa", "2018-2021"), ("docmath_qa", "<5")):
        with pytest.raises(ValueError, match=task):
            known_answer(task, value)
