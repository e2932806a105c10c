"""The benchmarks' formats, in each container that they come in; what is wrong with a file is said."""

import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from spell_megatron.errors import UserError
from spell_megatron.evaluation.benchmarks import BENCHMARKS
from spell_megatron.evaluation.generate import sample_seed
from spell_megatron.evaluation.load_benchmark import load_benchmark
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
    assert {alias for q in questions for alias in q.aliases} == ({"Sorrel Bridge"} if name == "hotpotqa" else set())
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
        "What explains the fall in deliveries?\n\nChoices:\n(A) A storm\n(B) A strike\n(C) Lower prices\n(D) A new road"
    )


def test_what_macos_leaves_behind_is_no_part_of_a_benchmark(tmp_path):
    """Also in an archive that was made there; and folders may be links."""
    (tmp_path / "linked").symlink_to(folder("docmath"))
    for name in ("._complong_testmini.json", ".cache/complong_testmini.json", "__MACOSX/complong_testmini.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    assert load_benchmark("docmath", tmp_path) == load_benchmark("docmath", folder("docmath"))
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("__MACOSX/data/._hotpotqa.jsonl", b"\0\5\x16\7")
        archive.write(folder("hotpotqa") / "data" / "hotpotqa.jsonl", "data/hotpotqa.jsonl")
    assert load_benchmark("hotpotqa", tmp_path / "data.zip") == load_benchmark("hotpotqa", folder("hotpotqa"))


def damaged_archive() -> bytes:
    """An archive whose file cannot be unpacked, though its list of files is whole."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data/hotpotqa.jsonl", json.dumps({"input": "x" * 1000}))
    data = bytearray(content.getvalue())
    data[60:70] = b"\xff" * 10
    return bytes(data)


def wrong_strings() -> bytes:
    content = io.BytesIO()
    strings = pa.array([b"fine", b"caf\xe9"], pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"input": strings, "context": strings, "answers": ["x", "y"]}), content)
    return content.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("hotpotqa.parquet", wrong_strings(), "row 2 holds bytes that are not UTF-8 in 'input', 'context'"),
        ("hotpotqa.parquet", b"PAR1", "not a readable parquet file"),
        ("hotpotqa.jsonl", gzip.compress(b"{}", mtime=0), "this is gzip data"),
        ("hotpotqa.zip", damaged_archive(), "cannot be read as hotpotqa"),
        ("hotpotqa.zip", damaged_archive()[:-30], "cannot be read as hotpotqa"),
    ],
)
def test_damaged_files_are_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_benchmark("hotpotqa", tmp_path / name)


def test_answers_in_a_column_of_decimals(tmp_path):
    rows = json.loads((folder("docmath") / "complong_testmini.json").read_text())
    answers = pa.array([Decimal("-200.00"), Decimal("5.10")], pa.decimal128(9, 2))
    columns = {"question": [row["question"] for row in rows], "paragraphs": [row["paragraphs"] for row in rows]}
    parquet.write_table(pa.table(columns | {"ground_truth": answers}), tmp_path / "complong_testmini.parquet")
    questions = load_benchmark("docmath", tmp_path / "complong_testmini.parquet")
    assert [question.answer for question in questions] == ["-200", "5.1"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_files_with_a_byte_order_mark(encoding, kind, tmp_path):
    rows = [{"input": "Où ?", "context": "漢", "answers": ["x"]}] * 2
    text = json.dumps(rows, ensure_ascii=False) if kind == "json" else "\n".join(map(json.dumps, rows))
    (tmp_path / f"hotpotqa.{kind}").write_bytes(text.encode(encoding))
    assert [question.question for question in load_benchmark("hotpotqa", tmp_path)] == ["Où ?"] * 2


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
        ("docmath", {"paragraphs": "one text"}, "'paragraphs' is not a list of texts"),
        ("frames", {"wiki_items": None}, "'wiki_items' is not a list of articles"),
        ("frames", {"Prompt": " "}, "no text in the field 'Prompt'"),
        ("hotpotqa", {"answers": []}, "'answers' is not a list of texts"),
        ("hotpotqa", {"dataset": "musique"}, "it is a row of 'musique'"),
        ("longbench-v2", {"answer": "E"}, "the answer 'E' is none of A, B, C and D"),
        ("longbench-v2", {"choice_D": None}, "no text in the field 'choice_D'"),
    ],
)
def test_rows_of_another_form_are_named(name, change, message, tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps(rows_of(name)[0] | change) + "\n" + json.dumps({"other": 1}) + "\n")
    with pytest.raises(UserError) as error:
        load_benchmark(name, path)
    assert message in str(error.value)
    assert "row 2" in str(error.value) and "there is no such field" in str(error.value)


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("a.jsonl", b'{"a": 1}\n{"b": \n', "line 2 is not JSON"),
        ("a.jsonl", b"", "there are no rows"),
        ("a.json", b"[1, 2]", "row 1 of a.json is not a JSON object"),
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
    with pytest.raises(UserError, match="There is no benchmark 'mine'"):
        load_benchmark("mine")


def rows_of(name: str) -> list[dict]:
    files = sorted(folder(name).rglob("*.json*"))
    text = next(file for file in files if file.stem == name or name not in FOLDERS).read_text()
    return json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]


def loaded(name: str, path: Path, *rows: dict):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_benchmark(name, path)


@pytest.mark.parametrize(
    "name, change, answer",
    [
        ("docmath", {"ground_truth": 7}, "7"),
        ("docmath", {"ground_truth": 1e-7}, "0.0000001"),
        ("docmath", {"ground_truth": 1.5e22}, "15000000000000000000000"),
        ("docmath", {"ground_truth": " 12.5% "}, "12.5%"),
        ("docmath", {"ground_truth": True}, "True"),  # some of its questions ask yes or no
        ("frames", {"Answer": 14}, "14"),
        ("frames", {"Answer": 14.0}, "14"),
        ("frames", {"Answer": "  Jane Ballou\r\n"}, "Jane Ballou"),
        ("hotpotqa", {"answers": [1987, "the year 1987"]}, "1987"),
        ("hotpotqa", {"answers": "Sorrel Bridge"}, "Sorrel Bridge"),
        ("longbench-v2", {"answer": "c"}, "C"),
        ("longbench-v2", {"answer": " C\n"}, "C"),
    ],
)
def test_answers_of_any_type(name, change, answer, tmp_path):
    assert loaded(name, tmp_path / "set.jsonl", rows_of(name)[0] | change)[0].answer == answer


@pytest.mark.parametrize(
    "name, change",
    [
        ("docmath", {"ground_truth": [1.5]}),
        ("docmath", {"ground_truth": float("inf")}),
        ("docmath", {"ground_truth": ""}),
        ("docmath", {"paragraphs": []}),
        ("frames", {"Answer": None}),
        ("frames", {"Answer": ["a"]}),
        ("frames", {"wiki_items": []}),
        ("frames", {"wiki_items": [{"title": "A", "text": ""}, {"title": "B", "text": None}]}),
        ("frames", {"wiki_items": ["a"]}),
        ("hotpotqa", {"answers": None}),
        ("hotpotqa", {"answers": [None, "a"]}),
        ("hotpotqa", {"answers": [" "]}),
        ("hotpotqa", {"context": ""}),
        ("longbench-v2", {"answer": 1}),
        ("longbench-v2", {"choice_A": float("nan")}),
    ],
)
def test_rows_without_an_answer_or_a_text_are_refused(name, change, tmp_path):
    with pytest.raises(UserError, match="row 1 of set.jsonl"):
        loaded(name, tmp_path / "set.jsonl", rows_of(name)[0] | change)


def test_an_article_of_frames_without_text_does_not_spoil_the_others(tmp_path):
    row = rows_of("frames")[0]
    row["wiki_items"] += [{"title": "Not fetched", "text": ""}, {"title": None, "text": None}, {"text": "Only text."}]
    documents = loaded("frames", tmp_path / "test.jsonl", row)[0].documents
    assert len(documents) == 5 and documents[2:] == ("Not fetched\n", "\n", "\nOnly text.")


def test_windows_files_long_lines_and_unicode(tmp_path):
    """A byte order mark, CRLF, empty lines, no line end at the end; names in any script; U+2028 inside a line."""
    row = rows_of("hotpotqa")[0] | {"context": "Ðá 東京 🎈\u2028\x85" * 200_000}
    row |= {"input": "¿Dónde?", "answers": ["Kraków"]}
    text = json.dumps(row, ensure_ascii=False) + "\r\n\r\n" + json.dumps(rows_of("hotpotqa")[1])
    path = tmp_path / "HotpotQA.JSONL"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    first, second = load_benchmark("hotpotqa", path)
    assert (first.question, first.answer, first.documents) == ("¿Dónde?", "Kraków", (row["context"].strip(),))
    assert second == load_benchmark("hotpotqa", folder("hotpotqa"))[1]


def test_half_a_surrogate_pair_does_not_stop_an_evaluation(tmp_path):
    row = rows_of("hotpotqa")[0] | {"input": "Who \ud83d?", "context": "It \ude00 was.", "_id": "\ud83d"}
    question = loaded("hotpotqa", tmp_path / "set.jsonl", row)[0]
    assert sample_seed(0, question, 0) and question.id == "?"
    assert question.question == "Who ??" and question.documents == ("It ? was.",)


def test_ids_of_a_benchmark_in_several_files_differ(tmp_path):
    rows = rows_of("frames")
    for number, row in enumerate(rows):
        (tmp_path / f"test-{number:05d}-of-00002.jsonl").write_text(json.dumps(row))
    assert load_benchmark("frames", tmp_path) == load_benchmark("frames", folder("frames"))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_same_rows_in_two_files_of_a_folder_are_refused(name, tmp_path):
    """As JSON and as parquet, say: every question would count twice, and intervals would be too narrow."""
    shutil.copytree(folder(name), tmp_path / "set")
    file = next(f for f in sorted((tmp_path / "set").rglob("*.json*")) if f.stem == name or name not in FOLDERS)
    text = file.read_text()
    rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
    parquet.write_table(pa.Table.from_pylist(rows), file.with_suffix(".parquet"))
    with pytest.raises(UserError, match=rf"holds the same questions twice.*{file.stem}"):
        load_benchmark(name, tmp_path / "set")


def own(tmp_path, *rows: object, encoding: str = "utf-8") -> Path:
    path = tmp_path / "own.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_bytes("\r\n".join(lines).encode(encoding))
    return path


OWN = {"task": "doc_general_qa", "question": "Où?", "answer": "Oslo", "documents": ["Text."]}


def test_own_questions_of_any_type(tmp_path):
    rows = [OWN, {}, OWN | {"id": None, "answer": 1987}, OWN | {"id": 0, "task": "docmath_qa", "answer": 1e-7}]
    rows[1] = OWN | {"id": 7, "task": "doc_mc", "answer": " B "}
    rows += [OWN | {"id": "x"}, OWN | {"id": "x"}, OWN | {"id": "x#2"}, OWN | {"id": "x"}]
    questions = load_benchmark("mine", own(tmp_path, *rows, "", encoding="utf-8-sig"))
    assert [q.answer for q in questions][:4] == ["Oslo", "B", "1987", "0.0000001"]
    assert [q.id for q in questions] == ["1", "7", "3", "0", "x", "x#3", "x#2", "x#4"]
    assert len({q.id for q in questions}) == len(questions)  # or answers of one would count for another
    assert questions[0].question == "Où?"


@pytest.mark.parametrize(
    "row, message",
    [
        (OWN | {"answer": None}, "line 1: answer must be a text or a number, not None"),
        (OWN | {"answer": float("nan")}, "answer must be a text or a number, not nan"),
        (OWN | {"answer": ["Oslo"]}, "answer must be a text or a number, not \\['Oslo'\\]"),
        (OWN | {"answer": True}, "answer must be a text or a number, not True"),
        (OWN | {"answer": " "}, "answer must be a text or a number, not ' '"),
        (OWN | {"question": None}, "question must be a text, not None"),
        (OWN | {"question": ""}, "question must be a text, not ''"),
        (OWN | {"documents": []}, "documents must be a list of texts"),
        (OWN | {"documents": ["a", None]}, "documents must be a list of texts"),
        (OWN | {"documents": "a"}, "documents must be a list of texts"),
        (OWN | {"task": "doc_mc"}, "answer of doc_mc must be A, B, C or D, not 'Oslo'"),
        (OWN | {"task": "docmath_qa"}, "answer of docmath_qa must be a number, not 'Oslo'"),
        (OWN | {"task": "math"}, "task 'math' is none of docmath_qa"),
        ({"task": "doc_mc"}, "line 1 has no 'question', 'answer', 'documents'"),
        ([1], "line 1 is not a JSON object"),
        ("[" * 10**5, "line 1 is not JSON"),
        ("{", "line 1 is not JSON"),
    ],
)
def test_own_questions_that_cannot_be_used(row, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_benchmark("mine", own(tmp_path, row))


def test_own_questions_in_another_encoding(tmp_path):
    with pytest.raises(UserError, match=r"line 1 is not UTF-8 \(byte \d+\)"):
        load_benchmark("mine", own(tmp_path, OWN, encoding="latin-1"))
    with pytest.raises(UserError, match="There is no file"):
        load_benchmark("mine", tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match="it holds no questions"):
        load_benchmark("mine", own(tmp_path, "", "  "))


def test_without_a_hub_it_is_said_what_to_do(tmp_path):
    code = (
        "from spell_megatron.evaluation.load_benchmark import load_benchmark\n"
        "from spell_megatron.errors import UserError\n"
        "try: load_benchmark('frames')\n"
        "except UserError as error: print(error)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "The data set Tongyi-Zhiwen/frames of the hub is not in its cache" in result.stdout, result.stderr
    assert "--benchmark frames=FILE_OR_FOLDER" in result.stdout


def test_files_in_the_hubs_cache_are_used_without_network(tmp_path):
    """What `snapshot_download` keeps: refs/main names a folder of snapshots."""
    cache = tmp_path / "hub" / "datasets--Tongyi-Zhiwen--frames"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc")
    shutil.copytree(folder("frames"), cache / "snapshots" / "abc")
    code = "from spell_megatron.evaluation.load_benchmark import load_benchmark\nprint(len(load_benchmark('frames')))"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.stdout.strip() == "2", result.stderr
