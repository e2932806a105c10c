"""Token ids by pieces are those of the whole, or there are no pieces."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from spell_megatron import token_pieces
from spell_megatron.token_pieces import PieceTokens
from spell_megatron.tokenizer import PolicyTokenizer

ROOT = Path(__file__).parents[1]
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_3 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{REST}"
QWEN = LLAMA_3.replace("{1,3}", "")
CAPITALS, SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
GPT_OSS = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{CAPITALS}*{SMALL}+{CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{CAPITALS}+{SMALL}*{CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}|{REST.replace('+[', '+[/', 1)}"
)
SAMPLES = ["A lamp's light: 1234 lumens.\n\nThe quay  \nis  wet,\tsays she.\r\nÜber 漢字かな\n* item\n", "\n\n\n  \n B"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level(expression: str | None, normalizer=None, prefix: bool = False) -> Tokenizer:
    """A byte-pair tokenizer that cuts words by an expression, or as GPT-2 does."""
    tokenizer = Tokenizer(models.BPE())
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=expression is None)
    cut = [pre_tokenizers.Split(Regex(expression), "isolated")] if expression else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cut, bytes_of_words])
    tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([(ROOT / "README.md").read_text(encoding="utf-8"), *SAMPLES * 9], trainer)
    return tokenizer


def sentencepiece_like() -> Tokenizer:
    """A byte-pair tokenizer without words, whose tokens may reach from one line into the next, as Gemma's."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator([(ROOT / "README.md").read_text(encoding="utf-8"), *SAMPLES * 9], trainer)
    return tokenizer


def llama_2_like() -> Tokenizer:
    """A byte-pair tokenizer that puts a space before every text."""
    tokenizer = sentencepiece_like()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = None
    return tokenizer


def spelled_line() -> Tokenizer:
    """A tokenizer with a token of its own for the beginning of a line."""
    tokenizer = byte_level(QWEN)
    tokenizer.add_tokens(["\nThe"])
    return tokenizer


