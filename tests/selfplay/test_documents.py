"""Reading clusters of documents."""

import itertools
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spell_megatron.errors import UserError
from spell_megatron.selfplay.documents import Cluster, load_clusters
from spell_megatron.selfplay.sampler import ClusterSampler


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_both_formats_and_both_schemas_are_read(tmp_path, suffix):
    ours = [{"cluster_id": "a", "documents": ["x", "ü\ny"], "document_ids": ["p", "q"], "source": "web_2"}]
    assert load_clusters(write(tmp_path / f"ours{suffix}", ours)) == [Cluster("a", ("x", "ü\ny"), ("p", "q"), "web_2")]
    bare = [{"cluster_id": 7, "documents": ["x", "y"]}]
    assert load_clusters(write(tmp_path / f"bare{suffix}", bare)) == [Cluster("7", ("x", "y"), ("7/0", "7/1"), "")]
    tasks = [{"cluster_id": task or "u", "documents": ["x"], "task": task} for task in ("doc_mc", None)]
    assert [cluster.task for cluster in load_clusters(write(tmp_path / f"t{suffix}", tasks))] == ["doc_mc", None]
    released = [{"question_id": 7, "paragraphs": ["x"], "data_source": "docmath_train"}]
    assert load_clusters(write(tmp_path / f"theirs{suffix}", released)) == [Cluster("7", ("x",), ("7/0",), "docmath")]


FAULTY = [
    ({"cluster_id": "a", "documents": []}, "column documents: must be a non-empty list"),
    ({"cluster_id": "a", "documents": ["x", " \n"]}, "column documents: document 2 is empty"),
    ({"cluster_id": "a", "documents": ["x", 5]}, "column documents: document 2 is not a text but 5"),
    ({"cluster_id": "a", "documents": "x"}, "column documents: must be a non-empty list of texts, not 'x'"),
    (
        {"cluster_id": "a", "documents": ["\ud800"]},
        "column documents: document 1 has half of a surrogate pair",
    ),
    ({"cluster_id": "", "documents": ["x"]}, "column cluster_id: must be a non-empty string"),
    ({"cluster_id": None, "documents": ["x"]}, "column cluster_id: must be"),
    ({"cluster_id": "\udc00", "documents": ["x"]}, "column cluster_id: must be"),  # half of a surrogate pair
    ({"cluster_id": "a", "documents": ["x"], "source": "\ud800"}, "column source: must be"),
    ({"cluster_id": "ok", "documents": ["x"]}, "column cluster_id: 'ok' is already the id of line 1"),
    ({"cluster_id": "a", "texts": ["x"]}, "column documents is missing (columns found: cluster_id, texts)"),
    (
        {"cluster_id": "a", "documents": ["x", "y"], "document_ids": ["p"]},
        "column document_ids: must be a list",
    ),
    ({"cluster_id": "a", "documents": ["x"], "source": 3}, "column source: must be a string, not 3"),
    ({"cluster_id": "a", "documents": ["x"], "task": "chess"}, "column task: must be one of docmath_qa"),
    ({"cluster_id": "a", "documents": ["x"], "task": ["doc_mc"]}, "column task: must be one of"),
]


@pytest.mark.parametrize(("row", "message"), FAULTY)
def test_faults_are_named_by_row_and_column(tmp_path, row, message):
    path = write(tmp_path / "d.jsonl", [{"cluster_id": "ok", "documents": ["x"]}, row])
    with pytest.raises(UserError) as error:
        load_clusters(path)
    assert f"line 2, {message}" in str(error.value)
    assert str(path) in str(error.value)


