"""Which documents the questioner is shown."""

import random
from collections import Counter

from spell_megatron.selfplay.context import choose_context, remembered_documents, shorten_context
from spell_megatron.selfplay.history import Entry


def test_context_grows_by_m_until_all_documents_are_seen():
    rng, entries, sizes = random.Random(0), [], []
    for i in range(5):
        context = choose_context(rng, 13, 5, entries)
        assert list(context) == sorted(set(context)) and set(context) <= set(range(13))
        assert all(set(entry.documents) <= set(context) for entry in entries)
        sizes.append(len(context))
        entries = [*entries, Entry(context, f"q{i}", "a")][-3:]
    assert sizes == [5, 10, 13, 13, 13]


def test_context_is_drawn_uniformly():
    rng = random.Random(0)
    counts = Counter(index for _ in range(4000) for index in choose_context(rng, 10, 3, []))
    # 4000 draws of 3 of 10: 1200 each, standard deviation 29; the bound is five of them.
    assert all(abs(count - 1200) < 145 for count in counts.values()) and len(counts) == 10


def test_a_context_loses_new_documents_first_and_from_the_end():
    entries = [Entry((0, 3), "q", "a")]

    def shortened(excess):
        return shorten_context((0, 1, 3, 4), entries, excess, lambda index: 10)

    assert [shortened(excess) for excess in (0, 1, 11, 21, 31)] == [(0, 1, 3, 4), (0, 1, 3), (0, 3), (0,), ()]
    assert shortened(1000) == ()


def test_a_question_is_remembered_with_all_or_with_its_new_documents():
    entries = [Entry((0, 3), "q", "a"), Entry((5,), "p", "a")]
    assert remembered_documents((0, 3, 4, 5, 7), entries, "all") == (0, 3, 4, 5, 7)
    assert remembered_documents((0, 3, 4, 5, 7), entries, "new") == (4, 7)
    assert remembered_documents((0, 3), entries, "new") == ()


def test_with_new_documents_alone_the_context_forgets():
    rng, entries, sizes = random.Random(0), [], []
    for i in range(8):
        context = choose_context(rng, 40, 3, entries)
        sizes.append(len(context))
        entries = [*entries, Entry(remembered_documents(context, entries, "new"), f"q{i}", "a")][-3:]
    assert sizes == [3, 6, 9, 12, 12, 12, 12, 12]  # at most (L + 1) m
