"""A configuration against the machine: what is known to fail before a model is loaded."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from config_files import add_checkpoint
from engine_fixtures import VOCABULARY, engine_sizes, save_byte_tokenizer, save_policy
from families import hf_model
from hf_models import edit
from transformers import AutoModelForCausalLM

from spell_megatron.config.faults import raise_faults
from spell_megatron.config.schema import Config, RolloutConfig
from spell_megatron.errors import UserError
from spell_megatron.preflight.cpu_kernels import HEAD_SIZES
from spell_megatron.preflight.engines import check_kernels
from spell_megatron.preflight.findings import Findings
from spell_megatron.preflight.inspect import inspect
from spell_megatron.preflight.machine import check_trainer
from spell_megatron.processes import folder_lock
from spell_megatron.processes.folder_lock import FolderLock
from spell_megatron.selfplay.documents import load_clusters
from spell_megatron.selfplay.sampler import ClusterSampler
from spell_megatron.training.policy import PolicyModel
from spell_megatron.weights.sizes import checkpoint_bytes


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    save_policy("dense", folder, seed=0)
    return folder


@pytest.fixture
def setup(dense, tmp_path):
    """setup(**sections) -> a configuration that is right on this machine, but for the changes named."""
    clusters = [
        {"cluster_id": str(i), "documents": ["A text.", "Another."], "source": "news" if i % 2 else "reports"}
        for i in range(12)
    ]
    documents = tmp_path / "clusters.jsonl"
    documents.write_text("".join(json.dumps(cluster) + "\n" for cluster in clusters))

    def make(**sections) -> Config:
        raw = {
            "model": {"path": dense, "dtype": "float32"},
            "data": {"documents": documents},
            "run": {"output_dir": tmp_path / "runs", "device": "cpu"},
            "selfplay": {"groups": 2, "clusters_per_round": 6, "prompts": "compact", "verifier": {"share": 0.5}},
            "rollout": {"sampling": {"max_prompt_tokens": 200, "max_response_tokens": 50}},
        }
        for section, values in sections.items():
            raw[section] = raw.get(section, {}) | values
        return Config.model_validate(raw)

    return make


def only_fault(config: Config, resume: Path | None = None) -> str:
    faults = inspect(config, resume).faults
    assert len(faults) == 1, [str(fault) for fault in faults]
    return str(faults[0])


def test_a_right_configuration_has_no_faults_and_nothing_is_written(setup, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    assert inspect(setup()) == Findings()
    assert sorted(tmp_path.rglob("*")) == before


def test_all_faults_come_in_one_error(setup, tmp_path):
    config = setup(
        model={"path": tmp_path / "no-model"},
        data={"documents": tmp_path / "no-documents.parquet"},
        validation={"questions": tmp_path / "no-questions.jsonl"},
        selfplay={"prompts": "no-prompts"},
        rollout={"urls": ["ftp://host", "http://host:99999", "http://host:8000", "http://host:8000/"]},
    )
    with pytest.raises(UserError) as error:
        raise_faults(inspect(config).faults, "the configuration")
    first, *lines = str(error.value).splitlines()
    assert first == "7 faults in the configuration:"
    assert sorted(line.split(":")[0].strip() for line in lines) == [
        "data.documents",
        "model.path",
        "rollout.urls",
        "rollout.urls",
        "rollout.urls",
        "selfplay.prompts",
        "validation.questions",
    ]


def live_run(folder: Path, **fields: object) -> None:
    """status.json as a run writes it every five seconds, also one of a version that had no locks."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {"state": "running", "step": 2, "steps": 9, "job": None, "restart": 0, "pid": os.getpid()}
    about |= {"started": time.time() - 60, "time": time.time(), "host": socket.gethostname()}
    (folder / "status.json").write_text(json.dumps(about | fields))


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_is_alive_is_left_alone(setup, dense, tmp_path, monkeypatch, resume):
    monkeypatch.setattr(folder_lock, "BEAT", 0.05)  # looks for three of them
    run = tmp_path / "runs" / "live"
    config = setup(run={"name": "live"})
    if resume:
        add_checkpoint(run, dense)
    folder = run if resume else None
    live_run(run)
    said = only_fault(config, folder)
    for part in (f"in use by `spell train`, process {os.getpid()} on", "since 20", "spell stop", "--run.name"):
        assert part in said
    assert "remove the folder" not in said
    live_run(run, host="n7", pid=1, job="4711")
    assert "process 1 on n7, Slurm job 4711" in only_fault(config, folder)
    ended = subprocess.Popen(["true"])
    ended.wait()
    for dead in (
        {"pid": ended.pid},
        {"host": "n7", "time": time.time() - 3600},
        {"time": time.time() - 3600},  # its number belongs to another process now
        {"state": "finished"},
    ):
        live_run(run, **dead)
        assert inspect(config, folder).faults == []
    live_run(run, host="n7", time=time.time() - 3600)  # its clock is wrong
    beat = threading.Timer(0.02, live_run, (run,), {"host": "n7", "time": time.time() - 3595})
    beat.start()
    assert "on n7" in only_fault(config, folder)
    beat.join()
    for damaged in ("", "[]", '{"state": 1', '{"time": "x"}', '{"time": 1.0}'):
        (run / "status.json").write_text(damaged)
        assert inspect(config, folder).faults == []
    with FolderLock(run, "`spell train`", ""):
        assert "in use by" in only_fault(config, folder)


