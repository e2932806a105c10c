"""Prompt sets: their contract, and that nothing filled in can change a prompt's form."""

import json
import re
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spell_megatron.errors import UserError
from spell_megatron.selfplay.history import Entry
from spell_megatron.selfplay.parsing import parse_verdict, read_record
from spell_megatron.selfplay.prompts import SETS, PromptSet

TASKS = ("docmath_qa", "doc_general_qa", "doc_mc")
FULL = PromptSet.load("full")
HISTORY = [Entry((0,), "Who came first?", "Ada"), Entry((0, 1), "Who came last?", "Bo")]
DOCUMENTS = ["First document.", "Second document."]


@pytest.mark.parametrize("name", ["full", "compact"])
@pytest.mark.parametrize("task", TASKS)
def test_documents_come_before_all_that_differs_between_prompts(name, task):
    prompts = PromptSet.load(name)
    for history in ([], HISTORY):
        prompt = prompts.questioner(task, DOCUMENTS, history, "C")
        assert [prompt.count(d) for d in DOCUMENTS] == [1, 1]
        assert prompt.index(DOCUMENTS[0]) < prompt.index(DOCUMENTS[1])
        assert all(prompt.index(DOCUMENTS[1]) < prompt.index(e.question) < prompt.index(e.answer) for e in history)
    answer = prompts.responder(task, "Which colour?", DOCUMENTS)
    assert answer.index(DOCUMENTS[1]) < answer.index("Which colour?")
    # What comes before the documents is the same for all questions: prefixes can be cached.
    assert answer.partition("Which colour?")[0] == prompts.responder(task, "Other?", DOCUMENTS).partition("Other?")[0]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("history", [[], HISTORY])
def test_full_set_shows_valid_json_and_no_placeholder(task, history):
    for letter in "ABCD":
        prompt = FULL.questioner(task, DOCUMENTS, history, letter)
        assert "{{" not in prompt
        blocks = re.findall(r"```json\n(.*?)\n```", prompt, re.DOTALL)
        assert len(blocks) == 1
        record = json.loads(blocks[0])
        assert read_record(prompt) == record
        keys = {"question", "options", "answer"} if task == "doc_mc" else {"question", "answer"}
        assert set(record) == keys
        if task == "doc_mc":
            assert record["answer"] == letter
            assert f"The right option has the letter {letter}." in prompt
            assert list(record["options"]) == list("ABCD")


def test_full_set_encloses_the_documents_and_joins_them_with_one_newline():
    for prompt in (FULL.questioner("doc_mc", DOCUMENTS, [], "A"), FULL.responder("doc_mc", "q", DOCUMENTS)):
        assert "<text>\nFirst document.\nSecond document.\n</text>" in prompt


def test_full_set_numbers_the_examples():
    prompt = FULL.questioner("docmath_qa", DOCUMENTS, HISTORY, None)
    assert (
        "Example 1\nQuestion: Who came first?\nAnswer: Ada\nExample 2\nQuestion: Who came last?\nAnswer: Bo" in prompt
    )
    assert "ONE new question" in prompt and "ONE new question" not in FULL.questioner("docmath_qa", DOCUMENTS, [], None)


def test_full_responder_asks_for_the_phrases_that_the_parser_knows():
    assert "Therefore, the answer is X" in FULL.responder("docmath_qa", "q", DOCUMENTS)
    assert "The correct answer is X" in FULL.responder("doc_general_qa", "q", DOCUMENTS)
    assert "The correct answer is (X)" in FULL.responder("doc_mc", "q", DOCUMENTS)


def test_without_documents_the_word_empty_stands_for_them():
    assert "<text>\nEmpty\n</text>" in FULL.responder("doc_mc", "q", None)


def test_verifier_prompt_cannot_be_echoed_into_a_vote():
    prompt = FULL.verifier("How many?", "5 km", "5,000 m")
    assert prompt.index("How many?") < prompt.index("5 km") < prompt.index("5,000 m")
    assert "[[YES]]" in prompt and "[[NO]]" in prompt and "0.15 %" in prompt
    assert parse_verdict(prompt, truncated=False) == -1


hostile = st.text() | st.sampled_from(
    ["{{documents}}", "{{question}}", "{{letter}}", "{{{{x}}}}", "\\1", "\\g<0>", "{0}", "%s"]
)


@given(hostile, hostile, hostile)
def test_what_is_filled_in_is_never_filled_again(question, document, answer):
    marked = [f"<{document}>", "tail"]
    expected = FULL.responder("doc_general_qa", "Q", ["D"]).split("\nD\n")
    before, after = expected[0], expected[1].split("\nQ\n")
    assert FULL.responder("doc_general_qa", question, marked) == (
        f"{before}\n<{document}>\ntail\n{after[0]}\n{question}\n{after[1]}"
    )
    assert f"Answer 1:\n{answer}\n\nAnswer 2:\n{document}\n" in FULL.verifier(question, answer, document)
    prompt = FULL.questioner("doc_mc", marked, [Entry((0,), question, answer)], "B")
    assert f"Question: {question}\nAnswer: {answer}\n" in prompt and f"<{document}>\ntail" in prompt


def test_multiple_choice_needs_a_letter():
    with pytest.raises(ValueError, match="letter"):
        FULL.questioner("doc_mc", DOCUMENTS, [], None)


def test_a_folder_serves_as_a_set_and_its_faults_are_all_named(tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(SETS / "full", folder)
    (folder / "document.md").write_text("Doc: {{document}}\n\n")
    mine = PromptSet.load(folder)
    assert "Doc: a\n\nDoc: b\n" in mine.responder("doc_mc", "q", ["a", "b"])  # one trailing newline is dropped

    (folder / "verifier.md").write_text("{{question}} {{prediction}} {{referance}}")
    (folder / "example.md").unlink()
    (folder / "responder_doc_mc.md").write_bytes(b"\xff{{documents}}{{question}}")
    with pytest.raises(UserError) as error:
        PromptSet.load(folder)
    for message in (
        "verifier.md lacks {{reference}}",
        "verifier.md has the unknown {{referance}}",
        "example.md cannot be read",
        "responder_doc_mc.md cannot be read",
    ):
        assert message in str(error.value)


def test_unknown_sets_are_the_users_error():
    with pytest.raises(UserError, match="compact, full"):
        PromptSet.load("no_such_set")
