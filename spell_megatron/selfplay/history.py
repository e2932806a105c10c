"""What the questioner remembers: the questions on a cluster that were neither too easy nor too hard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spell_megatron.selfplay.texts import normalize_text


@dataclass(frozen=True)
class Entry:
    """A solved question.

    Attributes:
        documents: indices of the documents that its questioner saw, or of those that were new to it then.
        answer: its reference answer.
    """

    documents: tuple[int, ...]
    question: str
    answer: str


class History:
    """The last `capacity` entries of every (task, cluster)."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._entries: dict[tuple[str, str], tuple[Entry, ...]] = {}

    def entries(self, task: str, cluster_id: str) -> tuple[Entry, ...]:
        """The entries of a cluster, oldest first."""
        return self._entries.get((task, cluster_id), ())

    def admit(self, task: str, cluster_id: str, entry: Entry) -> bool:
        """Remember an entry, forgetting the oldest if there are too many.

        Returns False, and changes nothing, if the capacity is 0 or the question is remembered already.
        """
        if self.capacity == 0 or self.knows(task, cluster_id, entry.question):
            return False
        self._entries[task, cluster_id] = (*self.entries(task, cluster_id), entry)[-self.capacity :]
        return True

    def knows(self, task: str, cluster_id: str, question: str) -> bool:
        """Whether a question is remembered already; capitals, blanks, punctuation and articles make no difference."""
        return any(_same(question, entry.question) for entry in self.entries(task, cluster_id))

    def depths(self) -> list[int]:
        """Number of entries of every cluster that has any."""
        return [len(entries) for entries in self._entries.values()]

    def state_dict(self) -> dict[str, Any]:
        """All entries as plain JSON."""
        return {
            "entries": [
                [task, cluster_id, [[list(e.documents), e.question, e.answer] for e in entries]]
                for (task, cluster_id), entries in self._entries.items()
            ]
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the entries of `state_dict`, the newest up to this history's capacity."""
        self._entries = {
            (task, cluster_id): tuple(Entry(tuple(d), q, a) for d, q, a in entries[-self.capacity :])
            for task, cluster_id, entries in state["entries"]
            if self.capacity > 0
        }


def _same(a: str, b: str) -> bool:
    return _bare(a) == _bare(b)


def _bare(question: str) -> str:
    return normalize_text(question) or "".join(question.split()).casefold()
