"""Weights pushed into running engines, against engines started fresh from the same checkpoint."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from engine_fixtures import engine_config, open_engines
from hf_models import apart
from safetensors.torch import load_file
from torchrun import torchrun
from transformers import AutoModelForCausalLM

from spell_megatron.config.schema import SamplingConfig
from spell_megatron.errors import UserError
from spell_megatron.rollout.checksum import checksum
from spell_megatron.rollout.client import Client, Completion, GenerationError
from spell_megatron.weights.buckets import fitting
from spell_megatron.weights.check import compare
from spell_megatron.weights.push import OtherModel, WeightPusher

PROMPTS = [[(start + 37 * i) % 250 for i in range(length)] for start, length in ((3, 5), (11, 40), (29, 300))]
SEEDED = {
    "temperature": 0.8,
    "max_tokens": 12,
    "seed": 77,
    "logprobs": 0,
    "ignore_eos": True,
    "detokenize": False,
}

_FRESH = """
import gc, json, sys
from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

if __name__ == "__main__":
    dtype, prompts, settings, folders = json.loads(sys.argv[1])
    results = {}
    for folder in folders:
        llm = LLM(folder, dtype=dtype, enforce_eager=True, max_model_len=1024, max_num_seqs=32,
                  kv_cache_memory_bytes=2**28, logprobs_mode="processed_logprobs", skip_tokenizer_init=True)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = [o.outputs[0] for o in llm.generate(inputs, SamplingParams(**settings), use_tqdm=False)]
        results[folder] = [
            (list(o.token_ids), [choices[token].logprob for token, choices in zip(o.token_ids, o.logprobs)])
            for o in outputs
        ]
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
    print("RESULT" + json.dumps(results))
"""


def fresh_answers(folders: list[Path], dtype: str = "float32") -> dict[str, list]:
    """(token ids, log-probabilities) of PROMPTS from engines that loaded the folders from disk."""
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    task = json.dumps([dtype, PROMPTS, SEEDED, [str(folder) for folder in folders]])
    done = subprocess.run(
        [sys.executable, "-c", _FRESH, task], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    return json.loads(line.removeprefix("RESULT"))


@pytest.fixture(scope="module")
def fresh(policy) -> Callable:
    answers: dict[str, list] = {}

    def get(folder: Path) -> list:
        if not answers:
            answers.update(fresh_answers([policy(kind, 1) for kind in ("dense", "tied", "moe")]))
        return answers[str(folder)]

    return get


def ask(engine) -> tuple[list, set[str]]:
    """(token ids, log-probabilities) of PROMPTS, and the weight versions that gave them."""
    answers, versions = [], set()
    for prompt in PROMPTS:
        body = {"token_ids": prompt, "sampling_params": SEEDED}
        choice = engine.post("/inference/v1/generate", body)["choices"][0]
        answers.append((choice["token_ids"], [token["logprob"] for token in choice["logprobs"]["content"]]))
        versions |= {span["version"] for span in choice["weight_versions"]}
    return answers, versions


def difference(left: list, right: list) -> float:
    """Largest difference of log-probabilities; infinite if the tokens differ."""
    if [tokens for tokens, _ in left] != [tokens for tokens, _ in right]:
        return float("inf")
    return max(abs(a - b) for (_, x), (_, y) in zip(left, right) for a, b in zip(x, y, strict=True))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def language(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of the language model, in bfloat16."""
    return {name: tensor.bfloat16() for name, tensor in tensors.items() if not name.startswith("model.visual.")}


