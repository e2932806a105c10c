"""tiktoken gives the ids and texts of the policy's tokenizer, or is not used."""

from __future__ import annotations

import json
import random
from array import array

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

pytest.importorskip("tiktoken", reason="comes with vLLM")

from spell_megatron.byte_pairs import BytePairs
from spell_megatron.token_pieces import PieceTokens

WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|" + WORDS
TEXT = (
    "The harbour's lamps weren't lit; 1234 boats lay there.\n\n"
    "Über die Brücke – “naïve” 漢字漢字 (see §2).\r\n  a = b → c\n"
)
CHARACTERS = [*"ab XY's1290.,-–“”é漢→\n\r\t_#<>|", "'S", "  ", "\n\n", "lamp", " harbour", "don't"]
CHARACTERS += ["e\u0301", "\u200b", "ſ", "は"]


def tokenizer(expression: str | None = QWEN, change=lambda rules: rules, **options) -> Tokenizer:
    """Byte pairs, learnt from a short text, that find words by an expression or as GPT-2 does."""
    made = Tokenizer(models.BPE())
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=expression is None)]
    if expression:
        steps.insert(0, pre_tokenizers.Split(Regex(expression), "isolated"))
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made.normalizer = normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=380, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([TEXT * 20], trainer)
    made = Tokenizer.from_str(json.dumps(change(json.loads(made.to_str()))))
    made.add_special_tokens(["<|im_end|>"])
    made.add_tokens([AddedToken("<think>", special=False)])
    return made


def without_last_merge(rules):
    """A token of the vocabulary that no merge makes."""
    rules["model"]["merges"].pop()
    return rules


def with_ids_in_another_order(rules):
    vocabulary = rules["model"]["vocab"]
    rules["model"]["vocab"] = dict(zip(vocabulary, reversed(vocabulary.values()), strict=True))
    return rules


def with_normalizer(rules):
    rules["normalizer"] = {"type": "NFKC"}
    return rules


def with_space_before(rules):
    rules["pre_tokenizer"]["pretokenizers"][-1]["add_prefix_space"] = True
    return rules


def with_dropout(rules):
    rules["model"]["dropout"] = 0.1
    return rules


def with_digits_alone(rules):
    steps = rules["pre_tokenizer"]["pretokenizers"]
    steps.insert(0, {"type": "Digits", "individual_digits": True})
    return rules


@pytest.mark.parametrize("expression", [QWEN, WORDS, None])
def test_ids_are_those_of_the_tokenizer_or_there_are_none(expression):
    fast, rng = tokenizer(expression), random.Random(0)
    pairs = BytePairs.of(fast)
    taken = 0
    for _ in range(2000):
        text = "".join(rng.choice(CHARACTERS) for _ in range(rng.randrange(12)))
        ids = pairs.ids(text)
        taken += ids is not None
        assert ids is None or list(ids) == fast.encode(text, add_special_tokens=False).ids, text
    assert taken > 500 and pairs.ids(TEXT) == array("i", fast.encode(TEXT, add_special_tokens=False).ids)


@pytest.mark.parametrize("text", ["a<think>b", "<|im_end|>", "e\u0301", "は", "ſ", "a" + " " * 1000, "\udc80"])
def test_texts_that_are_left_to_the_tokenizer(text):
    assert BytePairs.of(tokenizer()).ids(text) is None


@pytest.mark.parametrize(
    "change",
    [
        without_last_merge,
        with_ids_in_another_order,
        with_normalizer,
        with_space_before,
        with_dropout,
        with_digits_alone,
    ],
)
def test_tokenizers_that_it_cannot_be(change):
    assert BytePairs.of(tokenizer()) and BytePairs.of(tokenizer(change=change)) is None


def test_other_kinds_of_tokenizers():
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, "[UNK]"))
    assert BytePairs.of(words) is None
    two = tokenizer()
    two.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.Split(Regex(WORDS), "isolated")]
    )
    assert BytePairs.of(two) is None


def test_texts_of_ids_are_those_of_the_tokenizer():
    """Broken characters, special tokens and added ones among them."""
    fast, rng = tokenizer(), random.Random(0)
    pairs = BytePairs.of(fast)
    for _ in range(2000):
        ids = [rng.randrange(fast.get_vocab_size()) for _ in range(rng.randrange(9))]
        assert pairs.text(ids) == fast.decode(ids, skip_special_tokens=True)
    assert pairs.text([fast.get_vocab_size() + 7]) is None
    fast.decoder = decoders.Fuse()
    assert BytePairs.of(fast).text([0]) is None


def test_documents_with_odd_lines_are_taken_line_by_line():
    fast = tokenizer()
    slow: list[str] = []

    def encode(texts):
        slow.extend(texts)
        return [array("i", fast.encode(text, add_special_tokens=False).ids) for text in texts]

    pieces = PieceTokens(encode, fast)
    slow.clear()
    document = "Lamps are lit.\nThe は lamp.\nBoats e\u0301.\nThe quay is wet.\n" + TEXT
    text = f"Read:\n{document}\nNow ask."
    assert list(pieces.ids(text, [document])) == fast.encode(text, add_special_tokens=False).ids
    assert slow == ["The は lamp.\nBoats e\u0301.\n"]
