"""`spell prepare`: formats, cutting, grouping, what is left out, and what happens when things go wrong."""

from __future__ import annotations

import ast
import itertools
import json
import os
import random
import re
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from engine_fixtures import save_byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from spell_megatron.cli import main
from spell_megatron.corpus.embedding import embed_words
from spell_megatron.corpus.grouping import group_similar
from spell_megatron.corpus.options import Options
from spell_megatron.corpus.prepare import prepare
from spell_megatron.corpus.table import SCHEMA
from spell_megatron.corpus.texts import split_text
from spell_megatron.errors import UserError
from spell_megatron.selfplay.documents import Cluster, load_clusters

TOPICS = {
    "whales": "whale ocean krill baleen pod migration breach harpoon blubber song fluke calf".split(),
    "bread": "flour yeast oven dough crust knead loaf baker sourdough rye proofing salt".split(),
    "chess": "rook bishop knight pawn gambit castling checkmate endgame opening queen file tempo".split(),
}


def article(topic: str, number: int, words: int = 60) -> str:
    rng = random.Random(f"{topic} {number}")
    return f"Article {number}.\n\n" + " ".join(rng.choices(TOPICS[topic], k=words)) + "."


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def clusters_by_documents(out: Path) -> list[set[str]]:
    return [set(cluster.document_ids) for cluster in load_clusters(out)]


def test_subfolders_are_clusters(tmp_path):
    for topic, number in itertools.product(TOPICS, range(3)):
        write(tmp_path / "in" / topic / f"{number}.md", article(topic, number))
    write(tmp_path / "in" / "README.md", "What these files are. " * 20)
    summary = prepare([tmp_path / "in"], tmp_path / "out.parquet", Options(source="mine"))
    clusters = load_clusters(tmp_path / "out.parquet")
    assert pq.read_schema(tmp_path / "out.parquet").equals(SCHEMA)
    assert [cluster.id for cluster in clusters] == sorted(TOPICS)
    assert clusters[0].document_ids == ("bread/0.md", "bread/1.md", "bread/2.md")
    assert clusters[0].documents == tuple(article("bread", number) for number in range(3))
    assert {cluster.source for cluster in clusters} == {"mine"}
    assert (summary.counts.files, summary.counts.documents, summary.clusters) == (9, 9, 3)
    assert summary.counts.skipped_files == {"README beside sub-folders": 1}


def test_a_folder_that_cannot_be_read_is_reported(tmp_path, monkeypatch):
    write(tmp_path / "in" / "bread" / "0.md", article("bread", 0))
    monkeypatch.chdir(tmp_path / "in")
    for _ in range(20):  # a path too long to be opened, which not even root can read
        os.mkdir("x" * 250)
        os.chdir("x" * 250)
    monkeypatch.chdir(tmp_path)
    summary = prepare([tmp_path / "in"], tmp_path / "out.parquet", Options())
    assert (summary.counts.files, summary.counts.documents, summary.clusters) == (1, 1, 1)
    assert summary.counts.skipped_files == {"unreadable folders": 1}
    assert summary.counts.notes[0].endswith(": File name too long")


def test_a_large_folder_becomes_several_clusters(tmp_path):
    for number in range(7):
        write(tmp_path / "in" / "whales" / f"{number}.txt", article("whales", number))
    prepare([tmp_path / "in"], tmp_path / "out.parquet", Options(documents_per_cluster=3))
    clusters = load_clusters(tmp_path / "out.parquet")
    assert all(cluster.id.startswith("whales-") and len(cluster.documents) <= 3 for cluster in clusters)
    assert sorted(id for cluster in clusters for id in cluster.document_ids) == [f"whales/{n}.txt" for n in range(7)]


def test_flat_files_are_grouped_by_similarity(tmp_path):
    for topic, number in itertools.product(TOPICS, range(4)):
        write(tmp_path / "in" / f"{number}-{topic}.txt", article(topic, number))
    prepare([tmp_path / "in"], tmp_path / "out.parquet", Options(documents_per_cluster=4))
    expected = [{f"{number}-{topic}.txt" for number in range(4)} for topic in TOPICS]
    assert sorted(map(sorted, clusters_by_documents(tmp_path / "out.parquet"))) == sorted(map(sorted, expected))


