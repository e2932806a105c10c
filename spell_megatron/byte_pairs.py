"""Token ids of long texts in a seventh of the time: by tiktoken, where it gives the ids of the policy's tokenizer.

It takes tokenizers as Qwen's and Llama's: pairs of bytes, merged in the order of their ids, within words that one
regular expression finds. It is used for texts of characters that all versions of Unicode treat alike, and only if it
encodes and decodes these characters and the whole vocabulary as the policy's tokenizer does. It comes with vLLM.
"""

from __future__ import annotations

import json
import random
import re
from array import array
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""Words of a byte-level tokenizer that names no expression of its own."""

_PLAIN = r"\x00-\x7f¡-¬®-žА-я‐-‧‰-⁞←-⋿、。一-龥！（），：；？"
_OTHER = re.compile(rf"[^{_PLAIN}]|\s{{1000}}")
"""A character that is not taken, or so many blanks that the search for words may give up."""

_LINE = 1000
"""Tokens of the vocabulary that stand in one text of the comparison."""
_MIXED = 20_000
"""Tokens that stand directly beside each other there."""


class BytePairs:
    """tiktoken's form of a tokenizer. Made by `of`."""

    def __init__(self, encoding: Any, added: dict[str, int], special: frozenset[int], decodes: bool) -> None:
        self._encoding, self._added, self._special, self._decodes = encoding, list(added), special, decodes

    @classmethod
    def of(cls, fast: Any) -> BytePairs | None:
        """The same as a tokenizer of the tokenizers package; None if it cannot be."""
        try:
            import tiktoken
        except ImportError:
            return None
        rules = json.loads(fast.to_str())
        tokens = fast.get_added_tokens_decoder()
        added = {token.content: number for number, token in tokens.items()}
        pattern, ranks = _pattern(rules), _ranks(rules["model"], added)
        if pattern is None or ranks is None or (rules["normalizer"] or {}).get("type") not in (None, "NFC"):
            return None
        try:
            encoding = tiktoken.Encoding("policy", pat_str=pattern, mergeable_ranks=ranks, special_tokens=added)
        except ValueError:  # an expression that it does not know
            return None
        special = frozenset(number for number, token in tokens.items() if token.special)
        made = cls(encoding, added, special, (rules["decoder"] or {}).get("type") == "ByteLevel")
        return made if made._equals(fast, ranks) else None

    def ids(self, text: str) -> array[int] | None:
        """Token ids of a text; None if it holds what is not taken."""
        if _OTHER.search(text) or any(token in text for token in self._added):
            return None
        return array("i", self._encoding.encode_ordinary(text))

    def text(self, ids: Sequence[int]) -> str | None:
        """Text of token ids, special tokens left out; None if it cannot be told."""
        if not self._decodes:
            return None
        try:
            content = self._encoding.decode_bytes([token for token in ids if token not in self._special])
        except KeyError:  # no token has this id
            return None
        return content.decode("utf-8", "replace")

    def _equals(self, fast: Any, ranks: dict[bytes, int]) -> bool:
        """Whether all characters that are taken, and all tokens, are encoded and decoded as by the other tokenizer."""
        for text in _samples(ranks):
            ids = self.ids(text)
            if ids is not None and ids != array("i", fast.encode(text, add_special_tokens=False).ids):
                return False
        numbers = list(ranks.values())
        random.Random(0).shuffle(numbers)
        parts = [numbers[start : start + _LINE] for start in range(0, len(numbers), _LINE)]
        return not self._decodes or all(
            self.text(part) == fast.decode(part, skip_special_tokens=True) for part in parts
        )


def _samples(ranks: dict[bytes, int]) -> Iterator[str]:
    """Texts of all characters that are taken, of all tokens in lines of their own, and of many beside each other."""
    yield "".join(f"a{letter}1{letter} {letter}B\n" for letter in map(chr, range(0x10000)) if not _OTHER.match(letter))
    texts = [text for token in ranks if not _OTHER.search(text := token.decode("utf-8", "replace"))]
    mixed = random.Random(0).sample(texts, min(_MIXED, len(texts)))
    for between, some in (("\n", texts), ("", mixed)):
        for start in range(0, len(some), _LINE):
            yield between.join(some[start : start + _LINE])


def _pattern(rules: dict[str, Any]) -> str | None:
    """The expression that finds words; None: not one alone does."""
    steps = rules["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    *before, last = steps
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if not before:
        return _GPT2 if last.get("use_regex", True) else None
    split = before[0]
    alone = len(before) == 1 and not last.get("use_regex", True) and split["type"] == "Split"
    if not alone or split["behavior"] != "Isolated" or split["invert"]:
        return None
    return split["pattern"].get("Regex")


def _ranks(model: dict[str, Any], added: dict[str, int]) -> dict[bytes, int] | None:
    """Bytes of each token and its id, the order of merges; None: merges have another order, or are not all of it."""
    extras = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback")
    if model["type"] != "BPE" or any(model.get(name) for name in extras):
        return None
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    vocabulary, of_byte = model["vocab"], _bytes()
    numbers = [vocabulary["".join(pair)] for pair in merges]
    if any(first > second for first, second in pairwise(numbers)):
        return None
    try:
        ranks = {
            bytes(of_byte[letter] for letter in token): number
            for token, number in vocabulary.items()
            if token not in added
        }
    except KeyError:
        return None
    return ranks if all(bytes([byte]) in ranks for byte in range(256)) else None


def _bytes() -> dict[str, int]:
    """The letters by which byte-level tokenizers write bytes."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(others)}
