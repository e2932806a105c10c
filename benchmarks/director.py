"""Does rank 0 keep up with many engines at 100,000 tokens? CPU time, delays and memory of a step's self-play.

    python benchmarks/director.py [--quick] [--groups N] [--prompt TOKENS] [--answer TOKENS] [--engines N]
                                  [--routing LAYERS,EXPERTS] [SETTING=VALUE ...]

A step of self-play by the real `Director`: tokenizer, prompts, HTTP, parsing, rewards, batch, the trainer's rows (those
that are certain early, as in a run that overlaps its update), then the dump. The engines are simulated
(benchmarks/simulated_engines.py): real servers in processes of their own, whose answers have the form and the size of
vLLM's and come within --seconds. So the director is as busy as it can be. Documents are made of sentences of
examples/documents, tokenised by byte pairs as Qwen's. All clusters have prompts of the same length. Questions and
answers without documents are as long as the answers, and judgments have 512 tokens (--verdict). Half of the usable
questions have right and wrong answers. There is no gate: the simulated engines would not know its answers from others.

CPU seconds are those of this process, all threads together, so a busy machine changes them less than the time. Threads
beside the event loop tokenise, and read answers that hold the routing of a prompt. The delay is how long the event loop
is busy between two looks at its sockets, in CPU seconds of its thread; its 99th percentile is weighted by time: all but
a hundredth of the busy time is in turns that are no longer. The last turn, which makes the batch and its metrics, is
not among them: no answer is waited for any more. After it, all that the rollout has left is looked through once for
garbage. Memory is the most that the process ever held, all of the corpus included. --quick: 12 groups, 4 engines, a
share of the CPU time accordingly. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from spell_megatron.config.reading import load_config
from spell_megatron.config.schema import Config
from spell_megatron.director.director import Director
from spell_megatron.director.messages import PackedRow, pack_rows, unpack_rows
from spell_megatron.monitoring.dumps import write_dump
from spell_megatron.rollout import client, wire
from spell_megatron.selfplay import roles, selfplay, tasks
from spell_megatron.selfplay.batch import Sample
from spell_megatron.selfplay.final_rows import FinalRows
from spell_megatron.selfplay.prompts import PromptSet
from spell_megatron.tokenizer import PolicyTokenizer

ROOT = Path(__file__).parents[1]
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
FIRST_ID = 100_000  # ids with as many digits as most of a vocabulary of 150,000
DOCUMENTS, CLUSTERS_PER_GROUP, VARIANTS = 20, 2.75, 6
NO_CONTEXT = 2047  # limit of tokens that tells the engines which requests have no documents
GOALS = {"cpu_seconds": 60.0, "delay_p99_ms": 100.0, "memory_gb": 4.0}
GROUPS = 128


def save_tokenizer(folder: Path, text: str) -> None:
    """A byte-pair tokenizer as Qwen's, trained on a text."""
    learnt = Tokenizer(models.BPE())
    pre = [pre_tokenizers.Split(Regex(WORDS), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    learnt.pre_tokenizer = pre_tokenizers.Sequence(pre)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learnt.train_from_iterator([text], trainers.BpeTrainer(vocab_size=12_000, initial_alphabet=alphabet))
    model = json.loads(learnt.to_str())["model"]
    vocabulary = {token: number + FIRST_ID for token, number in model["vocab"].items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(pair) for pair in model["merges"]]))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFC(), learnt.pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=TEMPLATE)
    fast.save_pretrained(folder)


class Texts:
    """Texts of a wanted length, made of the sentences of the example documents."""

    def __init__(self, tokenizer: PolicyTokenizer, text: str) -> None:
        self.rng = random.Random(0)
        sentences = sorted({" ".join(s.split()) for s in text.replace("\n", " ").split(". ") if len(s) > 20})
        self._sentences = [sentence + "." for sentence in sentences if sentence[:1].isalpha()]
        self._tokens = tokenizer.counts([" " + sentence for sentence in self._sentences])

    def __call__(self, tokens: int) -> str:
        """Paragraphs of at most so many tokens, and nearly as many."""
        lines, line = [], []
        while tokens > 0:
            number = self.rng.randrange(len(self._sentences))
            line.append(self._sentences[number])
            tokens -= self._tokens[number] + 1
            if len(line) > 4:
                lines, line = [*lines, " ".join(line)], []
        return "\n\n".join([*lines, " ".join(line[:-1])])


