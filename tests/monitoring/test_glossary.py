"""Every metric that a run logs is explained, under the name that it is logged with."""

import json
import re

import pytest
from simulated_run import make_run
from small_run import ROOT

from spell_megatron.monitoring.glossary import MEANINGS, meaning, search
from spell_megatron.monitoring.progress import SHOWN


def test_what_a_run_logs_is_explained(tmp_path):
    run = make_run(tmp_path / "run", 3)
    logged = set().union(*map(json.loads, (run / "metrics.jsonl").read_text().splitlines())) - {"step", "time"}
    assert logged > {"selfplay/docmath_qa/responder/reward", "validation/doc_general_qa/pass@4", "train/entropy"}
    assert not [name for name in logged if meaning(name) is None]


def test_what_is_logged_of_experts_is_explained():
    """The simulated run has a dense model."""
    source = (ROOT / "spell_megatron" / "training" / "moe.py").read_text()
    names = set(re.findall(r'"((?:moe|routing)_\w+)"\]? ?[:=]', source))
    assert len(names) == 6 and not [name for name in names if meaning(f"train/{name}") is None]


def test_what_the_pages_name_is_explained():
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md"))
    names = set(re.findall(r"`((?:selfplay|batch|history|train|validation|push|time)/[\w@/<>]*\w)`", pages))
    assert len(names) > 20 and not [name for name in names if meaning(name) is None]


def test_what_is_shown_is_explained():
    assert not [name for name, _ in SHOWN if meaning(name) is None]


def test_a_name_or_a_word_is_found():
    assert list(search("validation/doc_mc/pass@16")) == [
        ("validation/doc_mc/pass@16", MEANINGS["validation/<task>/pass@<k>"])
    ]
    assert {"train/moe_load_imbalance"} <= {name for name, _ in search("EXPERT")}
    assert not list(search("nonsense")) and len(list(search(""))) == len(MEANINGS)
    assert meaning("selfplay/own_task/rule_score") == meaning("selfplay/doc_mc/rule_score") is not None
    assert meaning("selfplay/other/nothing") is None


@pytest.mark.parametrize(
    ("word", "status", "text"),
    [("train/entropy", 0, "train/entropy\n    mean entropy"), ("nonsense", 2, "No metric is called 'nonsense'")],
)
def test_the_command(word, status, text, capsys):
    from spell_megatron.cli import main

    assert main(["metrics", word]) == status
    captured = capsys.readouterr()
    assert text in captured.out + captured.err
