"""Scores of model outputs with known values; pass@k and its intervals; the paper's table; the files."""

import itertools
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spell_megatron.evaluation import results
from spell_megatron.evaluation.benchmarks import BenchmarkQuestion
from spell_megatron.evaluation.evaluate import write_scores
from spell_megatron.evaluation.markdown import markdown
from spell_megatron.evaluation.pass_at_k import pass_at_k
from spell_megatron.evaluation.plot import plot
from spell_megatron.selfplay.parsing import parse_verdict

SETTINGS = {"model": "m", "max_input": 16384, "max_output": 4096, "temperature": 0.7, "top_p": 0.95, "samples": 4}


def question(benchmark="mine", key="q", task="doc_general_qa", answer="Oslo", subset="") -> BenchmarkQuestion:
    return BenchmarkQuestion(key, task, "Where?", answer, ("Text.",), benchmark, subset)


def row(text: str, cut: bool = False) -> dict:
    return {"text": text, "cut": cut, "prompt_cut": False, "tokens": len(text.split())}


# task, reference, output, its score by rule
KNOWN = [
    # text: the reference occurs in the answer (B25: the released code scores these 0)
    ("doc_general_qa", "Oslo", "I think so. The correct answer is Oslo", 1),
    ("doc_general_qa", "Oslo", "The correct answer is the city of oslo.", 1),
    ("doc_general_qa", "the Sorrel Bridge", "The correct answer is **Sorrel Bridge**.", 1),
    ("doc_general_qa", "city of Oslo", "The correct answer is Oslo", 0),  # the other direction is no match
    ("doc_general_qa", "Oslo", "Oslo is right. The correct answer is Bergen", 0),
    ("doc_general_qa", "Oslo", "Oslo", 0),  # states no answer
    ("doc_general_qa", "Oslo", "<think>The answer is Oslo.", 0),  # thinking never ends
    ("doc_general_qa", "Oslo", "<think>The answer is Rome.</think>The correct answer is Oslo", 1),
    # numbers: 0.15 %, slips of scale forgiven, the sign counts
    ("docmath_qa", "-200", "Therefore, the answer is -200", 1),
    ("docmath_qa", "-200", "Therefore, the answer is 200", 0),
    ("docmath_qa", "23", "Therefore, the answer is 23.03%", 1),
    ("docmath_qa", "23", "Therefore, the answer is 23.04", 0),
    ("docmath_qa", "0.325", "Therefore, the answer is 32.5%", 1),
    ("docmath_qa", "57.3", "Therefore, the answer is $57,300", 1),
    ("docmath_qa", "46.4", r"so \boxed{46.4}", 1),
    ("docmath_qa", "46.4", "Therefore, the answer is 2 * 23.2", 1),
    ("docmath_qa", "46.4", "Therefore, the answer is 46.4 or 47", 0),
    ("docmath_qa", "46.4", "I do not know.", 0),
    # letters
    ("doc_mc", "C", "The correct answer is (C)", 1),
    ("doc_mc", "C", "The correct answer is (A), no: the correct answer is (C)", 1),
    ("doc_mc", "C", "The correct answer is (B)", 0),
    ("doc_mc", "C", "(C)", 1),
    ("doc_mc", "C", "The correct answer is Copper", 0),
]


@pytest.mark.parametrize("task, reference, output, score", KNOWN)
def test_known_outputs_have_known_scores(task, reference, output, score):
    asked = question(task=task, answer=reference)
    assert results.Sample.of(asked, row(output)).rule == score
    cut = results.Sample.of(asked, row(output, cut=True))  # what was cut at the limit states nothing
    assert (cut.prediction, cut.rule) == (None, 0)


def test_score_is_the_better_of_rule_and_judge():
    wrong, right = (results.Sample.of(question(), row(f"The correct answer is {x}")) for x in ("Bergen", "Oslo"))
    for verdict, score in ((None, 0), (0, 0), (-1, 0), (1, 1)):
        wrong.verdict = right.verdict = verdict
        assert (wrong.score, right.score) == (score, 1)


