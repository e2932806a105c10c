"""Self-play with a scripted policy, whose answers depend only on prompt and seed.

It makes every timing and every kind of bad sample happen on demand; the same code runs against real engines in
tests/test_train.py.
"""

import asyncio
import json
import random

import numpy as np
from simulated_run import Bytes

from spell_megatron.config.schema import SamplingConfig
from spell_megatron.config.selfplay_sections import SelfPlayConfig
from spell_megatron.errors import UserError
from spell_megatron.rollout.client import Completion
from spell_megatron.selfplay.documents import Cluster
from spell_megatron.selfplay.history import History
from spell_megatron.selfplay.prompts import PromptSet
from spell_megatron.selfplay.sampler import ClusterSampler
from spell_megatron.selfplay.selfplay import SelfPlay

TASKS = ("docmath_qa", "doc_general_qa", "doc_mc")
KINDS = ("mixed", "mixed", "right", "wrong", "format", "zero", "known", "long")


class ScriptedPolicy:
    """Acts on the behaviour named in the cluster's documents; `jitter` reorders completions."""

    def __init__(self, jitter=0, version="1", fail=None):
        self.jitter, self.version, self.fail = random.Random(jitter) if jitter else None, version, fail
        self.requests, self.cancelled, self.running = [], 0, 0

    async def generate(self, prompt_ids, *, n, seed, max_tokens, affinity, prompt_routing=True):
        prompt = bytes(prompt_ids).decode()
        self.requests.append((affinity, prompt, seed, n))
        try:
            for _ in range(self.jitter.randrange(8) if self.jitter else 0):
                await asyncio.sleep(0)
            if affinity.endswith("slow"):
                await asyncio.sleep(0.05)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.fail and self.fail in prompt:
            raise UserError("engine 0 is gone")
        texts = [self.text(prompt, affinity, seed + i) for i in range(n)]
        start = len(prompt_ids) if prompt_routing else 0
        return [
            Completion(ids, [-0.5] * len(ids), reason, self.version, np.zeros((start + len(text) - 1, 2, 2)))
            for text, reason in texts
            for ids in [list(text.encode())]
        ]

    def text(self, prompt, affinity, seed):
        role, task = prompt.split("|")[:2]
        kind = affinity.split("-")[1]
        coin = random.Random(seed).random() < 0.5
        if role == "questioner":
            if kind == "format":
                return "no json here", "stop"
            if kind == "long":
                return "and on and on", "length"
            record = {"question": f"What about {affinity} {seed}?", "answer": "B" if task == "doc_mc" else "42"}
            if kind == "zero":
                record["answer"] = "0" if task == "docmath_qa" else "word " * 50
            if task == "doc_mc":
                record["options"] = {"A": "one", "B": "42", "C": "three", "D": "four"}
            return json.dumps(record), "stop"
        if role == "responder":
            right = {"mixed": coin, "right": True, "known": True}.get(kind, False)
            if "|Empty|" in prompt:
                right = kind == "known"
            value = "42" if right else "7"
            if task == "doc_mc":  # the letter whose option is the value
                wanted = "42" if right else "three"
                value = next((line[1] for line in prompt.splitlines() if line.startswith("(") and wanted in line), "C")
            return f"So the answer is {value}.", "stop"
        reference, prediction = prompt.split("|")[3:5]
        vote = reference == prediction if random.Random(seed).random() < 0.8 else reference != prediction
        return ("[[YES]]" if vote else "[[NO]]") if random.Random(seed + 7).random() < 0.95 else "hmm", "stop"


def make_prompts(folder):
    """Prompts that name the role and the task, so that the policy knows what it is asked."""
    texts = {"document": "{{document}}", "example": "{{number}} {{question}} {{answer}}"}
    for task in TASKS:
        letter = "|{{letter}}" if task == "doc_mc" else ""
        texts[f"questioner_{task}"] = f"questioner|{task}|{{{{documents}}}}{letter}"
        texts[f"questioner_{task}_history"] = f"questioner|{task}|{{{{documents}}}}|{{{{examples}}}}{letter}"
        texts[f"responder_{task}"] = f"responder|{task}|{{{{documents}}}}|{{{{question}}}}"
    texts["verifier"] = "verifier||{{question}}|{{reference}}|{{prediction}}"
    for name, text in texts.items():
        (folder / f"{name}.md").write_text(text)
    return PromptSet.load(str(folder))


def make_selfplay(prompts, n_clusters=120, groups=10, kinds=KINDS, documents=7, asked=None, **settings):
    clusters = [
        Cluster(
            f"{i}-{kinds[i % len(kinds)]}",
            tuple(f"Document {j} of cluster {i}." for j in range(documents)),
            tuple(f"{i}/{j}" for j in range(documents)),
            "fiction",
            **(asked(i) if asked else {}),
        )
        for i in range(n_clusters)
    ]
    sampling, untrained = settings.pop("sampling", SamplingConfig()), settings.pop("untrained", ())
    sizes = {"groups": groups, "group_size": 4, "clusters_per_round": 30}
    config = SelfPlayConfig(**sizes | {"gate": {"enabled": False}} | settings)
    sampler = ClusterSampler(clusters, config.tasks, {}, config.clusters_per_round, 3)
    history = History(config.questioner.history)
    return SelfPlay(config, sampling, prompts, Bytes(), sampler, history, 11, untrained)


def roll(selfplay, policy, step=1, version="1"):
    return asyncio.run(selfplay.roll_out(policy, step, version))


def summary(rollout):
    return [(s.uid, s.role, s.group, s.outcome, s.prompt, s.response, s.reward, s.advantage) for s in rollout.batch]


def zip_first(iterator, count):
    return [next(iterator) for _ in range(count)]


def rows_of(samples, role):
    return [sample for sample in samples if sample.role == role]


def asked(policy, role):
    """Requests for a role (prompts of the grounding check are not the responder's)."""
    wanted = {"grounding": "|Empty|", "questioner": "questioner|", "verifier": "verifier|"}[role]
    return [prompt for _, prompt, *_ in policy.requests if wanted in prompt]
