"""Every family of models takes two whole steps: real engine, real trainer, natural documents, all three tasks.

Random weights write no text that parses, so that there would be nothing to train on. The policies
here are random models that were taught the formats for some seconds: the end of a prompt tells role
and task, and they write a question, an answer or a verdict of the right form, each of a few values
at random. They never learn to read; their answers disagree by chance, which is what a step needs.
"""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from engine_fixtures import VOCABULARY, save_byte_tokenizer

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[1]
TASKS = ("docmath_qa", "doc_general_qa", "doc_mc")
ROLES = ("questioner", "responder", "verifier")
STEPS, GROUPS, GROUP_SIZE, VOTES = 2, 6, 4, 3

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
# name of transformers' classes, and what sets the family apart
FAMILIES = {
    "llama3": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "qwen2.5": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3-moe": ("Qwen3Moe", MOE | {"head_dim": 32}),
}

# ------------------------------------------------------------------------------ policies


def random_model(family: str):
    import torch
    import transformers

    name, options = FAMILIES[family]
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "max_position_embeddings": 2048,
        "initializer_range": 0.1,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": None,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes | options)
    return getattr(transformers, f"{name}ForCausalLM")(config).float()


def question(rng: random.Random, task: str) -> dict:
    """A question as the policy shall write it."""
    if task == "docmath_qa":
        return {"question": "sum", "answer": rng.choice([3, 5, 8])}
    if task == "doc_general_qa":
        return {"question": "name", "answer": rng.choice(["red", "sky", "tan"])}
    options = {"A": "ash", "B": "box", "C": "cup", "D": "dye"}
    return {"question": "pick", "options": options, "answer": rng.choice("ABC")}


def exchange(rng: random.Random, prompts, text: str) -> tuple[str, str]:
    """A prompt of a random role and task over random slices of `text`, and the output to be taught."""
    from spell_megatron.selfplay.history import Entry
    from spell_megatron.selfplay.parsing import Question, question_from_record

    role, task = rng.choice(ROLES), rng.choice(TASKS)
    starts = [rng.randrange(len(text) - 100) for _ in range(rng.randrange(1, 3))]
    documents = [text[start : start + rng.randrange(10, 60)] for start in starts]
    record = question(rng, task)
    asked = question_from_record(task, record, len, 40)
    assert isinstance(asked, Question)
    if role == "questioner":
        entries = [Entry((0,), asked.text, asked.reference)] * rng.randrange(2)
        output = json.dumps(question(rng, task), separators=(",", ":"))
        return prompts.questioner(task, documents, entries, rng.choice("ABCD")), output
    answer = str(question(rng, task)["answer"])
    if role == "responder":
        shown = None if rng.random() < 0.2 else documents
        return prompts.responder(task, asked.text, shown), f"answer is {answer}"
    return prompts.verifier(asked.text, answer, asked.reference), rng.choice(["[[YES]]", "[[NO]]", "[[NO]]"])


def teach_formats(model, folder: Path, text: str, steps: int = 150) -> None:
    """Train a model to answer prompts in their form; several exchanges a row, so that little is wasted."""
    import torch

    from spell_megatron.rollout.tokenizer import PolicyTokenizer
    from spell_megatron.selfplay.prompts import PromptSet

    prompts, tokenizer, rng = PromptSet.load("compact"), PolicyTokenizer(folder), random.Random(0)
    rows, length, eos = 4, 448, 257
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(steps):
        ids = torch.full((rows, length), eos)
        labels = torch.full((rows, length), -100)
        for row in range(rows):
            sequence, taught = [], []
            while len(sequence) < length:
                prompt, output = exchange(rng, prompts, text)
                prompt_ids = tokenizer.prompt_ids(prompt)
                output_ids = [*tokenizer._encode(output), eos]
                sequence += prompt_ids + output_ids
                taught += [-100] * len(prompt_ids) + output_ids
            ids[row] = torch.tensor(sequence[:length])
            labels[row] = torch.tensor(taught[:length])
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return loss.item()
