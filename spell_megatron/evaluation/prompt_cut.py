"""How a prompt that is too long is cut: it loses its middle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from spell_megatron.tokenizer import PolicyTokenizer

T = TypeVar("T")


def middle_truncate(tokens: Sequence[T], max_length: int) -> list[T]:
    """Cut a prompt to `max_length` tokens by taking out its middle.

    The first floor(max_length / 2) tokens stay, and the rest from the end, which holds the question.
    """
    if len(tokens) <= max_length:
        return list(tokens)
    head = max_length // 2
    return [*tokens[:head], *tokens[len(tokens) - (max_length - head) :]]


def cut_ids(tokenizer: PolicyTokenizer, text: str, limit: int) -> tuple[list[int], int, bool]:
    """(at most `limit` token ids of a prompt, their number, whether its middle was taken out)."""
    ids = tokenizer.prompt_ids(text)
    cut = middle_truncate(ids, limit)
    return cut, len(cut), len(cut) < len(ids)


def cut_text(tokenizer: PolicyTokenizer, text: str, limit: int) -> tuple[str, int, bool]:
    """(text of at most `limit` tokens, its tokens, whether its middle was taken out).

    Where the two ends meet, the text may take more tokens than were kept; then some more are left out.
    """
    ids = tokenizer.encode(text)
    if len(ids) <= limit:
        return text, len(ids), False
    kept = limit
    while True:
        head = kept // 2
        short = tokenizer.decode(ids[:head]) + tokenizer.decode(ids[len(ids) - (kept - head) :])
        count = tokenizer.count(short)
        if count <= limit:
            return short, count, True
        kept -= max(1, (count - limit) // 2)  # fewer than too many: the join may come out shorter next time