def choice_json(tokenizer: PolicyTokenizer, text: str, tokens: int, ending: str) -> tuple[bytes, int]:
    """A completion of so many tokens, all but its index and routing, as vLLM writes it; and the number of tokens."""
    last = [*tokenizer.encode(ending), *tokenizer.eos_ids]
    ids = [*tokenizer.encode(text)[: tokens - len(last)], *last]
    rng = np.random.default_rng(len(ids))
    logprobs = (-rng.exponential(0.5, len(ids)).astype(np.float32)).tolist()
    entries = [{"token_id": t, "logprob": p, "rank": 1} for t, p in zip(ids, logprobs, strict=True)]
    whole = {
        "finish_reason": "stop",
        "stop_reason": None,
        "token_ids": ids,
        "sampling_mask": None,
        "weight_versions": [{"start": 0, "end": len(ids), "version": "0"}],
        "logprobs": {"content": [entry | {"top_logprobs": [entry]} for entry in entries]},
    }
    return json.dumps(whole, separators=(",", ":"))[1:].encode(), len(ids)


def write_script(folder: Path, config: Config, texts: Texts, tokenizer: PolicyTokenizer, options: Any) -> Path:
    """What the simulated engines need."""
    question = '</think>\n```json\n{"question": "Which harbour was %d?", "answer": "Port Adria"}\n```'
    right, wrong = "</think>\nThe correct answer is Port Adria", "</think>\nThe correct answer is Lindow"
    kinds = {
        "question": (options.answer, question),
        "no question": (options.answer, "</think>\nI have none."),
        "right": (options.answer, right),
        "wrong": (options.answer, wrong),
        "verdict": (options.verdict, "</think>\nDecision: [[NO]]"),
    }
    files: dict[str, list[tuple[str, int]]] = {}
    for kind, (tokens, ending) in kinds.items():
        files[kind] = []
        for number in range(VARIANTS):
            text = ending % number if "%d" in ending else ending
            content, made = choice_json(tokenizer, texts(tokens + 50), tokens, text)
            (folder / f"{kind}{number}").write_bytes(content)
            files[kind].append((f"{kind}{number}", made))
    files["answer"] = files["right"] + files["wrong"]
    prompt = PromptSet.load("full").questioner("doc_general_qa", ["x"], (), None)
    script = {
        "engines": options.engines,
        "seconds": options.seconds,
        "routing": options.routing,
        "no_context_tokens": NO_CONTEXT,
        "question_end": list(tokenizer.prompt_ids(prompt)[-30:]),
        "texts": files,
    }
    path = folder / "script.json"
    path.write_text(json.dumps(script))
    return path