def test_lone_documents_of_folders_are_grouped_too(tmp_path):
    for topic, number in itertools.product(TOPICS, range(2)):
        write(tmp_path / "in" / f"{topic}-{number}" / "text", article(topic, number))
    prepare([tmp_path / "in"], tmp_path / "out.parquet")
    expected = [{f"{topic}-{number}/text" for number in range(2)} for topic in TOPICS]
    assert sorted(map(sorted, clusters_by_documents(tmp_path / "out.parquet"))) == sorted(map(sorted, expected))


def test_folders_of_equal_name_in_two_inputs_stay_apart(tmp_path):
    for place, topic in (("a", "whales"), ("b", "chess")):
        for number in range(2):
            write(tmp_path / place / "same" / f"{number}.txt", article(topic, number))
    prepare([tmp_path / "a", tmp_path / "b"], tmp_path / "out.parquet")
    assert [c.id for c in load_clusters(tmp_path / "out.parquet")] == ["a/same", "b/same"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_tables_of_texts(tmp_path, kind):
    rows = [{"body": article(topic, number), "n": number} for topic in TOPICS for number in range(2)]
    rows.insert(2, {"body": None, "n": 9})
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n{broken\n[1]\n")
    summary = prepare([path], tmp_path / "out.parquet", Options(text_column="body"))
    expected = [{f"rows.{kind}:{n}" for n in pair} for pair in ((1, 2), (4, 5), (6, 7))]
    assert sorted(map(sorted, clusters_by_documents(tmp_path / "out.parquet"))) == sorted(map(sorted, expected))
    assert summary.counts.skipped["without a text in 'body'"] == 1
    assert summary.counts.skipped["not a JSON object"] == (2 if kind == "jsonl" else 0)
    assert summary.counts.documents == (9 if kind == "jsonl" else 7)


def test_clusters_are_passed_through(tmp_path):
    row = {
        "cluster_id": "c7",
        "documents": ["short", "x" * 20_000],
        "document_ids": ["p", "q"],
        "source": "theirs",
    }
    (tmp_path / "ours.jsonl").write_text(json.dumps(row))
    pq.write_table(
        pa.Table.from_pylist(
            [
                {
                    "question_id": "9",
                    "paragraphs": ["one", "two"],
                    "data_source": "docmath_train",
                    "text": "unused",
                }
            ]
        ),
        tmp_path / "theirs.parquet",
    )
    inputs = [tmp_path / "ours.jsonl", tmp_path / "theirs.parquet"]
    prepare(inputs, tmp_path / "out.parquet")
    clusters = load_clusters(tmp_path / "out.parquet")
    assert clusters == [cluster for path in inputs for cluster in load_clusters(path)]
    assert clusters[0] == Cluster("c7", ("short", "x" * 20_000), ("p", "q"), "theirs")
    # A prepared file is itself such an input, and comes out as it went in.
    prepare([tmp_path / "out.parquet"], tmp_path / "again.parquet")
    assert load_clusters(tmp_path / "again.parquet") == clusters
    with pytest.raises(UserError, match="'c7' was already in an earlier input"):
        prepare([inputs[0], tmp_path / "again.parquet"], tmp_path / "third.parquet")


def test_json_lines_hold_the_same_clusters(tmp_path):
    for topic, number in itertools.product(TOPICS, range(2)):
        write(tmp_path / "in" / topic / f"{number}.txt", article(topic, number) + " é漢")
    for kind in ("parquet", "jsonl"):
        prepare([tmp_path / "in"], tmp_path / f"out.{kind}")
    assert load_clusters(tmp_path / "out.jsonl") == load_clusters(tmp_path / "out.parquet")
    assert "é漢" in (tmp_path / "out.jsonl").read_text(encoding="utf-8")


def test_what_is_left_out_is_counted(tmp_path):
    folder = tmp_path / "in"
    text = article("bread", 1)
    write(folder / "a.txt", text)
    write(folder / "b.md", text.replace(" ", "  ") + "\r\n\r\n")  # the same but for white space
    write(folder / "c.txt", " \n\t\n")
    write(folder / "d.txt", "too short")
    write(folder / "e.pdf", "not read")
    write(folder / ".hidden.txt", article("chess", 1))
    (folder / "f.txt").write_bytes("£".encode("latin-1") + article("chess", 2).encode())
    (folder / "g.txt").write_bytes(article("chess", 3).encode("utf-16-le"))  # without a byte order mark
    (folder / "h.txt").symlink_to(folder / "gone.txt")
    summary = prepare([folder], tmp_path / "out.parquet")
    assert summary.counts.skipped == {"repeated": 1, "empty": 1, "shorter than 200 characters": 1}
    assert summary.counts.skipped_files == {
        ".pdf (not a format read here)": 1,
        "not UTF-8 text": 1,
        "broken links and special files": 1,
    }
    assert sorted(summary.counts.notes) == [
        f"{folder / 'f.txt'}: bytes that are not UTF-8: 1, replaced by U+FFFD",
        f"{folder / 'g.txt'}: not UTF-8 text, left out; convert it with iconv",
    ]
    documents = [text for cluster in load_clusters(tmp_path / "out.parquet") for text in cluster.documents]
    assert sorted(documents) == sorted([text, "�" + article("chess", 2)])
    for words in (
        "2 clusters of 2 documents",
        "1 repeated",
        "f.txt: bytes",
        "clusters of a single document: 2",
    ):
        assert words in str(summary)


def test_control_characters_and_surrogates_do_not_survive(tmp_path):
    body = article("bread", 1)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "Top\x00\x1b[0m\ud800\f" + body + " \n\n\n\n\n\nEnd"}))
    prepare([tmp_path / "a.jsonl"], tmp_path / "out.parquet")
    (cluster,) = load_clusters(tmp_path / "out.parquet")
    assert cluster.documents == ("Top?\n\n" + body + "\n\n\nEnd",)


