"""The order in which clusters are drawn, and the task that each serves."""

import itertools
import json
import random
from collections import Counter

import pytest

from spell_megatron.errors import UserError
from spell_megatron.selfplay.documents import Cluster
from spell_megatron.selfplay.sampler import ClusterSampler, round_counts

TASKS = {"docmath_qa": 1.0, "doc_general_qa": 1.0, "doc_mc": 1.0}


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
