"""Raw text to document clusters: what `spell prepare` does, stage by stage.

Text files, JSON lines and parquet tables become one parquet (or JSON lines) file of clusters, the form that
`spell_megatron.selfplay.documents.load_clusters` reads: columns `cluster_id` (string), `documents` (list of
strings), `document_ids` (list of strings, as many), `source` and `task` (strings; the task may be missing).

Each stage leaves its result in a hidden folder beside the output, so that a run that was stopped goes on from
there. Texts are mapped from a file, never all in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from spell_megatron import __version__
from spell_megatron.corpus import reading
from spell_megatron.corpus.clusters import plan_clusters, write_clusters
from spell_megatron.corpus.duplicates import find_near_duplicates
from spell_megatron.corpus.evaluation_sets import EvaluationSets, find_evaluation_files
from spell_megatron.corpus.examine import examine_files, load_counts, load_given_clusters
from spell_megatron.corpus.options import Options
from spell_megatron.corpus.pieces import Pieces
from spell_megatron.corpus.reading import Counts, File
from spell_megatron.corpus.summary import Summary, statistics_path
from spell_megatron.corpus.vectors import write_vectors
from spell_megatron.corpus.work_folder import WorkFolder
from spell_megatron.corpus.write import write
from spell_megatron.encodings import printable
from spell_megatron.errors import UserError
from spell_megatron.files import MAX_FAULTS, check_writable
from spell_megatron.monitoring.progress import PatientConsole, Progress
from spell_megatron.plural import counted
from spell_megatron.tokenizer import PolicyTokenizer


def prepare(inputs: Sequence[Path], out: Path, options: Options = Options(), left_out: Sequence[Path] = ()) -> Summary:
    """Turn files and folders into one .parquet or .jsonl file of document clusters.

    Text files (.txt, .md, or no extension) are one document each. Every row of a .jsonl or .parquet table is one
    document, or one cluster if the table has the columns `cluster_id` and `documents`; such clusters are passed
    through as they are, unless they overlap with an evaluation set or have too many tokens. Documents are filtered,
    those that repeat others are left out, long ones are cut. Text files that share a sub-folder of an input folder
    make a cluster; all other documents are grouped by similarity (`grouping.group_similar`).

    Args:
        left_out: files in the inputs that are no documents.

    `out` and the statistics beside it (`statistics_path`) appear only when they are complete. The same inputs and
    options give the same bytes, also when a run was killed and started again.

    Raises:
        UserError: for missing or damaged inputs, tables without the column, an output that cannot be written, an
            embedding server that does not answer, and when nothing usable is found.
    """
    inputs, out = [Path(path) for path in inputs], Path(out)
    sets = _check(inputs, out, options)
    check_writable(out.parent, [out.name, statistics_path(out).name])
    counts = Counts()
    files = reading.find_files(inputs, [out, statistics_path(out), *left_out], counts)
    progress = Progress(console=PatientConsole(stderr=True))

    def read_sets(folder: Path) -> None:
        EvaluationSets.write(folder, sets, options.overlap_words, progress.line)

    def examine(folder: Path) -> None:
        if not examine_files(folder, files, evaluation, options, counts, progress):
            raise UserError(_nothing_usable(inputs, counts))

    def compare(folder: Path) -> None:
        with progress.stage("near-duplicates"):
            find_near_duplicates(folder, pieces, read / "signatures", options.near_duplicates)

    with WorkFolder.open(out, _fingerprint(files, sets, options), progress) as work:
        evaluation = None
        if sets:
            evaluation = EvaluationSets(tuple(sets), options.overlap_words, work.stage("evaluation sets", read_sets))
        read = work.stage("reading", examine)
        pieces = Pieces(read)
        unique = work.stage("near-duplicates", compare)
        plan = plan_clusters(pieces, np.load(unique / "kept.npy"), options)
        vectors = work.stage(
            "embedding", lambda folder: write_vectors(folder, pieces, plan.embedded, options, progress)
        )
        grouped = work.stage(
            "grouping", lambda folder: write_clusters(folder, plan, vectors / "vectors.npy", options, progress)
        )
        summary = Summary(out, _all_counts(read, unique))
        groups = json.loads((grouped / "groups.json").read_bytes())
        write(load_given_clusters(read), groups, pieces, inputs, options, summary)
        work.finished = True
    return summary


def _check(inputs: Sequence[Path], out: Path, options: Options) -> list[Path]:
    """Look for what can be found wrong before any work; returns the files of evaluation sets.

    Raises:
        UserError: naming all faults at once.
    """
    given = [*inputs, *options.decontaminate]
    faults = [f"there is no {path}" for path in given if not path.exists()]
    faults += [
        f"{path} is neither a file nor a folder"
        for path in given
        if path.exists() and not path.is_file() and not path.is_dir()
    ]
    if not inputs:
        faults.append("there are no inputs; name files or folders")
    if out.suffix not in reading.TABLE_SUFFIXES:
        faults.append(f"the output {out} must end in .parquet or .jsonl")
    elif os.path.isdir(out):
        faults.append(f"the output {out} is a folder")
    elif printable(out) != str(out):
        faults.append(f"the name of the output, {printable(out)}, must be UTF-8")
    sets, faults_of_sets = find_evaluation_files(options.decontaminate)
    faults += faults_of_sets
    if options.tokenizer:
        try:
            PolicyTokenizer(options.tokenizer)
        except UserError as error:
            faults.append(f"--tokenizer: {error}".rstrip("."))
    if faults:
        raise UserError("Cannot prepare documents: " + "; ".join(faults) + ".")
    return sets


def _fingerprint(files: Sequence[File], sets: Sequence[Path], options: Options) -> str:
    """A word that changes with the inputs, the options and the program."""
    facts: list[Any] = [__version__, np.__version__]
    facts += [[name, str(value)] for name, value in asdict(options).items() if name != "workers"]
    for path, name in [(file.path, file.name) for file in files] + [(path, "") for path in sets]:
        status = path.stat()
        facts.append([str(path), name, status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps(facts).encode("utf-8", "surrogatepass")).hexdigest()


def _nothing_usable(inputs: Sequence[Path], counts: Counts) -> str:
    reasons = [f"{counted(count, 'document')} {reason}" for reason, count in counts.skipped.items()]
    reasons += [f"{counted(count, 'file')} {reason}" for reason, count in counts.skipped_files.items()]
    named = f" ({'; '.join(note.rstrip('.') for note in counts.notes[:MAX_FAULTS])})" if counts.notes else ""
    return (
        f"No usable documents in {', '.join(map(str, inputs))}: {'; '.join(reasons) or 'there are no files'}{named}. "
        "Documents are .txt, .md, .jsonl and .parquet files, and UTF-8 files without an extension."
    )


def _all_counts(read: Path, unique: Path) -> Counts:
    """The counts of reading, with the near-duplicates among what was left out."""
    counts = load_counts(read)
    original, kept = np.load(unique / "original.npy"), np.load(unique / "kept.npy")
    if repeated := int((original != np.arange(len(original))).sum()):
        counts.skipped["near-duplicates"] += repeated
    counts.pieces = len(kept) - (len(original) - repeated)
    return counts
