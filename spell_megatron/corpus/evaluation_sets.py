"""Evaluation sets that no document may share words with, so that training does not see their questions."""

from __future__ import annotations

import functools
import json
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spell_megatron.corpus.input_tables import table_rows
from spell_megatron.corpus.texts import words
from spell_megatron.corpus.word_sequences import sequences, word_hashes
from spell_megatron.encodings import ZIP_FAULTS, utf8
from spell_megatron.errors import UserError
from spell_megatron.folders import is_left_behind, walk

SUFFIXES = {".jsonl", ".json", ".parquet", ".zip"}


@dataclass(frozen=True)
class EvaluationSets:
    """The sequences of words in evaluation sets; can be sent to other processes."""

    files: tuple[Path, ...]
    words: int
    """Length of a sequence that may not be shared."""
    folder: Path
    """Where `write` has left the sequences."""

    @staticmethod
    def write(folder: Path, files: Sequence[Path], words: int, note: Callable[[str], None]) -> None:
        hashes, owners = evaluation_sequences(files, words, note)
        np.save(folder / "hashes.npy", hashes)
        np.save(folder / "owners.npy", owners)

    def overlap(self, hashes: np.ndarray) -> str:
        """The reason to leave out a text that shares a sequence with one of the sets; "" if it shares none.

        Args:
            hashes: the text's `word_hashes`.
        """
        known, owners = _load(self.folder)
        place = shared_sequence(hashes, self.words, known)
        return "" if place is None else f"sharing {self.words} words with {self.files[owners[place]].name}"


@functools.lru_cache(1)
def _load(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    hashes, owners = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("hashes", "owners"))
    return hashes.view(np.ndarray), owners.view(np.ndarray)  # searching a np.memmap is slower


def find_evaluation_files(given: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """(files of evaluation sets in some files and folders, faults: what is none)."""
    found: list[Path] = []
    faults = []
    for path in given:
        files = [path]
        if path.is_dir():
            below = (folder.path / name for folder in walk(path) for name in folder.files)
            files = sorted(file for file in below if file.suffix.lower() in SUFFIXES)
            if not files:
                faults.append(f"{path} holds no evaluation sets (.jsonl, .json, .parquet, .zip)")
        elif path.exists() and path.suffix.lower() not in SUFFIXES:
            faults.append(f"the evaluation set {path} must end in .jsonl, .json, .parquet or .zip")
        found += files
    return found, faults


def evaluation_sequences(
    files: Sequence[Path], n: int, note: Callable[[str], None] = lambda text: None
) -> tuple[np.ndarray, np.ndarray]:
    """All sequences of n words in evaluation sets: sorted hashes [sequences], and the number of each one's file.

    All strings count, wherever they stand in a row: questions, answers, contexts.

    Args:
        files: .jsonl, .json (a list of rows, or one a line), .parquet, or a .zip archive of such files.
        note: is told of rows with bytes that are not UTF-8; what stands beside such bytes counts.

    Raises:
        UserError: if a file cannot be read, or holds no text of n words.
    """
    hashes = np.zeros(0, np.uint64)
    owners = np.zeros(0, np.uint16)
    for number, path in enumerate(files):
        parts = [
            sequences(word_hashes(words(text)), n) for row in _evaluation_rows(path, note) for text in _strings(row)
        ]
        own = np.unique(np.concatenate(parts)) if parts else np.zeros(0, np.uint64)
        if not len(own):
            raise UserError(
                f"{path}: no text of {n} words is in this evaluation set, so nothing can overlap with it. Give a file "
                "with questions or contexts, or a smaller --overlap-words."
            )
        hashes, where = np.unique(np.concatenate([hashes, own]), return_index=True)
        owners = np.concatenate([owners, np.full(len(own), number, np.uint16)])[where]
    return hashes, owners


def shared_sequence(hashes: np.ndarray, n: int, known: np.ndarray) -> int | None:
    """Place in `known` of the first sequence of n words that a text shares with it; None: there is none.

    Args:
        hashes: the text's `word_hashes`.
        known: sorted hashes, from `evaluation_sequences`.
    """
    own = sequences(hashes, n)
    places = np.minimum(np.searchsorted(known, own), len(known) - 1)
    shared = np.flatnonzero(known[places] == own)
    return int(places[shared[0]]) if len(shared) else None


def _evaluation_rows(path: Path, note: Callable[[str], None]) -> Iterator[object]:
    suffix = path.suffix.lower()
    if suffix == ".zip":
        yield from _archive_rows(path, note)
    elif suffix == ".json" and (value := _json_value(path)) is not None:
        yield value
    else:
        faults = 0
        for _, row, fault in table_rows(path):
            if row is None and fault:
                raise UserError(f"{path}: {fault}. Correct the evaluation set, or leave it out.")
            if fault and not faults:
                note(f"{path}: {fault}")
            faults += bool(fault)
            yield row
        if faults > 1:
            note(f"{path}: there are {faults} such rows")


def _archive_rows(path: Path, note: Callable[[str], None]) -> Iterator[object]:
    try:
        with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as folder:
            for name in archive.namelist():
                if Path(name).suffix.lower() in SUFFIXES - {".zip"} and not is_left_behind(name):
                    yield from _evaluation_rows(Path(archive.extract(name, folder)), note)
    except (*ZIP_FAULTS, UserError) as error:
        raise UserError(f"{path}: not a readable archive ({error}).") from error


def _json_value(path: Path) -> object:
    """The value of a .json file; None: the file may have one row a line."""
    data = b""
    try:
        data = utf8(path.read_bytes())
        return json.loads(data.decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, OSError) or not data.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
            raise UserError(f"{path}: not a readable JSON file ({error}).") from error
        return None


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