def write_documents(path: Path, clusters: int, tokens: int, texts: Texts) -> None:
    with path.open("w") as file:
        for number in range(clusters):
            documents = [texts(tokens // DOCUMENTS) for _ in range(DOCUMENTS)]
            file.write(json.dumps({"cluster_id": str(number), "documents": documents}) + "\n")


class Stopwatch:
    """CPU seconds of the event loop's thread inside some functions, by part."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def watch(self, part: str, owner: Any, *names: str) -> None:
        for name in names:
            function = getattr(owner, name)

            def timed(*args: Any, function: Callable = function, **kwargs: Any) -> Any:
                began = time.thread_time()
                try:
                    return function(*args, **kwargs)
                finally:
                    if threading.current_thread() is threading.main_thread():
                        self.seconds[part] += time.thread_time() - began

            setattr(owner, name, timed)

    def parts(self) -> None:
        self.watch("texts of replies", PolicyTokenizer, "decode")
        self.watch("JSON of prompts", wire, "ids_json")
        self.watch("reading answers", client, "read_answer")
        self.watch("parsing replies", tasks, "parse_question", "parse_answer")
        self.watch("parsing replies", roles, "parse_verdict")
        self.watch("texts of prompts", PromptSet, "questioner", "responder", "verifier")
        self.watch("looking for rows that are certain", FinalRows, "look")
        self.watch("batch and metrics", selfplay, "step_metrics")
        self.watch("batch and metrics", selfplay.SelfPlay, "_compose")


def watch_collections() -> list[float]:
    """CPU seconds of each collection of garbage from now on."""
    seconds, began = [], [0.0]

    def note(phase: str, details: Any) -> None:
        if phase == "start":
            began[0] = time.thread_time()
        else:
            seconds.append(time.thread_time() - began[0])

    gc.callbacks.append(note)
    return seconds


def watch_loop(loop: asyncio.AbstractEventLoop) -> tuple[list[float], list[float]]:
    """How long the loop's turns take from now on, in CPU and in wall seconds."""
    selector, cpu, wall = loop._selector, [], []  # type: ignore[attr-defined]
    select, began = selector.select, [time.thread_time(), time.perf_counter()]

    def timed(timeout: float | None) -> Any:
        cpu.append(time.thread_time() - began[0])
        wall.append(time.perf_counter() - began[1])
        events = select(timeout)
        began[:] = time.thread_time(), time.perf_counter()
        return events

    selector.select = timed
    return cpu, wall


def call_in_last_turn(note: Callable[[], int]) -> list[int]:
    """A list that holds, once a rollout has ended, what a function returned in its last turn."""
    compose, noted = selfplay.SelfPlay._compose, []

    def noting(*args: Any) -> Any:
        noted.append(note())
        return compose(*args)

    selfplay.SelfPlay._compose = noting  # type: ignore[method-assign]
    return noted


def p99(turns: Sequence[float]) -> float:
    """The length of a turn that all but a hundredth of the time is in turns no longer than."""
    lengths = np.sort(np.array(turns))
    return float(lengths[np.searchsorted(np.cumsum(lengths), 0.99 * lengths.sum())])


def memory_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def measured(config: Config, urls: Sequence[str], folder: Path) -> dict[str, Any]:
    """The figures of a step."""
    watch, director = Stopwatch(), Director(config)
    weights = config.training.role_weights
    sent: list[tuple[list[PackedRow], list[np.ndarray]]] = []

    def send(samples: list[Sample]) -> None:
        sent.append(pack_rows(samples, weights))
        for sample in samples:
            sample.routing = None

    director.connect(urls, "key")
    with closing(director):
        watch.parts()
        at_start = memory_gb()
        cpu, wall = watch_loop(director._runner.get_loop())
        last = call_in_last_turn(lambda: len(cpu))
        collections = watch_collections()
        began, loop_began, wall_began = time.process_time(), time.thread_time(), time.perf_counter()
        rollout = director.roll_out(0, "0", urls, lambda mixed, admitted: None, send)
        loop_seconds, wall_seconds = time.thread_time() - loop_began, time.perf_counter() - wall_began
        rollout_seconds = time.process_time() - began
        memory = memory_gb()
    assert rollout is not None
    began = time.process_time()
    write_dump(rollout.samples, folder, 0, "jsonl")
    parts = dict(watch.seconds)
    parts["HTTP, event loop, the rest"] = loop_seconds - sum(parts.values())
    parts["beside the loop"] = rollout_seconds - loop_seconds
    parts["dump"] = time.process_time() - began
    began = time.process_time()
    rows = [row for packed in [*sent, pack_rows(rollout.late, weights)] for row in unpack_rows(*packed)]
    parts["rows of the update"] = time.process_time() - began
    metrics = rollout.metrics
    return {
        "cpu_seconds": rollout_seconds + parts["dump"] + parts["rows of the update"],
        "delay_p99_ms": 1e3 * p99(cpu[: last[0]]),
        "memory_gb": memory,
        "loop_cpu_seconds": loop_seconds,
        "delay_max_ms": 1e3 * max(cpu[: last[0]]),
        "delay_p99_wall_ms": 1e3 * p99(wall[: last[0]]),
        "delay_max_wall_ms": 1e3 * max(wall[: last[0]]),
        "last_turn_ms": 1e3 * cpu[last[0]],
        "memory_with_rows_gb": memory_gb(),
        "memory_before_gb": at_start,
        "collections": len(collections),
        "collections_cpu_seconds": sum(collections),
        "collection_max_ms": 1e3 * max(collections, default=0.0),
        "wall_seconds": wall_seconds,
        "clusters": int(metrics["selfplay/clusters"] + metrics["selfplay/surplus_clusters"]),
        "mixed_groups": int(metrics["selfplay/mixed_groups"]),
        "generated_tokens": int(metrics["selfplay/generated_tokens"]),
        "prompt_tokens": round(metrics["selfplay/responder/prompt_tokens"]),
        "rows": len(rows),
        "rows_early": len(rows) - len(rollout.late),
        "parts": parts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="12 groups, 4 engines (under two minutes)")
    parser.add_argument("--groups", type=int, default=GROUPS)
    parser.add_argument("--prompt", type=int, default=100_000, metavar="TOKENS")
    parser.add_argument("--answer", type=int, default=4_000, metavar="TOKENS")
    parser.add_argument("--verdict", type=int, default=512, metavar="TOKENS")
    parser.add_argument("--engines", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20.0, help="slowest answer")
    parser.add_argument("--routing", default="0,0", metavar="LAYERS,EXPERTS", help="of each token, in the answers")
    parser.add_argument("settings", nargs="*", metavar="SETTING=VALUE")
    options = parser.parse_args()
    options.routing = [int(number) for number in options.routing.split(",")]
    if options.quick:
        options.groups, options.engines, options.seconds = 12, 4, 5.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = "\n".join(path.read_text() for path in sorted(ROOT.glob("examples/documents/*/*")) if path.is_file())
        save_tokenizer(folder, text)
        tokenizer = PolicyTokenizer(folder)
        texts = Texts(tokenizer, text)
        clusters = int(CLUSTERS_PER_GROUP * options.groups)
        write_documents(folder / "documents.jsonl", clusters, options.prompt, texts)
        settings = {
            "model": {"path": str(folder)},
            "data": {"documents": str(folder / "documents.jsonl")},
            "run": {"device": "cpu"},
            "selfplay": {
                "tasks": {"doc_general_qa": 1.0},
                "groups": options.groups,
                "group_size": 8,
                "clusters_per_round": clusters,
                "gate": {"enabled": False},
            },
            "rollout": {
                "urls": ["http://127.0.0.1:1"],
                "sampling": {
                    "max_prompt_tokens": options.prompt + 5_000,
                    "max_response_tokens": options.answer,
                    "max_no_context_tokens": NO_CONTEXT,
                    "max_verdict_tokens": NO_CONTEXT + 1,
                },
            },
        }
        (folder / "settings.yaml").write_text(json.dumps(settings))  # JSON is YAML
        config = load_config(folder / "settings.yaml", options.settings)
        script = write_script(folder, config, texts, tokenizer, options)
        command = [sys.executable, "-S", str(Path(__file__).with_name("simulated_engines.py")), str(script)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as engines:
            assert engines.stdin and engines.stdout
            try:
                urls = [f"http://127.0.0.1:{next(engines.stdout).strip()}" for _ in range(options.engines)]
                figures = measured(config, urls, folder)
            finally:
                engines.stdin.close()
    report(figures, options)


def report(figures: dict[str, Any], options: Any) -> None:
    share = options.groups / GROUPS
    goals = GOALS | {"cpu_seconds": GOALS["cpu_seconds"] * min(1.0, share)}
    print(
        f"{options.groups} groups, prompts of {figures['prompt_tokens']:,} tokens, answers of {options.answer:,}, "
        f"{options.engines} engines, routing {options.routing}, settings {options.settings}; {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f}"
    )
    print(
        f"  {figures['clusters']} clusters, {figures['mixed_groups']} mixed groups, {figures['rows']} rows "
        f"({figures['rows_early']} early), "
        f"{figures['generated_tokens']:,} generated tokens used, {figures['wall_seconds']:.0f} s"
    )
    for part, seconds in sorted(figures["parts"].items(), key=lambda item: -item[1]):
        print(f"  {part:32s} {seconds:7.2f} s of CPU")
    print(f"  {'in all':32s} {figures['cpu_seconds']:7.2f} s of CPU (goal {goals['cpu_seconds']:.1f})")
    print(
        f"  delay: p99 {figures['delay_p99_ms']:.0f} ms, max {figures['delay_max_ms']:.0f} ms; with waiting for a core "
        f"{figures['delay_p99_wall_ms']:.0f} and {figures['delay_max_wall_ms']:.0f} ms; the last turn "
        f"{figures['last_turn_ms']:.0f} ms"
    )
    print(
        f"  garbage: {figures['collections']} collections, {figures['collections_cpu_seconds']:.2f} s of CPU, "
        f"the longest {figures['collection_max_ms']:.0f} ms"
    )
    print(
        f"  memory: {figures['memory_gb']:.2f} GB ({figures['memory_before_gb']:.2f} GB before the step, "
        f"{figures['memory_with_rows_gb']:.2f} GB with the update's rows)"
    )
    rounded = {name: round(value, 3) if isinstance(value, float) else value for name, value in figures.items()}
    rounded["parts"] = {part: round(seconds, 3) for part, seconds in figures["parts"].items()}
    holds = all(figures[name] <= goal for name, goal in goals.items())
    print(json.dumps({"benchmark": "director", "figures": rounded, "goal": goals, "holds": holds}))


if __name__ == "__main__":
    main()