def break_file(name: str, content: bytes | None):
    def change(folder: Path) -> None:
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)

    return change


def add_file(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (break_file("config.json", None), "config.json"),
        (break_file("config.json", b"{"), "cannot be read"),
        (break_file("config.json", b'{"model_type": "mamba"}'), "'mamba' are not supported"),
        (break_file("model.safetensors", None), "lacks model.safetensors"),
        (break_file("model.safetensors", b"version https://git-lfs"), "not a complete safetensors file"),
        (break_file("tokenizer.json", None), "no tokenizer"),
        (lambda folder: (folder / "notes.txt").symlink_to("/nowhere"), "notes.txt, which goes into every checkpoint"),
        (add_file("generation_config.json", b'{"max_new_tokens": -1}'), "must be greater than 0, but is -1"),
        (add_file("generation_config.json", b'{"pad_token_id": "x"}'), "vLLM does not start with it"),
        (add_file("generation_config.json", b'{"eos_'), "generation_config.json cannot be read"),
        (add_file("chat_template.jinja", b"{{ raise_exception('be a system') }}"), "It fails with: be a system"),
    ],
)
def test_an_incomplete_model(setup, dense, tmp_path, change, message):
    folder = tmp_path / "broken"
    shutil.copytree(dense, folder)
    change(folder)
    fault = only_fault(setup(model={"path": folder}))
    assert fault.startswith("model.path: ") and message in fault


