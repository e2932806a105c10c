"""Reading clusters, the questioner's context, the sampler."""

import itertools
import json
import random
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spell_megatron.errors import UserError
from spell_megatron.selfplay.documents import (
    Cluster,
    ClusterSampler,
    choose_context,
    load_clusters,
    round_counts,
)
from spell_megatron.selfplay.history import Entry

TASKS = {"docmath_qa": 1.0, "doc_general_qa": 1.0, "doc_mc": 1.0}


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
    assert dict(take(sampler, 2)) == {
        "line 1": "docmath_qa",
        "q": "doc_general_qa",
    }
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


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(UserError, match="not a file"):
        load_clusters(tmp_path)


# Context


def test_context_grows_by_m_until_all_documents_are_seen():
    rng, entries, sizes = random.Random(0), [], []
    for i in range(5):
        context = choose_context(rng, 13, 5, entries)
        assert list(context) == sorted(set(context)) and set(context) <= set(range(13))
        assert all(set(entry.documents) <= set(context) for entry in entries)
        sizes.append(len(context))
        entries = [*entries, Entry(context, f"q{i}", "a")][-3:]
    assert sizes == [5, 10, 13, 13, 13]


def test_context_is_drawn_uniformly():
    rng = random.Random(0)
    counts = Counter(index for _ in range(4000) for index in choose_context(rng, 10, 3, []))
    # 4000 draws of 3 of 10: 1200 each, standard deviation 29; the bound is five of them.
    assert all(abs(count - 1200) < 145 for count in counts.values()) and len(counts) == 10


# Sampler


def clusters(n, source="web", prefix="c"):
    return [Cluster(f"{prefix}{i}", ("x",), ("x",), source) for i in range(n)]


def take(sampler, n):
    return [(cluster.id, task) for cluster, task in itertools.islice(sampler.upcoming(), n)]


@pytest.mark.parametrize(
    ("sizes", "weights", "n", "counts"),
    [
        ((100, 100, 100), (1, 1, 1), 480, (100, 100, 100)),
        ((200, 200, 200), (1, 1, 1), 480, (160, 160, 160)),
        ((100, 100, 100), (2, 1, 1), 8, (4, 2, 2)),
        ((100, 100, 100), (1, 1, 1), 10, (4, 3, 3)),
        ((3, 100, 100), (1, 1, 1), 12, (3, 5, 4)),
        ((1, 1, 100), (1, 1, 1), 30, (1, 1, 28)),
        ((100, 100, 100), (1, 1, 3), 7, (1, 1, 5)),
    ],
)
def test_counts_of_a_round(sizes, weights, n, counts):
    names = ("doc_general_qa", "doc_mc", "docmath_qa")
    result = round_counts(dict(zip(names, sizes, strict=True)), dict(zip(names, weights, strict=True)), n)
    assert tuple(result[name] for name in names) == counts


@pytest.mark.parametrize(("n", "per_round"), [(37, 9), (9, 480), (30, 30), (31, 7)])
def test_rounds_hold_no_cluster_twice_and_passes_hold_all(n, per_round):
    sampler = ClusterSampler(clusters(n), TASKS, {}, per_round, seed=1)
    size = min(n, per_round)
    stream = take(sampler, 40 * size)
    for start in range(0, len(stream), size):
        assert len({cluster for cluster, _ in stream[start : start + size]}) == size
    assert len(set(stream)) == n  # a cluster serves one task only
    for task in TASKS:
        visits = Counter(cluster for cluster, t in stream if t == task)
        assert max(visits.values()) - min(visits.values()) <= 1


def test_looking_ahead_consumes_nothing_and_advancing_follows_the_stream():
    sampler = ClusterSampler(clusters(20), TASKS, {}, 9, seed=3)
    stream = take(sampler, 250)
    assert take(sampler, 250) == stream
    consumed, rng = 0, random.Random(0)
    while consumed < 150:
        step = rng.choice([0, 1, 2, 8, 9, 10, 18, 31])
        sampler.advance(step)
        consumed += step
        assert take(sampler, 20) == stream[consumed : consumed + 20]


