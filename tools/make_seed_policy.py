"""Make the quick start's policy: a sentencepiece tokenizer and a tiny language model.

    python tools/make_seed_policy.py [--out examples/quickstart/policy]

The policy is taught the formats of the three roles and basic reading of the fictional world, nothing more:
it stops at LESSONS updates although it still gets better, so that self-play has something to find out. One
thread, a fixed number of steps and fixed seeds: the same machine makes the same policy again. At the end it
prints how well each role does on the held-out questions and on clusters of its own.

How it learns to read in minutes: first copying of random words, then one document, then two, with larger
clusters in between so that no distance is new to it; the loss counts outputs only and mostly the answer; a
dozen prompts share their documents in one training row (a prefix tree of depth one).
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import string
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
from fictional_world import (
    GENERAL,
    MATH,
    RELATIONS,
    VALUES,
    Entity,
    Fact,
    draw_question,
    make_cluster,
    question_for,
    questions,
    relation_baseline,
    statement,
    wrong_answer,
)
from tokenizers import Regex, Tokenizer, decoders, models, normalizers
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from spell_megatron.selfplay.history import Entry
from spell_megatron.selfplay.parsing import Question, parse_answer, parse_question, parse_verdict
from spell_megatron.selfplay.prompts import PromptSet
from spell_megatron.selfplay.scoring import rule_score
from spell_megatron.tokenizer import PolicyTokenizer

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart"
UNKNOWN, BOS, EOS, PAD = range(4)
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
MARKERS = (
    "<doc>",
    "<example>",
    "<write>",
    "<ask>",
    "<answer>",
    "<number>",
    "<letter>",
    "<judge>",
    "<reference>",
    "<prediction>",
    "[[YES]]",
    "[[NO]]",
    '{"question": "',
)
JOINTS = ('", "answer": "', '"}')
WORDS = "Empty word number choice another The Therefore, the correct answer is 1 2 3"
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
TASKS = (GENERAL, MATH)
LESSONS = 1000
"""Updates after copying and single documents have been learned."""
LARGE_SHARE, LARGEST = 0.25, 9
"""How many of those are on clusters of three documents or more, and of how many at most."""


# Texts: what the roles read and write.


def answer_text(task: str, answer: str) -> str:
    """What the responder writes."""
    return f"Therefore, the answer is {answer}." if task == MATH else f"The correct answer is {answer}."


def question_text(fact: Fact) -> str:
    """What the questioner writes. Blanks inside the quotes keep names the same pieces as in the documents."""
    return json.dumps({"question": f" {fact.text}", "answer": f" {fact.answer}"})


def verdict_text(right: bool) -> str:
    """What the verifier writes."""
    return "[[YES]]" if right else "[[NO]]"


def history_entry(fact: Fact) -> Entry:
    """An earlier question as the prompt lists it."""
    return Entry(documents=(), question=fact.text, answer=fact.answer)


# Tokenizer.


def make_tokenizer(folder: Path) -> None:
    """Write tokenizer.model (sentencepiece, unigram) and the same tokenizer as tokenizer.json into `folder`.

    Every word of the world is one piece; other ASCII text falls back to letters. White space of any kind,
    line ends included, is one blank.
    """
    relations = [relation for kind in RELATIONS.values() for relation in kind]
    text = " ".join(
        [statement("", "", ""), question_for("", ""), WORDS, *relations, *(v for pool in VALUES.values() for v in pool)]
    )
    words = sorted(set(re.findall(r"\w+,?", text)))
    blank = "▁"
    pieces = [blank + text.replace(" ", blank) for text in (*MARKERS, *words)]
    pieces += [text.replace(" ", blank) for text in JOINTS]
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([string.printable.strip()] * 10),
        model_writer=stream,
        model_type="unigram",
        vocab_size=len(pieces) + 200,
        hard_vocab_limit=False,
        user_defined_symbols=pieces,
        required_chars=string.ascii_letters + string.digits + string.punctuation,
        unk_id=UNKNOWN,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=PAD,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(stream.getvalue())
    source = sentencepiece.SentencePieceProcessor(model_proto=stream.getvalue())
    vocabulary = [(source.id_to_piece(i), source.get_score(i)) for i in range(len(source))]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=UNKNOWN, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
            normalizers.Prepend(blank),
            normalizers.Replace(" ", blank),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace(blank, " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=SPECIAL[UNKNOWN],
        bos_token=SPECIAL[BOS],
        eos_token=SPECIAL[EOS],
        pad_token=SPECIAL[PAD],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


class Codec:
    """Prompts and outputs as the token ids that a run of `spell train` produces."""

    def __init__(self, folder: Path) -> None:
        self.policy = PolicyTokenizer(folder)
        self.size = self.policy.vocab_size
        self.decode = self.policy.decode
        self.count = self.policy.count
        self._encode = AutoTokenizer.from_pretrained(folder).encode

    def prompt(self, text: str) -> list[int]:
        """Token ids of a prompt."""
        return list(self.policy.prompt_ids(text))

    def output(self, text: str) -> list[int]:
        """Token ids of a response, end of sequence included."""
        return self._encode(text, add_special_tokens=False) + [EOS]


# Lessons.


@dataclass(frozen=True)
class Example:
    """A prompt with the output to learn and the loss weight of each output token."""

    role: str
    prompt: list[int]
    output: list[int]
    weights: list[float]
    key: int
    """Index in `output` of the token that decides: the answer or the verdict."""


class Teacher:
    """Draws clusters and examples. The generator's facts are right, and so is every lesson."""

    def __init__(self, codec: Codec, prompts: PromptSet, seed: str) -> None:
        self.codec = codec
        self.prompts = prompts
        self.rng = random.Random(seed)

    def cluster(self, size: int) -> tuple[list[Entity], list[Fact]]:
        """A cluster that has questions of both tasks."""
        while True:
            entities = make_cluster(self.rng, size)
            facts = questions(entities)
            if {fact.task for fact in facts} == set(TASKS):
                return entities, facts

    def example(self, role: str, prompt: str, output: str, key: str, boilerplate: float) -> Example:
        ids = self.codec.output(output)
        (key_id,) = self.codec.output(key)[:-1]
        index = len(ids) - 1 - ids[::-1].index(key_id)
        weights = [boilerplate] * len(ids)
        weights[index] = 4.0
        return Example(role, self.codec.prompt(prompt), ids, weights, index)

    def responder(self, entities: Sequence[Entity], facts: Sequence[Fact]) -> Example:
        fact = draw_question(self.rng, facts, self.rng.choice(TASKS))
        prompt = self.prompts.responder(fact.task, fact.text, [entity.text for entity in entities])
        return self.example("responder", prompt, answer_text(fact.task, fact.answer), fact.answer, 0.1)

    def questioner(self, entities: Sequence[Entity], facts: Sequence[Fact]) -> Example:
        """Half of the prompts list earlier questions of the same task; the new one differs from them."""
        task = self.rng.choice(TASKS)
        own = [fact for fact in facts if fact.task == task]
        fact = draw_question(self.rng, own, task)
        others = [other for other in own if other is not fact]
        shown = self.rng.sample(others, min(len(others), self.rng.choice((0, 0, 0, 1, 2, 3))))
        prompt = self.prompts.questioner(
            task, [entity.text for entity in entities], [history_entry(other) for other in shown], None
        )
        return self.example("questioner", prompt, question_text(fact), fact.answer, 1.0)

    def verifier(self, facts: Sequence[Fact]) -> Example:
        fact = draw_question(self.rng, facts, self.rng.choice(TASKS))
        right = self.rng.random() < 0.5
        prediction = fact.answer if right else wrong_answer(self.rng, facts, fact)
        prompt = self.prompts.verifier(fact.text, prediction, fact.answer)
        return self.example("verifier", prompt, verdict_text(right), verdict_text(right), 0.1)

    def cloze(self, entities: Sequence[Entity], facts: Sequence[Fact]) -> Example:
        """A sentence of the documents again, to be completed."""
        entity = self.rng.choice(entities)
        key, value = self.rng.choice(list(entity.facts.items()))
        sentence = statement(key, entity.name, value)
        texts = [entity.text for entity in entities]
        documents, _, _ = self.prompts.responder(MATH, "", texts).partition("<ask>")
        before, _, after = sentence.rpartition(value)
        return self.example("cloze", documents + before, value + after, value, 0.1)

    def row(self, size: int) -> list[Example]:
        """Examples over one cluster: all roles over one or two documents, the responder over more."""
        entities, facts = self.cluster(size)
        examples = [self.responder(entities, facts) for _ in range(6)]
        if size <= 2:
            examples += [self.questioner(entities, facts) for _ in range(5)]
            examples += [self.cloze(entities, facts) for _ in range(4)]
            examples += [self.verifier(facts) for _ in range(3)]
        return examples


