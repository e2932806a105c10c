"""Tiny policies: a sentencepiece tokenizer, a Qwen3, its training on examples of the three roles, and sampling.

What the examples teach is said by the program that makes a policy: `make_seed_policy.py`, `make_rich_policy.py`. They
share the formats of the roles. The loss counts outputs only and mostly the answer, and a dozen prompts share their
documents in one training row (a prefix tree of depth one).
"""

from __future__ import annotations

import io
import json
import random
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers
from torch.nn import functional
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from spell_megatron.tokenizer import PolicyTokenizer

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
LEARNING_RATE = 2e-3


# Texts: what the roles write.


def answer_text(task: str, answer: str) -> str:
    """What the responder writes."""
    return f"Therefore, the answer is {answer}." if task == "docmath_qa" else f"The correct answer is {answer}."


def question_text(question: str, answer: str) -> str:
    """What the questioner writes. Blanks inside the quotes keep names the same pieces as in the documents."""
    return json.dumps({"question": f" {question}", "answer": f" {answer}"})


def verdict_text(right: bool) -> str:
    """What the verifier writes."""
    return "[[YES]]" if right else "[[NO]]"


# Tokenizer.


def write_tokenizer(folder: Path, words: Sequence[str], joints: Sequence[str] = JOINTS) -> None:
    """Write tokenizer.model (sentencepiece, unigram) and the same tokenizer as tokenizer.json into `folder`.

    Every one of `words` is one piece, and so are MARKERS; other ASCII text falls back to letters. White space of any
    kind, line ends included, is one blank. `joints` are pieces that follow a word without a blank.
    """
    blank = "▁"
    pieces = [blank + text.replace(" ", blank) for text in (*MARKERS, *words)]
    pieces += [text.replace(" ", blank) for text in joints]
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


# Examples and batches.


@dataclass(frozen=True)
class Example:
    """A prompt with the output to learn and the loss weight of each output token."""

    role: str
    prompt: list[int]
    output: list[int]
    weights: list[float]
    key: int
    """Index in `output` of the token that decides: the answer or the verdict."""


def example(codec: Codec, role: str, prompt: str, output: str, key: str, boilerplate: float) -> Example:
    """An example whose deciding token, `key`, weighs 4 and whose other tokens weigh `boilerplate`."""
    ids = codec.output(output)
    (key_id,) = codec.output(key)[:-1]
    index = len(ids) - 1 - ids[::-1].index(key_id)
    weights = [boilerplate] * len(ids)
    weights[index] = 4.0
    return Example(role, codec.prompt(prompt), ids, weights, index)


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


def make_model(vocabulary: int, layers: int = 4) -> Qwen3ForCausalLM:
    """A Qwen3 of 0.2 million parameters per layer; its vocabulary is exactly the tokenizer's.

    A mixture of experts of the same active size (8 experts of 192, top 2) was tried and learned slower:
    copying after 1,255 updates instead of 852, single documents 54 % right 245 updates later instead of
    90 % after 116, at 1.3 times the seconds per update.
    """
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=128,
        num_hidden_layers=layers,
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


def make_optimizer(model: Qwen3ForCausalLM) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def learn(
    model: Qwen3ForCausalLM, optimizer: torch.optim.Optimizer, batch: Batch
) -> tuple[float, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One update on a batch. Returns the loss, then of every target token [targets]: the most likely token before the
    update, the target, and its entry in `batch.keys`."""
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
    return loss.item(), logits.argmax(-1), targets, batch.keys[used]


# Sampling.


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


def save(model: Qwen3ForCausalLM, folder: Path) -> None:
    """Write config.json, generation_config.json and model.safetensors."""
    model.generation_config.eos_token_id = EOS
    model.save_pretrained(folder)
