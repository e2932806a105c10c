"""Quotes of the questioner: read from its JSON, and looked up in the documents."""

import json

import pytest
from scripted import ScriptedPolicy, make_prompts, make_selfplay, roll, rows_of

from spell_megatron.errors import UserError
from spell_megatron.selfplay.parsing import parse_question
from spell_megatron.selfplay.prompts import PromptSet
from spell_megatron.selfplay.quotes import quotes_found

TEXT = "The Lindow Bridge was designed by Ada Reyes in 1911.\nIt cost $1,200,000; nobody paid."


@pytest.mark.parametrize(
    ("quote", "stands"),
    [
        ("The Lindow Bridge was designed by Ada Reyes", True),
        ("designed by Ada Reyes in 1911. It cost", True),  # over a line break
        ("the lindow  bridge WAS designed", True),
        ("“Lindow Bridge was designed by Ada Reyes”", True),
        ("It cost $1,200,000", True),
        ("The Lindow Bridge was built by Ada Reyes", False),
        ("designed by Ada", True),
        ("designed by Ad", False),  # half a word
        ("Ada Reyes", False),  # too short
        ("It cost $1,200,00", False),
        ("designed by Ada Reyes ... nobody paid", False),
        ("", False),
    ],
)
def test_a_quote_stands_in_a_document_word_for_word(quote, stands):
    assert quotes_found([quote], ["Another text.", TEXT]) == stands


def test_a_quote_does_not_run_over_two_documents():
    assert quotes_found(["one two three"], ["zero one two", "three four"]) == 0


@pytest.mark.parametrize(
    ("evidence", "quotes"),
    [
        (["One two three.", " four "], ("One two three.", "four")),
        ("One two three.", ("One two three.",)),
        ([], ()),
        (["a", 5], ()),
        ({"a": "b"}, ()),
        (None, ()),
        (["", "\x00"], ()),
    ],
)
def test_quotes_of_a_record(evidence, quotes):
    record = {"question": "Who designed it?", "answer": "Ada Reyes", "Evidence": evidence}
    question = parse_question("doc_general_qa", json.dumps(record), False, len, 40)
    assert question.reference == "Ada Reyes" and question.quotes == quotes


def test_the_full_prompts_ask_for_quotes_only_if_they_are_wanted():
    for task, letter in (("doc_general_qa", None), ("docmath_qa", None), ("doc_mc", "B")):
        plain = PromptSet.load("full").questioner(task, ["A text."], [], letter)
        asking = PromptSet.load("full", quotes=True).questioner(task, ["A text."], [], letter)
        assert "evidence" not in plain and "{{" not in plain and '"evidence"' in asking
        head, tail = asking.split(' A further key, "evidence"')
        assert plain == head + tail.partition("`.")[2]


def test_prompts_that_do_not_ask_for_quotes_are_refused():
    with pytest.raises(UserError, match="questioner_docmath_qa.md lacks {{evidence}}.*evidence.md cannot be read"):
        PromptSet.load("compact", quotes=True)


class Quoting(ScriptedPolicy):
    """Every second cluster's questioner quotes rightly; others quote what stands nowhere, or nothing."""

    def text(self, prompt, affinity, seed):
        text, reason = super().text(prompt, affinity, seed)
        if prompt.startswith("questioner") and text.startswith("{"):
            number = int(affinity.split("-")[0])
            shown = prompt.split("|")[2].split(".")[0]
            quote = [[f"{shown}."], ["Document 9 of cluster 999."], []][number % 3]
            text = json.dumps(json.loads(text) | {"evidence": quote})
        return text, reason


def test_only_questions_with_true_quotes_are_answered(tmp_path):
    make_prompts(tmp_path)
    for path in tmp_path.glob("questioner_*.md"):
        path.write_text(path.read_text() + "{{evidence}}")
    (tmp_path / "evidence.md").write_text("Quote.")
    prompts = PromptSet.load(tmp_path, quotes=True)
    questioner = {"history": 0, "quotes": True}
    rollout = roll(make_selfplay(prompts, kinds=("mixed",), questioner=questioner), Quoting())
    for row in rows_of(rollout.samples, "questioner"):
        number = int(row.cluster_id.split("-")[0])
        assert (row.outcome == "unconfirmed") == (number % 3 > 0)
        assert "Quote." in row.prompt
    asked = [int(row.cluster_id.split("-")[0]) for row in rows_of(rollout.samples, "questioner")]
    true, false = (sum(number % 3 == kind for number in asked) for kind in (0, 1))
    assert rollout.metrics["selfplay/rate/quotes_found"] == true / (true + false)