def test_the_judge_is_asked_only_where_it_can_matter():
    right, wrong, silent = (
        results.Sample.of(question(), row(text))
        for text in ("The correct answer is Oslo", "The correct answer is Bergen", "No idea")
    )
    letter = question(task="doc_mc", answer="A")
    assert [results.needs_judgment(question(), s, False) for s in (right, wrong, silent)] == [False, True, False]
    assert [results.needs_judgment(question(), s, True) for s in (right, wrong, silent)] == [True, True, False]
    assert not results.needs_judgment(letter, results.Sample.of(letter, row("The answer is B")), True)


@pytest.mark.parametrize(
    "text, verdict",
    [
        ("NOTHING is missing: [[YES]]", 1),  # B27: the released code finds a NO in NOTHING
        ("It is NOT so. Decision: [[NO]]", 0),
        ("<think>[[YES]]?</think>Decision: [[NO]]", 0),
        ("Explanation: the same. Decision: YES", 1),
        ("[[YES]] or [[NO]]", -1),
        ("I cannot tell", -1),
        ("<think>hm", -1),
    ],
)
def test_judgments_are_read(text, verdict):
    assert parse_verdict(text, truncated=False) == verdict
    assert parse_verdict(text, truncated=True) == -1


# ------------------------------------------------------------------------------------------ pass@k


def answered(counts: list[int], n: int, benchmark: str = "mine", subset: str = "") -> list[results.Answered]:
    """Questions with so many right answers of n."""
    made = []
    for number, right in enumerate(counts):
        samples = [results.Sample("x", int(i < right), False, False, 1) for i in range(n)]
        made.append(results.Answered(question(benchmark, str(number), subset=subset), samples))
    return made


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_draws_with_a_right_answer(case):
    """Against brute force over all ways to draw k of n samples without replacement."""
    n, right, k = case
    draws = list(itertools.combinations([1] * right + [0] * (n - right), k))
    assert pass_at_k(n, right, k) == pytest.approx(fmean(max(draw) for draw in draws), abs=1e-12)


def test_estimates_of_known_counts():
    made = results.estimates([(1.0, answered([0, 1, 4, 8], 8))], "score")
    assert list(made) == ["pass@1", "pass@2", "pass@4", "pass@8"]
    assert made["pass@1"]["mean"] == pytest.approx((0 + 1 + 4 + 8) / 32)
    # c = 1: k/8; c = 4: 1 - C(4, k)/C(8, k)
    assert made["pass@2"]["mean"] == pytest.approx((0 + 0.25 + (1 - 6 / 28) + 1) / 4)
    assert made["pass@8"]["mean"] == pytest.approx(0.75)
    assert list(results.estimates([(1.0, answered([1], 6))], "score")) == ["pass@1", "pass@2", "pass@4", "pass@6"]


def test_intervals_are_those_of_the_bootstrap():
    """Against the exact distribution of a resampled mean: of n questions answered 0 or 1, a binomial."""
    n, p = 60, 0.3
    made = results.estimates([(1.0, answered([1] * 18 + [0] * 42, 1))], "score")["pass@1"]
    cumulated = np.cumsum([math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)])
    exact = [int(np.searchsorted(cumulated, q)) / n for q in (0.025, 0.975)]
    assert made["mean"] == pytest.approx(p)
    # 2,000 resamples: the percentiles may be one question off
    assert [made["low"], made["high"]] == pytest.approx(exact, abs=1.01 / n)
    # and close to the normal approximation
    assert made["high"] - made["low"] == pytest.approx(2 * 1.96 * math.sqrt(p * (1 - p) / n), rel=0.1)


