"""vLLM takes the command lines of its servers on GPUs, and understands them as they are meant."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

from engine_fixtures import engine_config

from spell_megatron.config.schema import RolloutConfig
from spell_megatron.rollout.server import ServerSettings, kernel_variables, server_command
from spell_megatron.rollout.transports.ipc import IPC
from spell_megatron.rollout.transports.nccl import NCCL
from spell_megatron.rollout.transports.transport import Transport

HYBRIDS = ("qwen3_5_text", "qwen3_5_moe_text")
CASES = list(product((NCCL, IPC), ("dense", "moe"), (True, False), (1, 2, 4)))
CASES += list(product((NCCL, IPC), HYBRIDS, (True,), (2,)))

MORE = ("--max-num-seqs", "5", "--enforce-eager", "--gpu-memory-utilization", "0.5")
FAULTS = [("--no-such-flag",), ("--logprobs-mode", "guessed"), ("--tensor-parallel-size", "0")]


def asked(environment: dict[str, str], commands: list[list[str]]) -> list[dict]:
    """What vLLM makes of each command line (see `vllm_on_gpus.py`)."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("vllm_on_gpus.py")],
        input=json.dumps([command[3:] for command in commands]),  # after `python -m vllm...`
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("VLLM ")]


def test_it_understands_every_flag(with_vllm, policy):
    def command(
        transport: Transport, kind: str, routing: bool, tensor_parallel: int, extra: tuple[str, ...] = (), **more: str
    ) -> list[str]:
        config = engine_config(policy(kind), "bfloat16", tensor_parallel=tensor_parallel, extra_args=extra, **more)
        return server_command(ServerSettings(config.model, config.rollout, 7, routing), transport, 8123, "0.0.0.0")

    commands = [command(*case) for case in CASES]
    commands += [command(NCCL, "dense", True, 2, extra) for extra in [MORE, *FAULTS]]
    commands += [command(IPC, kind, True, 2, quantization="fp8") for kind in ("dense", "moe")]
    *answers, fp8_dense, fp8_experts = asked(
        with_vllm | kernel_variables(RolloutConfig(batch_invariant=True)), commands
    )
    answers = iter(answers)
    for transport, kind, routing, workers in CASES:
        answer = next(answers)
        assert "says" in answer, answer["refuses"]
        says = answer["says"]
        assert says.pop("version") == "0.32.0"
        assert (".venv-contracts" in says.pop("file")) == (".venv-contracts" in with_vllm["PYTHONPATH"])
        assert says == {
            "platform": "NonNvmlCudaPlatform",
            "model": str(policy(kind)),
            "served_as": "policy",
            "dtype": "torch.bfloat16",
            "seed": 7,
            "longest": 1024,
            "logprobs": "processed_logprobs",
            "tokenizer": False,
            "sleeps": transport is IPC,
            "transfer": transport.name,
            "quantization": [None, "None", None, "auto"],
            "batch_invariant": True,
            "routed_experts": routing and "moe" in kind,
            "v2_runner": True,
            "workers": workers,
            "extension": "spell_megatron.rollout.worker.WorkerExtension",
            "sequences": 32,
            "prefix_cache": True,
            "states": ["align", "float32", True] if kind in HYBRIDS else ["none", "auto", True],
            "memory": 0.85,
            "eager": False,
            "middleware": ["spell_megatron.rollout.worker.RequireKey"],
            "scale_out": True,
            "address": ["0.0.0.0", 8123],
        }
    # Further arguments of the user have the last word.
    told = next(answers)["says"]
    assert [told[name] for name in ("sequences", "eager", "memory")] == [5, True, 0.5]
    for (flag, *_), answer in zip(FAULTS, answers, strict=True):
        assert flag.removeprefix("--").replace("-", "_") in answer["refuses"].replace("-", "_"), answer
    # One scale for each output channel; routers as they are; experts by kernels that CUDA graphs do not outlive.
    channels = "QuantKey(f8e4m3fn,scale(f32,static,per_channel),symmetric)"
    assert fp8_dense["says"]["quantization"] == ["fp8_per_channel", channels, [], "auto"]
    assert fp8_experts["says"]["quantization"] == ["fp8_per_channel", channels, ["*.mlp.gate"], "triton"]
