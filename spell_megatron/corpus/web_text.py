"""Signs of poor web text: the quality and repetition rules of Gopher."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

_STOP_WORDS = frozenset("the be to of and that have with".split())


def web_fault(text: str, words: Sequence[str]) -> str:
    """Why a text looks like poor web text; "" if it does not.

    The quality and repetition rules of Gopher (Rae et al. 2021, arXiv 2112.11446, appendix A1.1), for English.

    Args:
        words: its `words`, in lower case.
    """
    n = len(words)
    if not 50 <= n <= 100_000:
        return "with fewer than 50 or more than 100,000 words"
    if not 3 <= sum(map(len, words)) / n <= 10:
        return "with words of unusual length"
    if max(text.count("#"), text.count("...") + text.count("…")) > 0.1 * n:
        return "with many # or ..."
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if sum(line.startswith(("•", "-", "*", "‣", "·")) for line in lines) > 0.9 * len(lines):
        return "made of bullet points"
    if sum(line.endswith(("...", "…")) for line in lines) > 0.3 * len(lines):
        return "with many lines that end in ..."
    tokens = text.split()
    if sum(any(map(str.isalpha, token)) for token in tokens) < 0.8 * len(tokens):
        return "with few words of letters"
    if len(_STOP_WORDS.intersection(words)) < 2:
        return "without English stop words"
    paragraphs = [part for part in re.split(r"\n\s*\n", text) if part.strip()]
    for parts, most in ((lines, 0.3), (paragraphs, 0.3)):
        if len(parts) - len(set(parts)) > most * len(parts):
            return "that repeats itself"
        if sum(len(p) * (c - 1) for p, c in Counter(parts).items()) > 0.2 * len(text):
            return "that repeats itself"
    return "that repeats itself" if _repeats(words) else ""


def _repeats(words: Sequence[str]) -> bool:
    """Gopher's rules on n-grams of words: characters in the commonest (n 2 to 4) and in all repeated ones (5 to 10)."""
    total = sum(map(len, words))
    for n, most in ((2, 0.20), (3, 0.18), (4, 0.16)):
        grams = Counter(zip(*(words[i:] for i in range(n)), strict=False))
        gram, count = grams.most_common(1)[0]
        if count > 1 and count * sum(map(len, gram)) > most * total:
            return True
    for n, most in ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10)):
        seen: set[tuple[str, ...]] = set()
        repeated = position = 0
        sequences = list(zip(*(words[i:] for i in range(n)), strict=False))
        while position < len(sequences):
            if sequences[position] in seen:
                repeated += sum(map(len, sequences[position]))
                position += n  # characters of overlapping repetitions count once
            else:
                seen.add(sequences[position])
                position += 1
        if repeated > most * total:
            return True
    return False
