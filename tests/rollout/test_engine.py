"""One engine over HTTP."""

from __future__ import annotations

import errno
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import psutil
import pytest
import requests
from engine_fixtures import engine_config, open_engines
from families import hf_config
from urllib3.util import connection

from spell_megatron.rollout import engine
from spell_megatron.rollout.engine import Engine, _faults, _Patience


@pytest.mark.slow
def test_a_call_to_a_core_that_dies_fails(policy, tmp_path: Path):
    """The server would leave it without an answer."""
    with open_engines(engine_config(policy("dense")), tmp_path) as engines:
        server = psutil.Process(engines.source.servers[0].process.pid)
        (core,) = (child for child in server.children(recursive=True) if "EngineCore" in child.name())
        core.suspend()
        with ThreadPoolExecutor(1) as threads:
            call = threads.submit(engines.engines[0].call, "spell_describe", timeout=300)
            assert not wait([call], timeout=7).done  # longer than between two looks at the engine
            core.kill()
            with pytest.raises(requests.ConnectionError, match="has ended while"):
                call.result(timeout=120)
        assert engines.failed() == [0]


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections

    def do_GET(self) -> None:
        self.answer(b"")

    def do_POST(self) -> None:
        self.server.posts += 1
        content = json.dumps({"results": [{"workers": 1}]}).encode()
        self.answer(content)

    def answer(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        if self.close_connection:  # as it was asked to; uvicorn says so too
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server():
    """A server that counts what it is asked to do."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.posts = 0
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_engine_that_is_out_of_reach_has_not_ended(server, monkeypatch):
    """Its network is cut for some seconds: a request is made again only if it cannot have arrived."""
    monkeypatch.setattr(_Patience, "get_backoff_time", lambda _: 0)
    monkeypatch.setattr(engine, "time", Mock(monotonic=time.monotonic))  # does not sleep
    one = Engine(f"http://127.0.0.1:{server.server_port}", "key")
    connect, cut = connection.create_connection, OSError(errno.EHOSTUNREACH, "No route to host")

    def network(*ways: object) -> None:
        monkeypatch.setattr(connection, "create_connection", Mock(side_effect=[*ways, *[DEFAULT] * 9], wraps=connect))

    network(cut, cut)
    assert one.call("spell_describe") == [{"workers": 1}] and server.posts == 1
    network(cut)
    assert not one._ended()
    network(cut, cut)
    assert one.responds(10)
    network(cut)
    assert not one.healthy()  # at once: whoever watches an engine wants to know
    network()
    one.call("spell_describe")
    one.call("spell_describe")
    assert connection.create_connection.call_count == 2  # none is kept, which the server might close meanwhile
    monkeypatch.setattr(engine, "_CUT_SECONDS", 0.0)
    network(*[cut] * 9)
    assert not one.responds(10)
    with pytest.raises(requests.ConnectionError, match="No route to host"):
        one.call("spell_describe")
    gone = Engine("http://127.0.0.1:1", "key")  # refused: its machine is there, and it is not
    monkeypatch.setattr(connection, "create_connection", Mock(wraps=connect))
    with pytest.raises(requests.ConnectionError, match="refused"):
        gone.call("spell_describe")
    assert connection.create_connection.call_count == 1
    assert gone._ended() and not gone.responds(10)


def test_an_engine_of_an_unknown_transport_does_not_fit(policy):
    config = engine_config(policy("dense"))
    about = {
        "architecture": "Qwen3ForCausalLM",
        "sizes": [64, 2, 260],
        "dtype": "float32",
        "max_model_len": 1024,
        "logprobs_mode": "processed_logprobs",
    }

    def faults(transport: str | None) -> list[str]:
        return list(_faults(about | {"weight_transfer": transport}, config.model, config.rollout))

    assert faults("gloo") == []
    assert faults("pigeons") == ["it receives weights by 'pigeons', and the trainer can send by gloo, nccl, ipc only"]
    assert faults(None) == ["it was started without --weight-transfer-config"]


def test_an_engine_with_a_vision_tower_does_not_fit(tmp_path: Path):
    """A push has no weights for it. The sizes are those of the language model within."""
    whole = hf_config("qwen3_5_text", vision=True, hidden_size=64, num_hidden_layers=2, vocab_size=260)
    whole.architectures = ["Qwen3_5ForConditionalGeneration"]
    whole.save_pretrained(tmp_path)
    config = engine_config(tmp_path)
    about = {"architecture": whole.architectures[0], "sizes": [64, 2, 260], "dtype": "float32", "max_model_len": 1024}
    about |= {"logprobs_mode": "processed_logprobs", "weight_transfer": "gloo"}
    faults = [list(_faults(about | {"language_model_only": alone}, config.model, config.rollout)) for alone in (1, 0)]
    assert faults[0] == [] and "without --language-model-only" in faults[1][0]