@dataclass(frozen=True)
class Batch:
    """Packed rows; all tensors are [rows, length] except the mask, [rows, 1, length, length]."""

    tokens: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    keys: torch.Tensor
    """Index in ROLES of the role whose deciding token the target is; 0 for other targets."""


ROLES = ("", "responder", "questioner", "verifier", "copy")


def shared_length(prompts: Iterable[Sequence[int]]) -> int:
    """Length of the longest common prefix."""
    length = 0
    for column in zip(*prompts, strict=False):
        if len(set(column)) > 1:
            break
        length += 1
    return length


def pack(rows: Sequence[Sequence[Example]]) -> Batch:
    """Lay each row out as the shared document prefix followed by its branches.

    A branch sees the prefix and itself; verifier prompts, which hold no documents, share only the first
    token.
    """
    packed = []
    for examples in rows:
        prefix = shared_length(e.prompt for e in examples if e.role != "verifier")
        tokens = list(next(e.prompt for e in examples if e.role != "verifier")[:prefix])
        positions = list(range(prefix))
        branch, sees = [0] * prefix, [prefix] * prefix
        targets, weights, keys = [PAD] * prefix, [0.0] * prefix, [0] * prefix
        for number, e in enumerate(examples, 1):
            shared = 1 if e.role == "verifier" else prefix
            rest = e.prompt[shared:] + e.output
            tokens += rest
            positions += range(shared, shared + len(rest))
            branch += [number] * len(rest)
            sees += [shared] * len(rest)
            silent = len(rest) - len(e.output) - 1
            targets += [PAD] * silent + e.output + [PAD]
            weights += [0.0] * silent + e.weights + [0.0]
            own = [0] * len(e.output)
            own[e.key] = ROLES.index(e.role) if e.role in ROLES else 0
            keys += [0] * silent + own + [0]
        packed.append((tokens, positions, branch, sees, targets, weights, keys))
    length = max(len(row[0]) for row in packed)

    def column(i: int, fill: float, dtype: torch.dtype = torch.long) -> torch.Tensor:
        return torch.tensor([row[i] + [fill] * (length - len(row[i])) for row in packed], dtype=dtype)

    branch, sees = column(2, -1), column(3, 0)
    order = torch.arange(length)
    same = branch[:, :, None] == branch[:, None, :]
    mask = (same | (order[None, None, :] < sees[:, :, None])) & (order[None, :] <= order[:, None])
    return Batch(
        column(0, PAD),
        column(1, 0),
        mask[:, None],
        column(4, PAD),
        column(5, 0.0, torch.float32),
        column(6, 0),
    )


