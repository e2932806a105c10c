"""`spell prepare` with files that are damaged, in other encodings, or not what their names say.

One bad file or row does not stop a corpus: it is counted and named. Only if all are bad there is an error.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import zipfile
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spell_megatron.corpus.options import Options
from spell_megatron.corpus.prepare import prepare
from spell_megatron.corpus.summary import Summary
from spell_megatron.errors import UserError
from spell_megatron.selfplay.documents import load_clusters

GOOD = "The lock keeper writes down every barge, its load and the hour at which it came through the gates. " * 3


def good(number: int) -> str:
    return GOOD.replace("barge", f"barge of company {number}")


def texts_of(*inputs: Path, **options) -> tuple[list[str], Summary]:
    """(documents that `spell prepare` makes, its summary)."""
    out = inputs[0].parent / "out.parquet"
    summary = prepare(inputs, out, Options(near_duplicates=1.0, **options))
    return sorted(text for cluster in load_clusters(out) for text in cluster.documents), summary


def not_utf8(texts: list[bytes | None], kind: pa.DataType = pa.string()) -> pa.Array:
    """A column of strings that holds any bytes, as careless writers make it."""
    wide = pa.types.is_large_string(kind)
    return pa.array(texts, pa.large_binary() if wide else pa.binary()).view(kind)


def columns_of_kinds() -> dict[str, pa.Array]:
    texts = [good(1).encode(), good(2).encode() + b" caf\xe9", good(3).encode()]
    strings = not_utf8(texts)
    return {
        "string": strings,
        "large_string": not_utf8(texts, pa.large_string()),
        "dictionary": pa.DictionaryArray.from_arrays(pa.array([0, 1, 2], pa.int32()), strings),
        "binary": pa.array(texts, pa.binary()),
    }


@pytest.mark.parametrize("kind", columns_of_kinds())
def test_strings_of_parquet_that_are_not_utf8(tmp_path, kind):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": columns_of_kinds()[kind]}), path)
    documents, summary = texts_of(path)
    assert documents == sorted([good(1).strip(), good(2) + " caf\ufffd", good(3).strip()])
    assert "a.parquet: faulty rows: 1; the first: row 2 holds bytes" in str(summary)


def test_a_row_that_is_mostly_not_utf8_is_left_out(tmp_path):
    wrong = ("né à la crémerie " * 30).encode("latin-1")
    pq.write_table(pa.table({"text": not_utf8([good(1).encode(), wrong, None])}), tmp_path / "a.parquet")
    documents, summary = texts_of(tmp_path / "a.parquet")
    assert documents == [good(1).strip()]
    assert summary.counts.skipped == {"not UTF-8 text": 1, "without a text in 'text'": 1}


def test_a_text_may_hold_replacement_characters_of_its_own(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": good(1) + "\ufffd" * 50}))
    assert texts_of(tmp_path / "a.jsonl")[0] == [good(1) + "\ufffd" * 50]


def test_columns_of_other_types_do_not_matter(tmp_path):
    """Wrong strings, lists and dates that Python does not have beside the texts, and nested texts."""
    strings = not_utf8([b"\xff", b"x"])
    table = {
        "text": pa.array([good(1), good(2)]),
        "name": strings,
        "list": pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), strings),
        "when": pa.array([2**52, 1], pa.timestamp("ms")),
        "nested": pa.array([[good(1)], [good(2)]]),
    }
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet")[0] == [good(1).strip(), good(2).strip()]
    with pytest.raises(UserError, match="2 documents without a text in 'nested'"):
        texts_of(tmp_path / "a.parquet", text_column="nested")


def bad_files() -> dict[str, bytes]:
    parquet = io.BytesIO()
    pq.write_table(pa.table({"text": [good(1)] * 50}), parquet)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("word/document.xml", good(1))
    line = (json.dumps({"text": good(1)}) + "\n").encode()
    whole = parquet.getvalue()
    return {
        "empty.parquet": b"",
        "cut.parquet": whole[: len(whole) // 2],
        "column.parquet": b"",  # written by the test: it lacks the column
        "gzip.jsonl": gzip.compress(line),
        "gzip.txt": gzip.compress(good(1).encode()),
        "cut gzip.md": gzip.compress(good(1).encode())[:40],
        "xz.jsonl": lzma.compress(line),
        "bz2.jsonl": bz2.compress(line),
        "zstd.jsonl": b"\x28\xb5\x2f\xfd" + bytes(range(200)),
        "office": archive.getvalue(),
        "zip.jsonl": archive.getvalue()[:50],
        "pdf.txt": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n" + bytes(range(256)) * 4,
        "parquet.jsonl": whole,
        "latin.txt": ("né à la crémerie " * 30).encode("latin-1"),
        "nul.txt": good(1).replace("e", "\0").encode(),
        "empty.jsonl": b"",
        "empty.txt": b"",
        "broken.jsonl": b'{"text": "\n' * 3,
        "deep.jsonl": b"[" * 100_000,
        "number.jsonl": b"1" * 10_000 + b"\n",
        "clusters.jsonl": b'{"cluster_id": "a", "documents": [""]}\n',
        "clusters.parquet": b"",  # written by the test: its documents are not UTF-8
    }


def write_bad(folder: Path, name: str) -> Path:
    (folder / name).write_bytes(bad_files()[name])
    if name == "column.parquet":
        pq.write_table(pa.table({"body": ["x"]}), folder / name)
    if name == "clusters.parquet":
        documents = pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), not_utf8([b"\xff"]))
        pq.write_table(pa.table({"cluster_id": ["a"], "documents": documents}), folder / name)
    return folder / name


def test_bad_files_are_counted_and_named_and_the_others_used(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in bad_files():
        write_bad(folder, name)
    (folder / "good.txt").write_text(good(1))
    (folder / "good.jsonl").write_text(json.dumps({"text": good(2)}) + "\n{cut\n" + json.dumps({"text": good(3)}))
    documents, summary = texts_of(folder)
    assert documents == [good(n).strip() for n in (1, 2, 3)]
    notes = "\n".join(summary.counts.notes)
    for name in set(bad_files()) - {"empty.jsonl", "empty.txt"}:
        assert f"/{name}: " in notes, name
    assert "good.jsonl: faulty rows: 1; the first: line 2 is not JSON" in notes
    for name, what in (("gzip.jsonl", "gunzip"), ("zip.jsonl", "zip archive"), ("pdf.txt", "PDF"), ("office", "zip")):
        (note,) = (note for note in summary.counts.notes if f"/{name}: " in note)
        assert what in note
    assert summary.counts.skipped_files == {"not UTF-8 text": 6, "damaged": 2, "without a column 'text'": 1}


@pytest.mark.parametrize("name", bad_files())
def test_a_bad_file_alone_is_an_error_that_names_it(tmp_path, name):
    path = write_bad(tmp_path, name)
    with pytest.raises(UserError) as error:
        texts_of(path)
    assert name in str(error.value) and not (tmp_path / "out.parquet").exists()


def test_a_column_that_no_table_has_is_an_error_also_beside_texts(tmp_path):
    (tmp_path / "readme.txt").write_text(good(1))
    for name in "ab":
        pq.write_table(pa.table({"body": [good(2)]}), tmp_path / f"{name}.parquet")
    with pytest.raises(UserError, match=r"no column 'text'. The columns are body"):
        texts_of(tmp_path / "readme.txt", tmp_path / "a.parquet", tmp_path / "b.parquet")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_texts_with_a_byte_order_mark(tmp_path, encoding):
    """Notepad and PowerShell write such."""
    (tmp_path / "a.txt").write_bytes((good(1) + "é漢").encode(encoding))
    rows = json.dumps({"text": good(2) + "é\u2028漢"}, ensure_ascii=False) + "\r\n"
    (tmp_path / "b.jsonl").write_bytes(rows.encode(encoding))
    documents, summary = texts_of(tmp_path / "a.txt", tmp_path / "b.jsonl")
    assert documents == [good(1) + "é漢", good(2) + "é\n漢"] and not summary.counts.notes


def test_some_wrong_bytes_in_a_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(good(1).encode() + b"caf\xe9 \0 end \xef\xbf\xbd")
    documents, summary = texts_of(tmp_path / "a.txt")
    assert documents == [good(1) + "caf\ufffd  end \ufffd"]
    assert "bytes that are not UTF-8: 3" in str(summary)


SCORES = {
    "decimal": pa.array([Decimal("1.00"), Decimal("0.99"), None], pa.decimal128(5, 2)),
    "text": pa.array([" 1.0", "9e-1", "good"]),
    "float": pa.array([1.0, 0.5, float("nan")], pa.float32()),
    "integer": pa.array([3, 0, None], pa.uint8()),
    "dictionary": pa.array(["1", "0", "1_000"]).dictionary_encode(),
}


@pytest.mark.parametrize("kind", SCORES)
def test_scores_of_all_types(tmp_path, kind):
    pq.write_table(pa.table({"text": [good(1), good(2), good(3)], "score": SCORES[kind]}), tmp_path / "a.parquet")
    documents, summary = texts_of(tmp_path / "a.parquet", quality_column="score")
    assert documents == [good(1).strip()]
    assert summary.counts.skipped == {"with score below 1": 1, "without a number in 'score'": 1}
    if kind == "text":
        assert "row 3 has 'good' in 'score', which is no number" in str(summary)


def test_a_score_in_four_bytes_reaches_its_own_value(tmp_path):
    pq.write_table(pa.table({"text": [good(1)], "score": pa.array([0.9], pa.float32())}), tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet", quality_column="score", min_quality=0.9)[0] == [good(1).strip()]


def test_decontamination_with_a_set_that_is_not_utf8(tmp_path, capsys):
    question = b"which lock keeper wrote down the hour of the barge that brought the caf\xe9 its chairs"
    other = " ".join(f"word{number}" for number in range(13))
    (tmp_path / "sets").mkdir()
    pq.write_table(pa.table({"question": not_utf8([question, b"\xff"])}), tmp_path / "sets" / "a.parquet")
    (tmp_path / "sets" / "._a.parquet").write_bytes(b"\0\5\x16\7Mac OS X")
    (tmp_path / "sets" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.json").write_bytes(json.dumps([{"q": other}]).encode("utf-16"))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in (
        good(1), good(2) + question.decode("latin-1"), good(3) + other,
    )))  # fmt: skip
    documents, summary = texts_of(tmp_path / "a.jsonl", decontaminate=(tmp_path / "sets",))
    assert documents == [good(1).strip()]
    assert summary.counts.skipped == {"sharing 13 words with a.parquet": 1, "sharing 13 words with b.json": 1}
    told = " ".join(capsys.readouterr().err.split())
    assert "row 1 holds bytes that are not UTF-8 in 'question'" in told and "there are 2 such rows" in told


def test_linked_folders_are_read_once_and_circles_end(tmp_path):
    folder, other = tmp_path / "in", tmp_path / "other"
    for number in range(2):
        for place in (folder / "own", other / "deep"):
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number}.txt").write_text(good(number + 2 * (place.name == "deep")))
    (folder / "again").symlink_to(folder / "own")
    (folder / "linked").symlink_to(other)
    (other / "deep" / "up").symlink_to(other)
    (folder / "own" / "root").symlink_to(folder)
    (folder / "around").symlink_to(tmp_path)
    (folder / "self").symlink_to(folder / "self")
    summary = prepare([folder], tmp_path / "out.parquet", Options(near_duplicates=1.0))
    clusters = load_clusters(tmp_path / "out.parquet")
    assert {cluster.id: cluster.document_ids for cluster in clusters} == {
        "linked/deep": ("linked/deep/0.txt", "linked/deep/1.txt"),
        "own": ("own/0.txt", "own/1.txt"),
    }
    assert summary.counts.skipped_files == {
        "links to a folder that holds the input": 1,
        "broken links and special files": 1,
    }
    prepare([folder / "linked"], tmp_path / "linked.parquet", Options(near_duplicates=1.0))  # as the input itself
    assert [cluster.id for cluster in load_clusters(tmp_path / "linked.parquet")] == ["deep"]


def test_what_systems_and_editors_leave_behind_is_no_document(tmp_path):
    folder = tmp_path / "in"
    for name in ("a.txt", "._a.txt", ".DS_Store", "notes~", "~$a.txt", "Thumbs.db", "__MACOSX/._b", ".git/config"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(good(len(name)))
    summary = prepare([folder], tmp_path / "out.parquet")
    assert summary.counts.documents == 1 and not summary.counts.skipped_files
    assert os.listdir(folder)


def test_an_output_that_cannot_be_written_is_known_before_anything_is_read(tmp_path):
    (tmp_path / "a.txt").write_text(good(1))
    (tmp_path / "b.statistics.json").mkdir()
    long = "x" * 236  # the name of the statistics is longer than that of the corpus
    for out in (tmp_path / "a.txt" / "o.parquet", tmp_path / "b.parquet", tmp_path / f"{long}.parquet"):
        with pytest.raises(UserError, match="Cannot write"):
            prepare([tmp_path / "a.txt"], out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.statistics.json"]
