"""Responses in channels (OpenAI's harmony format, gpt-oss), as text in which thinking stands between tags.

A response is a sequence of messages: `<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final
<|message|>…<|return|>`. Without special tokens the names of channels would be glued to what is said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

_FINAL = "final"
"""The channel of what the user is told."""


@dataclass(frozen=True)
class Channels:
    """Ids of the special tokens of the format."""

    channel: int
    message: int
    ends: frozenset[int]
    """What ends the text of a message."""

    @classmethod
    def of(cls, added: Mapping[str, int]) -> Channels | None:
        """Those of a tokenizer with these added tokens; None if it does not know the format."""
        channel, message, start, end = (added.get(f"<|{name}|>") for name in ("channel", "message", "start", "end"))
        if channel is None or message is None or start is None or end is None:
            return None
        return cls(channel, message, frozenset((channel, message, start, end)))


def as_thinking(ids: list[int], channels: Channels, text: Callable[[list[int]], str]) -> str:
    """The text of the last final message after `<think>`, that of all others, `</think>`, as other models write.

    Without a final message thinking does not end. Ids without channels are plain text.

    Args:
        ids: of a response, from the opening of the assistant's turn on.
        text: of token ids, special tokens left out.
    """
    if channels.channel not in ids:
        return text(ids)
    thought, final, name = "", None, ""
    for marker, piece in _pieces(ids, channels):
        said = text(piece)
        if marker == channels.channel:
            name = said.split(maxsplit=1)[0] if said.strip() else ""
        elif marker == channels.message and name == _FINAL:
            final = said
        elif marker in (channels.message, None) and said.strip():
            thought += f"{said.strip()}\n"
    if final is None:
        return f"<think>\n{thought}"
    return f"<think>\n{thought}</think>\n\n{final}" if thought else final


def _pieces(ids: list[int], channels: Channels) -> list[tuple[int | None, list[int]]]:
    """(special token, what follows it up to the next one); None: the beginning."""
    pieces: list[tuple[int | None, list[int]]] = [(None, [])]
    for token in ids:
        if token in channels.ends:
            pieces.append((token, []))
        else:
            pieces[-1][1].append(token)
    return pieces