def copy_batch(rng: random.Random, rows: int, words: Sequence[int]) -> Batch:
    """Random words twice; the second time is to be learned."""
    length = rng.randint(12, 40)
    spans = [rng.choices(words, k=length) for _ in range(rows)]
    tokens = torch.tensor([[BOS, *span, *span] for span in spans])
    targets = torch.cat([tokens[:, 1:], torch.full((rows, 1), PAD)], 1)
    weights = torch.zeros(tokens.shape)
    weights[:, length + 1 : -1] = 1.0
    size = tokens.shape[1]
    mask = torch.ones(size, size, dtype=torch.bool).tril().expand(rows, 1, size, size)
    return Batch(tokens, torch.arange(size).expand(rows, size), mask, targets, weights, (weights > 0) * 4)


# Training.


def make_model(vocabulary: int) -> Qwen3ForCausalLM:
    """A Qwen3 of 0.8 million parameters; its vocabulary is exactly the tokenizer's.

    A mixture of experts of the same active size (8 experts of 192, top 2) was tried and learned slower:
    copying after 1,255 updates instead of 852, single documents 54 % right 245 updates later instead of
    90 % after 116, at 1.3 times the seconds per update.
    """
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=384,
        max_position_embeddings=2048,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        attn_implementation="sdpa",
    )
    return Qwen3ForCausalLM(config)


