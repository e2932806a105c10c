"""Vectors of texts: against scikit-learn's TF-IDF, of a server, and of a real model in vLLM."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import requests
from sklearn.feature_extraction.text import TfidfVectorizer

from spell_megatron.corpus import embedding
from spell_megatron.corpus.embedding import embed_by_server, embed_words
from spell_megatron.corpus.options import Options
from spell_megatron.corpus.prepare import prepare
from spell_megatron.corpus.texts import words
from spell_megatron.errors import UserError
from spell_megatron.selfplay.documents import load_clusters


def texts_of_topics(n: int, topics: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    vocabulary = [f"word{i}" for i in range(3000)]
    own = [rng.sample(vocabulary, 40) for _ in range(topics)]
    return [" ".join(rng.choices(own[i % topics], k=60) + rng.choices(vocabulary, k=20)) for i in range(n)]


def test_few_texts_have_the_vectors_of_scikit_learn():
    texts = [*texts_of_topics(40, 5), "The and of", "the sea"]
    (ours,) = embed_words([texts], [texts], 1, 0)
    stop = TfidfVectorizer(stop_words="english").get_stop_words()
    theirs = TfidfVectorizer(analyzer=lambda text: [w for w in words(text) if w not in stop], sublinear_tf=True)
    weights = theirs.fit_transform(texts)
    # Hashes of two words may fall on one column: 3,000 words in 262,144 columns, hence not all pairs are as close.
    difference = np.abs(ours @ ours.T - (weights @ weights.T).toarray())
    assert np.percentile(difference, 90) < 1e-6 and difference.max() < 0.01
    assert not ours[-2].any() and ours[-1].any()


def test_many_texts_are_near_their_own_kind_in_fewer_dimensions():
    texts = texts_of_topics(600, 30)
    batches = [texts[i : i + 100] for i in range(0, 600, 100)]
    vectors = np.concatenate(list(embed_words(batches, batches, 1, 0)))
    assert vectors.shape == (600, embedding.DIMENSIONS) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    similarity, same = vectors @ vectors.T, np.equal.outer(np.arange(600) % 30, np.arange(600) % 30)
    np.fill_diagonal(same, False)
    assert np.percentile(similarity[same], 1) > np.percentile(similarity[~same & ~np.eye(600, dtype=bool)], 99)
    again = np.concatenate(list(embed_words(batches, batches, 1, 0)))
    assert (again == vectors).all()


def test_languages_without_spaces_are_grouped(tmp_path):
    themes = ["鯨海豚潮波魚網船港", "麦粉窯酵母塩焼香", "棋盤駒王手飛車角"]
    rng = random.Random(0)
    rows = [{"text": "".join(rng.choices(themes[n % 3], k=300))} for n in range(12)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepare([tmp_path / "a.jsonl"], tmp_path / "out.parquet", Options(documents_per_cluster=4))
    found = [{int(name.split(":")[1]) % 3 for name in c.document_ids} for c in load_clusters(tmp_path / "out.parquet")]
    assert len(found) == 3 and all(len(kinds) == 1 for kinds in found)


# A server

Answer = Callable[[list[str]], tuple[int, object]]


@contextlib.contextmanager
def server(answer: Answer) -> Iterator[str]:
    """A server of the protocol; what it answers to the texts of a request is `answer`'s business."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/embeddings" and body["model"] == "some-model"
            assert self.headers["Authorization"] == "Bearer sesame"
            status, content = answer(body["input"])
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    own = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=own.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{own.server_port}/v1/"
    finally:
        own.shutdown()
        own.server_close()


def lengths(texts: list[str]) -> list[dict]:
    rows = [{"index": i, "embedding": [float(len(text)), 3.0]} for i, text in enumerate(texts)]
    return rows[::-1]  # a server may answer in another order