def test_files_of_questions(tmp_path):
    rows = [
        {"task": "docmath_qa", "question": "How many?", "answer": 3, "documents": ["a", "b"]},
        {"task": "doc_general_qa", "question": "Who?", "answer": "Ann", "documents": ["c"], "id": "q"},
    ]
    first, second = load_clusters(write(tmp_path / "questions.jsonl", rows))
    assert (first.id, first.task, first.question, first.answer) == ("line 1", "docmath_qa", "How many?", "3")
    assert (second.id, second.documents, second.answer) == ("q", ("c",), "Ann")
    sampler = ClusterSampler([first, second], {"docmath_qa": 1.0, "doc_general_qa": 1.0}, {}, 2, 0)
    stream = itertools.islice(sampler.upcoming(), 2)
    assert {cluster.id: task for cluster, task in stream} == {"line 1": "docmath_qa", "q": "doc_general_qa"}
    for task, answer, fault in (
        ("doc_mc", "Ann", "answer of doc_mc must be A, B, C or D"),
        ("docmath_qa", "many", "answer of docmath_qa must be a number"),
        ("docmath_qa", float("nan"), "answer must be a text or a number, not nan"),
        ("doc_general_qa", None, "answer must be a text or a number, not None"),
    ):
        row = {"task": task, "question": "Who?", "documents": ["a"], "answer": answer}
        with pytest.raises(UserError, match=f"line 1, column answer: {fault}"):
            load_clusters(write(tmp_path / "questions.jsonl", [row]))
    rows = [{"task": "essay", "question": " ", "documents": ["a"]}]
    with pytest.raises(UserError, match=r"column question.*column answer.*must be one of.*'essay'"):
        load_clusters(write(tmp_path / "bad.jsonl", rows))


def test_all_faults_are_reported_at_once_but_not_more_than_ten(tmp_path):
    rows = [row for row, _ in FAULTY if row.get("cluster_id") != "ok"]
    with pytest.raises(UserError) as error:
        load_clusters(write(tmp_path / "d.jsonl", rows * 2))
    assert str(error.value).count("line ") >= 10
    assert "more)" in str(error.value)
    with pytest.raises(UserError, match=r"line 1.*line 3"):
        load_clusters(
            write(tmp_path / "e.jsonl", [FAULTY[0][0], {"cluster_id": "b", "documents": ["x"]}, FAULTY[5][0]])
        )


def test_parquet_with_wrong_columns_and_empty_documents(tmp_path):
    with pytest.raises(UserError, match=r"row 1, column cluster_id is missing.*columns found: id, text"):
        load_clusters(write(tmp_path / "a.parquet", [{"id": "a", "text": "x"}]))
    with pytest.raises(UserError, match="row 2, column documents: document 1 is empty"):
        load_clusters(
            write(tmp_path / "b.parquet", [{"cluster_id": i, "documents": [d]} for i, d in enumerate(["x", ""])])
        )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "does not exist"),
        ("empty.jsonl", b"", "is empty"),
        ("blank.jsonl", b"\n\n", "holds no clusters"),
        ("latin.jsonl", '{"cluster_id": "a", "documents": ["é"]}'.encode("latin-1"), "line 1 is not UTF-8"),
        ("half.jsonl", b'{"cluster_id": "a"\n', "line 1 is not JSON"),
        ("list.jsonl", b"[1]\n", "line 1 is not a JSON object"),
        ("deep.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("broken.parquet", b"PAR1 no parquet", "cannot be read as parquet"),
        ("table.csv", b"a,b\n", "neither .parquet nor .jsonl"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_clusters(tmp_path / name)


def test_strings_of_parquet_that_are_not_utf8(tmp_path):
    """They are faults of their row; other columns do not matter."""
    texts = pa.array([b"fine", b"caf\xe9", b"\xff"], pa.binary()).view(pa.string())
    documents = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), texts)
    table = pa.table({"cluster_id": ["a", "b", "c"], "documents": documents, "unused": texts})
    pq.write_table(table, tmp_path / "a.parquet")
    fault = "has 2 fault.*row 2, column documents: holds bytes that are not UTF-8; row 3, column documents"
    with pytest.raises(UserError, match=fault):
        load_clusters(tmp_path / "a.parquet")
    pq.write_table(table.slice(0, 1), tmp_path / "b.PARQUET")
    assert load_clusters(tmp_path / "b.PARQUET") == [Cluster("a", ("fine",), ("a/0",), "")]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_json_lines_with_a_byte_order_mark(tmp_path, encoding):
    (tmp_path / "a.jsonl").write_bytes('{"cluster_id": "a", "documents": ["é漢"]}\r\n'.encode(encoding))
    assert load_clusters(tmp_path / "a.jsonl") == [Cluster("a", ("é漢",), ("a/0",), "")]


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(UserError, match="not a file"):
        load_clusters(tmp_path)
