"""The benchmarks' formats, in each container that they come in; what is wrong with a file is said."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from spell_megatron.errors import UserError
from spell_megatron.evaluation.benchmarks import BENCHMARKS, load_benchmark
from spell_megatron.selfplay.prompts import PromptSet

DATA = Path(__file__).parents[1] / "data" / "benchmarks"
FOLDERS = {"2wikimqa": "longbench", "hotpotqa": "longbench", "musique": "longbench"}


def folder(name: str) -> Path:
    return DATA / FOLDERS.get(name, name)


def test_docmath_has_four_parts_and_numbers_as_references():
    questions = load_benchmark("docmath", folder("docmath"))
    assert [(q.id, q.subset, q.answer) for q in questions] == [
        ("complong-testmini-0", "complong", "-200"),
        ("complong-testmini-1", "complong", "23"),
        ("compshort-testmini-0", "compshort", "57.3"),
        ("simplong-testmini-0", "simplong", "46.4"),
        ("simpshort-testmini-0", "simpshort", "0.325"),
    ]
    assert {(q.task, q.benchmark) for q in questions} == {("docmath_qa", "docmath")}
    assert questions[0].question.startswith("What was the change")
    prompt = PromptSet.load("full").responder("docmath_qa", questions[0].question, questions[0].documents)
    rows = json.loads((folder("docmath") / "complong_testmini.json").read_text())
    assert "\n".join(rows[0]["paragraphs"]) in prompt  # joined by a newline, as in the reference


def test_frames_joins_title_and_text():
    questions = load_benchmark("frames", folder("frames"))
    assert [(q.id, q.task, q.answer) for q in questions] == [
        ("frames-0", "doc_general_qa", "Lydia Trew"),
        ("frames-1", "doc_general_qa", "14"),
    ]
    first, second = questions[1].documents
    assert first == "Tolmen Dam\nThe dam was removed in 2005."
    assert second == "Treaty of 1991\nThe riparian states signed in 1991."


@pytest.mark.parametrize(
    "name, answers", [("2wikimqa", ["Velmstad"]), ("hotpotqa", ["yes", "the Sorrel Bridge"]), ("musique", ["1987"])]
)
def test_longbench_takes_the_first_answer_and_not_the_sets_of_longbench_e(name, answers):
    questions = load_benchmark(name, folder(name))
    assert [q.answer for q in questions] == answers
    assert {(q.task, q.benchmark) for q in questions} == {("doc_general_qa", name)}
    assert questions[0].documents[0].startswith("Passage 1:")


def test_longbench_is_read_from_the_hubs_archive(tmp_path):
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted((folder("hotpotqa") / "data").iterdir()):
            file.write(path, f"data/{path.name}")
    for path in (archive, tmp_path):  # the file, or the folder that the hub's cache has
        assert load_benchmark("hotpotqa", path) == load_benchmark("hotpotqa", folder("hotpotqa"))
    with pytest.raises(UserError, match="no file named like"):
        load_benchmark("hotpotqa", _zip_of(tmp_path / "other.zip", "readme.md", "x"))


def _zip_of(path: Path, name: str, text: str) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(name, text)
    return path


def test_longbench_v2_asks_as_training_does():
    first, second = load_benchmark("longbench-v2", folder("longbench-v2"))
    assert (first.task, first.answer, first.subset, second.subset) == ("doc_mc", "A", "short", "medium")
    assert first.question == (
        "What explains the fall in deliveries?\n\nChoices:\n"
        "(A) A storm\n(B) A strike\n(C) Lower prices\n(D) A new road"
    )


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_every_format_is_read_from_every_container(name, kind, tmp_path):
    """A single file of any name: a JSON list, JSON lines or parquet give the same questions."""
    rows = []
    for path in sorted(folder(name).rglob("*.json*")):
        if FOLDERS.get(name) and path.stem != name:
            continue
        text = path.read_text()
        rows += json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
    rows = [row | {"ground_truth": float(row["ground_truth"])} if "ground_truth" in row else row for row in rows]
    path = tmp_path / f"set.{kind}"
    if kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        path.write_text("\ufeff\n" + json.dumps(rows, indent=2))
    expected = load_benchmark(name, folder(name))
    assert load_benchmark(name, path) == expected
    assert load_benchmark(name, path, limit=1) == expected[:1]


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("docmath", {"ground_truth": None}, "row 1 of set.jsonl: no text in the field 'ground_truth'"),
        ("docmath", {"ground_truth": float("nan")}, "no text in the field 'ground_truth'"),
        ("docmath", {"paragraphs": "one text"}, "'paragraphs' is no list of texts"),
        ("frames", {"wiki_items": None}, "'wiki_items' is no list of articles"),
        ("frames", {"Prompt": " "}, "no text in the field 'Prompt'"),
        ("hotpotqa", {"answers": []}, "'answers' is no list of texts"),
        ("hotpotqa", {"dataset": "musique"}, "it is a row of 'musique'"),
        ("longbench-v2", {"answer": "E"}, "the answer 'E' is none of A, B, C and D"),
        ("longbench-v2", {"choice_D": None}, "no text in the field 'choice_D'"),
    ],
)
def test_rows_of_another_form_are_named(name, change, message, tmp_path):
    files = sorted(folder(name).rglob("*.json*"))
    text = next(file for file in files if file.stem == name or name not in FOLDERS).read_text()
    row = json.loads(text)[0] if text.startswith("[") else json.loads(text.splitlines()[0])
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps(row | change) + "\n" + json.dumps({"other": 1}) + "\n")
    with pytest.raises(UserError) as error:
        load_benchmark(name, path)
    assert message in str(error.value)
    assert "row 2" in str(error.value) and "there is no such field" in str(error.value)


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("a.jsonl", b'{"a": 1}\n{"b": \n', "line 2 is no JSON"),
        ("a.jsonl", b"", "there are no rows"),
        ("a.json", b"[1, 2]", "row 1 of a.json is no JSON object"),
        ("a.parquet", b"PAR1 no parquet", "cannot be read as frames"),
        ("a.zip", b"PK no zip", "cannot be read as frames"),
        ("a.csv", b"a,b", "none of .json"),
        ("a.jsonl", b"\xff\xfe\x00", "cannot be read as frames"),
    ],
)
def test_wrong_files_are_named(file, content, message, tmp_path):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_benchmark("frames", tmp_path / file)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match="no file or folder"):
        load_benchmark("frames", tmp_path / "nothing")
    with pytest.raises(UserError, match="lacks files of frames"):
        load_benchmark("frames", tmp_path)
    shutil.copy(folder("docmath") / "complong_testmini.json", tmp_path)
    with pytest.raises(UserError, match="compshort, simplong, simpshort"):
        load_benchmark("docmath", tmp_path)


def test_questions_of_ones_own(tmp_path):
    path = tmp_path / "mine.jsonl"
    row = {"id": "x", "task": "doc_mc", "question": "Which?\n(A) a\n(B) b", "answer": "B", "documents": ["Text."]}
    path.write_text(json.dumps(row) + "\n" + json.dumps(row | {"answer": "A"}) + "\n")
    first, second = load_benchmark("mine", path)
    assert (first.id, second.id) == ("x", "x#2")  # an id twice does not mix two questions' answers
    assert (first.benchmark, first.documents, second.answer) == ("mine", ("Text.",), "A")
    with pytest.raises(UserError, match="is no benchmark that is known here"):
        load_benchmark("mine")


def test_without_a_hub_it_is_said_what_to_do(tmp_path):
    code = (
        "from spell_megatron.evaluation.benchmarks import load_benchmark\n"
        "from spell_megatron.errors import UserError\n"
        "try: load_benchmark('frames')\n"
        "except UserError as error: print(error)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "Tongyi-Zhiwen/frames) cannot be fetched" in result.stdout, result.stderr
    assert "--benchmark frames=FILE_OR_FOLDER" in result.stdout


def test_files_in_the_hubs_cache_are_used_without_network(tmp_path):
    """What `snapshot_download` keeps: refs/main names a folder of snapshots."""
    cache = tmp_path / "hub" / "datasets--Tongyi-Zhiwen--frames"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc")
    shutil.copytree(folder("frames"), cache / "snapshots" / "abc")
    code = "from spell_megatron.evaluation.benchmarks import load_benchmark\nprint(len(load_benchmark('frames')))"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.stdout.strip() == "2", result.stderr