def edit_config(**fields: object):
    """A change of config.json; None removes a field."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | fields
        kept = {name: value for name, value in config.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))

    return change


SCALE = "model.layers.0.mlp.up_proj.weight_scale_inv"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([edit_config(architectures=None)], 'Add "architectures": ["Qwen3ForCausalLM"]'),
        ([edit_config(attention_bias=True)], "lacks model.layers.0.self_attn.q_proj.bias"),
        ([edit_config(quantization_config={"quant_method": "fp8"})], "config.json (fp8) says that they are"),
        ([edit_config(quantization_config={})], "Remove quantization_config in config.json"),
        ([edit_config(compression_config={"quant_method": "x"})], "Remove compression_config in config.json"),
        ([add_file("hf_quant_config.json", b"{}")], "Remove hf_quant_config.json"),
        (
            [
                edit_config(quantization_config={"quant_method": "fp8"}),
                edit(lambda tensors: tensors.update({SCALE: torch.ones(1)})),
            ],
            "are quantised (fp8), and only plain weights can be trained",
        ),
        ([edit(lambda tensors: tensors.update({SCALE: torch.ones(1)}))], f"holds {SCALE}, which its config.json"),
        (
            [edit(lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.float8_e4m3fn)}))],
            "has the type F8_E4M3",
        ),
        (
            [edit_config(tie_word_embeddings=True)],
            "lm_head.weight with other values than model.embed_tokens.weight",
        ),
    ],
)
def test_a_model_whose_weights_and_config_differ(setup, dense, tmp_path, changes, message):
    folder = shutil.copytree(dense, tmp_path / "broken")
    for change in changes:
        change(folder)
    faults = [str(fault) for fault in inspect(setup(model={"path": folder})).faults]
    assert any(fault.startswith("model.path: ") and message in fault for fault in faults), faults
    assert len(faults) == 1 + (
        "attention_bias" in json.loads((folder / "config.json").read_text()) and "q_proj.bias" in message
    )


def test_experts_that_are_stored_together(setup, tmp_path):
    save_policy("moe", tmp_path / "moe", seed=0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32)
    model.save_pretrained(tmp_path / "moe", save_original_format=False)
    assert inspect(setup(model={"path": tmp_path / "moe"})) == Findings()


def test_a_model_that_lacks_a_shard_or_a_half(setup, dense, tmp_path):
    folder = tmp_path / "sharded"
    shutil.copytree(dense, folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model-1.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "model.safetensors").unlink()
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    faults = inspect(setup(model={"path": folder})).faults
    lacking, cut_short = map(str, faults)
    assert "lacks model-2" in lacking and "not a complete" in cut_short


def parallel(**size: int) -> dict:
    """A section for as many processes as one kind of parallelism needs."""
    return {"training": {"parallel": {"processes": max(size.values()), **size}}}


@pytest.mark.parametrize(
    ("sections", "key", "message"),  # the key that the line begins with
    [
        ({"data": {"sources": {"newz": ["doc_mc"]}}}, "data.sources", "Did you mean 'news'?"),
        ({"data": {"sources": {"news": ["doc_mc"], "reports": ["doc_mc"]}}}, "data.sources", "docmath_qa"),
        ({"selfplay": {"groups": 100, "max_rounds": 2}}, "selfplay.groups", "can never come"),
        ({"selfplay": {"clusters_per_round": 2}}, "data.sources", "no place"),
        ({"rollout": {"sampling": {"max_prompt_tokens": 9000}}}, "rollout.sampling", "positions"),
        (parallel(tensor=3), "training.parallel.tensor", "attention heads"),
        (parallel(pipeline=3), "training.parallel.pipeline", "more than the model's 2 layers"),
        (parallel(expert=2), "training.parallel.expert", "no experts"),
        ({"rollout": {"tensor_parallel": 3}}, "rollout.tensor_parallel", "attention heads"),
        ({"rollout": {"urls": ["localhost:8000"]}}, "rollout.urls", "http://"),
        ({"logging": {"wandb": True}}, "logging.wandb", "pip install wandb"),
        ({"run": {"device": "cuda"}}, "run.device", "no GPU"),
    ],
)
def test_settings_that_this_machine_or_model_cannot_serve(setup, sections, key, message):
    if key == "logging.wandb" and find_spec("wandb"):
        pytest.skip("wandb is installed")
    if key == "run.device" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    fault = only_fault(setup(**sections))
    assert fault.startswith(key) and message in fault


def test_one_step_off_needs_gpus_for_both(setup, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def keys(gpus: int, **sections: dict) -> list[tuple[str, ...]]:
        monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
        stale = {"staleness": 1, "importance_sampling": "token"}
        found = Findings()
        check_trainer(found, setup(run={"device": "auto"}, training=stale, **sections))
        return [fault.keys for fault in found.faults]

    assert keys(1) == [("training.staleness", "training.parallel.processes")]
    assert keys(2) == keys(1, rollout={"urls": ["http://a:1"]}) == []


def test_a_head_size_that_engines_on_cpus_lack(setup, dense, tmp_path):
    folder = shutil.copytree(dense, tmp_path / "odd")
    hf_model(
        "qwen3", vocab_size=VOCABULARY, num_hidden_layers=2, **engine_sizes("qwen3") | {"head_dim": 48}
    ).save_pretrained(folder)
    fault = only_fault(setup(model={"path": folder}))
    assert fault.startswith("model.path") and "48 dimensions" in fault
    attached = setup(model={"path": folder}, rollout={"urls": ["http://localhost:8000"]})
    assert inspect(attached).faults == []


@pytest.mark.engine
def test_the_head_sizes_are_those_of_vllm():
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    assert list(HEAD_SIZES) == CPUAttentionBackend.get_supported_head_sizes()


def test_kernels_that_vllm_does_not_have_here(setup):
    assert only_fault(setup(rollout={"batch_invariant": True})).startswith(
        "rollout.batch_invariant: vLLM has no batch-invariant kernels for CPUs"
    )
    assert inspect(setup(rollout={"batch_invariant": True, "urls": ["http://localhost:8000"]})).faults == []
    assert inspect(setup(model={"dtype": "bfloat16"}, rollout={"quantization": "fp8"})).faults == []

    def refused(experts: bool, capability: tuple[int, int] | None, **settings: object) -> list[str]:
        found = Findings()
        check_kernels(found, RolloutConfig(**settings), experts, capability)
        return [str(fault) for fault in found.faults]

    for experts in (False, True):
        assert refused(experts, (9, 0), quantization="fp8", batch_invariant=True) == []
        assert refused(experts, (8, 0), batch_invariant=True) == []
        (fault,) = refused(experts, (8, 6), quantization="fp8")
        assert "GPUs of compute capability 8.6 do not compute in float8" in fault
        (fault,) = refused(experts, (7, 5), batch_invariant=True)
        assert "kernels for GPUs of compute capability 7.5" in fault
    (fault,) = refused(True, None, quantization="fp8")
    assert fault.startswith("rollout.quantization: vLLM's kernels for experts in float8 on CPUs")


def test_engines_of_biased_experts(setup, tmp_path):
    save_policy("gpt_oss", tmp_path / "biased", seed=0)
    config = setup(model={"path": tmp_path / "biased", "dtype": "float32"})
    assert not inspect(config).faults
    config.rollout.tensor_parallel = 2
    assert "of the 96 rows of an expert each of 2 workers has 48" in only_fault(config)
    config.rollout.tensor_parallel = 4
    faults = [fault.message for fault in inspect(config).faults]
    assert any("4 does not divide the model's 2 key-value heads" in fault for fault in faults), faults
    config = setup(model={"path": tmp_path / "biased", "dtype": "bfloat16"}, rollout={"quantization": "fp8"})
    faults = [fault.message for fault in inspect(config).faults]
    assert any("the model's experts have biases" in fault for fault in faults), faults


def test_linear_layers_on_cpus(setup, tmp_path):
    save_policy("qwen3_5_text", tmp_path / "hybrid", seed=0)
    config = setup(model={"path": tmp_path / "hybrid", "dtype": "bfloat16"})
    assert inspect(config).faults == []
    config.model.dtype = "float32"
    assert "linear-attention layers (gated delta nets) only in bfloat16" in only_fault(config)
    config.rollout.tensor_parallel = 4
    faults = [fault.message for fault in inspect(config).faults]
    assert any("4 does not divide the model's 2 key heads of linear layers" in fault for fault in faults)


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"linear_key_head_dim": 32, "linear_value_head_dim": 32}, "serve only those where both have the same number"),
        ({"linear_value_head_dim": 128}, "have keys of 64 dimensions and values of 128"),
        ({"linear_conv_kernel_dim": 3}, "see 3 tokens, and those of vLLM's engines on CPUs 4"),
    ],
)
def test_sizes_of_linear_layers_on_cpus(fields, fault, setup, tmp_path):
    sizes = engine_sizes("qwen3_5_text") | fields
    hf_model("qwen3_5_text", vocab_size=VOCABULARY, num_hidden_layers=2, **sizes).save_pretrained(tmp_path)
    save_byte_tokenizer(tmp_path)
    assert fault in only_fault(setup(model={"path": tmp_path, "dtype": "bfloat16"}))


def test_documents_with_a_wrong_column(setup, tmp_path):
    path = tmp_path / "wrong.jsonl"
    path.write_text('{"id": 1, "documents": ["a"]}\n')
    assert "column cluster_id is missing" in only_fault(setup(data={"documents": path}))


def test_a_port_in_use(setup):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        config = setup()
        config.rollout.base_port = port
        assert only_fault(config).startswith(f"rollout.base_port: port {port} is in use")
    assert inspect(config) == Findings()


def test_a_folder_that_holds_a_run_is_refused_unless_it_is_resumed(setup, dense, tmp_path):
    config = setup()
    folder = tmp_path / "runs" / "spell"
    (folder / "logs").mkdir(parents=True)
    (folder / "config.yaml").touch()
    assert inspect(config).faults == []  # an engine that died at the start leaves no results
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    assert "already holds a run" in only_fault(config)
    assert "remove the folder, which loses its settings, metrics, logs and rollouts" in only_fault(config)
    assert "no checkpoint to continue from" in only_fault(config, resume=folder)
    step = add_checkpoint(folder, dense)
    assert "--resume" in only_fault(config)
    meta = (step / "meta.json").read_text()
    (step / "meta.json").unlink()
    assert "step_000001 is incomplete" in only_fault(config, resume=folder)
    (step / "meta.json").write_text(meta[:9])
    assert "meta.json is damaged" in only_fault(config, resume=folder)
    (step / "meta.json").write_text(meta)
    (step / "state.json").unlink()
    assert "state.json is missing" in only_fault(config, resume=folder)
    (step / "state.json").write_text("{}")
    assert inspect(config, resume=folder).faults == []
    assert "no run in" in only_fault(config, resume=tmp_path / "elsewhere")


def test_a_run_is_not_resumed_with_other_documents(setup, dense, tmp_path):
    config = setup()
    clusters = load_clusters(config.data.documents)
    sampler = ClusterSampler(clusters, config.selfplay.tasks, {}, 6, config.run.seed)
    step = add_checkpoint(tmp_path / "runs" / "spell", dense)
    (step / "state.json").write_text(json.dumps({"step": 1, "selfplay": {"sampler": sampler.state_dict()}}))
    assert inspect(config, resume=step.parents[1]).faults == []
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(config.data.documents.read_text().splitlines(keepends=True)[:9]))
    fault = only_fault(setup(data={"documents": fewer}), resume=step.parents[1])
    assert fault.startswith("data.documents") and "made with 12 clusters" in fault and "this run has 9" in fault


def test_a_run_is_not_resumed_with_another_model_of_the_same_sizes(setup, dense, tmp_path):
    step = add_checkpoint(tmp_path / "runs" / "spell", dense)
    other = shutil.copytree(dense, tmp_path / "other")
    config = setup(model={"path": other})
    assert inspect(config, resume=step.parents[1]).faults == []
    (other / "chat_template.jinja").write_text("{{ messages[0].content }}")
    fault = only_fault(config, resume=step.parents[1])
    assert fault.startswith("model.path") and "another model" in fault and "the chat template" in fault


def test_an_output_folder_that_cannot_be_one(setup, tmp_path):
    (tmp_path / "file").touch()
    assert "is a file" in only_fault(setup(run={"output_dir": tmp_path / "file" / "runs", "device": "cpu"}))


def test_a_full_disk(setup, monkeypatch, dense):
    needed = checkpoint_bytes(PolicyModel.load(dense, "float32"))
    size = (dense / "model.safetensors").stat().st_size
    # float32: 4 bytes a parameter twice, and 12 for the optimizer; the file has a header too
    assert 5 * size > needed > 4.8 * size
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    assert only_fault(setup()).startswith("run.output_dir: a checkpoint takes about")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2 * needed))
    found = inspect(setup())
    assert not found.faults and "checkpoint.keep = 2 may not fit" in found.warnings[0]


def test_doubtful_settings_are_warnings(setup, dense):
    config = setup(
        model={"path": dense, "dtype": "bfloat16"},
        selfplay={"groups": 20, "clusters_per_round": 12},
        training={"tokens_per_microbatch": 100},
    )
    found = inspect(config)
    assert found.faults == []
    assert [warning.split()[0] for warning in found.warnings] == [
        "selfplay.groups", "training.tokens_per_microbatch", "model.dtype"
    ]  # fmt: skip


def test_too_few_answers_for_a_group_of_judgments(setup):
    few = {"groups": 3, "group_size": 4, "verifier": {"share": 0.125}}
    [warning] = inspect(setup(selfplay=few)).warnings
    assert warning.startswith("selfplay.verifier.share = 0.125 of the 12 answers of an update is less than one group")
    assert "4 judgments" in warning and "Raise it to 0.34 or more" in warning
    assert not inspect(setup(selfplay=few | {"verifier": {"share": 0.34}})).warnings
    assert not inspect(setup(selfplay=few | {"verifier": {"share": 0}})).warnings
    assert not inspect(setup(selfplay=few, training={"role_weights": {"verifier": 0}})).warnings


def test_what_depends_on_a_known_fault_is_left_out(setup, tmp_path):
    config = setup(model={"path": tmp_path / "none"})
    assert inspect(config, known_faulty={"model.path"}).faults == []
    assert len(inspect(config, known_faulty={"model.dtype"}).faults) == 1


def test_parts_of_a_run_that_cannot_be_read_are_found_before_a_resume(setup, dense, tmp_path):
    run = tmp_path / "runs" / "torn"
    add_checkpoint(run, dense)
    (run / "metrics.jsonl").mkdir()
    assert "metrics.jsonl is no file" in only_fault(setup(run={"name": "torn"}), run)
    (run / "metrics.jsonl").rmdir()
    (run / "tensorboard").touch()
    assert "tensorboard is no folder" in only_fault(setup(run={"name": "torn"}), run)


def test_code_of_ones_own_is_tried_before_a_model_is_loaded(setup, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    example = Path(__file__).parents[1] / "examples" / "extend"
    names = {"own_tasks": {"names": "my_package.names:task"}, "tasks": {"names": 1.0, "doc_general_qa": 1.0}}
    assert inspect(setup(selfplay={"code": example, "rule": "my_package.rules:score"} | names)) == Findings()
    fault = only_fault(setup(selfplay={"code": example, "rule": "my_package.rules:scores"} | names))
    assert fault.startswith("selfplay.rule: my_package.rules (") and fault.endswith("Did you mean score?")
