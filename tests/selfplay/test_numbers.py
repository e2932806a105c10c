"""Numbers as people and models write them: what is read as which number, and what is none."""

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from spell_megatron.selfplay.numbers import format_decimal, in_parentheses, number_at, parse_number
from spell_megatron.selfplay.scoring import numbers_match, rule_score

VALUES = {
    # signs and currency
    "\N{MINUS SIGN}8.25": -8.25,
    "\N{EN DASH}4": -4,
    "+3.0": 3,
    "-$91": -91,
    "$-91": -91,
    "\N{MINUS SIGN}€7.5": -7.5,
    "-(6)": -6,
    "minus 12": -12,
    "negative 0.5": -0.5,
    "US$ 17": 17,
    "AU$17": 17,
    "CHF 17": 17,
    "17 EUR": 17,
    "17€": 17,
    "Rs. 640": 640,
    "£1,750.25": 1750.25,
    # separators
    "12,345,678.9": 12345678.9,
    "7 654 321": 7654321,
    "7\N{NO-BREAK SPACE}654": 7654,
    "7\N{NARROW NO-BREAK SPACE}654.5": 7654.5,
    "7\N{RIGHT SINGLE QUOTATION MARK}654": 7654,
    "7.654,25": 7654.25,
    "12.345": 12.345,
    "0042": 42,
    ".75": 0.75,
    "９８７": 987,
    # scale
    "2 million": 2e6,
    "2.5 billion dollars": 2.5e9,
    "4.35 million": 4350000,
    "6 trillion": 6e12,
    "3 thousand": 3000,
    "3 hundred thousand": 300000,
    "2 dozen": 24,
    "9k": 9000,
    "$9m": 9e6,
    "9 m": 9,
    "9bn": 9e9,
    "3/4 million": 750000,
    "36 万": 360000,
    "1.2亿": 1.2e8,
    # powers, fractions, arithmetic
    "4 x 10^5": 4e5,
    "4x10^5": 4e5,
    "4 × 10⁵": 4e5,
    "4 · 10^-2": 0.04,
    "4e5": 4e5,
    "4.5E+2": 450,
    "3/8": 0.375,
    "⅜": 0.375,
    "2½": 2.5,
    "2 3/8": 2.375,
    "2,400 / 8": 300,
    "2,400 - 1,900": 500,
    "9 - 4 - 3": 2,
    "(9 - 4) * 3": 15,
    "rate = 6 / 8 = 0.75": 0.75,
    "total => 31": 31,
    # LaTeX
    r"\frac{3}{8}": 0.375,
    r"-\dfrac{3}{8}": -0.375,
    r"2\frac{3}{8}": 2.375,
    r"\frac38": 0.375,
    "7{,}654": 7654,
    r"2\text{ million}": 2e6,
    r"4.5 \times 10^{3}": 4500,
    r"\(31\)": 31,
    r"\$31": 31,
    r"31\%": 31,
    r"\mathbf{31}": 31,
    r"31^\circ": 31,
    r"\left(31\right)": 31,
    r"x \approx 31": 31,
    # words beside the number
    "approximately 31": 31,
    "about 31": 31,
    "~31": 31,
    "a total of 31": 31,
    "31 percent": 31,
    "31 percentage points": 31,
    "31 basis points": 31,
    "31 km/h": 31,
    "31-day": 31,
    "31 (rounded)": 31,
    "31st": 31,
    "FY 2021": 2021,
    "No 31": 31,
}
NO_VALUES = [
    *("4-9", "4–9", "4 - 9", "2018-2021", "2018–21", "2021-06-30", "30/6/2021", "30.6.2021", "4 to 9", "4 or 9"),
    *(
        "4 and 9",
        "4, 9",
        "4; 9",
        "between 4 and 9",
        "4%-9%",
        "2 million to 3 million",
        "4:9",
        "4 : 9",
        "12:45",
        "4 out of 9",
    ),
    *("<9", "> 9", "≥9", r"\geq 9", "less than 9", "more than 9", "at least 9", "up to 9", "over 9", "9 or more", "9+"),
    *("9 ± 1", r"9 \pm 1", "9!", "9x4", "9_000", "9,5", "9,00", "9,0000", "1.2.3", "v1.2", "Q2 2021", "FY2021", "B2"),
    *("COVID-19", "5 ft 3 in", "6 years, 2 months", "nine", "zero", "none", "N/A", "-", "$", "%", "", "()", "not 9"),
    *("1e999999", "9/0", "9" * 2000, "__import__('os')"),
]


@pytest.mark.parametrize("text", VALUES)
def test_the_one_number_of_a_text(text):
    assert parse_number(text) == pytest.approx(VALUES[text], rel=1e-12)