def test_look_ahead_is_not_disturbed_by_advancing():
    sampler = ClusterSampler(clusters(20), TASKS, {}, 9, seed=3)
    stream, upcoming = take(sampler, 100), sampler.upcoming()
    seen = []
    for _ in range(50):
        cluster, task = next(upcoming)
        seen.append((cluster.id, task))
        sampler.advance(1)
    assert seen == stream[:50]


def test_state_survives_json_at_every_place():
    sampler = ClusterSampler(clusters(13), TASKS, {}, 6, seed=5)
    for _ in range(30):
        state = json.loads(json.dumps(sampler.state_dict()))
        restored = ClusterSampler(clusters(13), TASKS, {}, 6, seed=99)  # the state brings its own seed
        restored.load_state_dict(state)
        assert take(restored, 60) == take(sampler, 60)
        sampler.advance(1)


def test_partition_depends_on_the_seed_and_not_on_the_order_of_tasks():
    def tasks_of(seed, tasks):
        return dict(take(ClusterSampler(clusters(30), tasks, {}, 30, seed), 30))

    assert tasks_of(1, TASKS) == tasks_of(1, dict(reversed(TASKS.items())))
    assert tasks_of(1, TASKS) != tasks_of(2, TASKS)
    assert Counter(tasks_of(1, TASKS).values()) == dict.fromkeys(TASKS, 10)


def test_sources_decide_which_tasks_their_clusters_serve():
    mixed = clusters(10, "docmath", "m") + clusters(20, "ultrafineweb", "w")
    sources = {"docmath": ["docmath_qa"], "ultrafineweb": ["doc_general_qa", "doc_mc"]}
    stream = take(ClusterSampler(mixed, TASKS, sources, 30, 0), 30)
    assert all((task == "docmath_qa") == cluster.startswith("m") for cluster, task in stream)
    assert Counter(task for _, task in stream) == dict.fromkeys(TASKS, 10)


def test_a_clusters_own_task_comes_before_that_of_its_source():
    mixed = clusters(6, "docmath", "m") + [Cluster(f"t{i}", ("x",), ("x",), "docmath", "doc_mc") for i in range(3)]
    sources = {"docmath": ["docmath_qa"]}
    stream = take(ClusterSampler(mixed, {"docmath_qa": 2.0, "doc_mc": 1.0}, sources, 9, 0), 9)
    assert all((task == "doc_mc") == cluster.startswith("t") for cluster, task in stream)


def test_many_small_sources_are_shared_out_evenly():
    many = [Cluster(f"c{i}", ("x",), ("x",), f"file{i}") for i in range(9)]
    stream = take(ClusterSampler(many, TASKS, {}, 9, 0), 9)
    assert Counter(task for _, task in stream) == dict.fromkeys(TASKS, 3)


def test_task_without_clusters_or_without_a_place_is_the_users_error():
    with pytest.raises(UserError, match=r"no document clusters for the task\(s\) docmath_qa.*data.sources"):
        ClusterSampler(clusters(9), TASKS, {"web": ["doc_mc", "doc_general_qa"]}, 9, 0)
    with pytest.raises(UserError, match=r"selfplay.tasks"):
        ClusterSampler(clusters(2), TASKS, {}, 9, 0)
    with pytest.raises(UserError, match="clusters_per_round"):
        ClusterSampler(clusters(9), TASKS, {}, 2, 0)
    with pytest.raises(UserError, match=r"selfplay.tasks"):
        ClusterSampler(clusters(9), {"doc_mc": 0.0}, {}, 2, 0)


def test_tasks_of_share_zero_take_no_clusters():
    sampler = ClusterSampler(clusters(6), {**TASKS, "docmath_qa": 0.0}, {}, 6, 0)
    assert Counter(task for _, task in take(sampler, 6)) == {"doc_mc": 3, "doc_general_qa": 3}


def test_state_of_other_documents_is_refused():
    state = ClusterSampler(clusters(9), TASKS, {}, 9, 0).state_dict()
    with pytest.raises(UserError, match="same documents file"):
        ClusterSampler(clusters(10), TASKS, {}, 9, 0).load_state_dict(state)
    with pytest.raises(UserError, match="same documents file"):
        ClusterSampler(clusters(9), {"doc_mc": 1.0}, {}, 9, 0).load_state_dict(state)