def test_long_documents_are_cut_and_budgets_hold(tmp_path):
    for topic in TOPICS:
        paragraphs = [article(topic, number, words=40) for number in range(40)]
        write(tmp_path / "in" / f"{topic}.txt", "\n\n".join(paragraphs))
    options = Options(max_document_chars=1000, max_cluster_chars=4000, documents_per_cluster=5)
    summary = prepare([tmp_path / "in"], tmp_path / "out.parquet", options)
    clusters = load_clusters(tmp_path / "out.parquet")
    lengths = [len(document) for cluster in clusters for document in cluster.documents]
    assert max(lengths) <= 1000 and min(lengths) >= 200
    assert all(sum(map(len, cluster.documents)) <= 4000 and len(cluster.documents) <= 5 for cluster in clusters)
    assert summary.counts.pieces == len(lengths) - 3
    kept = Counter(word for cluster in clusters for document in cluster.documents for word in document.split())
    source = Counter(word for topic in TOPICS for word in (tmp_path / "in" / f"{topic}.txt").read_text().split())
    assert kept == source


def test_cuts_prefer_headings_then_paragraphs():
    text = "Intro text here.\n\nMore text.\n## Part two\n\nIts own text stands here.\n\nThe end."
    assert split_text(text, 60) == [
        "Intro text here.\n\nMore text.",
        "## Part two\n\nIts own text stands here.\n\nThe end.",
    ]
    assert split_text("one two.\n\nthree four five.", 20) == ["one two.", "three four five."]
    assert split_text("One two three. Four five six.", 20) == ["One two three. ", "Four five six."]
    assert split_text("x" * 10, 4) == ["xx", "xxx", "xx", "xxx"]


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab .\n#é漢", max_size=400), st.integers(1, 60))
def test_cutting_loses_nothing_but_line_ends(text, limit):
    pieces = split_text(text, limit)
    assert all(len(piece) <= limit for piece in pieces)
    assert "".join(pieces).replace("\n", "") == text.replace("\n", "")