def test_intervals_of_an_average_add_the_variances_of_its_sets():
    first, second = answered([1] * 50 + [0] * 50, 1), answered([1] * 20 + [0] * 80, 1)
    made = results.estimates([(0.5, first), (0.5, second)], "score")["pass@1"]
    assert made["mean"] == pytest.approx(0.35)
    deviation = 0.5 * math.sqrt(0.25 / 100 + 0.16 / 100)
    assert made["high"] - made["low"] == pytest.approx(2 * 1.96 * deviation, rel=0.1)


# ------------------------------------------------------------------------------------------- table


def everything(n: int = 4) -> dict[str, list[results.Answered]]:
    return {
        "docmath": answered([n, 0], n, "docmath", "complong"),  # 50
        "frames": answered([n, n, 0, 0, 0], n, "frames"),  # 40
        "2wikimqa": answered([n], n, "2wikimqa"),  # 100
        "hotpotqa": answered([0, 0], n, "hotpotqa"),  # 0
        "musique": answered([n, 0], n, "musique"),  # 50
        "longbench-v2": answered([n] + [0] * 4, n, "longbench-v2"),  # 20
        "mine": answered([n], n, "mine"),
    }


def test_the_papers_table_weighs_columns_not_questions():
    made = results.summarise(everything(), SETTINGS)
    means = {name: column["score"]["pass@1"]["mean"] for name, column in made["columns"].items()}
    assert means == {
        name: pytest.approx(x) for name, x in {"DocMath": 0.5, "Frames": 0.4, "LB-MQA": 0.5, "LB-V2": 0.2}.items()
    }
    assert made["average"]["score"]["pass@1"]["mean"] == pytest.approx(0.4)
    assert made["benchmarks"]["docmath"]["subsets"]["complong"]["score"]["pass@1"]["mean"] == 0.5


def test_the_published_averages_are_means_of_four_columns():
    """Qwen2.5-7B-Instruct at 16K: base and SPELL (specification, Appendix C)."""
    for columns, average in (((38.4, 40.3, 45.1, 29.0), 38.2), ((45.8, 46.7, 63.1, 33.2), 47.2)):
        counts = [round(10 * x) for x in columns]
        sets = [(0.25, answered([1] * right + [0] * (1000 - right), 1)) for right in counts]
        assert 100 * results.estimates(sets, "score")["pass@1"]["mean"] == pytest.approx(average, abs=0.051)


def test_the_files_say_the_same(tmp_path):
    numbers = results.summarise(everything(), SETTINGS | {"judge": "gpt-oss-120b"})
    write_scores(numbers, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pass_at_k.svg", "scores.json", "scores.md"]
    assert json.loads((tmp_path / "scores.json").read_text()) == numbers
    text = (tmp_path / "scores.md").read_text()
    table = re.search(r"\| pass@1 \|(.*)\|", text)[1].split("|")
    assert [cell.split()[0] for cell in table] == ["50.0", "40.0", "50.0", "20.0", "40.0"]
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.count("|") in (7, 11)
    picture = ElementTree.parse(tmp_path / "pass_at_k.svg").getroot()
    labels = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {"Avg", "DocMath", "Frames", "LB-MQA", "LB-V2", "mine", "1", "2", "4"} <= set(labels)
    lines = list(picture.iter("{http://www.w3.org/2000/svg}polyline"))
    assert len(lines) == 6 and all(len(line.get("points").split()) == 3 for line in lines)


def test_a_missing_column_leaves_the_average_out():
    some = {name: members for name, members in everything().items() if name not in ("frames", "musique")}
    numbers = results.summarise(some, SETTINGS)
    assert list(numbers["columns"]) == ["DocMath", "LB-V2"] and numbers["average"] is None
    assert "missing: Frames, LB-MQA." in markdown(numbers)
    own = results.summarise({"mine": answered([1], 1)}, SETTINGS)
    assert own["columns"] == {} and "mine" in markdown(own) and "mine" in plot(own)