# tokenizer, and whether texts can be cut
TOKENIZERS = {
    "qwen": (lambda: byte_level(QWEN, normalizers.NFC()), True),
    "llama 3": (lambda: byte_level(LLAMA_3), True),
    "gpt-oss": (lambda: byte_level(GPT_OSS), True),
    "gpt-2": (lambda: byte_level(None), False),  # "\n\n" before a letter is two words, and one at the end of a text
    "gpt-2 with a space before": (lambda: byte_level(None, prefix=True), False),
    "sentencepiece": (sentencepiece_like, False),
    "llama 2": (llama_2_like, False),
    "a token over lines": (spelled_line, False),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def folder(request, tmp_path_factory) -> tuple[Path, bool]:
    make, cuts = TOKENIZERS[request.param]
    tokenizer, path = make(), tmp_path_factory.mktemp("tokenizer")
    tokenizer.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.enable_truncation(50)  # some files come with it
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(path)
    return path, cuts


def documents_of(rng: random.Random, count: int) -> list[str]:
    """Documents of lines that end and begin in all manner of ways."""
    words = [
        "a",
        "Lamp",
        "I'm",
        "12",
        "é",
        "e\u0301",
        "漢字",
        "は",
        ".",
        "?!",
        "'s",
        "-",
        "/",
        "#",
        "<b>",
        "\U0001f642",
        "_",
    ]
    words += ["<|im_end|>", "\u00a0", "Σ", "ﬁ", "²", "\u200b"]
    spaces = [" ", "  ", "\n", "\n\n", " \n", "\n ", "\t", "\r\n", "\r", "", "", "\n"]
    return ["".join(rng.choice(words) + rng.choice(spaces) for _ in range(rng.randrange(1, 60))) for _ in range(count)]


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_ids_by_pieces_are_those_of_the_whole(folder, template):
    path, cuts = folder
    (path / "chat_template.jinja").unlink(missing_ok=True)
    if template:
        (path / "chat_template.jinja").write_text(template)
    tokenizer = PolicyTokenizer(path)
    assert tokenizer._pieces.cuts == cuts
    rng = random.Random(0)
    documents = documents_of(rng, 40)
    for _ in range(100):
        shown = rng.sample(documents, rng.randrange(6))
        text = "Read:\n" + rng.choice(["\n", "\n\n", "</text>\n<text>"]).join(shown) + rng.choice(["\nWho?", "", "?"])
        # Others that stand nowhere, or in another order, do not matter.
        named = [*shown, *rng.sample(documents, 2)] if rng.random() < 0.5 else rng.sample(shown, len(shown))
        ids = tokenizer.prompt_ids(text, named)
        assert ids == tokenizer.prompt_ids(text)
        text = tokenizer._without_special_tokens(text)
        if template:
            message = [{"role": "user", "content": text}]
            whole = tokenizer._tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        else:
            whole = [*tokenizer._bos, *tokenizer._tokenizer.encode(text, add_special_tokens=False)]
        assert list(ids) == whole


def counted(tokenizer: PolicyTokenizer) -> PieceTokens:
    """The tokenizer's pieces, made to note what they encode in `texts`."""
    pieces = tokenizer._pieces
    encode, pieces.texts = pieces._ids, []
    pieces._ids = lambda texts: (pieces.texts.extend(texts), encode(texts))[1]
    return pieces


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("qwen")
    tokenizer = byte_level(QWEN)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(path)
    return path


def test_a_document_in_several_prompts_is_encoded_once(qwen):
    tokenizer = PolicyTokenizer(qwen)
    pieces = counted(tokenizer)
    first, second = (f"The {name}.\n\nIt is wet.\nSo it is.\n\nEnd of {name}." for name in ("quay", "mole"))
    for shown in ([first, second, first], [second, first, second], [second, first]):
        text = "\n".join(["Read", *shown, "Why?"])
        assert list(tokenizer.prompt_ids(text, shown)) == [*tokenizer._bos, *tokenizer.encode(text)]
    made = [text for text in pieces.texts if "wet" in text]
    assert sorted(made) == sorted([first + "\n"] * 2 + [second + "\n"])  # twice in the first prompt


def test_of_a_document_among_other_texts_the_lines_inside_are_encoded_once(qwen):
    tokenizer = PolicyTokenizer(qwen)
    pieces = counted(tokenizer)
    document = "The quay.\n\nIt is wet.\n* wet\nSo it is.\n\nEnd."
    for before, after in (("<text>", "</text>"), ("\n - ", "\n\n# Who"), ("", "")):
        text = f"{before}{document}{after}"
        assert list(tokenizer.prompt_ids(text, [document])) == [*tokenizer._bos, *tokenizer.encode(text)]
    assert pieces.texts.count("It is wet.\n* wet\nSo it is.\n\n") == 1
    assert not any("wet" in text for text in pieces.texts if not text.startswith("It is"))


def test_the_memory_of_documents_is_bounded(qwen, monkeypatch):
    monkeypatch.setattr(token_pieces, "MEMORY", 200)
    pieces = PolicyTokenizer(qwen)._pieces
    documents = [f"The lamp {i}.\n" + "It burns.\n" * 5 + "End." for i in range(30)]
    for document in [*documents, documents[-1]]:
        pieces.ids(document, [document])
    assert 1 < len(pieces._known) < 10 and documents[-1] in {document for document, *_ in pieces._known}
    assert pieces._remembered == sum(map(len, pieces._known.values())) <= 200


def test_the_policy_of_the_quick_start_is_encoded_whole():
    policy = ROOT / "examples" / "quickstart" / "policy"
    tokenizer = PolicyTokenizer(policy)
    text = "One.\nTwo lamps.\nThree.\n"
    assert not tokenizer._pieces.cuts
    assert list(tokenizer.prompt_ids(text, [text])) == [*tokenizer._bos, *tokenizer.encode(text)]
