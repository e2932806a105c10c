"""The policy's tokenizer: prompts to token ids, sampled ids to text."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Sequence
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

from spell_megatron.channels import Channels, as_thinking
from spell_megatron.errors import UserError
from spell_megatron.token_pieces import PieceTokens

_PROBE = "Xyzzy42"
"""A user's message to try the chat template with."""


class PolicyTokenizer:
    """Tokenizer of a Hugging Face checkpoint folder, read from local files only.

    The folder holds a `tokenizer.json`, or a sentencepiece `tokenizer.model` (a bare one is read
    as Llama's tokenizers are).

    Attributes:
        eos_ids: ids that end a response: the tokenizer's end-of-sequence token, and the ids in config.json and
            generation_config.json.
        vocab_size: number of ids, added tokens included.

    Raises:
        UserError: there is no readable tokenizer in the folder, it has no end-of-sequence token, or its chat template
            cannot render a conversation of one message of the user.
    """

    def __init__(self, path: str | Path, today: date | None = None) -> None:
        """today: the day that a chat template gets when it asks for the time, which is midnight; None: this day."""
        path = Path(path)
        self._path, self._now = path, datetime.combine(today or date.today(), time())
        self._tokenizer = _load(path)
        self.eos_ids: set[int] = _eos_ids(path, self._tokenizer.eos_token_id)
        self.vocab_size: int = len(self._tokenizer)
        self._bos = [] if self._tokenizer.bos_token_id is None else [self._tokenizer.bos_token_id]
        self._special = [token.content for token in self._tokenizer.added_tokens_decoder.values() if token.special]
        self._channels = Channels.of(self._tokenizer.get_added_vocab())
        self._template: str | None = None
        if self._tokenizer.chat_template is not None:
            if _PROBE not in self._render(_PROBE):
                raise self._unusable_template("It leaves out the message of the user")
            self._template = self._tokenizer.get_chat_template()
        self._fast = getattr(self._tokenizer, "backend_tokenizer", None)
        if self._fast is not None:
            self._fast.no_truncation()
            self._fast.no_padding()
        self._pieces = PieceTokens(self._ids, self._fast)

    def prompt_ids(self, text: str, documents: Sequence[str] = ()) -> array[int]:
        """Token ids of one user turn followed by the opening of the assistant's turn.

        `documents` stand in the text, in this order. They make the work faster, if other prompts have the same ones,
        and do not change the result. One thread at a time may ask for prompts with documents.

        A tokenizer without a chat template gives the beginning-of-sequence token, if it has one,
        and the plain text. Special tokens spelled out in the text are broken by a space, so that a
        document cannot end the user's turn.

        Raises:
            UserError: the chat template does not take this text.
        """
        text = self._without_special_tokens(text)
        if self._template is None:
            return array("i", self._bos) + self._pieces.ids(text, documents)
        return self._pieces.ids(self._render(text), documents)

    def _render(self, text: str) -> str:
        """One user turn and the opening of the assistant's turn by the chat template."""
        try:
            return self._tokenizer.apply_chat_template(
                [{"role": "user", "content": text}],
                add_generation_prompt=True,
                tokenize=False,
                strftime_now=self._now.strftime,  # in place of the clock that transformers gives to templates
            )
        except Exception as error:  # templates are programs, which fail in many ways
            raise self._unusable_template(f"It fails with: {error}") from error

    def _unusable_template(self, reason: str) -> UserError:
        return UserError(
            f"The chat template of the tokenizer in {self._path} cannot be used. {reason}. Each prompt is a "
            "conversation of one message, whose role is user. Change the template (chat_template.jinja, or "
            "chat_template in tokenizer_config.json) so that it renders one; without any, prompts are plain text."
        )

    def differences(self, other: PolicyTokenizer) -> list[str]:
        """In what this tokenizer and another one give other prompts, or end responses otherwise."""
        ours, theirs = self._tokenizer, other._tokenizer
        aspects = {
            "the vocabulary": ours.get_vocab() != theirs.get_vocab(),
            "how a text is cut into tokens": _rules(ours) != _rules(theirs),
            "the special tokens": (self._bos, set(self._special)) != (other._bos, set(other._special)),
            "the tokens that end a response": self.eos_ids != other.eos_ids,
            "the chat template": self._template != other._template,
        }
        return [aspect for aspect, differs in aspects.items() if differs]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, special tokens left out; with messages in channels as `channels.as_thinking` writes it."""
        return as_thinking(list(ids), self._channels, self._text) if self._channels else self._text(list(ids))

    def _text(self, ids: list[int]) -> str:
        if self._pieces.byte_pairs and (text := self._pieces.byte_pairs.text(ids)) is not None:
            return text
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def count(self, text: str) -> int:
        """Number of tokens of a text by itself."""
        return len(self.encode(text))

    def counts(self, texts: Sequence[str]) -> list[int]:
        """Number of tokens of each text by itself; faster than one by one."""
        encoded = self._tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)
        return [len(ids) for ids in encoded["input_ids"]]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text by itself."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _ids(self, texts: Sequence[str]) -> list[array[int]]:
        """The same of several texts, without what transformers adds to a fast tokenizer's ids.

        Other threads go on meanwhile.
        """
        if self._fast is None:
            return [array("i", self.encode(text)) for text in texts]
        return [array("i", made.ids) for made in self._fast.encode_batch_fast(texts, add_special_tokens=False)]

    def _without_special_tokens(self, text: str) -> str:
        for token in self._special:
            if token in text:
                text = text.replace(token, f"{token[0]} {token[1:]}")
        return text


def tokenizer_files(folder: Path) -> list[str]:
    """Names of the files in a folder that may hold a vocabulary; [] if it has no tokenizer."""
    return [name for name in ("tokenizer.json", "tokenizer.model", "vocab.json") if (folder / name).is_file()]


def _load(path: Path):
    from transformers import AutoTokenizer, LlamaTokenizer

    files = tokenizer_files(path)
    if not files:
        raise UserError(
            f"There is no tokenizer in {path}: neither tokenizer.json nor tokenizer.model. Point "
            "model.path at the folder of a complete Hugging Face checkpoint."
        )
    try:
        bare = files == ["tokenizer.model"] and not (path / "tokenizer_config.json").is_file()
        kind = LlamaTokenizer if bare else AutoTokenizer
        return kind.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"The tokenizer in {path} cannot be read ({files[0]}): {error}. It must be one that "
            "transformers' AutoTokenizer loads without code of its own."
        ) from error


def _rules(tokenizer: Any) -> str | None:
    """How a text becomes tokens, as the tokenizers package writes it; None of a tokenizer of another package."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else backend.to_str()


def _eos_ids(path: Path, tokenizer_eos: int | None) -> set[int]:
    ids = set() if tokenizer_eos is None else {tokenizer_eos}
    for name in ("config.json", "generation_config.json"):
        ids |= _named_eos_ids(path / name)
    if not ids:
        raise UserError(
            f"The tokenizer in {path} has no end-of-sequence token, so no response could ever end. "
            "Name one as eos_token in tokenizer_config.json or as eos_token_id in generation_config.json."
        )
    return ids


def _named_eos_ids(path: Path) -> set[int]:
    """The ids under eos_token_id in a JSON file; none if there is no such file."""
    if not path.is_file():
        return set()
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}. Copy it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object of settings. Copy it again.")
    named = content.get("eos_token_id")
    ids = named if isinstance(named, list) else [] if named is None else [named]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise UserError(
            f"{path} has eos_token_id {json.dumps(named)}. It must be the id of a token, or a list of such ids."
        )
    return set(ids)
