"""Words, and cuts by tokens."""

from __future__ import annotations

from spell_megatron.corpus.texts import split_text, words


def test_words():
    assert words("It's a\tTEST_case: naïve 3.14!") == ["it", "s", "a", "test", "case", "naïve", "3", "14"]
    assert words("東京タワーは333m、high") == list("東京タワ") + ["ー", "は", "333m", "high"]
    assert words("--- !!!") == []


def test_cuts_by_another_length():
    text = " ".join(f"This is sentence {n}, which has {n % 7} parts." for n in range(30))
    pieces = split_text(text, 25, lambda piece: len(piece.split()))
    assert max(len(piece.split()) for piece in pieces) <= 25 and " ".join(pieces).split() == text.split()
    assert split_text("x", 0, lambda piece: 5) == ["x"]  # what cannot be cut stays