def together(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors with the experts of a layer in two, as `Export` streams them."""
    stored: dict[str, list[list[torch.Tensor]]] = {}
    rest = {}
    for name, tensor in tensors.items():
        if not (match := re.fullmatch(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name)):
            rest[name] = tensor
            continue
        rows = stored.setdefault(f"{match[1]}.{'down_proj' if match[3] == 'down' else 'gate_up_proj'}", [])
        rows += [[] for _ in range(len(rows), int(match[2]) + 1)]
        rows[int(match[2])].insert(0 if match[3] == "gate" else 1, tensor)
    return rest | {name: torch.stack([torch.cat(rows) for rows in experts]) for name, experts in stored.items()}


def check_pushes(engines, old: Path, new: Path, expected: list, tolerance: float = 1e-5) -> None:
    before, _ = ask(engines.engines[0])  # fills the prefix cache
    assert difference(before, expected) == float("inf")
    pusher = WeightPusher(engines, bucket_bytes=1 << 14)
    done = pusher.push(weights(new).items(), "one", verify=True)
    assert done.tensors == len(weights(new))
    for engine in engines.engines:
        after, versions = ask(engine)
        assert versions == {"one"}
        assert difference(after, expected) <= tolerance
    pusher.push(weights(old).items(), "two", verify=True)
    again, versions = ask(engines.engines[0])
    assert versions == {"two"}
    assert difference(again, before) <= tolerance
    fused = together(weights(new))
    assert pusher.push(fused.items(), "three", verify=True).tensors == len(fused)
    for engine in engines.engines:
        assert difference(ask(engine)[0], expected) <= tolerance
    assert compare(weights(new).items(), engines.engines) == (len(weights(new)), [])
    pusher.close()


# In the order of the engines they need, each started once; the last test on each leaves it unusable.


def test_a_pushed_dense_engine_equals_a_fresh_one(engines_for, policy, fresh):
    # 0.0 measured
    check_pushes(engines_for("dense"), policy("dense", 0), policy("dense", 1), fresh(policy("dense", 1)))


def test_a_tensor_that_no_parameter_takes_is_named(engines_for, policy):
    """vLLM throws biases away that its model does not have."""
    engines = engines_for("dense")
    bias = {"model.layers.1.self_attn.o_proj.bias": torch.ones(64)}
    pusher = WeightPusher(engines, bucket_bytes=1 << 14)
    with pytest.raises(
        OtherModel, match=r"no parameter for 1 tensors, among them model.layers.1.self_attn.o_proj.bias"
    ):
        pusher.push((weights(policy("dense", 1)) | bias).items(), "one", verify=True)
    pusher.close()
    engines.engines[0].post("/finish_weight_update")  # so that the next push may begin
    pusher = WeightPusher(engines)
    pusher.push(weights(policy("dense", 0)).items(), "two", verify=True)
    pusher.close()


def test_a_stream_that_breaks_leaves_the_engine_paused(engines_for, policy):
    engines = engines_for("dense")
    engine = engines.engines[0]
    pusher = WeightPusher(engines, bucket_bytes=1 << 14)

    def broken():
        for index, item in enumerate(weights(policy("dense", 1)).items()):
            if index == 10:
                raise ZeroDivisionError
            yield item

    with pytest.raises(ZeroDivisionError):
        pusher.push(broken(), "bad")
    with pytest.raises(UserError, match="interrupted"):
        pusher.push([], "bad")
    assert engine.get("/is_paused")["is_paused"]
    pusher.close()
    engines.stop()


def test_a_pushed_tied_engine_equals_a_fresh_one(engines_for, policy, fresh):
    # 0.0 measured
    check_pushes(engines_for("tied"), policy("tied", 0), policy("tied", 1), fresh(policy("tied", 1)))


def test_an_engine_that_refuses_a_tensor_does_not_hang_the_push(engines_for, policy):
    engines = engines_for("tied")
    pusher = WeightPusher(engines, bucket_bytes=1 << 14, timeout=60)
    wrong = weights(policy("tied", 1)) | {"model.layers.0.mlp.up_proj.weight": torch.zeros(3, 64)}
    result: list[BaseException] = []

    def push():
        try:
            pusher.push(wrong.items(), "bad")
        except UserError as error:
            result.append(error)

    thread = threading.Thread(target=push, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive() and "did not take the weights" in str(result[0])
    pusher.close()
    engines.stop()


def test_a_pushed_moe_engine_equals_a_fresh_one(engines_for, policy, fresh):
    # 0.0 measured
    check_pushes(engines_for("moe"), policy("moe", 0), policy("moe", 1), fresh(policy("moe", 1)))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "workers"), [("gpt_oss", 1), ("wide_experts", 2)])
def test_a_pushed_gpt_oss_engine_computes_what_transformers_does(kind, workers, engines_for, policy):
    """Sinks, biases and experts by turns arrive: the engine has them, and samples with their log-probabilities."""
    engines, new = engines_for(kind, tensor_parallel=workers), policy(kind, 1)
    pusher, pushed = WeightPusher(engines, bucket_bytes=1 << 14), apart(weights(new))
    assert pusher.push(pushed.items(), "one", verify=True).tensors == len(pushed)
    assert compare(pushed.items(), engines.engines) == (len(pushed), [])
    pusher.close()
    model = AutoModelForCausalLM.from_pretrained(new, dtype=torch.float32)
    for prompt, (tokens, logprobs) in zip(PROMPTS, ask(engines.engines[0])[0]):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        expected = (logits / SEEDED["temperature"]).log_softmax(-1)[torch.arange(len(tokens)), tokens]
        torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=0, atol=1e-5)


def test_running_requests_end_before_or_are_aborted(engines_for, policy):
    engines = engines_for("moe")
    pusher = WeightPusher(engines)
    new = weights(policy("moe", 1))

    def push_while_running(running: str, version: str) -> list[Completion]:
        async def main():
            sampling = SamplingConfig(temperature=0.8, top_p=1.0)
            async with Client(engines.urls, engines.api_key, sampling, stop_token_ids=[]) as client:
                request = client.generate([1, 2, 3], n=8, seed=1, max_tokens=200, affinity="a")
                task = asyncio.create_task(request)
                await asyncio.sleep(0.3)
                assert not task.done()
                await asyncio.to_thread(pusher.push, new.items(), version, running=running)
                return await task

        return asyncio.run(main())

    pusher.push(new.items(), "a")
    completions = push_while_running("wait", "b")
    assert {c.weight_version for c in completions} == {"a"}
    assert max(len(c.token_ids) for c in completions) == 200
    again = push_while_running("abort", "c")  # whoever waits for an aborted request makes it again
    assert {c.weight_version for c in again} == {"c"} and len(again) == 8
    pusher.close()


def test_an_incomplete_push_never_serves(engines_for, policy, monkeypatch):
    monkeypatch.setattr("spell_megatron.rollout.client._RETRY_SECONDS", (0.1,))
    engines = engines_for("moe")
    engine = engines.engines[0]
    pusher = WeightPusher(engines, bucket_bytes=1 << 14)
    missing = "model.layers.1.mlp.experts.3.up_proj.weight"
    partial = {name: tensor for name, tensor in weights(policy("moe", 1)).items() if name != missing}
    with pytest.raises(UserError, match="did not fill .*layers.1.mlp.experts.*restart"):
        pusher.push(partial.items(), "bad")
    with pytest.raises(UserError, match="'bad' was interrupted"):
        pusher.push(weights(policy("moe", 0)).items(), "good")
    assert engine.get("/is_paused")["is_paused"]
    assert engine.get("/weight_info")["weight_version"].startswith("updating")

    # Even if somebody resumes it, there is no answer: it breaks, or what it says is refused.
    engine.post("/resume")

    async def main():
        sampling = SamplingConfig(temperature=0.8, top_p=1.0)
        async with Client(engines.urls, engines.api_key, sampling, stop_token_ids=[]) as client:
            await client.generate([1, 2, 3], n=2, seed=1, max_tokens=4, affinity="a")

    with pytest.raises((GenerationError, UserError)):
        asyncio.run(main())
    pusher.close()
    engines.stop()


def test_a_rank_that_does_not_send_takes_part_in_the_stream():
    produced = []
    stream = ((str(i), produced.append(i) or torch.zeros(1)) for i in range(3))
    assert WeightPusher(None).push(stream, "v") is None
    assert produced == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_checksum_sees_values_places_shapes_and_types(dtype):
    tensor = torch.randn(300, 500).to(dtype)  # more than one chunk
    swapped = tensor.clone()
    swapped[0, 0], swapped[299, 499] = 3.0, -5.0
    tensor[0, 0], tensor[299, 499] = -5.0, 3.0
    changed = tensor.clone()
    changed[299, 499] = 3.5
    sums = [checksum(t) for t in (tensor, swapped, changed, tensor.view(500, 300), tensor.to(torch.float64))]
    assert len(set(sums)) == 5
    assert checksum(tensor.T.contiguous().T) == sums[0]
    odd = torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(300, 500)  # at an odd place in memory
    assert checksum(odd) == sums[0]
    assert checksum(tensor[0, :7]) != checksum(tensor[0, 1:8])  # 7 bytes are no whole number of words


@pytest.mark.slow
def test_two_replicas(engines_for, policy, fresh):
    check_pushes(engines_for("moe", replicas=2), policy("moe", 0), policy("moe", 1), fresh(policy("moe", 1)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tied", "moe"])
def test_tensor_parallel_engine(kind, engines_for, policy, fresh):
    # Sums over shards are rounded in another order.
    engines = engines_for(kind, tensor_parallel=2)
    check_pushes(engines, policy(kind, 0), policy(kind, 1), fresh(policy(kind, 1)), tolerance=1e-4)


@pytest.mark.slow
def test_engines_of_several_layouts_at_once(policy, monkeypatch, tmp_path):
    """One broadcast serves a lone worker and the two of a tensor-parallel engine; all take the new weights."""
    monkeypatch.setenv("SPELL_API_KEY", "the key of both")
    with ExitStack() as stack:
        urls = []
        for size in (1, 2):
            config = engine_config(policy("moe"), tensor_parallel=size)
            urls += stack.enter_context(open_engines(config, tmp_path / str(size))).urls
        engines = open_engines(engine_config(policy("moe"), urls=urls), tmp_path)
        pusher = WeightPusher(engines)
        new = weights(policy("moe", 1))
        assert pusher.push(new.items(), "one", verify=True).verified == 3 * len(new)
        assert compare(new.items(), engines.engines) == (len(new), [])
        pusher.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "layouts"),
    [
        ("moe", [{"tensor": 2, "expert": 2}, {"pipeline": 2}, {"expert": 2}]),
        ("tied", [{"tensor": 2}, {"pipeline": 2}]),
    ],
)
def test_a_trainer_of_two_processes(kind, layouts, engines_for, policy, monkeypatch):
    """Each layout in turn pushes other weights than the one before; the engine then computes with just those."""
    engines = engines_for(kind)
    monkeypatch.setenv("SPELL_API_KEY", engines.api_key)
    tasks = [[str(policy(kind, 1 - index % 2)), layout] for index, layout in enumerate(layouts)]
    worker = Path(__file__).with_name("push_worker.py")
    output = torchrun(2, worker, json.dumps([engines.urls, tasks]), timeout=900)
    count = len(weights(policy(kind)))
    fused = len(together(weights(policy(kind))))
    assert output.count(f"RESULT {fused} sent, {count} compared, [] differ") == len(layouts)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "vision"])
def test_an_engine_in_float8_takes_pushes(kind, engines_for, policy):
    """Back at the old weights it answers as at its start; what was pushed in between, it used."""
    engines = engines_for(kind, dtype="bfloat16", quantization="fp8")
    old, new = (language(weights(policy(kind, seed))) for seed in (0, 1))
    first, _ = ask(engines.engines[0])
    pusher = WeightPusher(engines)
    pusher.push(new.items(), "one", verify=True)
    assert difference(ask(engines.engines[0])[0], first) == float("inf")
    pusher.push(old.items(), "two", verify=True)
    assert difference(ask(engines.engines[0])[0], first) == 0
    pusher.close()
    with pytest.raises(UserError, match="could not be read back.*quantises"):
        compare(old.items(), engines.engines)


@pytest.mark.parametrize(
    ("trainer", "engine", "expected"),
    [(80 << 30, None, 4 << 30), (16 << 30, None, 2 << 30), (16 << 30, 4 << 30, 1 << 30), (1 << 20, None, 64 << 20)],
)
def test_buckets_on_gpus_take_a_share_of_what_is_free(trainer, engine, expected):
    assert fitting(trainer, engine) == expected


def differences_from_transformers(folder: Path, answers: list) -> tuple[float, float]:
    """Mean differences of answers' log-probabilities: from transformers in bfloat16; of that from float32."""
    from transformers import AutoModelForCausalLM

    narrow, wide = (AutoModelForCausalLM.from_pretrained(folder, dtype=t) for t in (torch.bfloat16, torch.float32))

    def logprobs(model, prompt: list[int], tokens: list[int]) -> torch.Tensor:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float()
        return (logits / SEEDED["temperature"]).log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]

    triples = [
        (torch.tensor(theirs), logprobs(narrow, prompt, tokens), logprobs(wide, prompt, tokens))
        for prompt, (tokens, theirs) in zip(PROMPTS, answers, strict=True)
    ]
    engine, in_bfloat16, in_float32 = (torch.cat(parts) for parts in zip(*triples, strict=True))
    return tuple(float((x - in_bfloat16).abs().mean()) for x in (engine, in_float32))


