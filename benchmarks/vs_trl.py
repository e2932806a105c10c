"""The same update through TRL's GRPOTrainer and through ours, in one run on a CPU.

    python benchmarks/vs_trl.py [--quick] [--threads N]

Needs TRL: `pip install -e ".[bench]"`, best in a separate environment.

Both sides train the same checkpoint (Qwen3, 4 layers, hidden size 384, vocabulary 8,192, float32) on the same rows:
groups of 8 recorded responses of 40 tokens to a prompt of 1,000 (25:1), with recorded rewards, one AdamW step a batch.
TRL gets the responses through its `rollout_func` and the rewards through a reward function. Its loss is `dapo` (token
mean over the batch) with beta 0, one iteration and no clipping of the gradient norm, which is our loss. TRL's other
settings are the fastest here: no gradient checkpointing, no pass for old log-probabilities (its configuration needs
none with one gradient step a batch), --batch sequences at a time.

Only the update is counted. On TRL's side it is everything from the start of its step to its end except
`_prepare_inputs` (responses, rewards, advantages, and an old-log-probability pass if there were one). On our side it is
`Trainer.update`. They take turns, each in its own process. Seconds are the minimum over the steps, in CPU time (wall
time is printed too). The gradients of the first step are compared.

On CPUs TRL projects every position of a sequence to the vocabulary; on GPUs (Triton) it projects only response
positions. `TRL, responses projected` is the same run with the GPU's choice made on the CPU, for the record. The goal is
about TRL as it is. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.prefix_tree import clock, hf_config, make_rows
from spell_megatron.config.schema import OptimizerConfig, TrainingConfig
from spell_megatron.training import backend

GOAL, GRADIENT = 5.0, 1e-5
GROUP, PROMPT, RESPONSE = 8, 1000, 40
ADAMW = {"lr": 1e-6, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


def make_checkpoint(folder: Path) -> None:
    """A random model, and a tokenizer that names its token ids (TRL decodes what it trains on)."""
    config = hf_config()
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(config.vocab_size)}, unk_token="t0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t1")
    tokenizer.save_pretrained(folder)


def ours(connection: Connection, folder: Path, rows: list, threads: int) -> None:
    """The project's trainer, in a process of its own: an update for each message, answered by its seconds. The
    first answer also has the gradient by Hugging Face name (the export's cuts and joins are linear)."""
    from spell_megatron.training.model import build_model
    from spell_megatron.training.policy import PolicyModel
    from spell_megatron.training.trainer import Trainer
    from spell_megatron.weights.huggingface import load_weights
    from spell_megatron.weights.reshard import export

    training = TrainingConfig(
        threads=threads,
        tokens_per_microbatch=PROMPT + GROUP * RESPONSE,
        optimizer=OptimizerConfig(**ADAMW, clip_grad=0.0),
    )
    policy = PolicyModel.load(folder, "float32")
    backend.initialise(policy, training, "cpu")
    model = build_model(policy, training)
    load_weights(model, folder)
    trainer = Trainer(model, training, temperature=1.0, steps=1)
    gradient = None
    while connection.recv():
        seconds = clock(lambda: trainer.update(rows))
        if gradient is None:
            parameters = list(model.parameters())
            kept = [parameter.data for parameter in parameters]
            for parameter in parameters:
                parameter.data = parameter.main_grad
            gradient = {name: tensor.clone().numpy() for name, tensor in export(model)}
            for parameter, data in zip(parameters, kept, strict=True):
                parameter.data = data
            connection.send((seconds, gradient))
        else:
            connection.send((seconds, None))
    backend.shutdown()


class Turns(transformers.TrainerCallback):
    """After each step of TRL one of ours; keeps the seconds of both, and how far apart the first gradients are."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.theirs: list[np.ndarray] = []
        self.mine: list[np.ndarray] = []
        self.gradient: dict[str, torch.Tensor] = {}
        self.error = float("nan")

    def on_step_begin(self, *unused, **more) -> None:
        self.trainer.spent = np.zeros(2)
        self.start = np.array([time.process_time(), time.perf_counter()])

    def on_pre_optimizer_step(self, *unused, model, **more) -> None:
        if not self.theirs:
            self.gradient = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    def on_step_end(self, *unused, **more) -> None:
        now = np.array([time.process_time(), time.perf_counter()])
        self.theirs.append(now - self.start - self.trainer.spent)
        self.connection.send(True)
        seconds, gradient = self.connection.recv()
        self.mine.append(seconds)
        if gradient is not None:
            assert gradient.keys() == self.gradient.keys(), gradient.keys() ^ self.gradient.keys()
            mine = torch.cat([torch.from_numpy(gradient[name]).flatten().double() for name in gradient])
            theirs = torch.cat([self.gradient[name].flatten().double() for name in gradient])
            self.error = ((mine - theirs).norm() / theirs.norm()).item()


def trl_trainer(folder: Path, rows: list, rewards: np.ndarray, batch: int, steps: int, turns: Turns):
    """TRL's trainer on the recorded rows. Its `spent` is what `_prepare_inputs` took since it was set to zero."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    responses = [row.tokens[row.prompt_length :].tolist() for row in rows]
    reward_of = {tuple(response): float(reward) for response, reward in zip(responses, rewards, strict=True)}

    def recorded(prompts: list[str], trainer) -> dict:
        """TRL repeats each prompt once for each of its responses."""
        numbers = [GROUP * int(prompt) + i % GROUP for i, prompt in enumerate(prompts)]
        return {
            "prompt_ids": [rows[n].tokens[:PROMPT].tolist() for n in numbers],
            "completion_ids": [responses[n] for n in numbers],
            "logprobs": None,
        }

    def reward(completion_ids: list[list[int]], **unused) -> list[float]:
        return [reward_of[tuple(ids)] for ids in completion_ids]

    class Timed(GRPOTrainer):
        spent = np.zeros(2)

        def _prepare_inputs(self, generation_batch):
            box = []
            self.spent = self.spent + clock(lambda: box.append(super(Timed, self)._prepare_inputs(generation_batch)))
            return box[0]

    arguments = GRPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        model_init_kwargs={"dtype": "float32"},
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=len(rows) // batch,
        num_generations=GROUP,
        max_completion_length=RESPONSE,
        max_steps=steps,
        loss_type="dapo",
        beta=0.0,
        num_iterations=1,
        temperature=1.0,
        gradient_checkpointing=False,
        learning_rate=ADAMW["lr"],
        lr_scheduler_type="constant",
        optim="adamw_torch",
        adam_beta1=ADAMW["betas"][0],
        adam_beta2=ADAMW["betas"][1],
        adam_epsilon=ADAMW["eps"],
        weight_decay=ADAMW["weight_decay"],
        max_grad_norm=0.0,
        shuffle_dataset=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return Timed(
        model=str(folder),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": [str(n) for n in range(len(rows) // GROUP)]}),
        reward_funcs=reward,
        rollout_func=recorded,
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
        callbacks=[turns],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one group and one counted step (under two minutes)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8, help="sequences that TRL computes at a time (default 8)")
    options = parser.parse_args()
    if find_spec("trl") is None:
        parser.exit(3, 'TRL is not installed: pip install -e ".[bench]" (best in an environment of its own)\n')
    import trl
    from trl.trainer import utils as trl_utils

    torch.set_num_threads(options.threads)
    groups, steps = (1, 2) if options.quick else (4, 4)
    rows = make_rows(groups, GROUP, PROMPT, RESPONSE)
    rewards = np.random.default_rng(1).integers(0, 2, len(rows)).astype(np.float64)
    rewards[::GROUP], rewards[1::GROUP] = 0, 1  # no group is all right or all wrong
    for number, row in enumerate(rows):
        group = rewards[number // GROUP * GROUP :][:GROUP]
        # TRL adds 1e-4 to the standard deviation, of which it counts n - 1.
        row.weights[:] = (rewards[number] - group.mean()) / (group.std(ddof=1) + 1e-4)
    print(f"{os.cpu_count()} cores, load before {os.getloadavg()[0]:.1f}; TRL {trl.__version__}")
    print(f"{groups} x {GROUP} responses of {RESPONSE} tokens to prompts of {PROMPT}; {options.threads} thread(s)")
    figures, holds = {}, True
    compact = trl_utils._use_triton
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_checkpoint(folder)
        for name, projected in (("TRL", compact), ("TRL, responses projected", lambda device: True)):
            trl_utils._use_triton = projected
            parent, child = multiprocessing.Pipe()
            worker = multiprocessing.get_context("spawn").Process(
                target=ours, args=(child, folder, rows, options.threads), daemon=True
            )
            worker.start()
            turns = Turns(parent)
            turns.trainer = trl_trainer(folder, rows, rewards, options.batch, steps, turns)
            turns.trainer.train()
            parent.send(False)
            worker.join()
            mine, theirs = np.min(turns.mine, axis=0), np.min(turns.theirs, axis=0)
            ratio, wall = theirs / mine
            print(f"ours                      {mine[0]:7.2f} s of CPU, {mine[1]:7.2f} s")
            print(
                f"{name:25} {theirs[0]:7.2f} s of CPU, {theirs[1]:7.2f} s: {ratio:.2f} x (wall {wall:.2f} x); "
                f"gradients differ by {turns.error:.1e} (relative)",
                flush=True,
            )
            figures[name] = {"cpu_seconds": round(theirs[0], 3), "ours_cpu_seconds": round(mine[0], 3)}
            figures[name] |= {"ratio": round(ratio, 2), "wall_ratio": round(wall, 2), "gradient_error": turns.error}
            holds &= bool((ratio >= GOAL or name != "TRL") and turns.error <= GRADIENT)
    trl_utils._use_triton = compact
    print(f"load after {os.getloadavg()[0]:.1f}")
    print(json.dumps({"benchmark": "vs_trl", "figures": figures, "goal": f">= {GOAL} x TRL", "holds": holds}))


if __name__ == "__main__":
    main()
