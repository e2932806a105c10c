"""How long does a weight push take? Compared with a plain copy of the same bytes over the same path.

    python benchmarks/refit.py [--quick] [--gigabytes 1.0] [--repeats 7] [--tensor-parallel N]

A random float32 model, dense and as a mixture of experts (Qwen3, head size 128), is in a Megatron trainer in this
process. A real vLLM engine with the same architecture takes its weights again and again:

    push    what `spell train` does after an update: pause, export, send in buckets, load layer by layer, reset the
            prefix cache, resume
    copy    the same bytes in as many buckets through a gloo group of the same kind (loopback TCP), from memory that
            is already laid out for it into memory that already exists, in as many processes as the engine has
            workers: nothing is packed, unpacked or allocated
    memcpy  one copy of the same bytes in this process's memory, for scale
    pack    what every push to a CPU needs: vLLM's own functions pack the same matrices for its kernels, from memory
            that is already laid out for them, alone in a process (after the rounds; GPUs have no such step)

The first three take turns. Ratios are medians over the rounds' ratios. A push is shown with three more figures: export
alone, a push with checksums, and the CPU seconds of both sides, which depend less on other programs. The first push is
checked by checksums; the engine starts with other weights. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
import torch
from transformers import Qwen3Config, Qwen3MoeConfig

from spell_megatron.config.schema import Config
from spell_megatron.rollout.addresses import listen
from spell_megatron.rollout.engines import Engines
from spell_megatron.rollout.transports.gloo import broadcast, gloo_group
from spell_megatron.training import backend
from spell_megatron.training.model import build_model
from spell_megatron.training.policy import PolicyModel
from spell_megatron.weights.buckets import BUCKET_BYTES
from spell_megatron.weights.push import WeightPusher
from spell_megatron.weights.reshard import export

GOAL = 1.5
ADDRESS = "127.0.0.1"
TIMEOUT = 300.0


def write_config(folder: Path, moe: bool, gigabytes: float) -> None:
    """config.json of a model of about this size in float32."""
    hidden, vocabulary, experts = 1024, 16_384, 32
    sizes = dict(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=128,
        intermediate_size=3072,
        tie_word_embeddings=False,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=None,
    )
    per_expert = 384
    attention = hidden * 128 * (2 * 8 + 2 * 4)
    feed_forward = experts * 3 * hidden * per_expert if moe else 3 * hidden * 3072
    layers = max(2, round((gigabytes * 1e9 / 4 - 2 * vocabulary * hidden) / (attention + feed_forward)))
    if moe:
        config = Qwen3MoeConfig(
            **sizes,
            num_hidden_layers=layers,
            moe_intermediate_size=per_expert,
            num_experts=experts,
            num_experts_per_tok=4,
            norm_topk_prob=True,
            architectures=["Qwen3MoeForCausalLM"],
        )
    else:
        config = Qwen3Config(**sizes, num_hidden_layers=layers, architectures=["Qwen3ForCausalLM"])
    config.save_pretrained(folder)


class Copy:
    """The plain copy: a group of this process and receivers that hold a destination for every bucket."""

    def __init__(self, sizes: list[int], receivers: int) -> None:
        self._buckets = [torch.ones(size, dtype=torch.uint8) for size in sizes]
        listener = listen(ADDRESS)
        port = listener.getsockname()[1]
        command = [sys.executable, __file__, "--receive"]
        self.processes = [
            subprocess.Popen([*command, json.dumps([port, rank, receivers + 1, sizes])])
            for rank in range(1, receivers + 1)
        ]
        self._group = gloo_group(ADDRESS, port, 0, receivers + 1, TIMEOUT, listener)

    def __call__(self) -> None:
        for bucket in self._buckets:
            broadcast(self._group, bucket).wait()
        self._group.barrier().wait()

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def receive(port: int, rank: int, world_size: int, sizes: list[int]) -> None:
    """One receiver of a plain copy, until it is killed."""
    buckets = [torch.ones(size, dtype=torch.uint8) for size in sizes]
    group = gloo_group(ADDRESS, port, rank, world_size, TIMEOUT)
    while True:
        for bucket in buckets:
            broadcast(group, bucket).wait()
        group.barrier().wait()


def pack(folder: str, repeats: int) -> None:
    """Prints the median seconds in which vLLM packs the matrices of a model for one worker's kernels."""
    from vllm._custom_ops import cpu_prepack_moe_weight, create_onednn_mm

    config = PolicyModel.load(folder).hf_config
    hidden, width = config.hidden_size, config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    shapes = [(width + 2 * keys, hidden), (hidden, width)]
    if experts := getattr(config, "num_experts", 0):
        inner = config.moe_intermediate_size
        shapes += [(experts, 2 * inner, hidden), (experts, hidden, inner)]
    else:
        shapes += [(2 * config.intermediate_size, hidden), (hidden, config.intermediate_size)]
    shapes = shapes * config.num_hidden_layers + [(config.vocab_size, hidden)]
    matrices = [torch.randn(shape) for shape in shapes]
    packed = [None] * len(matrices)

    def every() -> None:
        for number, matrix in enumerate(matrices):
            experts = matrix.dim() == 3
            packed[number] = cpu_prepack_moe_weight(matrix, "vec") if experts else create_onednn_mm(matrix.t())

    every()
    print(statistics.median(timed(every)[0] for _ in range(repeats)))


