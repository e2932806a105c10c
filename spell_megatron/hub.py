"""Models and data sets of the Hugging Face hub: their names, and their files in the hub's cache on this machine.

Only weights as safetensors, configurations, tokenizers and texts are fetched: never pickles, which can run code when
they are read, and never code.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from spell_megatron.errors import UserError, explain

SITE = "https://huggingface.co"
SCHEME = "hf://"

_WORD = r"[A-Za-z0-9][\w.-]*"
_REVISION = r"refs/(?:pr|convert)/[\w.-]+|[\w][\w.-]*"
_MODEL = re.compile(rf"({_WORD}/{_WORD})(?:@({_REVISION}))?", re.ASCII)
_DOCUMENTS = re.compile(rf"{SCHEME}datasets/({_WORD}/{_WORD})(?:@({_REVISION}))?((?:/[^/]+)*)/?", re.ASCII)
_CACHED = re.compile(rf"models--({_WORD}?)--({_WORD})/snapshots/([0-9a-f]{{40}})", re.ASCII)

_BESIDE_WEIGHTS = ("*.json", "*.jinja", "*.model", "*.txt")
_WEIGHTS = ("*.safetensors",)
# Sub-folders hold the model once more, for other programs, but for one, `additional_chat_templates`. Mistral's
# consolidated files are a second copy, too. (A * of these patterns also stands for slashes.)
_OF_OTHERS = ("[!a]*/*", "a[!d]*/*", "consolidated*")


@dataclass(frozen=True)
class HubName:
    """What a user names at the hub."""

    repository: str
    """ORG/NAME"""
    revision: str | None = None
    """Branch, tag or commit; None: the newest."""
    kind: Literal["model", "dataset"] = "model"
    inside: str = ""
    """File or folder of a data set; empty: all of it."""

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}" if self.revision else self.repository

    @property
    def page(self) -> str:
        return f"{SITE}/{'datasets/' if self.kind == 'dataset' else ''}{self.repository}"


def model_name(path: Path) -> HubName | None:
    """The model that `ORG/NAME` or `ORG/NAME@REVISION` names at the hub, unless a file or folder has that name."""
    match = _MODEL.fullmatch(str(path))
    return HubName(match[1], match[2]) if match and not path.exists() else None


def fetch_model(path: Path, weights: bool = True) -> Path:
    """The folder of a model, fetched if its name is one of the hub; any other path as it is.

    Args:
        weights: else only configuration and tokenizer.

    Raises:
        UserError: the hub does not give it; the message says why, and what to do.
    """
    name = model_name(path)
    if name is None:
        return path
    patterns = [*_BESIDE_WEIGHTS, *(_WEIGHTS if weights else ())]
    return _fetch(name, patterns, _OF_OTHERS, f"Or fetch it elsewhere, and name its folder in place of {name}.")


def fetch_documents(text: str) -> tuple[Path, Path]:
    """(file or folder, file that describes the whole and is no document) of `hf://datasets/ORG/NAME[@REVISION][/PATH]`.

    Raises:
        UserError: it is no such name, or the hub does not give it.
    """
    match = _DOCUMENTS.fullmatch(text)
    if match is None or ".." in match[3].split("/"):
        raise UserError(
            f"{text} names no data set of the hub. Write {SCHEME}datasets/ORG/NAME, with @REVISION behind NAME for one "
            "that is not the newest, and behind that with /FOLDER or /FILE for a part of it."
        )
    name = HubName(match[1], match[2], "dataset", match[3].strip("/"))
    inside = f"{name.inside}/*" if name.inside else "*"
    patterns = [
        *(f"{inside}{suffix}" for suffix in (".txt", ".md", ".jsonl", ".parquet")),
        *filter(None, [name.inside]),
    ]
    folder = _fetch(name, patterns, (), "Or fetch its files elsewhere, and name them.")
    found = folder / name.inside
    if not found.exists() or (found.is_dir() and not any(found.iterdir())):
        raise UserError(
            f"The data set {name} of the hub has no .txt, .md, .jsonl or .parquet files"
            f"{f' in {name.inside}' if name.inside else ''}. {name.page}/tree/{name.revision or 'main'} shows what it "
            "has. Many have parquet files at the revision refs/convert/parquet."
        )
    return found, folder / "README.md"


def fetch_files(repository: str, patterns: Sequence[str], remedy: str) -> Path:
    """The folder of a data set's files that match the patterns. `remedy`: how else they can be named.

    Raises:
        UserError: the hub does not give them.
    """
    return _fetch(HubName(repository, kind="dataset"), patterns, (), remedy)


def name_of(folder: Path) -> str:
    """`ORG/NAME@COMMIT` if a folder is a model's place in the hub's cache of this machine, else the folder itself.

    The name finds the same files on other machines, and when the cache was emptied.
    """
    match = _CACHED.fullmatch("/".join(folder.parts[-3:]))
    if match is None:
        return str(folder)
    from huggingface_hub import constants

    cached = folder.parents[2].resolve() == Path(constants.HF_HUB_CACHE).resolve()
    return f"{match[1]}/{match[2]}@{match[3]}" if cached else str(folder)


def _fetch(name: HubName, patterns: Sequence[str], without: Sequence[str], remedy: str) -> Path:
    """The folder of a repository's files in the hub's cache. What is there already is not fetched again."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    def get(only_here: bool) -> Path:
        folder = snapshot_download(
            name.repository,
            repo_type=name.kind,
            revision=name.revision,
            allow_patterns=list(patterns),
            ignore_patterns=list(without),
            local_files_only=only_here,
        )
        return Path(folder)

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        get(only_here=True)
    except LocalEntryNotFoundError:
        if not constants.HF_HUB_OFFLINE:
            print(f"fetching {name} from the hub to {constants.HF_HUB_CACHE}", file=sys.stderr)
    try:
        return get(only_here=False)
    except Exception as error:  # also the errors of the libraries below
        if isinstance(error, OSError) and explain(error):
            raise
        raise UserError(f"{_reason(name, error)} {remedy}") from error


