"""Numbers with their nouns."""

from spell_megatron.plural import counted


def test_one_of_a_thing_has_no_s():
    assert [counted(number, "step") for number in (0, 1, 2, 1000)] == ["0 steps", "1 step", "2 steps", "1,000 steps"]
