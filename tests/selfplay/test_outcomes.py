"""The ends of an attempt, and what a step without rows says about them."""

from pathlib import Path

from spell_megatron.selfplay.outcomes import Outcome, why_empty

DUMPS = Path("runs/first/rollouts")


def test_names_are_those_of_metrics_and_dumps():
    assert [str(outcome) for outcome in Outcome] == [
        "mixed", "all_0", "all_1", "ungrounded", "unconfirmed", "repeated", "bad_format", "truncated",
        "zero_answer", "unparsable_number", "long_reference", "error", "questioner_prompt_too_long",
        "documents_too_long", "responder_prompt_too_long",
    ]  # fmt: skip
    assert Outcome("all_0") is Outcome.ALL_0 and f"{Outcome.ALL_0}" == "all_0"


def test_every_outcome_has_a_meaning_of_its_own_and_a_remedy():
    assert len({outcome.meaning for outcome in Outcome}) == len(Outcome)
    assert all(outcome.remedy.format(dumps=DUMPS).endswith(".") for outcome in Outcome)


def test_an_outcome_is_mixed_or_negative_or_dropped():
    for outcome in Outcome:
        assert (outcome is Outcome.MIXED) + outcome.negative + outcome.dropped == 1
        assert outcome.valid or not outcome.answered


def test_an_empty_step_names_the_three_most_frequent_ends_and_the_remedy_of_the_first():
    rates = {"bad_format": 0.5, "truncated": 0.25, "all_0": 0.15, "ungrounded": 0.1}
    metrics = {f"selfplay/rate/{outcome}": rate for outcome, rate in rates.items()} | {"selfplay/clusters": 20}
    text = why_empty(metrics, DUMPS)
    assert "(20 tried: 50% bad format, 25% cut off, 15% all answers wrong)" in text
    assert text.endswith(f"read its questions in {DUMPS}.")
    assert why_empty({}, DUMPS).endswith("the update is left out.")