def _reason(name: HubName, error: Exception) -> str:
    """Why the hub does not give what was asked for, and what to do about it."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
    from huggingface_hub.errors import RevisionNotFoundError as NoRevision

    what = "model" if name.kind == "model" else "data set"
    if isinstance(error, GatedRepoError):
        return (
            f"The hub gives {name.repository} only to those who accepted its conditions. Accept them at {name.page}, "
            f"make a token ({SITE}/settings/tokens), and set HF_TOKEN to it."
        )
    if isinstance(error, RepositoryNotFoundError):
        here = f"There is no folder {name}, and the hub has" if name.kind == "model" else "The hub has"
        return (
            f"{here} no {what} {name.repository}, or keeps it private. Correct the name; for a private one set "
            "HF_TOKEN to a token that may read it."
        )
    if isinstance(error, NoRevision):
        return (
            f"The {what} {name.repository} of the hub has no revision {name.revision}. {name.page}/commits/main lists "
            f"the commits; {name.repository} alone is the newest."
        )
    if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
        return f"The hub refuses the token in HF_TOKEN for {name}. Make another one at {SITE}/settings/tokens."
    here = f"There is no folder {name}, and the {what}" if name.kind == "model" else f"The {what} {name}"
    command = ["hf", "download", name.repository, *(["--repo-type", "dataset"] if name.kind == "dataset" else [])]
    command += ["--revision", name.revision] if name.revision else []
    elsewhere = f"run `{shlex.join(command)}` where there is a network, with an HF_HOME that this machine sees, too."
    if constants.HF_HUB_OFFLINE and isinstance(error, LocalEntryNotFoundError):
        return (
            f"{here} of the hub is not in its cache on this machine ({constants.HF_HUB_CACHE}), or not whole. "
            f"HF_HUB_OFFLINE forbids to fetch it: unset it, or {elsewhere}"
        )
    return f"{here} cannot be fetched from the Hugging Face hub ({_cause(error)}). Try again, or {elsewhere}"


def _cause(error: BaseException) -> str:
    """The first line of the error at the bottom."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
