"""Which documents of a cluster the questioner is shown."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Literal

from spell_megatron.selfplay.history import Entry


def choose_context(
    rng: random.Random, n_documents: int, new_documents: int, entries: Sequence[Entry]
) -> tuple[int, ...]:
    """Indices, in document order, of the documents that the questioner is shown.

    All documents of these remembered questions, and up to `new_documents` of the others, chosen at random.
    """
    seen = {index for entry in entries for index in entry.documents if index < n_documents}
    unseen = [index for index in range(n_documents) if index not in seen]
    return tuple(sorted(seen | set(rng.sample(unseen, min(new_documents, len(unseen))))))


def remembered_documents(
    context: Sequence[int], entries: Sequence[Entry], history_documents: Literal["all", "new", "none"]
) -> tuple[int, ...]:
    """Which of the documents that a questioner was shown its question is remembered with.

    All of them, but with `new` only those that belong to no question that was remembered then.
    """
    if history_documents != "new":
        return tuple(context)
    seen = {index for entry in entries for index in entry.documents}
    return tuple(index for index in context if index not in seen)


def shorten_context(
    context: Sequence[int], entries: Sequence[Entry], excess: int, count_tokens: Callable[[int], int]
) -> tuple[int, ...]:
    """The context after documents were dropped, one by one, until at least `excess` tokens are saved.

    Documents that belong to no remembered question are dropped first, then the others, always from the end.
    `count_tokens` gives the number of tokens of a document, by its index. The result may be empty.
    """
    seen = {index for entry in entries for index in entry.documents}
    droppable = [index for index in context if index in seen] + [index for index in context if index not in seen]
    while excess > 0 and droppable:
        excess -= count_tokens(droppable.pop())
    return tuple(sorted(droppable))
