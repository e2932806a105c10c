"""Rule checks: cover exact match, numbers, letters."""

import re
import sys
from pathlib import Path

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from spell_megatron.selfplay.numbers import parse_number
from spell_megatron.selfplay.scoring import answer_kind, numbers_match, rule_score
from spell_megatron.selfplay.texts import normalize_text

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def oracle():
    """tools/vectors/numbers.py, which has its own arithmetic (Python's parser) and comparison (fractions)."""
    sys.path.append(str(TOOLS))
    from vectors import numbers

    return numbers


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234.5", 1234.5),
        ("$1,200", 1200),
        ("US$ 5 million", 5e6),
        ("12 kg", 12),
        ("about 7", 7),
        ("profit = 3.5%", 3.5),
        ("007", 7),
        ("1e-05", 0.00001),
        ("−5", -5),
        ("2 × 3", 6),
        ("2 x 10^3", 2000),
        ("2^3^2", 512),
        ("-2^2", -4),
        ("(3 + 4) * 2 / 7 - 1", 1),
        ("8 - 3 - 2", 3),
        ("8 / 4 / 2", 1),
    ],
)
def test_numbers_are_read(text, value):
    assert parse_number(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "abc",
        "yes",
        "True",
        "(b)",
        "12,34",
        "1, 2",
        "{1,2}",
        "1 2",
        "1.2.3",
        "inf",
        "nan",
        "1e999",
        "5/0",
        "3+4j",
        "(-8)^(1/3)",
        "10^10^10",
        "9" * 5000,
        "(" * 400 + "1" + ")" * 400,
        "len('abc')",
        "__import__('os').getcwd()",
        "0x10",
        "1_000",
        "٣",
        "²",
    ],
)
def test_what_is_no_finite_number_is_none(text):
    assert parse_number(text) is None


# The oracle evaluates with the same floats, so results are equal, not just close.
numerals = st.integers(0, 99).map(str) | st.decimals(0, 99, places=2).map(str)
expressions = st.recursive(
    numerals,
    lambda inner: (
        st.tuples(inner, st.sampled_from("+-*/^"), inner).map("".join)
        | inner.map("({})".format)
        | inner.map("-{}".format)
    ),
    max_leaves=8,
)


RANGE_OR_DATE = re.compile(r"[0-9.]+(?:-[0-9.]+)+|[0-9.]+(?:/[0-9.]+){2,}")


@given(expressions)
@example("2^-1")
@example("-2^2")
@example("--3")
def test_arithmetic_agrees_with_pythons(oracle, text):
    assume(not RANGE_OR_DATE.fullmatch(text))
    assert parse_number(text) == oracle.arithmetic(text)


finite = st.floats(-1e12, 1e12, allow_nan=False) | st.integers(-5000, 5000).map(float)


@given(
    finite,
    finite | st.none(),
    st.sampled_from([1, 1.001, 0.999, 1.0015, 1.002, 100, 0.01, 1e3, 1e-6, 1e9, 10]),
)
def test_comparison_agrees_with_exact_fractions(oracle, a, b, factor):
    b = a * factor if b is None else b
    # On the very edge of a tolerance floats and fractions may differ; keep away from it by 1e-9.
    assume(all(abs(abs(a - b) - 0.0015 * abs(x)) > 1e-9 * abs(x) for x in (a, b) if x))
    small, large = sorted((abs(a), abs(b)))
    assume(all(abs(abs(small * s - large) - 0.0015 * large) > 1e-9 * large for s in (100, 1e3, 1e6, 1e9)) or not large)
    assert numbers_match(a, b) == oracle.numbers_agree(a, b)


@pytest.mark.parametrize(
    ("prediction", "reference", "match"),
    [
        (100.15, 100, True),
        (100.16, 100, False),
        (5, -5, False),
        (-5, -5, True),
        (0, 0, True),
        (0, -0.0004, False),
        (0.05, 5, True),
        (5, 50, False),
        (5, 5e3, True),
        (5, 5e6, True),
        (5, 5e9, True),
        (5, 50000, False),
        (1.0004, 1.0008, True),
        (1e307, 1e307, True),
        (1e308, -1e308, False),
    ],
)
def test_numbers_match_by_sign_scale_and_tolerance(prediction, reference, match):
    assert numbers_match(prediction, reference) is match


def test_two_unparsable_numbers_do_not_match():
    assert rule_score("docmath_qa", "abc", "xyz") == 0
    assert rule_score("docmath_qa", "(a)", "(a)") == 0


@given(st.text())
def test_text_normalisation_is_idempotent_and_ignores_case(text):
    once = normalize_text(text)
    assert normalize_text(once) == once
    assert normalize_text(text.lower()) == once


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        ("docmath_qa", "number"),
        ("doc_general_qa", "text"),
        ("doc_mc", "letter"),
        ("longbench-v2_x", "letter"),
        ("longbench-hotpotqa", "text"),
        ("frames", "text"),
        ("docmath_complong", "number"),
    ],
)
def test_kind_of_answers_by_name(task, kind):
    assert answer_kind(task) == kind


def test_unknown_names_have_no_kind():
    with pytest.raises(ValueError, match="hotpotqa"):
        answer_kind("hotpotqa")


def test_no_prediction_scores_zero_and_letters_must_be_equal():
    assert rule_score("doc_mc", None, "A") == 0
    assert rule_score("doc_mc", "A", "A") == 1
    assert rule_score("doc_mc", "B", "A") == 0
