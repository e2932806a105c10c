"""Seconds, memory and quality of `spell prepare` on 100,000 documents with known repetitions.

    python benchmarks/prepare.py [--documents 100000] [--quick] [--sample 5000]

Makes documents of 100 to 900 words (Zipf's law, about 50 for each topic, sentences and paragraphs) as a .jsonl file,
and an evaluation set:

* 5 % of the documents repeat an earlier one exactly.
* 10 % repeat an earlier one nearly: 0.5 to 8 % of the words are changed, inserted or dropped. The Jaccard similarity of
  the five-word sequences is computed exactly for each. A similarity of 0.8 or more makes a near-duplicate.
* 1 % contain 20 to 40 words in sequence from a context of the evaluation set.

`spell prepare` runs as its own process with default options and --decontaminate. Its seconds include starting Python.
In the same run, on the same machine and texts:

* scikit-learn's HashingVectorizer over all texts, in one process. It only counts words: nothing that looks at every
  word of a text in one process can be faster.
* datasketch's MinHash and MinHashLSH (128 permutations, 0.8) on a sample, compared with our signatures and
  near-duplicates on the same sample (needs the extra `bench`).

Recall and precision are over near-duplicates: a removal is right if the document has a Jaccard similarity of 0.8 or
more with an earlier document. Purity is the share of documents whose topic is their cluster's most frequent topic. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from sklearn.feature_extraction.text import HashingVectorizer

from spell_megatron.corpus import duplicates
from spell_megatron.corpus.texts import words
from spell_megatron.corpus.word_sequences import sequences, word_hashes
from spell_megatron.selfplay.documents import load_clusters

DOCUMENTS_OF_A_TOPIC = 50
VOCABULARY = 60_000
THRESHOLD = 0.8
LIMIT_SECONDS, LIMIT_GB = 600, 4.0


class Writer:
    """Makes texts of topics: two words in five are the topic's, the others are common to all."""

    def __init__(self, topics: int, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        spell = random.Random(seed)
        spelled = {"".join(spell.choices("etaoinshrdlucmfwyp", k=spell.randint(2, 9))) for _ in range(2 * VOCABULARY)}
        self.words = np.array(sorted(spelled)[:: max(1, len(spelled) // VOCABULARY)])
        self.rng.shuffle(self.words)
        rank = np.arange(1, len(self.words) + 1)
        self.common = np.cumsum(1 / rank) / (1 / rank).sum()
        self.topics = self.rng.integers(0, len(self.words), (topics, 120))

    def text(self, topic: int, length: int) -> list[str]:
        """Words of a text."""
        ids = np.searchsorted(self.common, self.rng.random(length))
        own = self.rng.random(length) < 0.4
        ids[own] = self.topics[topic, (self.rng.random(own.sum()) ** 2 * 120).astype(int)]
        return self.words[ids].tolist()


def spell_out(text: list[str]) -> str:
    """Sentences of 14 words, paragraphs of six sentences."""
    sentences = [" ".join(text[i : i + 14]).capitalize() + "." for i in range(0, len(text), 14)]
    return "\n\n".join(" ".join(sentences[i : i + 6]) for i in range(0, len(sentences), 6))


def jaccard(a: list[str], b: list[str]) -> float:
    """Exact similarity of the sets of five-word sequences."""
    sets = [{tuple(text[i : i + 5]) for i in range(len(text) - 4)} for text in (a, b)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def edited(text: list[str], share: float, writer: Writer, rng: random.Random) -> list[str]:
    result = []
    for word in text:
        kind = rng.choice("cid") if rng.random() < share else ""
        if kind == "i":
            result.append(word)
        if kind != "d":
            result.append(str(writer.words[rng.randrange(len(writer.words))]) if kind else word)
    return result


def make_corpus(folder: Path, n: int, seed: int) -> list[dict[str, Any]]:
    """Write corpus.jsonl and evaluation.jsonl; returns what is true of each document."""
    topics = max(20, n // DOCUMENTS_OF_A_TOPIC)
    writer, rng = Writer(topics, seed), random.Random(seed)
    contexts = [writer.text(number % topics, 600) for number in range(200)]
    with (folder / "evaluation.jsonl").open("w") as file:
        for number, context in enumerate(contexts):
            file.write(json.dumps({"question": f"What of {number}?", "context": spell_out(context)}) + "\n")
    truth: list[dict[str, Any]] = []
    originals: list[tuple[int, list[str]]] = []
    with (folder / "corpus.jsonl").open("w") as file:
        for number in range(n):
            kind = rng.choices(["new", "exact", "near", "contaminated"], [84, 5, 10, 1])[0] if originals else "new"
            fact: dict[str, Any] = {"kind": kind, "topic": rng.randrange(topics)}
            if kind in ("exact", "near"):
                source, text = originals[rng.randrange(len(originals))]
                fact |= {"of": source, "topic": truth[source]["topic"], "similarity": 1.0}
                if kind == "near":
                    changed = edited(text, rng.uniform(0.005, 0.08), writer, rng)
                    fact["similarity"] = jaccard(text, changed)
                    text = changed
            else:
                text = writer.text(fact["topic"], rng.randint(100, 900))
                if kind == "contaminated":
                    length, context = rng.randint(20, 40), rng.choice(contexts)
                    place, start = rng.randrange(len(text)), rng.randrange(len(context) - 40)
                    text = text[:place] + context[start : start + length] + text[place:]
                elif len(originals) < 30_000:
                    originals.append((number, text))
            truth.append(fact)
            file.write(json.dumps({"text": spell_out(text)}) + "\n")
    return truth


def read_texts(folder: Path) -> Iterator[str]:
    with (folder / "corpus.jsonl").open() as file:
        for line in file:
            yield json.loads(line)["text"]


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def prepare(folder: Path) -> tuple[float, float, float]:
    """(seconds, seconds of CPU, peak GB) of the command with its worker processes."""
    command = [sys.executable, "-m", "spell_megatron", "prepare", folder / "corpus.jsonl"]
    command += ["--decontaminate", folder / "evaluation.jsonl", "--out", folder / "out.parquet"]
    start, peak = time.perf_counter(), 0.0
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        peak = max(peak, tree_memory(process.pid))
        time.sleep(0.5)
    seconds = time.perf_counter() - start
    print(process.stdout.read())
    if process.returncode:
        raise SystemExit(process.returncode)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, usage.ru_utime + usage.ru_stime, peak


def tree_memory(pid: int) -> float:
    """Resident GB of a process and its descendants, shared pages divided among them (PSS)."""
    total = 0
    try:
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            total += process.memory_full_info().pss
    except psutil.NoSuchProcess:
        pass
    return total / 1e9


def datasketch_duplicates(texts: list[list[str]]) -> set[int]:
    """Documents that are like an earlier one that was kept, as datasketch's documentation does it."""
    from datasketch import MinHash, MinHashLSH

    index, found = MinHashLSH(THRESHOLD, num_perm=duplicates.PERMUTATIONS), set()
    for number, text in enumerate(texts):
        sketch = MinHash(duplicates.PERMUTATIONS)
        sketch.update_batch([" ".join(text[i : i + 5]).encode() for i in range(len(text) - 4)])
        if index.query(sketch):
            found.add(number)
        else:
            index.insert(str(number), sketch)
    return found


def our_duplicates(texts: list[list[str]]) -> set[int]:
    signatures = np.stack([duplicates.signature(word_hashes(text)) for text in texts])
    original = duplicates.near_duplicates(
        signatures, THRESHOLD, lambda number: sequences(word_hashes(texts[number]), 5)
    )
    return set(np.flatnonzero(original != np.arange(len(original))).tolist())


def score(found: set[int], truth: list[dict[str, Any]]) -> dict[str, float]:
    """Recall by similarity, and precision, of near-duplicates; exact repetitions and contaminated ones aside."""
    near = {n: fact["similarity"] for n, fact in enumerate(truth) if fact["kind"] == "near"}
    figures: dict[str, float] = {}
    for low, high in ((0.8, 1.01), (0.8, 0.85), (0.85, 0.9), (0.9, 1.01)):
        wanted = {n for n, similarity in near.items() if low <= similarity < high}
        name = "recall" if (low, high) == (0.8, 1.01) else f"recall {low:g}-{min(high, 1):g}"
        figures[name] = len(found & wanted) / max(1, len(wanted))
    removed = {n for n in found if truth[n]["kind"] not in ("exact", "contaminated")}
    right = {n for n in removed if near.get(n, 0) >= THRESHOLD}
    figures["precision"] = len(right) / max(1, len(removed))
    figures["precision, 0.75 allowed"] = sum(near.get(n, 0) >= 0.75 for n in removed) / max(1, len(removed))
    return {name: round(value, 4) for name, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--sample", type=int, default=5000, help="documents that datasketch is given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="10,000 documents, a sample of 2,000")
    options = parser.parse_args()
    n, sample = (10_000, 2000) if options.quick else (options.documents, options.sample)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        seconds, truth = timed(lambda: make_corpus(folder, n, options.seed))
        size = (folder / "corpus.jsonl").stat().st_size / 1e6
        kinds = Counter(fact["kind"] for fact in truth)
        print(f"{n:,} documents, {size:.0f} MB, made in {seconds:.0f} s: {dict(kinds)}; load before: {load:.1f}")

        seconds, cpu, peak = prepare(folder)
        kept, pure = set(), 0
        for cluster in load_clusters(folder / "out.parquet"):
            numbers = [int(name.partition("#")[0].rpartition(":")[2]) - 1 for name in cluster.document_ids]
            kept.update(numbers)
            pure += Counter(truth[number]["topic"] for number in numbers).most_common(1)[0][1]
        statistics = json.loads((folder / "out.statistics.json").read_bytes())
        left_out = set(range(n)) - kept
        figures: dict[str, Any] = {
            "seconds": round(seconds, 1),
            "CPU seconds": round(cpu, 1),
            "documents/s": round(n / seconds),
            "peak GB": round(peak, 2),
            "exact repetitions left out": sum(truth[i]["kind"] == "exact" for i in left_out) / max(1, kinds["exact"]),
            "contaminated left out": sum(truth[i]["kind"] == "contaminated" for i in left_out)
            / max(1, kinds["contaminated"]),
            "near-duplicates": score(left_out, truth),
            "purity of clusters": round(pure / statistics["documents"], 4),
            "documents per cluster": round(statistics["per_cluster"]["documents"]["mean"], 2),
        }

        start = time.process_time()
        limit, _ = timed(lambda: HashingVectorizer().transform(read_texts(folder)))
        limit_cpu = time.process_time() - start
        figures["HashingVectorizer alone"] = {"seconds": round(limit, 1), "CPU seconds": round(limit_cpu, 1)}
        figures["times its seconds"] = round(seconds / limit, 2)
        figures["times its CPU seconds"] = round(cpu / limit_cpu, 2)

        few = [words(text) for text, _ in zip(read_texts(folder), range(sample))]
        ours, found = timed(lambda: our_duplicates(few))
        figures["near-duplicates of a sample"] = {"documents": sample, "seconds": round(ours, 2)}
        figures["near-duplicates of a sample"] |= score(found, truth[:sample])
        try:
            version = importlib.metadata.version("datasketch")
        except importlib.metadata.PackageNotFoundError:
            print("datasketch is not installed (extra `bench`): not compared")
        else:
            theirs, found = timed(lambda: datasketch_duplicates(few))
            scores = score(found, truth[:sample])
            figures[f"datasketch {version} on the sample"] = {"seconds": round(theirs, 2)} | scores
            figures["times faster than datasketch"] = round(theirs / ours, 2)

    for name, value in figures.items():
        print(f"  {name:36} {value}")
    own_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"load: {load:.1f} before, {os.getloadavg()[0]:.1f} after; peak of this script itself {own_peak:.2f} GB")
    goal = {"seconds": LIMIT_SECONDS, "peak GB": LIMIT_GB}
    holds = seconds <= LIMIT_SECONDS and peak <= LIMIT_GB
    print(json.dumps({"benchmark": "prepare", "documents": n, "figures": figures, "goal": goal, "holds": holds}))


if __name__ == "__main__":
    main()