def train(model: Qwen3ForCausalLM, teacher: Teacher, lessons: int) -> None:
    """Teach copying until 85 % are right, then single documents until 90 % are, then `lessons` updates of
    clusters."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    words = range(len(SPECIAL) + len(MARKERS), teacher.codec.size)
    accuracy = dict.fromkeys(ROLES[1:], 0.0)
    stage, left, step, tokens, start = "copying", lessons, 0, 0, time.process_time()
    while left:
        step += 1
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, step / 50)
        size = 1 if stage == "single documents" else 2
        if stage == "clusters":
            left -= 1
            if teacher.rng.random() < LARGE_SHARE:
                size = teacher.rng.randint(3, LARGEST)
        if stage == "copying":
            batch = copy_batch(teacher.rng, 40, words)
        else:
            batch = pack([teacher.row(size) for _ in range(max(4, int(14 / (size + 1) ** 0.5)))])
        hidden = model.model(
            input_ids=batch.tokens, position_ids=batch.positions, attention_mask=batch.mask, use_cache=False
        ).last_hidden_state
        used = batch.weights > 0
        logits, targets, weights = model.lm_head(hidden[used]), batch.targets[used], batch.weights[used]
        loss = (functional.cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        right, keys = (logits.argmax(-1) == targets).float(), batch.keys[used]
        for i, role in enumerate(ROLES):
            if i and size <= 2 and (keys == i).any():
                accuracy[role] += 0.05 * (right[keys == i].mean().item() - accuracy[role])
        tokens += int((batch.tokens != PAD).sum())
        learned = stage
        if stage == "copying" and accuracy["copy"] > 0.85:
            stage = "single documents"
        elif stage == "single documents" and accuracy["responder"] > 0.9:
            stage = "clusters"
        if stage != learned:
            print(f"step {step}: {learned} learned", flush=True)
        if step % 100 == 0 or not left:
            seconds = time.process_time() - start
            shares = " ".join(f"{role} {share:.2f}" for role, share in accuracy.items())
            print(
                f"step {step} {seconds:.0f} s of CPU {tokens / 1e6:.2f} M tokens "
                f"{tokens / seconds:.0f} tokens/s loss {loss.item():.3f} {shares}",
                flush=True,
            )


@torch.no_grad()
def sample(
    model: Qwen3ForCausalLM, prompts: Sequence[list[int]], limit: int, temperature: float, batch: int = 256
) -> list[list[int]]:
    """Responses of at most `limit` tokens, end of sequence left out; temperature 0 is greedy."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    responses: list[list[int]] = [[] for _ in prompts]
    for chosen in (order[i : i + batch] for i in range(0, len(order), batch)):
        longest = max(len(prompts[i]) for i in chosen)
        current = torch.tensor([[PAD] * (longest - len(prompts[i])) + prompts[i] for i in chosen])
        attention = (current != PAD).long()
        positions = (attention.cumsum(1) - 1).clamp(min=0)
        cache, running = None, set(chosen)
        for _ in range(limit):
            out = model(
                input_ids=current,
                attention_mask=attention,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache, logits = out.past_key_values, out.logits[:, -1]
            following = (
                torch.multinomial((logits / temperature).softmax(-1), 1)
                if temperature
                else logits.argmax(-1, keepdim=True)
            )
            for i, token in zip(chosen, following[:, 0].tolist(), strict=True):
                if token == EOS:
                    running.discard(i)
                if i in running:
                    responses[i].append(token)
            if not running:
                break
            current = following
            attention = torch.cat([attention, torch.ones_like(following)], 1)
            positions = positions[:, -1:] + 1
    return responses


def share(hits: Sequence[bool]) -> float:
    """Percentage of hits."""
    return round(100 * sum(hits) / max(len(hits), 1), 1)


def check_responder(
    model: Qwen3ForCausalLM,
    codec: Codec,
    prompts: PromptSet,
    rows: Sequence[dict],
    temperature: float,
    documents: bool = True,
) -> dict[str, float]:
    """Percentage right per task on held-out questions, by the rules that self-play uses."""
    ids = [
        codec.prompt(prompts.responder(row["task"], row["question"], row["documents"] if documents else None))
        for row in rows
    ]
    scores: dict[str, list[bool]] = {}
    for row, response in zip(rows, sample(model, ids, 16, temperature), strict=True):
        prediction = parse_answer(row["task"], codec.decode(response), len(response) == 16)
        scores.setdefault(row["task"], []).append(bool(rule_score(row["task"], prediction, row["answer"])))
    return {**{task: share(hits) for task, hits in scores.items()}, "all": share(sum(scores.values(), []))}


def check_questioner(
    model: Qwen3ForCausalLM,
    codec: Codec,
    prompts: PromptSet,
    clusters: Sequence[list[Entity]],
    temperature: float,
    shown: int = 2,
    history: bool = False,
) -> dict[str, float]:
    """Percentage of questions that parse, that the documents answer, and whose reference is that answer.

    Also the percentage of two-hop questions among the answerable ones, and, with a history of up to three
    questions in the prompt, the percentage that repeats one of them.
    """
    rng = random.Random(0)
    asked, ids = [], []
    for number, cluster in enumerate(clusters):
        task = TASKS[number % 2]
        facts = [fact for fact in questions(cluster[:shown]) if fact.task == task]
        earlier = rng.sample(facts, min(3, len(facts) - 1)) if history else []
        asked.append((task, {fact.text: fact for fact in questions(cluster)}, {fact.text for fact in earlier}))
        ids.append(
            codec.prompt(
                prompts.questioner(
                    task,
                    [entity.text for entity in cluster[:shown]],
                    [history_entry(fact) for fact in earlier],
                    None,
                )
            )
        )
    parsed, answerable, correct, repeated, two_hop = [], [], [], [], []
    for (task, facts, earlier), response in zip(asked, sample(model, ids, 64, temperature), strict=True):
        question = parse_question(task, codec.decode(response), len(response) == 64, codec.count, 40)
        parsed.append(isinstance(question, Question))
        text = question.text.strip() if isinstance(question, Question) else ""
        fact = facts.get(text)
        answerable.append(fact is not None)
        correct.append(fact is not None and bool(rule_score(task, fact.answer, question.reference)))
        repeated.append(text in earlier)
        if fact is not None:
            two_hop.append(len(fact.documents) == 2)
    return {
        "parsed": share(parsed),
        "answerable": share(answerable),
        "correct reference": share(correct),
        "two hops": share(two_hop),
        "repeated": share(repeated),
    }


def check_verifier(
    model: Qwen3ForCausalLM,
    codec: Codec,
    prompts: PromptSet,
    clusters: Sequence[list[Entity]],
    temperature: float,
) -> float:
    """Percentage of right verdicts; half of the answers are wrong."""
    rng = random.Random(0)
    ids, expected = [], []
    for number, cluster in enumerate(clusters):
        facts = questions(cluster)
        fact = draw_question(rng, facts, TASKS[number % 2]) or facts[0]
        expected.append(number % 4 < 2)
        prediction = fact.answer if expected[-1] else wrong_answer(rng, facts, fact)
        ids.append(codec.prompt(prompts.verifier(fact.text, prediction, fact.answer)))
    verdicts = [parse_verdict(codec.decode(r), len(r) == 4) for r in sample(model, ids, 4, temperature)]
    return share([verdict == right for verdict, right in zip(verdicts, expected, strict=True)])


def report(model: Qwen3ForCausalLM, codec: Codec, prompts: PromptSet, heldout: Path, clusters: int = 200) -> None:
    """Print how well each role does, greedily and at temperature 0.7."""
    torch.manual_seed(0)
    rows = [json.loads(line) for line in heldout.read_text(encoding="utf-8").splitlines()]
    rng = random.Random("check")
    unseen = [make_cluster(rng, 8) for _ in range(clusters)]
    for temperature in (0.0, 0.7):
        print(f"temperature {temperature}")
        print("  responder ", check_responder(model, codec, prompts, rows, temperature))
        print("  no context", check_responder(model, codec, prompts, rows, temperature, documents=False))
        print("  questioner", check_questioner(model, codec, prompts, unseen, temperature))
        print("  history   ", check_questioner(model, codec, prompts, unseen, temperature, history=True))
        print("  verifier  ", check_verifier(model, codec, prompts, unseen, temperature), flush=True)


def report_sizes(model: Qwen3ForCausalLM, codec: Codec, prompts: PromptSet, count: int = 300) -> None:
    """Print the percentage of new questions answered rightly, by the number of documents."""
    print("documents  knows the relation only  greedy  temperature 1  greedy, one document needed  two needed")
    for size in (1, 2, 3, 5, 8):
        rng = random.Random(size)
        asked: list[tuple[list[Entity], Fact]] = []
        while len(asked) < count:
            entities = make_cluster(rng, size)
            if fact := draw_question(rng, questions(entities), TASKS[len(asked) % 2]):
                asked.append((entities, fact))
        ids = [
            codec.prompt(prompts.responder(fact.task, fact.text, [entity.text for entity in entities]))
            for entities, fact in asked
        ]
        hits = {}
        for temperature in (0.0, 1.0):
            torch.manual_seed(0)
            hits[temperature] = [
                parse_answer(fact.task, codec.decode(response), False) == fact.answer
                for (_, fact), response in zip(asked, sample(model, ids, 16, temperature), strict=True)
            ]
        needed = [
            share([hit for hit, (_, fact) in zip(hits[0.0], asked, strict=True) if len(fact.documents) == n])
            for n in (1, 2)
        ]
        baseline = round(100 * sum(relation_baseline(*case) for case in asked) / count, 1)
        print(f"{size:9} {baseline:24} {share(hits[0.0]):7} {share(hits[1.0]):14} {needed[0]:28} {needed[1]:11}")


def save(model: Qwen3ForCausalLM, folder: Path) -> None:
    """Write config.json, generation_config.json and model.safetensors."""
    model.generation_config.eos_token_id = EOS
    model.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=QUICKSTART / "policy")
    parser.add_argument("--heldout", type=Path, default=QUICKSTART / "heldout.jsonl")
    parser.add_argument("--lessons", type=int, default=LESSONS)
    parser.add_argument("--check-only", action="store_true", help="report on the policy in --out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    prompts = PromptSet.load("compact")
    if options.check_only:
        model = AutoModelForCausalLM.from_pretrained(options.out)
        report(model, Codec(options.out), prompts, options.heldout)
        report_sizes(model, Codec(options.out), prompts)
        return
    make_tokenizer(options.out)
    codec = Codec(options.out)
    torch.manual_seed(0)
    model = make_model(codec.size)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {codec.size} pieces", flush=True)
    train(model, Teacher(codec, prompts, "lessons"), options.lessons)
    save(model, options.out)
    report(model, codec, prompts, options.heldout)


if __name__ == "__main__":
    main()
