"""Prove that engines compute with the weights of a checkpoint: a checksum per Hugging Face tensor on both sides.

    python tools/check_weights.py CHECKPOINT URL [URL ...]
    python tools/check_weights.py CHECKPOINT --start [--tensor-parallel N] [--device cpu]

CHECKPOINT is a Hugging Face folder, a Megatron distributed checkpoint or a step of a run (step_000012). Engines are
read back from where their kernels take the weights, so it does not matter how they got there; serving pauses for it
(seconds for each gigabyte). Their key is taken from the environment variable SPELL_API_KEY; set it before
`spell train` to be able to look into the engines of a run.

With --start an engine is started on this machine with random weights, those of the checkpoint are pushed into it as
training pushes them, and the result is compared: a test of weight transfer on this machine. The engine computes in
float32, or in bfloat16 if the checkpoint does, or if vLLM has no kernels in float32 on CPUs (linear attention). Weights
in another type are rounded to that, as in training.

Exit status: 0 all tensors agree, 1 some differ, 2 no comparison was possible.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from spell_megatron.cli.arguments import quiet_libraries

quiet_libraries()  # they warn about themselves when they are imported

import torch  # noqa: E402

from spell_megatron.config.schema import ModelConfig, RolloutConfig, SamplingConfig  # noqa: E402
from spell_megatron.errors import UserError  # noqa: E402
from spell_megatron.monitoring.progress import Progress  # noqa: E402
from spell_megatron.rollout.engine import Engine  # noqa: E402
from spell_megatron.rollout.engines import Engines  # noqa: E402
from spell_megatron.training.policy import PolicyModel  # noqa: E402
from spell_megatron.weights.check import compare, read_checkpoint, side_files  # noqa: E402
from spell_megatron.weights.names import hf_shapes  # noqa: E402
from spell_megatron.weights.push import WeightPusher  # noqa: E402

SHOWN = 5
KEY = "SPELL_API_KEY"


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("urls", nargs="*", default=[], metavar="URL", help="address of a running engine")
    parser.add_argument("--start", action="store_true", help="start an engine here and push the weights into it")
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="of the engine of --start")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="of the engine of --start")
    options = parser.parse_args(argv)
    if options.start == bool(options.urls):
        parser.error("give the addresses of running engines, or --start")
    try:
        return _check(options)
    except UserError as error:
        print(f"check_weights: {error}", file=sys.stderr)
        return 2


def _check(options: argparse.Namespace) -> int:
    folder = side_files(options.checkpoint)
    policy = PolicyModel.load(folder)
    progress = Progress()
    with ExitStack() as stack:
        if options.start:
            dtype = _engine_type(options, policy)
            engines = _pushed(options, folder, dtype, stack, progress)
            weights = _rounded(options.checkpoint, dtype)
        else:
            engines = [Engine(url, os.environ.get(KEY, "")) for url in options.urls]
            weights = read_checkpoint(options.checkpoint)
        with progress.stage("comparing", len(hf_shapes(policy))) as advance:
            count, differences = compare(weights, engines, advance)
    for engine in engines:
        wrong = [difference for difference in differences if difference.engine == engine.url]
        print(f"{engine.url}: {count - len(wrong)} of {count} tensors agree")
        for difference in wrong[:SHOWN]:
            print(f"  {difference.name}: checkpoint {difference.checkpoint}, engine {difference.held}")
        if len(wrong) > SHOWN:
            print(f"  and {len(wrong) - SHOWN} more")
    return 1 if differences else 0


def _engine_type(options: argparse.Namespace, policy: PolicyModel) -> torch.dtype:
    """Engines have the types of training. Every float16 value is a float32 value too."""
    _, first = next(read_checkpoint(options.checkpoint))
    on_cpus = options.device == "cpu" or not torch.cuda.is_available()
    narrow = first.dtype == torch.bfloat16 or (on_cpus and policy.arch.delta_net)
    return torch.bfloat16 if narrow else torch.float32


def _rounded(checkpoint: Path, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, tensor.to(dtype)) for name, tensor in read_checkpoint(checkpoint))


def _pushed(
    options: argparse.Namespace, folder: Path, dtype: torch.dtype, stack: ExitStack, progress: Progress
) -> list[Engine]:
    """An engine that was started with random weights and got those of the checkpoint by a push."""
    model = ModelConfig(path=folder, dtype=str(dtype).removeprefix("torch."))
    rollout = RolloutConfig(
        tensor_parallel=options.tensor_parallel,
        concurrency=8,
        cpu_kv_cache_gib=0.25,
        sampling=SamplingConfig(max_prompt_tokens=256, max_response_tokens=256),
        extra_args=["--load-format", "dummy"],
    )
    logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    with progress.stage("starting an engine"):
        engines = stack.enter_context(
            Engines.open(model, rollout, logs, device=options.device, seed=0, routing=False, trainers=1)
        )
    pusher = WeightPusher(engines)
    stack.callback(pusher.close)
    with progress.stage("pushing"):
        done = pusher.push(_rounded(options.checkpoint, dtype), "checkpoint", verify=True)
    size, way = f"{done.bytes / 1e9:.2f} GB", engines.transport.name
    print(f"pushed {done.tensors} tensors, {size}, in {done.seconds:.1f} s ({way})")
    return engines.engines


if __name__ == "__main__":
    sys.exit(main())