def test_grouping_many_texts_in_parts(monkeypatch):
    monkeypatch.setattr("spell_megatron.corpus.grouping.PART", 40)
    rng = random.Random(1)
    words = [f"word{i}" for i in range(3000)]
    topics = [rng.sample(words, 30) for _ in range(30)]
    labels = [i % 30 for i in range(120)]
    texts = [" ".join(rng.choices(topics[label], k=60)) for label in labels]
    groups = group(texts, seed=3)
    assert sorted(i for members in groups for i in members) == list(range(120))
    together = sum(len({labels[i] for i in members}) == 1 and len(members) == 4 for members in groups)
    assert together >= 27, groups  # measured: 30 of 30


def group(texts, max_documents=4, seed=0):
    (vectors,) = embed_words([texts], [texts], 1, seed)
    sizes = np.array([[len(text)] for text in texts])
    return sorted(group_similar(vectors, sizes, [10**9], max_documents, 0.1, seed))


def test_texts_without_words_stay_alone():
    assert group(["!!! ???"] * 3 + ["rook pawn"] * 2) == [[0], [1], [2], [3, 4]]


def test_same_inputs_give_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("spell_megatron.corpus.grouping.PART", 6)
    for topic, number in itertools.product(TOPICS, range(5)):
        write(tmp_path / "in" / f"{number}-{topic}.txt", article(topic, number))
    for name in ("a", "b"):
        prepare([tmp_path / "in"], tmp_path / f"{name}.parquet", Options(seed=5))
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_an_earlier_output_inside_the_input_is_not_read(tmp_path):
    for number in range(3):
        write(tmp_path / f"{number}.txt", article("whales", number))
    first = prepare([tmp_path], tmp_path / "out.parquet")
    second = prepare([tmp_path], tmp_path / "out.parquet")
    assert first.cluster_documents == second.cluster_documents == [3]


def test_wrong_column_names_the_columns_and_the_option(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x", "title": "y"}\n')
    pq.write_table(pa.table({"body": ["x"], "title": ["y"]}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        with pytest.raises(UserError, match=rf"{name}: .*'text'.*body, title.*--text-column"):
            prepare([tmp_path / name], tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


def test_columns_that_some_lines_lack(tmp_path):
    """Lines of one file need not have the same columns; a column that none of them has is a mistake, and soon told."""
    text = article("whales", 1)
    lines = [{"id": 1}, {"text": text, "score": 2}, {"text": None}, {"text": ["a"]}, {"text": float("nan")}]
    lines += [{"score": 1}]
    path = write(tmp_path / "a.jsonl", "\ufeff" + "\r\n".join(map(json.dumps, lines)))
    summary = prepare([path], tmp_path / "out.parquet", Options(quality_column="score"))
    assert [c.documents for c in load_clusters(tmp_path / "out.parquet")] == [(text,)]
    assert summary.counts.skipped == {"without a text in 'text'": 5}
    many = write(tmp_path / "b.jsonl", json.dumps({"body": "x"}) + "\n" + json.dumps({"title": "y"}) + "\n")
    with pytest.raises(UserError, match="there is no column 'text'. The columns are body, title"):
        prepare([many], tmp_path / "out.parquet")
    many.write_text(many.read_text() * 500 + json.dumps({"text": text}) + "\n")
    with pytest.raises(UserError, match="there is no column 'text' in the first 256 lines"):
        prepare([many], tmp_path / "out.parquet")


def test_names_that_are_not_utf_8(tmp_path):
    folder = os.fsencode(tmp_path / "in") + b"/caf\xe9"
    os.makedirs(folder)
    for number in range(2):
        Path(os.fsdecode(folder + b"/%d\xe8.txt" % number)).write_text(article("bread", number))
    Path(os.fsdecode(folder + b"/bad\xe9.txt")).write_bytes(b"\xff\x00\xfe" * 100)
    Path(os.fsdecode(folder + b"/other.\xe9x")).write_bytes(b"")
    summary = prepare([Path(os.fsdecode(folder)).parent], tmp_path / "out.parquet")
    (cluster,) = load_clusters(tmp_path / "out.parquet")
    assert cluster.id == r"caf\udce9" and cluster.document_ids == tuple(rf"caf\udce9/{n}\udce8.txt" for n in range(2))
    str(summary).encode()
    assert summary.counts.skipped_files.total() == 2
    prepare([Path(os.fsdecode(folder))], tmp_path / "again.parquet")  # and as the input itself
    assert json.loads((tmp_path / "again.statistics.json").read_text())["documents"] == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"not parquet", "a.parquet: not a readable parquet file"),
        ("a.txt", b"", "1 document empty"),
        ("a.pdf", b"%PDF", r"1 file \.pdf"),
        ("a.jsonl", b"{\n[\n", "2 documents not a JSON object"),
        ("a.jsonl", b'{"cluster_id": "a", "documents": [""]}', "document 1 is empty"),
    ],
)
def test_nothing_usable(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare([tmp_path / name], tmp_path / "out.parquet")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_table_damaged_inside_is_named_with_the_place(tmp_path):
    path = tmp_path / "a.parquet"
    texts = [article(topic, n) for n in range(500) for topic in TOPICS]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=500, use_dictionary=False)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 5000] = bytes(5000)
    path.write_bytes(data)
    summary = prepare([path], tmp_path / "out.parquet")
    assert re.search(r"a.parquet: damaged after row \d+ .*Write the file again", str(summary))
    assert summary.counts.skipped_files == {"damaged": 1} and 0 < sum(summary.cluster_documents) < 1500


