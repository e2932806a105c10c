"""Hashes of sequences of words, against the sequences themselves."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from spell_megatron.corpus.word_sequences import sequences, word_hashes


@given(st.lists(st.sampled_from("abc"), max_size=40), st.integers(1, 6))
def test_sequences_are_equal_exactly_where_words_are(letters, n):
    grams = [tuple(letters[i : i + n]) for i in range(len(letters) - n + 1)]
    hashes = sequences(word_hashes(letters), n)
    assert len(hashes) == len(grams)
    assert [[a == b for b in grams] for a in grams] == (hashes[:, None] == hashes).tolist()
