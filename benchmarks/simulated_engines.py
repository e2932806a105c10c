"""Servers that answer as vLLM's generation route does, without a model: for benchmarks/director.py.

    python benchmarks/simulated_engines.py SCRIPT

SCRIPT is a JSON file. One process per engine, each with a port of its own, printed one per line. They end when their
standard input does. An answer is chosen from prepared ones by the request's kind and seed, so that the engines cost
little CPU time, and comes after a while. Only the standard library is imported, so that 64 of them fit into memory.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import re
import sys
import zlib
from pathlib import Path

NPY = b"\x93NUMPY\x01\x00v\x00{'descr': '|u1', 'fortran_order': False, 'shape': %s, }"


class Engine:
    """One server. `script`: see `benchmarks/director.py`."""

    def __init__(self, script: dict, texts: dict[str, list[tuple[bytes, int]]]) -> None:
        self.script, self.texts = script, texts

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                body = await reader.readexactly(int(re.search(rb"content-length: *(\d+)", head.lower())[1]))
                answer, seconds = self.answer(body)
                del body  # thousands of requests wait
                await asyncio.sleep(seconds)
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n")
                writer.write(b"content-length: %d\r\n\r\n" % sum(map(len, answer)))
                for part in answer:
                    writer.write(part)
                    await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def answer(self, body: bytes) -> tuple[list[bytes], float]:
        """The parts of an answer, and seconds until it comes."""
        end = body.index(b"]")
        params = json.loads(b"{" + body[end + 2 :])["sampling_params"]
        rng = random.Random(params["seed"])
        kind = self.kind(body, end, params)
        parts = [b'{"request_id":"generate-tokens-0","model":"policy","created":1,"usage":null,"choices":[']
        prompt_tokens = body.count(b",", 0, end) + 1
        for index in range(params["n"]):
            choice, tokens = rng.choice(self.texts[kind])
            routing = self.routing(prompt_tokens, tokens, params)
            parts += [b"," if index else b"", b'{"index":%d,"routed_experts":%s,' % (index, routing), choice]
        slowest = self.script["seconds"]
        return [*parts, b"]}"], rng.uniform(0.1, 1.0) * slowest

    def kind(self, body: bytes, end: int, params: dict) -> str:
        """What is asked for. Of a cluster the answers are all right, all wrong, or both."""
        if params["n"] > 1:
            return "verdict"
        if params["max_tokens"] == self.script["no_context_tokens"]:
            return "wrong"
        last = [int(token) for token in body[max(0, end - 400) : end].split(b",")[-len(self.script["question_end"]) :]]
        chance = zlib.crc32(body[end // 2 : end // 2 + 1000]) % 100
        if last == self.script["question_end"]:
            return "question" if chance % 10 else "no question"
        return ("right", "wrong", "answer", "answer")[chance % 4]

    def routing(self, prompt_tokens: int, tokens: int, params: dict) -> bytes:
        layers, experts = self.script["routing"]
        if not layers:
            return b"null"
        rows = prompt_tokens - params.get("routed_experts_prompt_start", 0) + tokens - 1
        head = (NPY % str((rows, layers, experts)).encode()).ljust(127) + b"\n"
        return b'"%s"' % base64.b64encode(head + bytes(rows * layers * experts))


async def run(engine: Engine, port: int) -> None:
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(sys.stdin, ended.set)
    server = await asyncio.start_server(engine.serve, "127.0.0.1", 0, limit=2**20, backlog=4096)
    os.write(port, f"{server.sockets[0].getsockname()[1]}\n".encode())
    await ended.wait()
    os._exit(0)


def main() -> None:
    script = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(sys.argv[1]).parent
    texts: dict[str, list[tuple[bytes, int]]] = {}
    for kind, files in script["texts"].items():
        texts[kind] = [((folder / name).read_bytes(), tokens) for name, tokens in files]
    for _ in range(script["engines"]):
        if os.fork() == 0:
            asyncio.run(run(Engine(script, texts), 1))
    sys.stdin.read()


if __name__ == "__main__":
    main()
