"""A small server with OpenAI's routes that counts what it is asked and can misbehave; for the tests."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Stub:
    """What the server was asked, and how it answers.

    Attributes:
        url: its address, with /v1.
        requests: (route, body, key) of every request, in the order of their coming.
        answer: body -> (HTTP status, text of the completion or of the error).
        delay: seconds before each answer.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.requests: list[tuple[str, dict, str | None]] = []
        self.answer: Callable[[dict], tuple[int, str]] = lambda body: (200, "The correct answer is Oslo")
        self.delay = 0.0
        self.busy = self.busiest = 0
        self.lock = threading.Lock()


@contextmanager
def serve() -> Iterator[Stub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with stub.lock:
                stub.requests.append((self.path, body, self.headers.get("Authorization")))
                stub.busy += 1
                stub.busiest = max(stub.busy, stub.busiest)
            time.sleep(stub.delay)
            status, text = stub.answer(body)
            with stub.lock:
                stub.busy -= 1
            if status == 200:
                chat = self.path.endswith("/chat/completions")
                choice = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
                answer = {"choices": [choice | {"finish_reason": "stop"}], "usage": {"completion_tokens": 7}}
            else:
                answer = {"error": {"message": text}}
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    stub = Stub(f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