@pytest.mark.parametrize(
    ("family", "workers"),
    [
        ("vision", 1),
        pytest.param("vision", 2, marks=pytest.mark.slow),
        pytest.param("vision_moe", 1, marks=pytest.mark.slow),
        pytest.param("vision_moe", 2, marks=pytest.mark.slow),
    ],
)
def test_a_hybrid_takes_pushes(family, workers, engines_for, policy):
    """What is pushed is read back from the kernels bit by bit, and the answers are as near to those of transformers as
    rounding allows; those to the same weights are the same. Of a model that also sees images it is the language model.
    """
    engines = engines_for(family, dtype="bfloat16", tensor_parallel=workers)
    pusher = WeightPusher(engines, bucket_bytes=1 << 14)
    given = []
    for version, seed in enumerate((1, 0, 1)):
        pushed = language(weights(policy(family, seed)))
        assert pusher.push(together(pushed).items(), str(version), verify=True).tensors == len(together(pushed))
        answers, versions = ask(engines.engines[0])
        given.append(answers)
        assert versions == {str(version)}
    assert compare(pushed.items(), engines.engines) == (len(pushed), [])
    assert difference(given[2], given[0]) == 0
    assert difference(given[1], given[0]) == float("inf")
    off, rounding = differences_from_transformers(policy(family, 1), answers)
    print(f"{family}: {off:.4f} from transformers in bfloat16, which is {rounding:.4f} from itself in float32")
    assert off < 2 * rounding
    pusher.close()


@pytest.mark.slow
def test_bfloat16(engines_for, policy):
    expected = fresh_answers([policy("moe", 1)], "bfloat16")[str(policy("moe", 1))]
    engines = engines_for("moe", dtype="bfloat16")

    before, _ = ask(engines.engines[0])
    assert difference(before, expected) == float("inf")
    pusher = WeightPusher(engines, bucket_bytes=1 << 14)
    stream = ((name, tensor.bfloat16()) for name, tensor in weights(policy("moe", 1)).items())
    pusher.push(stream, "one", verify=True)
    assert difference(ask(engines.engines[0])[0], expected) <= 1e-5
    pusher.close()