def test_contradicting_options_are_named_together(tmp_path):
    with pytest.raises(UserError) as error:
        prepare([tmp_path / "gone"], tmp_path / "out.csv")
    assert "gone" in str(error.value) and "must end in .parquet" in str(error.value)
    with pytest.raises(UserError) as error:
        Options(documents_per_cluster=0, min_document_chars=9000, tasks=("chess",), max_cluster_tokens=5)
    for words in ("at least 1, not 0", "9000, 8000", "not chess", "--max-cluster-tokens and --tokenizer"):
        assert words in str(error.value)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    write(tmp_path / "in" / "a.txt", article("bread", 1))
    out = tmp_path / "out.parquet"
    prepare([tmp_path / "in"], out)
    before = out.read_bytes()
    write(tmp_path / "in" / "b.txt", article("bread", 2))

    def full_disk(self, batch):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_batch", full_disk)
    with pytest.raises(UserError, match="the disk is full"):
        prepare([tmp_path / "in"], out)
    assert out.read_bytes() == before
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"in", "out.parquet", "out.statistics.json", ".out.parquet.work"}  # to go on from
    with pytest.raises(UserError, match="Cannot write"):
        prepare([tmp_path / "in"], out / "below.parquet")


def test_docstrings_of_the_python_installation(tmp_path):
    """The modules as text: every cluster within its limits, and most documents find company."""
    library = Path(sysconfig.get_path("stdlib"))
    if not library.is_dir():
        pytest.skip(f"no Python sources at {library}")
    for path in sorted([*library.glob("[a-z]*.py"), *library.glob("asyncio/[a-z]*.py")]):
        nodes = [
            node
            for node in ast.walk(ast.parse(path.read_bytes()))
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        ]
        texts = [text for node in nodes if (text := ast.get_docstring(node))]
        write(tmp_path / "in" / f"{path.parent.name}.{path.stem}.txt", "\n\n".join(texts))
    summary = prepare([tmp_path / "in"], tmp_path / "out.parquet")
    clusters = load_clusters(tmp_path / "out.parquet")
    assert summary.clusters == len(clusters) >= 30
    assert max(summary.cluster_documents) <= 8
    assert max(sum(map(len, cluster.documents)) for cluster in clusters) <= 48_000
    # Measured with Python 3.11: 23 of 219 documents stay alone, small modules such as colorsys and uu.
    assert summary.cluster_documents.count(1) < 0.2 * sum(summary.cluster_documents)
    # The four pieces of the long threading module are not scattered.
    pieces = [{id for id in ids if "threading.txt#" in id} for ids in clusters_by_documents(tmp_path / "out.parquet")]
    assert max(map(len, pieces)) >= 3