def bucket_sizes(sizes: list[int]) -> list[int]:
    """Sizes of the buckets in which tensors of these sizes are pushed."""
    buckets = [0]
    for size in sizes:
        if buckets[-1] and buckets[-1] + size > BUCKET_BYTES:
            buckets.append(0)
        buckets[-1] += size
    return buckets


def cpu_seconds(process: psutil.Process) -> float:
    """CPU time of a process; 0 if it has ended (beside each server a guard's `sleep` comes and goes)."""
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return times.user + times.system


def timed(action, processes: list[psutil.Process] = ()) -> tuple[float, list[float]]:
    """(wall seconds, CPU seconds of each process) of an action."""
    before, start = [cpu_seconds(p) for p in processes], time.perf_counter()
    action()
    seconds = time.perf_counter() - start
    return seconds, [cpu_seconds(p) - b for p, b in zip(processes, before, strict=True)]


def measure(root: Path, moe: bool, gigabytes: float, repeats: int, tensor_parallel: int) -> dict:
    """Figures of one model."""
    kind = "moe" if moe else "dense"
    folder = root / kind
    folder.mkdir()
    write_config(folder, moe, gigabytes)
    config = Config(
        model={"path": folder, "dtype": "float32"},
        data={"documents": folder},
        run={"device": "cpu"},
        rollout={
            "tensor_parallel": tensor_parallel,
            "concurrency": 8,
            "cpu_kv_cache_gib": 0.25,
            "sampling": {"max_prompt_tokens": 256, "max_response_tokens": 256},
            "extra_args": ["--load-format", "dummy"],
        },
    )
    with ExitStack() as stack:
        policy = PolicyModel.load(folder, config.model.dtype)
        backend.initialise(policy, config.training, config.run.device)
        stack.callback(backend.shutdown)
        model = build_model(policy, config.training)
        sizes = [tensor.nbytes for _, tensor in export(model)]
        size = sum(sizes)
        engines = stack.enter_context(
            Engines.open(
                config.model,
                config.rollout,
                root / "logs",
                device="cpu",
                seed=config.run.seed,
                routing=False,
                trainers=1,
            )
        )
        pusher = WeightPusher(engines)
        stack.callback(pusher.close)
        copy = Copy(bucket_sizes(sizes), tensor_parallel)
        stack.callback(copy.close)
        source, target = torch.ones(size, dtype=torch.uint8), torch.ones(size, dtype=torch.uint8)

        def push(verify: bool = False) -> None:
            done = pusher.push(export(model), "benchmark", verify=verify)
            assert done.bytes == size

        def exported() -> None:
            for _ in export(model):
                pass

        push(verify=True)
        copy()
        me = psutil.Process()
        receivers = [psutil.Process(process.pid) for process in copy.processes]
        servers = [process for process in me.children(recursive=True) if process not in receivers]
        rounds: dict[str, list[float]] = {}

        def add(**values: float) -> None:
            for way, value in values.items():
                rounds.setdefault(way, []).append(value)

        for _ in range(repeats):
            seconds, (sender, *receiver) = timed(copy, [me, *receivers])
            add(copy=seconds, copy_sender_cpu=sender, copy_receiver_cpu=sum(receiver))
            seconds, (trainer, *engine) = timed(push, [me, *servers])
            add(push=seconds, push_trainer_cpu=trainer, push_engine_cpu=sum(engine))
            add(memcpy=timed(lambda: target.copy_(source))[0], export=timed(exported)[0])
        verified = timed(lambda: push(verify=True))[0]
    command = [sys.executable, __file__, "--pack", json.dumps([str(folder), repeats])]
    rounds["pack"] = [float(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.split()[-1])]
    middle = {way: statistics.median(values) for way, values in rounds.items()}
    ratios = [push / copy for push, copy in zip(rounds["push"], rounds["copy"], strict=True)]
    print(f"{kind}: {size / 1e9:.2f} GB in {len(sizes)} tensors, {len(bucket_sizes(sizes))} buckets")
    for way in ("push", "copy", "memcpy", "pack", "export"):
        speed = f"{size / 1e9 / middle[way]:6.2f} GB/s" if way not in ("pack", "export") else ""
        spread = f"{min(rounds[way]):.2f} to {max(rounds[way]):.2f}"
        print(f"  {way:8} {middle[way]:6.3f} s ({spread}) {speed}")
    print(
        f"  CPU seconds: push {middle['push_trainer_cpu']:.2f} in the trainer and {middle['push_engine_cpu']:.2f} "
        f"in the engine, copy {middle['copy_sender_cpu']:.2f} in the sender and {middle['copy_receiver_cpu']:.2f} "
        f"in the receiver; a push with checksums takes {verified:.2f} s"
    )
    ratio = statistics.median(ratios)
    push_cpu, copy_cpu = (
        [x + y for x, y in zip(rounds[f"{way}_cpu"], rounds[f"{other}_cpu"], strict=True)]
        for way, other in (("push_trainer", "push_engine"), ("copy_sender", "copy_receiver"))
    )
    cpu_ratio = statistics.median(push_cpu) / statistics.median(copy_cpu)
    rounds_of_it = ", ".join(f"{r:.2f}" for r in ratios)
    print(f"  push / copy: {ratio:.2f} ({rounds_of_it}); in CPU time {cpu_ratio:.2f}")
    print(f"  pack / copy: {middle['pack'] / middle['copy']:.2f}", flush=True)
    return {
        "gigabytes": round(size / 1e9, 3),
        "ratio": round(ratio, 3),
        "cpu_ratio": round(cpu_ratio, 3),
        "verified_seconds": round(verified, 3),
        **{f"{way}_seconds": round(value, 3) for way, value in middle.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="0.3 GB, the dense model only (under two minutes)")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of each model (default 1)")
    parser.add_argument("--repeats", type=int, default=7, help="rounds (default 7)")
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="workers of the engine")
    parser.add_argument("--receive", help=argparse.SUPPRESS)
    parser.add_argument("--pack", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.receive:
        receive(*json.loads(options.receive))
    if options.pack:
        pack(*json.loads(options.pack))
        return
    gigabytes, kinds = (0.3, (False,)) if options.quick else (options.gigabytes, (False, True))
    print(f"{os.cpu_count()} cores, load before {os.getloadavg()[0]:.1f}", flush=True)
    figures = {}
    with tempfile.TemporaryDirectory() as temporary:
        for moe in kinds:
            figures["moe" if moe else "dense"] = measure(
                Path(temporary), moe, gigabytes, options.repeats, options.tensor_parallel
            )
    print(f"load after {os.getloadavg()[0]:.1f}")
    holds = all(figure["ratio"] <= GOAL for figure in figures.values())
    result = {"benchmark": "refit", "figures": figures, "goal": f"push <= {GOAL} x copy", "holds": holds}
    print(json.dumps(result))
    return


if __name__ == "__main__":
    main()