def test_vectors_of_a_server(monkeypatch):
    monkeypatch.setenv("SPELL_API_KEY", "sesame")
    busy = iter([503, 429])
    batches = [["x" * n for n in range(1, 101)], ["xxxx"]]
    with server(lambda texts: (next(busy, 200), {"data": lengths(texts)})) as url:
        first, second = embed_by_server(batches, url, "some-model")
    expected = np.array([[n, 3.0] for n in range(1, 101)])
    np.testing.assert_allclose(first, expected / np.linalg.norm(expected, axis=1, keepdims=True), rtol=1e-6)
    np.testing.assert_allclose(second, [[0.8, 0.6]], rtol=1e-6)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda texts: (400, {"error": "input is too long"}), "HTTP 400.*too long.*--embedding-chars"),
        (lambda texts: (401, {"error": "no key"}), "HTTP 401.*SPELL_API_KEY"),
        (lambda texts: (200, {"data": lengths(texts)[:-1]}), "gives 1 vectors for 2 texts"),
        (lambda texts: (200, {"vectors": []}), "no list of vectors"),
        (lambda texts: (200, {"data": [{"index": 0, "embedding": [1]}, {"index": 1, "embedding": [1, 2]}]}), "no list"),
        (lambda texts: (200, {"data": [{"index": i, "embedding": [float("nan")]} for i in (0, 1)]}), "not finite"),
    ],
)
def test_a_server_that_fails(monkeypatch, answer, message):
    monkeypatch.setenv("SPELL_API_KEY", "sesame")
    with server(answer) as url, pytest.raises(UserError, match=message):
        list(embed_by_server([["a", "b"]], url, "some-model"))


def test_no_proxy_is_asked_for_a_server_of_this_machine(monkeypatch):
    monkeypatch.setattr(embedding, "_RETRIES", 0)
    monkeypatch.setenv("SPELL_API_KEY", "sesame")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with server(lambda texts: (200, {"data": lengths(texts)})) as url:
        vectors = list(embed_by_server([["a", "bb"]], url, "some-model"))
    assert len(vectors[0]) == 2


def test_a_server_that_is_not_there(monkeypatch):
    monkeypatch.setattr(embedding, "_RETRIES", 0)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{held.getsockname()[1]}"
        with pytest.raises(UserError, match="does not answer.*--embedding-url.*not repeated"):
            list(embed_by_server([["a"]], url, "some-model"))


# A real model

PROGRAM = """
import json, sys
from pathlib import Path
import numpy as np
from spell_megatron.corpus.embedding import embed_by_vllm
if __name__ == "__main__":
    batches = json.loads(Path(sys.argv[2]).read_text())
    np.save(sys.argv[3], np.concatenate(list(embed_by_vllm(batches, sys.argv[1]))))
"""


@pytest.mark.slow
@pytest.mark.engine
def test_vllm_here_and_as_a_server_give_the_same_vectors(tmp_path, policy, monkeypatch):
    model = policy("dense")
    batches = [["one text", "another text, a longer one", "x" * 1500], ["y" * 5000]]  # more than 2,048 tokens are cut
    (tmp_path / "batches.json").write_text(json.dumps(batches))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    command = [sys.executable, "-c", PROGRAM, model, tmp_path / "batches.json", tmp_path / "vectors.npy"]
    subprocess.run(list(map(str, command)), check=True, env=environment, timeout=600)
    here = np.load(tmp_path / "vectors.npy")
    assert here.shape == (4, 64) and np.abs(here[0] - here[1]).max() > 0.01

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment |= {"VLLM_API_KEY": "sesame", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--runner", "pooling"]
    command += ["--served-model-name", "small", "--dtype", "float32", "--enforce-eager", "--port", port]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, env=environment)
    try:
        deadline = time.monotonic() + 600
        while True:
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
            with contextlib.suppress(requests.ConnectionError):
                if requests.get(f"http://127.0.0.1:{port}/health", timeout=5).ok:
                    break
            time.sleep(0.5)
        monkeypatch.setenv("SPELL_API_KEY", "sesame")
        url = f"http://127.0.0.1:{port}/v1"
        (served,) = embed_by_server([batches[0]], url, "small")
        with pytest.raises(UserError, match="HTTP 400.*--embedding-chars"):
            list(embed_by_server([batches[1]], url, "small"))
        # and the whole way: cut to what the model can take
        rows = [{"text": text} for text in texts_of_topics(12, 3)]
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
        options = Options(embedding_model="small", embedding_url=url, embedding_chars=400, documents_per_cluster=4)
        assert sum(prepare([tmp_path / "a.jsonl"], tmp_path / "out.parquet", options).cluster_documents) == 12
    finally:
        process.terminate()
        process.wait(60)
    # fp32; one batches the texts in another way than the other
    np.testing.assert_allclose(served, here[:3], atol=1e-4)
