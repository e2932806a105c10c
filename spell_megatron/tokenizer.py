"""The policy's tokenizer: prompts to token ids, sampled ids to text."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from spell_megatron.errors import UserError


class PolicyTokenizer:
    """Tokenizer of a Hugging Face checkpoint folder, read from local files only.

    The folder holds a `tokenizer.json`, or a sentencepiece `tokenizer.model` (a bare one is read
    as Llama's tokenizers are).

    Attributes:
        eos_ids: ids that end a response: the tokenizer's end-of-sequence token, and the ids in
            generation_config.json.
        vocab_size: number of ids, added tokens included.

    Raises:
        UserError: there is no readable tokenizer in the folder, or it has no end-of-sequence token.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self._tokenizer = _load(path)
        self.eos_ids: set[int] = _eos_ids(path, self._tokenizer.eos_token_id)
        self.vocab_size: int = len(self._tokenizer)
        self._bos = [] if self._tokenizer.bos_token_id is None else [self._tokenizer.bos_token_id]
        self._special = [token.content for token in self._tokenizer.added_tokens_decoder.values() if token.special]

    def prompt_ids(self, text: str) -> list[int]:
        """Token ids of one user turn followed by the opening of the assistant's turn.

        A tokenizer without a chat template gives the beginning-of-sequence token, if it has one,
        and the plain text. Special tokens spelled out in the text are broken by a space, so that a
        document cannot end the user's turn.
        """
        text = self._without_special_tokens(text)
        if self._tokenizer.chat_template is None:
            return self._bos + self.encode(text)
        return self._tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def count(self, text: str) -> int:
        """Number of tokens of a text by itself."""
        return len(self.encode(text))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text by itself."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _without_special_tokens(self, text: str) -> str:
        for token in self._special:
            if token in text:
                text = text.replace(token, f"{token[0]} {token[1:]}")
        return text


def _load(path: Path):
    from transformers import AutoTokenizer, LlamaTokenizer

    files = [name for name in ("tokenizer.json", "tokenizer.model", "vocab.json") if (path / name).is_file()]
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


def _eos_ids(path: Path, tokenizer_eos: int | None) -> set[int]:
    ids = set() if tokenizer_eos is None else {tokenizer_eos}
    config = path / "generation_config.json"
    if config.is_file():
        more = json.loads(config.read_text(encoding="utf-8")).get("eos_token_id")
        ids.update([more] if isinstance(more, int) else more or [])
    if not ids:
        raise UserError(
            f"The tokenizer in {path} has no end-of-sequence token, so no response could ever end. "
            "Name one as eos_token in tokenizer_config.json or as eos_token_id in generation_config.json."
        )
    return ids