def test_licences_of_a_debian_system(tmp_path):
    """Files without an extension, some with a version number that looks like one."""
    folder = Path("/usr/share/common-licenses")
    if not (folder / "Apache-2.0").is_file():
        pytest.skip(f"not a Debian system: no {folder}")
    prepare([folder], tmp_path / "out.parquet")
    clusters = load_clusters(tmp_path / "out.parquet")
    texts = {id: text for c in clusters for id, text in zip(c.document_ids, c.documents, strict=True)}
    assert "Grant of Copyright License" in texts["Apache-2.0#1"]
    assert not any("\f" in text for text in texts.values())
    # Links of another name (GPL to GPL-3) are not documents of their own.
    assert len(set(texts.values())) == len(texts)


# Filters, tasks, tokens, statistics


def table(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def written(out: Path) -> set[str]:
    return {name for cluster in load_clusters(out) for name in cluster.document_ids}


def test_quality_scores_and_length(tmp_path):
    rows = [{"text": article("bread", n), "score": score} for n, score in enumerate([1.0, 0.99, 1, None, "1", True])]
    rows.append({"text": article("bread", 9, words=400), "score": 1.0})
    rows.append({"text": article("bread", 10), "score": float("nan")})
    path = table(tmp_path / "a.jsonl", rows)
    options = Options(quality_column="score", max_document_chars=1000, drop_long=True)
    summary = prepare([path], tmp_path / "out.parquet", options)
    assert written(tmp_path / "out.parquet") == {"a.jsonl:1", "a.jsonl:3", "a.jsonl:5", "a.jsonl:6"}
    left_out = {"with score below 1": 1, "without a number in 'score'": 2, "longer than 1000 characters": 1}
    assert summary.counts.skipped == left_out
    with pytest.raises(UserError, match="no column 'stars'.*--quality-column"):
        prepare([path], tmp_path / "out.parquet", Options(quality_column="stars"))


def test_near_duplicates_are_left_out_and_can_be_kept(tmp_path):
    text = article("bread", 1, words=200)
    changed = text.replace("dough", "batter", 1)
    rows = [{"text": t} for t in (text, article("chess", 1), changed, text.upper(), article("bread", 2))]
    path = table(tmp_path / "a.jsonl", rows)
    summary = prepare([path], tmp_path / "out.parquet")
    assert written(tmp_path / "out.parquet") == {"a.jsonl:1", "a.jsonl:2", "a.jsonl:5"}
    assert summary.counts.skipped == {"near-duplicates": 2}
    summary = prepare([path], tmp_path / "out.parquet", Options(near_duplicates=1.0))
    assert sum(summary.cluster_documents) == 5 and not summary.counts.skipped


def test_near_duplicates_of_long_documents_go_with_all_pieces(tmp_path):
    long = "\n\n".join(article("whales", n) for n in range(12))
    rows = [{"text": long}, {"text": long.replace("Article 3", "Article three")}]
    options = Options(max_document_chars=1500)
    summary = prepare([table(tmp_path / "a.jsonl", rows)], tmp_path / "out.parquet", options)
    names = written(tmp_path / "out.parquet")
    assert len(names) > 2 and all(name.startswith("a.jsonl:1#") for name in names)
    assert summary.counts.pieces == len(names) - 1


def test_decontamination(tmp_path):
    phrase = " ".join(f"secret{i}" for i in range(13))
    (tmp_path / "sets").mkdir()
    table(tmp_path / "sets" / "frames.jsonl", [{"question": phrase}])
    pq.write_table(pa.table({"context": [[article("chess", 7)]]}), tmp_path / "sets" / "bench.parquet")
    documents = [article("bread", 1), article("bread", 2) + " " + phrase.upper() + "!", article("chess", 7)]
    inputs = [table(tmp_path / "a.jsonl", [{"text": text} for text in documents])]
    rows = [{"cluster_id": n, "documents": [article("whales", 1), text]} for n, text in enumerate(documents)]
    inputs.append(table(tmp_path / "clusters.jsonl", rows))
    options = Options(decontaminate=(tmp_path / "sets",))
    summary = prepare(inputs, tmp_path / "out.parquet", options)
    clusters = load_clusters(tmp_path / "out.parquet")
    assert [cluster.id for cluster in clusters] == ["0", "documents-00001"]
    assert clusters[1].documents == (article("bread", 1),)
    assert summary.counts.skipped == {
        "sharing 13 words with frames.jsonl": 1,
        "sharing 13 words with bench.parquet": 1,
        "in clusters with a document sharing 13 words with frames.jsonl": 2,
        "in clusters with a document sharing 13 words with bench.parquet": 2,
    }
    with pytest.raises(UserError, match="there is no .*gone"):
        prepare(inputs, tmp_path / "out.parquet", Options(decontaminate=(tmp_path / "gone",)))
    with pytest.raises(UserError, match="must end in .jsonl, .json, .parquet or .zip"):
        prepare(inputs, tmp_path / "out.parquet", Options(decontaminate=(write(tmp_path / "a.csv", "x"),)))


def test_clusters_keep_within_tokens(tmp_path):
    from spell_megatron.tokenizer import PolicyTokenizer

    save_byte_tokenizer(tmp_path / "policy")
    rows = [{"text": article(topic, n, words=40 + 30 * n) + " é漢" * 20} for topic in TOPICS for n in range(8)]
    path = table(tmp_path / "a.jsonl", rows)
    options = Options(max_cluster_tokens=700, tokenizer=tmp_path / "policy")
    summary = prepare([path], tmp_path / "out.parquet", options)
    count = PolicyTokenizer(tmp_path / "policy").count
    clusters = load_clusters(tmp_path / "out.parquet")
    counted = [sum(map(count, cluster.documents)) for cluster in clusters]
    joined = [count("\n".join(cluster.documents)) for cluster in clusters]
    assert max(joined) <= 700 and counted == summary.cluster_tokens and summary.counts.pieces > 0
    assert np.median(joined) > 350  # two groups of less than half would have been joined if they are alike
    kept = Counter(word for cluster in clusters for text in cluster.documents for word in text.split())
    assert kept == Counter(word for row in rows for word in row["text"].split())
    given = [{"cluster_id": str(n), "documents": ["x" * n, "é"]} for n in (696, 697)]  # é is two bytes
    prepare([table(tmp_path / "given.jsonl", given)], tmp_path / "given.parquet", options)
    assert [cluster.id for cluster in load_clusters(tmp_path / "given.parquet")] == ["696"]
    with pytest.raises(UserError, match="--tokenizer: There is no tokenizer in"):
        prepare([path], tmp_path / "o.parquet", Options(max_cluster_tokens=700, tokenizer=tmp_path))


def test_tasks_are_assigned_evenly_and_kept(tmp_path):
    for n in range(20):
        for part in "ab":
            write(tmp_path / "in" / f"{n}" / f"{part}.txt", article("bread", 100 * n + ord(part)))
    options = Options(tasks=("doc_mc", "doc_general_qa"), seed=3)
    summary = prepare([tmp_path / "in"], tmp_path / "one.parquet", options)
    assert summary.tasks == {"doc_mc": 10, "doc_general_qa": 10}
    assert "tasks: 10 doc_general_qa, 10 doc_mc" in str(summary)
    tasks = {cluster.id: cluster.task for cluster in load_clusters(tmp_path / "one.parquet")}
    assert [tasks[str(n)] for n in range(10)] != ["doc_mc"] * 10
    more = [{"cluster_id": f"m{n}", "documents": ["x"]} for n in range(4)]
    inputs = [tmp_path / "one.parquet", table(tmp_path / "more.jsonl", more)]
    prepare(inputs, tmp_path / "both.parquet", Options(tasks=("docmath_qa",)))
    assert {cluster.id: cluster.task for cluster in load_clusters(tmp_path / "both.parquet")} == tasks | {
        f"m{n}": "docmath_qa" for n in range(4)
    }


def test_clusters_are_chosen_by_size_and_number(tmp_path):
    for n in range(30):
        for part in range(1 + n % 3):
            write(tmp_path / "in" / f"{n:02}" / f"{part}.txt", article("bread", 100 * n + part))
    options = Options(min_cluster_documents=2, max_clusters=5, seed=1, min_similarity=1.0)
    summary = prepare([tmp_path / "in"], tmp_path / "out.parquet", options)
    ids = [cluster.id for cluster in load_clusters(tmp_path / "out.parquet")]
    assert len(ids) == 5 and ids == sorted(ids) and min(summary.cluster_documents) == 2
    assert summary.left_out_clusters == {"with fewer than 2 documents": 10, "beyond 5": 15}
    prepare([tmp_path / "in"], tmp_path / "out.parquet", Options(**vars(options) | {"seed": 2}))
    assert [cluster.id for cluster in load_clusters(tmp_path / "out.parquet")] != ids
    with pytest.raises(UserError, match="No cluster has 8 documents"):
        prepare([tmp_path / "in"], tmp_path / "out.parquet", Options(min_cluster_documents=8, min_similarity=1.0))


def test_the_command_line_has_every_option(tmp_path):
    rows = [{"text": article(topic, n), "score": 2.5} for n in range(4) for topic in TOPICS]
    path = table(tmp_path / "a.jsonl", rows)
    evaluation = table(tmp_path / "e.jsonl", [{"q": " ".join(f"e{i}" for i in range(9))}])
    given = {
        "min_document_chars": 100, "max_document_chars": 700, "drop_long": True, "quality_column": "score",
        "min_quality": 2.5, "near_duplicates": 0.7, "decontaminate": [str(evaluation)] * 2, "overlap_words": 8,
        "documents_per_cluster": 3, "min_cluster_documents": 2, "max_cluster_chars": 2000, "max_clusters": 2,
        "min_similarity": 0.05, "source": "mine", "tasks": ["doc_mc", "docmath_qa"], "seed": 4,
    }  # fmt: skip
    words = ["prepare", str(path), "--out", str(tmp_path / "out.parquet")]
    words += ["--drop-long", "--tasks", "doc_mc,docmath_qa"]
    for name, value in given.items():
        for one in value if name == "decontaminate" else [value] if name not in ("drop_long", "tasks") else []:
            words += [f"--{name.replace('_', '-')}", str(one)]
    assert main(words) == 0
    statistics = json.loads((tmp_path / "out.statistics.json").read_text())
    assert {name: statistics["options"][name] for name in given} == given
    assert statistics["clusters_of_each_task"] == {"doc_mc": 1, "docmath_qa": 1}


def test_statistics_stand_beside_the_output(tmp_path):
    for topic, number in itertools.product(TOPICS, range(3)):
        write(tmp_path / "in" / topic / f"{number}.txt", article(topic, number))
    write(tmp_path / "in" / "short.txt", "x")
    prepare([tmp_path / "in"], tmp_path / "out.parquet", Options(source="mine"))
    statistics = json.loads((tmp_path / "out.statistics.json").read_text())
    assert statistics["read"] == {"files": 10, "documents": 10, "pieces_of_long_documents": 0}
    assert statistics["documents_left_out"] == {"shorter than 200 characters": 1}
    assert statistics["clusters"] == 3 and statistics["documents"] == 9
    assert statistics["clusters_of_each_source"] == {"mine": 3}
    assert statistics["options"]["source"] == "mine" and "workers" not in statistics["options"]
    words = [sum(len(text.split()) for text in c.documents) for c in load_clusters(tmp_path / "out.parquet")]
    assert statistics["per_cluster"]["words"]["total"] == sum(words)
    assert statistics["per_cluster"]["words"]["max"] == max(words)


def test_the_number_of_workers_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("spell_megatron.corpus.examine.PARALLEL_BYTES", 0)
    monkeypatch.setattr("spell_megatron.corpus.examine._BATCH_DOCUMENTS", 7)
    monkeypatch.setattr("spell_megatron.corpus.vectors.PARALLEL_TEXTS", 0)
    monkeypatch.setattr("spell_megatron.corpus.vectors._PART", 8)
    rows = [{"text": article(topic, number)} for number in range(20) for topic in TOPICS]
    path = table(tmp_path / "a.jsonl", rows + rows[:10])
    for workers in (1, 2):
        prepare([path], tmp_path / f"{workers}.parquet", Options(workers=workers))
    assert (tmp_path / "1.parquet").read_bytes() == (tmp_path / "2.parquet").read_bytes()
    statistics = [json.loads((tmp_path / f"{n}.statistics.json").read_text()) for n in (1, 2)]
    assert statistics[0] == statistics[1] and statistics[0]["documents_left_out"] == {"repeated": 10}
