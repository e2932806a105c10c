"""What the questioner remembers."""

import json

from spell_megatron.selfplay.history import Entry, History


def test_history_keeps_the_last_entries_per_task_and_cluster():
    history = History(3)
    for i in range(5):
        assert history.admit("doc_mc", "c", Entry((i,), f"q{i}", "a"))
    assert [entry.question for entry in history.entries("doc_mc", "c")] == ["q2", "q3", "q4"]
    assert history.entries("docmath_qa", "c") == ()
    assert history.depths() == [3]


def test_history_refuses_a_question_it_knows():
    history = History(3)
    assert history.admit("t", "c", Entry((0,), "Who was first?", "a"))
    assert not history.admit("t", "c", Entry((0, 1), " who was  FIRST? ", "b"))
    assert history.knows("t", "c", "Who was the \N{LEFT DOUBLE QUOTATION MARK}first\N{RIGHT DOUBLE QUOTATION MARK}?")
    assert not history.knows("t", "c", "Who was second?") and not history.knows("t", "other", "Who was first?")
    assert history.admit("t", "c", Entry((0,), "?", "a")) and not history.knows("t", "c", "!")
    assert history.admit("t", "other", Entry((0,), "Who was first?", "a"))
    assert len(history.entries("t", "c")) == 2


def test_history_of_capacity_zero_stays_empty():
    history = History(0)
    assert not history.admit("t", "c", Entry((0,), "q", "a"))
    assert history.entries("t", "c") == ()


def test_history_survives_json():
    history = History(2)
    for i in range(3):
        history.admit("t", f"c{i % 2}", Entry((i, i + 1), f"q{i}", "a"))
    restored = History(2)
    restored.load_state_dict(json.loads(json.dumps(history.state_dict())))
    assert restored.entries("t", "c0") == history.entries("t", "c0")
    assert restored.entries("t", "c1") == history.entries("t", "c1")
    assert restored.state_dict() == history.state_dict()
