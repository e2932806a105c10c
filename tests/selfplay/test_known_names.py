"""Names in questions, looked up in the documents that the questioner saw."""

import json

import pytest
from scripted import ScriptedPolicy, make_prompts, make_selfplay, roll, rows_of

from spell_megatron.selfplay.names import unknown_names
from spell_megatron.selfplay.prompts import PromptSet

DOCUMENTS = ["The Lindow Bridge was designed by Ada O'Brien in 1911.", "Émile Zay of the U.S. sold J. R. Fern's mill."]


@pytest.mark.parametrize(
    ("question", "unknown"),
    [
        ("Who designed the Lindow Bridge?", []),
        ("Who designed the Lindov Bridge?", ["Lindov"]),
        ("Who designed the Lindow Tower of Ada Reyes?", ["Tower", "Reyes"]),
        ("In which year did Ada O’Brien design it?", []),
        ("What was ADA's bridge called?", []),
        ("What did E\u0301mile Zay sell to Fern’s heirs?", []),  # a composed and a decomposed letter
        ("Is he from the US?", []),
        ("What happened? Which mill did Zay sell? (Answer briefly.)", []),  # sentences begin with capitals
        ("What is the sum of both numbers?", []),
        ("What is the CAGR of its revenue, in USD or E.U.R.?", []),
        ("Who led the COMPANY?", ["COMPANY"]),
        ("What did I read about Zay-Fern?", []),
        ("艾达设计了什么？", []),
        ("", []),
    ],
)
def test_names_that_no_document_holds(question, unknown):
    assert unknown_names(question, DOCUMENTS) == unknown


class Naming(ScriptedPolicy):
    """The questioner of every third cluster names what its documents do not."""

    def text(self, prompt, affinity, seed):
        text, reason = super().text(prompt, affinity, seed)
        if prompt.startswith("questioner") and text.startswith("{"):
            record = json.loads(text)
            name = "Nowhere" if int(affinity.split("-")[0]) % 3 == 0 else "Document"
            text = json.dumps(record | {"question": f"{record['question']} What does {name} say?"})
        return text, reason


def test_a_question_about_unknown_names_is_not_answered(tmp_path):
    make_prompts(tmp_path)
    selfplay = make_selfplay(PromptSet.load(tmp_path), kinds=("mixed",), questioner={"history": 0, "known_names": True})
    rollout = roll(selfplay, Naming())
    rows = rows_of(rollout.samples, "questioner")
    unknown = [int(row.cluster_id.split("-")[0]) % 3 == 0 for row in rows]
    assert [row.outcome == "unconfirmed" for row in rows] == unknown and any(unknown)
    assert rollout.metrics["selfplay/rate/unknown_names"] == sum(unknown) / len(unknown)