@pytest.mark.parametrize("text", NO_VALUES)
def test_what_is_not_one_number(text):
    assert parse_number(text) is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("31 for 2021, up from 28", "31"),
        ("31 (2020: 28)", "31"),
        ("31. Then 28 more", "31"),
        ("31\n28", "31"),
        ("$2,400.50.", "$2400.50"),
        ("-$91 in total", "-$91"),
        ("approximately 31 km", "31"),
        ("3.2 million dollars", "3.2 million"),
        ("minus 12", "minus 12"),
        ("12 / 4 = 3 units", "3"),
        ("x = 31", "31"),
        ("31, where x = 4", "31"),
        ("31 (x = 4)", "31"),
        ("f(x) = 31", "31"),
        ("62 / 2 = 31 km = 31000 m", "31000"),
        ("0.31 or 31 %", "0.31"),
        ("31% or 0.31", "31"),
        ("31 or 0.31", "31 or 0.31"),
        ("31.25 to 2 decimal places", "31.25"),
        ("4-9", "4-9"),
        ("4 or 9 units", "4 or 9 units"),
        ("4, 9 and 12", "4, 9 and 12"),
        ("less than 9", "less than 9"),
        ("9x4", "9x4"),
        ("based on table 2", None),
        ("given in section 3", None),
        ("nine", None),
        ("", None),
    ],
)
def test_the_number_with_which_a_text_begins(text, number):
    assert number_at(text) == number


# One number in many forms, and different numbers.

decimals = st.decimals("0.01", "999999999", places=2)


def grouped(value, separator):
    return f"{value:,}".replace(",", separator)


FORMS = [
    str,
    lambda v: grouped(v, ","),
    lambda v: grouped(v, " "),
    lambda v: grouped(v, "'"),
    lambda v: grouped(v, "\N{NARROW NO-BREAK SPACE}"),
    lambda v: f"${grouped(v, ',')}",
    lambda v: f"{v} %",
    lambda v: f"+{v}",
    lambda v: f"about {v} kg",
    lambda v: f"{v / 1000000} million",
    lambda v: f"{v} x 10^0",
    lambda v: f"{v * 4} / 4",
    lambda v: rf"\frac{{{v * 2}}}{{2}}",
    lambda v: grouped(v, "{,}"),
    lambda v: rf"\text{{{v}}}",
    lambda v: str(v).translate(str.maketrans("0123456789", "０１２３４５６７８９")),
    lambda v: f"{v:e}",
    lambda v: f"total = {v}",
]


@given(decimals, st.sampled_from(FORMS))
def test_every_form_of_a_number_means_it(value, form):
    assert parse_number(form(value)) == pytest.approx(float(value), rel=1e-12)
    assert rule_score("docmath_qa", form(value), str(value)) == 1


@given(decimals, st.sampled_from(FORMS), st.sampled_from(["-", "\N{MINUS SIGN}", "\N{EN DASH}", "minus "]))
def test_the_sign_of_a_number_counts(value, form, sign):
    text = sign + form(value)
    assume("=" not in text and parse_number(text) is not None)  # a sign before words is none
    assert parse_number(text) == pytest.approx(-float(value), rel=1e-12)
    assert rule_score("docmath_qa", text, str(value)) == 0


@given(decimals, decimals, st.sampled_from(FORMS), st.sampled_from(FORMS))
def test_different_numbers_never_match(a, b, form, other):
    small, large = sorted((float(a), float(b)))
    assume(all(abs(small * scale - large) > 0.002 * large for scale in (1, 1e2, 1e3, 1e6, 1e9)))
    assert rule_score("docmath_qa", form(a), other(b)) == 0


@given(st.integers(1, 9999), st.integers(1, 9999), st.sampled_from(["-", "–", "/1/", " or ", " to ", ":", " and "]))
def test_two_numbers_are_none(a, b, between):
    assume(a != b)
    text = f"{a}{between}{b}"
    assert parse_number(text) is None
    assert rule_score("docmath_qa", number_at(text), str(a)) == 0


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_formatted_number_is_read_as_it_was(value):
    assert parse_number(format_decimal(value)) == value


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("(5)", "-5", 1),  # as accountants write it
        ("(5)", "5", 1),  # or only in parentheses
        ("$(1,234)", "-1234", 1),
        ("(2.5) million", "-2500000", 1),
        ("(-5)", "5", 0),
        ("-(5)", "5", 0),
        ("(2 + 3)", "-5", 0),
        ("-5", "(5)", 1),
        ("(6)", "-5", 0),
    ],
)
def test_a_number_in_parentheses_may_be_negative(prediction, reference, score):
    assert rule_score("docmath_qa", prediction, reference) == score
    assert in_parentheses("(5)") and not in_parentheses("(-5)") and not in_parentheses("(5) or (6)")


@pytest.mark.parametrize(
    ("prediction", "reference", "match"),
    [
        (0.0009, 0.0001, False),
        (0.0019, 0.0011, False),
        (0.001, 0.0006, False),
        (0.0001, 0.0001, True),
        (1.0004, 1.0008, True),
        (0.3333, 1 / 3, True),
        (0.33, 1 / 3, False),
        (0.07, 7, True),
        (4.5, 450, True),
        (45, 4500, False),
        (2000, 20, False),
        (0.45, 45, True),
        (45, 45000, True),
        (2.5, 2.5e6, True),
        (2.5, 2.5e12, False),
        (math.pi, 3.14, True),
        (0, 0, True),
        (0, 1e-9, False),
    ],
)
def test_numbers_match_within_the_tolerance_or_by_a_forgiven_factor(prediction, reference, match):
    assert numbers_match(prediction, reference) is match
