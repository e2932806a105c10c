"""`spell report`: one page of HTML about runs and evaluations, which needs nothing but a browser."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from spell_megatron.errors import UserError
from spell_megatron.files import check_writable, write_text
from spell_megatron.plural import counted
from spell_megatron.report.evaluations import is_evaluation, read_evaluation
from spell_megatron.report.health import findings
from spell_megatron.report.render import render
from spell_megatron.report.runs import Run, is_run, read_run
from spell_megatron.report.transcripts import choose_dumps, read_questions


def write_report(
    folders: Sequence[Path],
    out: Path,
    transcripts: int = 200,
    text_chars: int = 2000,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Write the report of some runs and evaluations to the file `out`, which appears when it is complete.

    Args:
        folders: of runs (`spell train`), which may still be going, and of evaluations (`spell evaluate`). A folder may
            be both.
        transcripts: most questions per run that are shown with all that became of them.
        text_chars: longer texts in them lose their middle; judgments are cut to a quarter of it.
        on_progress: gets the number of files of transcripts read, and of all to be read.

    Returns:
        A line that says what was written and what was left out.

    Raises:
        UserError: a folder is no run and no evaluation that has ended, there is no evaluation and no run has logged a
            step yet, or `out` cannot be written.
    """
    if os.path.isdir(out):
        raise UserError(f"{out} is a folder. Name the file to write, such as {out / 'report.html'}.")
    check_writable(out.parent, [out.name])
    names = short_names(folders)
    evaluations = [read_evaluation(folder, name) for folder, name in names.items() if is_evaluation(folder)]
    runs = [read_run(folder, name) for folder, name in names.items() if not is_evaluation(folder) or is_run(folder)]
    if not evaluations and not any(run.steps for run in runs):
        raise UserError(
            f"There is nothing to report yet: {', '.join(str(run.folder) for run in runs)} has not logged a step. "
            "A run logs its first numbers after its first step, or after a validation at its start."
        )
    questions = _questions(runs, transcripts, text_chars, on_progress)
    page = render(runs, evaluations, questions, text_chars)
    write_text(out, page)
    steps = sum(len(run.steps) for run in runs)
    line = f"{out}: {len(page) / 1e6:.1f} MB, {counted(len(runs), 'run')}, {counted(steps, 'step')}, "
    line += f"{counted(len(questions), 'question')} with transcripts"
    if evaluations:
        line += f", {counted(len(evaluations), 'evaluation')}"
    faults = [(run.name, f"{found.title}: {found.text} {found.remedy}") for run in runs for found in findings(run)]
    notes = [(run.name, note) for run in runs for note in run.notes]
    return "\n".join([line, *(f"  {name}: {text}" for name, text in (*faults, *notes))])


def _questions(
    runs: Sequence[Run], transcripts: int, text_chars: int, on_progress: Callable[[int, int], None]
) -> list[dict[str, Any]]:
    """The transcripts of all runs; the runs get notes about what is missing."""
    chosen = [(index, choose_dumps(run, transcripts)) for index, run in enumerate(runs)]
    done, total = 0, sum(len(files) for _, files in chosen)
    questions: list[dict[str, Any]] = []
    for index, files in chosen:
        for file, count in files:
            questions += read_questions(file, count, text_chars, index, runs[index].notes)
            done += 1
            on_progress(done, total)
        if runs[index].steps and not files and transcripts:
            runs[index].notes.append("no transcripts: its folder rollouts/ holds none (logging.dump: none)")
    return questions


def short_names(folders: Sequence[Path]) -> dict[Path, str]:
    """A short name for each folder: its last part, or as many parts as make the names differ.

    Raises:
        UserError: a folder is named twice.
    """
    parts = [folder.resolve().parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise UserError("A folder is named twice. Name each of them once.")
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(some[-count:]) for some in parts]
        if len(set(names)) == len(names):
            break
    return dict(zip(folders, names, strict=True))
