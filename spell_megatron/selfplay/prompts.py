"""Prompts of the three roles, from sets of text files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import get_args

from spell_megatron.config.selfplay_sections import Task
from spell_megatron.errors import UserError
from spell_megatron.selfplay.history import Entry

SETS = Path(__file__).parent / "prompt_sets"
NO_DOCUMENTS = "Empty"
EVIDENCE = "evidence"
"""The file that asks the questioner for quotes, and the placeholder of its text in the questioner's prompts."""

_PLACEHOLDER = re.compile(r"\{\{([^{}]*)\}\}")


def _required(quotes: bool, own: Iterable[str]) -> dict[str, set[str]]:
    """The files of a prompt set and the placeholders of each; `own`: names of the user's own tasks."""
    evidence = {EVIDENCE} if quotes else set()
    files = {
        "document": {"document"},
        "example": {"number", "question", "answer"},
        "verifier": {"question", "prediction", "reference"},
    }
    for task in (*get_args(Task), *own):
        letter = {"letter"} if task == "doc_mc" else set()
        files[f"questioner_{task}"] = {"documents"} | letter | evidence
        files[f"questioner_{task}_history"] = {"documents", "examples"} | letter | evidence
        files[f"responder_{task}"] = {"documents", "question"}
    return files | ({EVIDENCE: set()} if quotes else {})


def _own_files(folders: Mapping[str, Path]) -> dict[str, Path]:
    """The paths of the files of tasks of the user's own, by the names that they would have in a prompt set."""
    return {
        name: folder / file
        for task, folder in folders.items()
        for name, file in (
            (f"questioner_{task}", "questioner.md"),
            (f"questioner_{task}_history", "questioner_history.md"),
            (f"responder_{task}", "responder.md"),
        )
    }


def fill(template: str, **values: str) -> str:
    """The template with its {{placeholders}} replaced in one pass: what is filled in is never searched for more."""
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)


class PromptSet:
    """The templates of a set. No document, question or answer can change a prompt's form (see `fill`)."""

    def __init__(self, templates: dict[str, str], evidence: str = "") -> None:
        self._templates = templates
        self._evidence = evidence

    @classmethod
    def load(cls, name_or_path: str | Path, quotes: bool = False, own: Mapping[str, Path] | None = None) -> PromptSet:
        """Load a set of this package by name, or a folder of .md files.

        Files are UTF-8; one trailing newline is dropped. `quotes`: ask the questioner for quotes. `own`: for tasks of
        the user's own, the folders with their files questioner.md, questioner_history.md and responder.md.

        Raises:
            UserError: naming every missing file and every missing or unknown placeholder.
        """
        folder = SETS / name_or_path
        if not folder.is_dir():
            folder = Path(name_or_path)
        if not folder.is_dir():
            known = ", ".join(sorted(path.name for path in SETS.iterdir() if path.is_dir()))
            raise UserError(
                f"The prompt set {str(name_or_path)!r} is neither a set of this package ({known}) nor a "
                "folder. Set selfplay.prompts to one of these."
            )
        templates: dict[str, str] = {}
        faults: list[str] = []
        paths = _own_files(own or {})
        for name, placeholders in _required(quotes, own or {}).items():
            path = paths.get(name, folder / f"{name}.md")
            shown = path if name in paths else path.name
            try:
                text = path.read_text(encoding="utf-8").removesuffix("\n")
            except (OSError, UnicodeDecodeError) as error:
                faults.append(f"{shown} cannot be read ({error})")
                continue
            found = set(_PLACEHOLDER.findall(text)) - (set() if quotes else {EVIDENCE})
            faults += [f"{shown} lacks {{{{{p}}}}}" for p in sorted(placeholders - found)]
            faults += [f"{shown} has the unknown {{{{{p}}}}}" for p in sorted(found - placeholders)]
            templates[name] = text
        if faults:
            raise UserError(
                f"The prompt set in {folder} cannot be used: {'; '.join(faults)}. "
                f"Compare with the set in {SETS / 'full'}."
            )
        return cls(templates, templates[EVIDENCE] if quotes else "")

    def _fill(self, name: str, **values: str) -> str:
        return fill(self._templates[name], **values)

    def _documents(self, documents: Sequence[str]) -> str:
        return "\n".join(self._fill("document", document=document) for document in documents)

    def questioner(self, task: str, documents: Sequence[str], history: Sequence[Entry], letter: str | None) -> str:
        """Prompt for a question about the documents that is harder than the questions of the history.

        `letter` is the option that shall be right; multiple choice needs it, other tasks ignore it.

        Raises:
            ValueError: for multiple choice without a letter.
        """
        if task == "doc_mc" and letter is None:
            raise ValueError("a multiple-choice prompt needs the letter of the right option")
        values = {"documents": self._documents(documents), "letter": letter or "", EVIDENCE: self._evidence}
        if not history:
            return self._fill(f"questioner_{task}", **values)
        values["examples"] = "\n".join(
            self._fill("example", number=str(number), question=entry.question, answer=entry.answer)
            for number, entry in enumerate(history, start=1)
        )
        return self._fill(f"questioner_{task}_history", **values)

    def responder(self, task: str, question_text: str, documents: Sequence[str] | None) -> str:
        """Prompt for an answer from the documents; without any (None) the word `Empty` stands for them."""
        shown = NO_DOCUMENTS if documents is None else self._documents(documents)
        return self._fill(f"responder_{task}", documents=shown, question=question_text)

    def verifier(self, question_text: str, prediction: str, reference: str) -> str:
        """Prompt for a judgment whether prediction and reference mean the same."""
        return self._fill("verifier", question=question_text, prediction=prediction, reference=reference)
