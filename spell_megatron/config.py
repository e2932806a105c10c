"""The whole configuration of a run: what a YAML file may hold, and how it is read.

`load_config` merges YAML files and dotted overrides, checks every field and every relation
between fields, and reports all faults at once. What depends on the machine (files, ports, GPUs)
is checked by `spell_megatron.preflight`.
"""

# pydantic, not jsonargparse: pydantic reports every fault of a file, jsonargparse stops at the first.

from __future__ import annotations

import copy
import difflib
import math
import os
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticUndefined

from spell_megatron.errors import UserError

Task = Literal["docmath_qa", "doc_general_qa", "doc_mc"]


class Section(BaseModel):
    """A group of settings. Unknown keys are errors; attribute docstrings are the help."""

    model_config = ConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


Schema = TypeVar("Schema", bound=Section)


class RunConfig(Section):
    name: str = "spell"
    """Name of the run; its folder is `output_dir/name`."""
    output_dir: Path = Path("runs")
    """Folder that holds the folders of all runs."""
    seed: int = 0
    """Seed from which every random choice of the run is derived."""
    steps: int = Field(70, ge=0)
    """Number of updates (the paper's runs stop at about 70)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the trainer runs; `auto` takes CUDA when there is a GPU."""


class ModelConfig(Section):
    path: Path
    """Folder of the policy as a Hugging Face checkpoint (config.json, safetensors, tokenizer)."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of trainer and engines. Use float32 on CPUs: bfloat16 is slow there."""


class DataConfig(Section):
    documents: Path
    """Parquet (or .jsonl) file of document clusters, as `spell prepare` writes it."""
    sources: dict[str, list[Task]] = {}
    """Tasks of each value of the `source` column. Sources not named here serve every task of
    `selfplay.tasks`. A source of several tasks is cut into as many near-equal parts, so that a
    cluster belongs to one task for the whole run."""


class QuestionerConfig(Section):
    enabled: bool = True
    """Off: the questions are those of the documents file, whose rows then have task, question and answer too (RLVR, the
    paper's baseline). There is neither a grounding filter nor a history then."""
    new_documents: int = Field(5, ge=1)
    """m: new documents shown to the questioner per attempt."""
    history: int = Field(3, ge=0)
    """L: solved questions remembered per (task, cluster); 0 switches the memory off."""
    history_low: float = 0.0
    """A question enters the history only if its mean responder reward is above this."""
    history_high: float = 1.0
    """... and below this: the paper's 0 < mean < 1. The released code also admits 1: set 1.01 for that."""
    max_reference_tokens: int = Field(40, ge=1)
    """General-QA references longer than this many tokens are dropped."""
    reward: Literal["gaussian", "azr", "r_zero"] = "gaussian"
    """Map from mean responder reward to questioner reward."""
    mu: float = 0.5
    """Centre of the Gaussian reward."""
    sigma: float = Field(1 / 6, gt=0)
    """Width of the Gaussian reward."""
    bad_format_reward: float = -1.0
    """Reward of a question that does not parse."""
    ungrounded_reward: float = -0.5
    """Reward of a question that is answered right without its documents."""
    advantage_group: Literal["task", "batch"] = "task"
    """Rows over which questioner rewards are normalised."""


class GroundingConfig(Section):
    enabled: bool = True
    """Drop questions that the policy answers right without documents."""
    samples: int = Field(1, ge=1)
    """No-context answers per question."""
    mc_samples: int = Field(4, ge=1)
    """No-context answers per multiple-choice question, each with its options in another order."""
    mc_threshold: float = Field(0.5, gt=0, le=1)
    """A multiple-choice question is ungrounded if more than this share of them is right."""


class VerifierConfig(Section):
    enabled: bool = True
    """Judge answers by the policy itself; off: rule rewards only."""
    votes: int | None = Field(None, ge=1)
    """Judgments per answer; default: selfplay.group_size. 1 is the paper's ablation without a vote: the verifier then
    learns to agree with the rule check."""
    agreement_low: float = 0.51
    """Verifier groups are trained on if the share of valid votes for the majority is at least this"""
    agreement_high: float = 0.99
    """... and at most this (a single judgment always agrees with itself, so that this is not asked of it)"""
    require_rule_agreement: bool = True
    """... and if the majority equals the rule score."""
    share: float = Field(0.125, ge=0)
    """Verifier rows per responder row in the update batch."""


class SelfPlayConfig(Section):
    tasks: dict[Task, float] = {"docmath_qa": 1.0, "doc_general_qa": 1.0, "doc_mc": 1.0}
    """Share of each task among the clusters drawn."""
    prompts: str = "full"
    """Prompt set: the name of a folder in spell_megatron/selfplay/prompt_sets, or a path."""
    groups: int = Field(128, ge=1)
    """N: question groups with mixed outcomes per update."""
    group_size: int = Field(8, ge=2)
    """G: answers per question, and (unless verifier.votes says otherwise) judgments per answer."""
    clusters_per_round: int = Field(480, ge=1)
    """Clusters drawn at a time by the sampler; shares of the tasks hold within a round."""
    max_rounds: int = Field(10, ge=1)
    """After this many rounds without `groups` mixed groups, update with what there is."""
    negatives_per_positive: float = Field(1.0, ge=0)
    """Questioner rows with a non-positive reward per row with a positive one."""
    questioner: QuestionerConfig = QuestionerConfig()
    grounding: GroundingConfig = GroundingConfig()
    verifier: VerifierConfig = VerifierConfig()
    shuffle_rewards: bool = False
    """Control experiment: permute the advantages among the rows of each role before the update."""

    @property
    def votes(self) -> int:
        """Judgments per answer."""
        return self.verifier.votes or self.group_size


class SamplingConfig(Section):
    temperature: float = Field(0.7, gt=0, le=2)
    """Sampling temperature of all roles; the trainer divides logits by it too."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Nucleus sampling."""
    max_prompt_tokens: int = Field(18000, ge=1)
    """Longer prompts are dropped (responder) or lose documents (questioner)."""
    max_response_tokens: int = Field(4096, ge=1)
    """Longest response of the questioner and the responder."""
    max_verdict_tokens: int | None = Field(None, ge=1)
    """Longest response of the verifier; default: max_response_tokens."""
    max_no_context_tokens: int | None = Field(None, ge=1)
    """Longest answer of the grounding check; default: max_response_tokens."""


class RolloutConfig(Section):
    urls: list[str] = []
    """Addresses of running vLLM servers. Empty: the run starts `replicas` servers itself."""
    replicas: int = Field(1, ge=1)
    """Servers to start on this machine."""
    tensor_parallel: int = Field(1, ge=1)
    """GPUs (or CPU ranks) per server."""
    concurrency: int = Field(256, ge=1)
    """Sequences generated at a time by each server (vLLM's --max-num-seqs)."""
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)
    """Share of GPU memory a server may use."""
    cpu_kv_cache_gib: float = Field(1.0, gt=0)
    """KV cache of a CPU server in GiB."""
    threads: int = Field(1, ge=1)
    """Threads of a CPU server."""
    base_port: int | None = Field(None, ge=1, le=65535)
    """Port of the first server; default: free ports."""
    start_timeout: float = Field(600.0, gt=0)
    """Seconds a server may take to become healthy."""
    request_timeout: float = Field(3600.0, gt=0)
    """Seconds a request may take."""
    hang_timeout: float = Field(300.0, gt=0)
    """Seconds after which an engine that has requests is asked whether it is alive, and that its answer may take. One
    that does not answer is started again."""
    verify_weights: bool = False
    """Compare a checksum of every tensor on both sides of each push; pushes take longer by it."""
    api_key_env: str = "SPELL_API_KEY"
    """Environment variable that holds the servers' key; unset: a random key per run."""
    extra_args: list[str] = []
    """More arguments for `vllm serve`, appended as they are."""
    sampling: SamplingConfig = SamplingConfig()


class ParallelConfig(Section):
    processes: int = Field(1, ge=1)
    """Trainer processes (GPUs). They are started on this machine unless torchrun or srun has started them."""
    tensor: int = Field(1, ge=1)
    """Tensor-parallel size: processes that share each layer's matrices."""
    pipeline: int = Field(1, ge=1)
    """Pipeline-parallel size: processes that share the layers."""
    context: int = Field(1, ge=1)
    """Context-parallel size: processes that share the tokens of a row."""
    expert: int = Field(1, ge=1)
    """Expert-parallel size: processes that share the experts of a mixture-of-experts model."""
    expert_tensor: int = Field(1, ge=1)
    """Tensor-parallel size inside each expert."""


class OptimizerConfig(Section):
    lr: float = Field(2e-6, gt=0)
    """Peak learning rate of AdamW."""
    warmup_steps: int = Field(0, ge=0)
    """Updates over which the rate rises linearly from zero."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the rate after warm-up."""
    min_lr: float = Field(0.0, ge=0)
    """Rate at the last update when it decays."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay of AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's first and second moments."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's term against division by zero."""
    clip_grad: float = Field(1.0, ge=0)
    """Largest gradient norm; 0 switches clipping off."""
    distributed: bool = True
    """Shard optimizer state over data-parallel ranks."""


class TrainingConfig(Section):
    tokens_per_microbatch: int = Field(32768, ge=1)
    """Most tokens of one packed tree row (shared prefixes count once)."""
    logprob_chunk: int = Field(512, ge=1)
    """Response positions projected to the vocabulary at a time: 4 bytes for each and each token of the vocabulary."""
    role_weights: dict[Literal["questioner", "responder", "verifier"], float] = {}
    """Factor on a role's rows in the loss; roles not named have 1. With 0 its rows are left out of the update."""
    clip_low: float = Field(0.2, ge=0)
    """PPO clip below 1 (inactive on-policy; its rate is logged)."""
    clip_high: float = Field(0.2, ge=0)
    """PPO clip above 1."""
    clip_dual: float = Field(3.0, gt=1)
    """Dual clip for negative advantages."""
    importance_sampling: Literal["none", "token", "sequence"] = "none"
    """Weigh each token's loss by trainer over engine probability, of the token or of its whole response, to correct
    for engines that compute differently from the trainer."""
    importance_cap: float = Field(2.0, gt=0)
    """Largest importance weight."""
    routing_replay: bool = True
    """Mixture-of-experts models: send each token to the experts that the engine sent it to. Off by itself where the
    engines do not tell (vLLM on CPUs)."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass."""
    offload: bool = False
    """Keep the layers' inputs, which `recompute: full` needs for the backward pass, in host memory."""
    moe_dispatcher: Literal["alltoall", "allgather"] = "alltoall"
    """How tokens reach their experts on other processes: all-to-all sends each to those that need it; all-gather
    sends all to all, pads rows to one length and excludes pipelines. Neither drops a token."""
    moe_aux_loss: float = Field(0.0, ge=0)
    """Coefficient of the load-balancing loss of mixture-of-experts models, summed over layers. It is computed in
    each microbatch, so that its gradient, unlike the policy's, depends on how the batch is cut."""
    threads: int = Field(1, ge=1)
    """Threads of each trainer process on a CPU."""
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()


class CheckpointConfig(Section):
    every: int = Field(10, ge=1)
    """Updates between checkpoints; one is always written at the end."""
    keep: int = Field(2, ge=1)
    """Checkpoints kept beside the best one; older ones are deleted after a newer one is complete."""
    asynchronous: bool = False
    """Write weights and optimizer in another process while the run goes on. On a CPU that can take as much memory
    again as they do."""


class ValidationConfig(Section):
    questions: Path | None = None
    """JSONL of held-out questions (task, question, answer, documents); none: no validation."""
    every: int = Field(0, ge=0)
    """Updates between validations; 0: only before the first and after the last update. Each has a checkpoint, and the
    one with the highest pass@1 is kept (checkpoints/best.json names it)."""
    limit: int | None = Field(None, ge=1)
    """Use only the first questions of the file."""
    samples: int = Field(4, ge=1)
    """Answers per question; pass@1 and pass@samples are reported."""

    def due(self, step: int, steps: int) -> bool:
        """Whether the weights after update `step` of `steps` (0: the start) are to be validated."""
        return self.questions is not None and (step in (0, steps) or (self.every > 0 and step % self.every == 0))


class LoggingConfig(Section):
    wandb: bool = False
    """Also log to Weights & Biases (the wandb package must be installed)."""
    wandb_project: str = "spell"
    """Project of the run at Weights & Biases."""
    dump: Literal["none", "jsonl", "parquet"] = "jsonl"
    """Format of the per-step rollout dumps."""


class Config(Section):
    model: ModelConfig
    data: DataConfig
    run: RunConfig = RunConfig()
    selfplay: SelfPlayConfig = SelfPlayConfig()
    rollout: RolloutConfig = RolloutConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    logging: LoggingConfig = LoggingConfig()


# ---------------------------------------------------------------------------------------- faults


@dataclass(frozen=True)
class Fault:
    """Something wrong with one setting, or with several that do not fit together. `str` gives one line."""

    keys: tuple[str, ...]
    """Dotted keys; the first one heads the line."""
    message: str
    """What is wrong, and the remedy."""
    place: str = ""
    """Which of several files holds the setting."""

    def __str__(self) -> str:
        place = f" ({self.place})" if self.place else ""
        line = f"{self.keys[0]}{place}: {' '.join(self.message.split())}"
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def raise_faults(faults: Sequence[Fault], where: str) -> None:
    """Raise one UserError that lists all faults, one a line; do nothing if there are none."""
    if faults:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise UserError("\n".join([f"{count} in {where}:", *(f"  {fault}" for fault in faults)]))


# ---------------------------------------------------------------------------------------- reading

Files = str | Path | Sequence[str | Path]
"""One YAML file, or several: the settings of later ones replace those of earlier ones."""


def load_config(files: Files, overrides: Sequence[str] = ()) -> Config:
    """Read YAML files, apply dotted overrides and validate the result.

    `overrides` are strings such as `selfplay.groups=16` (leading dashes allowed) whose values are
    parsed as YAML. A relative input path is taken from the current directory if it exists there,
    else from the folder of the YAML file that holds it; input paths come out absolute.

    Raises UserError that lists every fault, one a line.
    """
    config, faults = read_config(files, overrides)
    raise_faults_of_files(faults, files, overrides)
    return config


def read_config(files: Files, overrides: Sequence[str] = ()) -> tuple[Config, list[Fault]]:
    """Like `load_config`, but returns the faults beside a configuration without them.

    In the configuration returned, faulty settings have their defaults (a required one is empty),
    so that the caller can go on looking for faults elsewhere. Raises UserError only if a YAML
    file cannot be read at all.
    """
    raws = {path: _read_yaml(path) for path in _paths(files)}
    raw: dict[str, Any] = {}
    for other in raws.values():
        _merge(raw, other, Config)
    config, faults = _read(Config, raw, overrides)
    faulty = {key for fault in faults for key in fault.keys}
    faults += [fault for fault in _relation_faults(config) if not involves(fault, faulty)]
    _resolve_paths(config, lambda key: (_holder(raws, key) or next(iter(raws), Path())).parent)
    return config, faults


def read_section(schema: type[Schema], path: Path | None, overrides: Sequence[str] = ()) -> tuple[Schema, list[Fault]]:
    """A YAML file (or none) of any schema, with overrides, and its faults by field; otherwise like `read_config`."""
    return _read(schema, _read_yaml(path) if path else {}, overrides)


def _read(schema: type[Schema], raw: dict[str, Any], overrides: Sequence[str]) -> tuple[Schema, list[Fault]]:
    faults: list[Fault] = []
    for override in overrides:
        fault = _apply_override(raw, override)
        if fault:
            faults.append(fault)
    section, schema_faults = _validate(schema, raw)
    return section, faults + schema_faults


def raise_faults_of_files(faults: Sequence[Fault], files: Files, overrides: Sequence[str] = ()) -> None:
    """`raise_faults` for what `read_config` was given: of several files, a line names the one that sets its key."""
    paths = _paths(files)
    if faults and len(paths) > 1:
        raws = {path: _read_yaml(path) for path in paths}
        given = [_split_override(override)[0] for override in overrides]

        def place(fault: Fault) -> str:
            if any(involves(fault, [key]) for key in given):
                return "command line"
            return next((str(holder) for key in fault.keys if (holder := _holder(raws, key))), "")

        faults = [replace(fault, place=place(fault)) for fault in faults]
    raise_faults(faults, " and ".join(map(str, paths)))


def _paths(files: Files) -> list[Path]:
    return [Path(files)] if isinstance(files, str | Path) else [Path(file) for file in files]


def _merge(raw: dict[str, Any], other: dict[str, Any], section: type[Section]) -> None:
    """Put the settings of `other` into `raw`; one that is a mapping (`selfplay.tasks`) replaces the earlier one."""
    for name, value in other.items():
        field = section.model_fields.get(name)
        if field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            if isinstance(value, dict) and isinstance(raw.get(name), dict):
                _merge(raw[name], value, field.annotation)
                continue
            if value is None:  # `selfplay:` with nothing under it
                raw.setdefault(name, None)
                continue
        raw[name] = copy.deepcopy(value)


def _holder(raws: Mapping[Path, dict[str, Any]], key: str) -> Path | None:
    """The last of the files that sets a dotted key."""

    def sets(raw: Any, sections: Sequence[str]) -> bool:
        if not isinstance(raw, dict):  # the value of a section, or the list that the key is in
            return raw is not None
        return not sections or (sections[0] in raw and sets(raw[sections[0]], sections[1:]))

    return next((path for path in reversed(raws) if sets(raws[path], key.split("."))), None)


def involves(fault: Fault, keys: Iterable[str]) -> bool:
    """Whether a fault is about one of these keys, a section that holds it, or a part of it."""
    return any(
        mine == other or mine.startswith(other + ".") or other.startswith(mine + ".")
        for mine in fault.keys
        for other in keys
    )


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word; here they are an error."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen and isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} occurs twice", key_node.start_mark
                )
            if isinstance(key_node, yaml.ScalarNode):
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"There is no configuration file {path}. Check the path given to --config.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The configuration file {path} cannot be read: {error}. Use UTF-8 YAML.") from None
    try:
        raw = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {_one_line(error)}. Mend that line.") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold sections such as `model:` and `data:`, not a {_kind(raw)}.")
    return raw


def _split_override(override: str) -> tuple[str, str, str]:
    """(key, "=" or nothing, value) of `--key=value`."""
    return override.lstrip("-").partition("=")


def _apply_override(raw: dict[str, Any], override: str) -> Fault | None:
    key, equals, text = _split_override(override)
    if not equals or not key:
        return Fault((key or override,), "an override needs a value. Write --section.key=value")
    try:
        value = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        return Fault((key,), f"{text!r} is not valid YAML: {_one_line(error)}. Quote the value")
    *sections, leaf = key.split(".")
    mapping = raw
    for depth, section in enumerate(sections):
        inner = mapping.setdefault(section, {})
        if inner is None:  # `section:` with nothing under it
            inner = mapping[section] = {}
        if not isinstance(inner, dict):
            parent = ".".join(sections[: depth + 1])
            return Fault((key,), f"{parent} is a single value, so nothing can be set under it. Check the key")
        mapping = inner
    mapping[leaf] = value
    return None


def _one_line(error: yaml.YAMLError) -> str:
    return " ".join(str(error).split())


def _kind(value: Any) -> str:
    names = {dict: "mapping", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), type(value).__name__)


# ---------------------------------------------------------------------------------------- schema


@dataclass(frozen=True)
class Setting:
    """One leaf of the schema, for help texts and suggestions."""

    key: str
    type: str
    default: str | None
    """As YAML; None: required."""
    help: str


def settings(section: type[Section] | None = None, prefix: str = "") -> Iterator[Setting]:
    """Every setting a configuration may hold, in the order of the schema."""
    for name, field in (section or Config).model_fields.items():
        key = prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from settings(field.annotation, key + ".")
            continue
        default = None
        if field.default is not PydanticUndefined:
            value = list(field.default) if isinstance(field.default, tuple) else field.default
            value = str(value) if isinstance(value, Path) else value
            default = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=math.inf)
            default = default.removesuffix("\n").removesuffix("\n...")
        yield Setting(key, _type_name(field.annotation), default, " ".join((field.description or "").split()))


def _type_name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin is types.UnionType:
        return " or ".join("null" if part is type(None) else _type_name(part) for part in arguments)
    if origin is dict:
        return f"mapping of {_type_name(arguments[0])} to {_type_name(arguments[1])}"
    if origin in (list, tuple):
        return f"list of {_type_name(arguments[0])}"
    names = {int: "integer", float: "number", str: "text", bool: "true|false", Path: "path"}
    return names[annotation]


def _validate(schema: type[Schema], raw: dict[str, Any]) -> tuple[Schema, list[Fault]]:
    """Validate; take faulty values out and validate again until nothing is wrong."""
    raw = copy.deepcopy(raw)
    _fill_empty_sections(raw, schema)
    faults: list[Fault] = []
    while True:
        try:
            return schema.model_validate(raw), faults
        except ValidationError as error:
            for details in error.errors(include_url=False):
                faults += _schema_fault(schema, details, faults)
                _remove(schema, raw, details)


def _fill_empty_sections(raw: dict[str, Any], section: type[Section]) -> None:
    """`selfplay:` with every line under it commented out reads as null; it means the defaults."""
    for name, field in section.model_fields.items():
        if name in raw and isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            if raw[name] is None:
                raw[name] = {}
            if isinstance(raw[name], dict):
                _fill_empty_sections(raw[name], field.annotation)


def _schema_fault(schema: type[Section], details: Mapping[str, Any], earlier: Sequence[Fault]) -> list[Fault]:
    location = tuple(str(part) for part in details["loc"] if part != "[key]")
    key, kind, value = ".".join(location), details["type"], details["input"]
    if kind == "missing" and isinstance(details["loc"][-1], str):
        if len(location) == 1:  # a whole required section: name what must stand in it
            required = [s for s in settings(schema) if f"{s.key}.".startswith(key + ".") and s.default is None]
        else:
            required = [s for s in settings(schema) if s.key == key]
        return [
            Fault((s.key,), f"is missing: {_sentence(s.help)} Set it, or pass --{s.key}=…")
            for s in required
            if not any(involves(fault, [s.key]) for fault in earlier)
        ]
    if kind == "extra_forbidden":
        return [Fault((key,), f"unknown key. {_suggestion(schema, location)}")]
    about = next((s for s in settings(schema) if s.key == key or key.startswith(s.key + ".")), None)
    if about is None:
        return [
            Fault(
                (key,),
                f"must be a section with keys of its own, not a {_kind(value)}. "
                f"Indent its settings under `{location[-1]}:`",
            )
        ]
    if kind == "literal_error":
        allowed = [part.strip(" '") for part in details["ctx"]["expected"].replace(" or ", ", ").split(",")]
        close = difflib.get_close_matches(str(value), allowed, 1)
        hint = f" Did you mean {close[0]}?" if close else ""
        return [Fault((key,), f"{value!r} is not one of {', '.join(allowed)}.{hint}")]
    reason = details["msg"].removeprefix("Input ").rstrip(".")
    reason = reason[0].lower() + reason[1:]
    return [Fault((key,), f"{reason}, got {value!r}. Expected {about.type}: {_sentence(about.help)}")]


def _sentence(text: str) -> str:
    return text if text.endswith(".") else text + "."


def _suggestion(schema: type[Section], location: Sequence[str]) -> str:
    keys = [setting.key for setting in settings(schema)]
    *parents, leaf = location
    prefix = "".join(part + "." for part in parents)
    siblings = {key.removeprefix(prefix).split(".")[0] for key in keys if key.startswith(prefix)}
    if close := difflib.get_close_matches(leaf, siblings, 1):
        return f"Did you mean {prefix}{close[0]}?"
    leaves = {key.rsplit(".", 1)[-1]: key for key in keys}
    close = difflib.get_close_matches(leaf, leaves, 1, cutoff=0.75) or difflib.get_close_matches(
        ".".join(location), keys, 1
    )
    if close:
        return f"Did you mean {leaves.get(close[0], close[0])}?"
    if siblings:
        return f"Known here: {', '.join(sorted(siblings))}."
    return "`spell train --help` lists all keys."


def _remove(schema: type[Section], raw: dict[str, Any], details: Mapping[str, Any]) -> None:
    """Take the value that an error is about out of the raw mapping (or fill in what is missing)."""
    location = [part for part in details["loc"] if part != "[key]"]
    if details["type"] == "missing" and isinstance(location[-1], str):
        parent = _descend(raw, location[:-1])
        annotation = schema.model_fields[location[-1]].annotation if location[-1] in schema.model_fields else None
        parent[location[-1]] = {} if isinstance(annotation, type) and issubclass(annotation, Section) else ""
        return
    # a fault inside a list removes the list: another length would be another fault
    while len(location) > 1 and not isinstance(_descend(raw, location[:-1]), dict):
        location.pop()
    parent = _descend(raw, location[:-1])
    if isinstance(parent, dict):
        parent.pop(location[-1], None)


def _descend(raw: Any, location: Sequence[str | int]) -> Any:
    for part in location:
        raw = raw.get(part) if isinstance(raw, dict) else None
    return raw


# ---------------------------------------------------------------------------------------- relations


def launched_processes() -> int | None:
    """Number of trainer processes if torchrun or srun started this one, else None."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    if "SLURM_STEP_ID" in os.environ and "SLURM_PROCID" in os.environ:  # a bare batch script has no step
        return int(os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS", "1")))
    return None


def trains_verifier(config: Config) -> bool:
    """Whether judgments are meant to be among the rows of an update."""
    verifier = config.selfplay.verifier
    return verifier.enabled and verifier.share > 0 and config.training.role_weights.get("verifier", 1) > 0


def _relation_faults(config: Config) -> list[Fault]:
    """Faults between settings that are each in range."""
    faults: list[Fault] = []

    def check(holds: bool, keys: str, message: str) -> None:
        if not holds:
            faults.append(Fault(tuple(keys.split()), message))

    name = config.run.name
    check(
        bool(name.strip()) and name not in (".", "..") and not set(name) & set("/\\\0\n"),
        "run.name",
        f"{name!r} cannot be the name of a folder. Give a name without slashes, such as my-run",
    )

    play = config.selfplay
    check(
        any(share > 0 for share in play.tasks.values()) and all(share >= 0 for share in play.tasks.values()),
        "selfplay.tasks",
        "shares must not be negative, and at least one must be above 0",
    )
    active = [task for task, share in play.tasks.items() if share > 0]
    for source, tasks in config.data.sources.items():
        check(
            bool(tasks),
            "data.sources",
            f"the source {source!r} has no task. Name some of {', '.join(active)}, or leave the source out",
        )
        for task in tasks:
            check(
                task in active,
                "data.sources selfplay.tasks",
                f"the source {source!r} is to serve {task}, which has no share in selfplay.tasks. "
                f"Add the task there or take it away here",
            )
        check(
            len(set(tasks)) == len(tasks),
            "data.sources",
            f"the source {source!r} names a task twice. Remove one",
        )
    reachable = play.clusters_per_round * play.max_rounds
    check(
        play.groups <= reachable,
        "selfplay.groups selfplay.clusters_per_round selfplay.max_rounds",
        f"{play.groups} mixed groups can never come from max_rounds x clusters_per_round = "
        f"{play.max_rounds} x {play.clusters_per_round} clusters, which ask one question each. "
        f"Lower selfplay.groups to {reachable} or less, or raise the others",
    )
    check(
        play.questioner.history_low < play.questioner.history_high,
        "selfplay.questioner.history_low selfplay.questioner.history_high",
        f"{play.questioner.history_low} must be below selfplay.questioner.history_high "
        f"({play.questioner.history_high}), or no question ever enters the history",
    )
    training, optimizer, parallel = config.training, config.training.optimizer, config.training.parallel
    low, high = play.verifier.agreement_low, play.verifier.agreement_high
    check(
        0 <= low <= high <= 1,
        "selfplay.verifier.agreement_low selfplay.verifier.agreement_high",
        f"0 <= agreement_low ({low}) <= agreement_high ({high}) <= 1 must hold. They are shares of votes",
    )
    if trains_verifier(config):
        untrained = "Set selfplay.verifier.share to 0 if the verifier is not to be trained"
        shares = {k / valid for valid in range(1, play.votes + 1) for k in range((valid + 1) // 2, valid + 1)}
        check(
            play.votes == 1 or low > high or any(low <= share <= high for share in shares),
            "selfplay.verifier.votes selfplay.group_size selfplay.verifier.agreement_low "
            "selfplay.verifier.agreement_high",
            f"the share of {play.votes} judgments that agree is never from agreement_low ({low}) to agreement_high "
            f"({high}), so the verifier would never be trained. Ask for more judgments, or widen that. {untrained}",
        )
        check(
            play.votes > 1 or play.verifier.require_rule_agreement,
            "selfplay.verifier.require_rule_agreement selfplay.verifier.votes",
            "a single judgment that need not agree with the rule check is rewarded whatever it says. Set "
            f"require_rule_agreement to true, or ask for more judgments. {untrained}",
        )

    check(
        all(0 <= beta < 1 for beta in optimizer.betas),
        "training.optimizer.betas",
        f"{list(optimizer.betas)} must both lie in [0, 1). The usual values are [0.9, 0.999]",
    )
    check(
        optimizer.min_lr <= optimizer.lr,
        "training.optimizer.min_lr training.optimizer.lr",
        f"{optimizer.min_lr} is above training.optimizer.lr ({optimizer.lr}). Lower it",
    )
    check(
        config.run.steps == 0 or optimizer.warmup_steps < config.run.steps,
        "training.optimizer.warmup_steps run.steps",
        f"{optimizer.warmup_steps} warm-up updates leave nothing of run.steps = {config.run.steps}. Lower it",
    )
    check(
        training.clip_low < 1,
        "training.clip_low",
        f"{training.clip_low} must be below 1, for 1 - clip_low bounds a ratio of probabilities. Lower it",
    )
    check(
        training.importance_sampling != "sequence" or config.rollout.sampling.top_p == 1,
        "training.importance_sampling rollout.sampling.top_p",
        f"with top_p = {config.rollout.sampling.top_p} the engine gives each token a higher probability than the "
        "trainer, and their product over a response leaves no weight at all. Set top_p to 1, or use token",
    )
    for role, weight in training.role_weights.items():
        check(weight >= 0, "training.role_weights", f"{role} has weight {weight}. Use 0 or more")
    check(
        any(training.role_weights.get(role, 1) for role in ("questioner", "responder", "verifier")),
        "training.role_weights",
        "all roles have weight 0, so nothing would be trained. Give one of them 1",
    )

    check(
        not training.offload or training.recompute == "full",
        "training.offload training.recompute",
        f"with recompute: {training.recompute} every layer keeps much more than its input, which would all have to be "
        "moved. Set training.recompute to full, or training.offload to false",
    )

    check(
        training.moe_dispatcher == "alltoall" or parallel.pipeline == 1,
        "training.moe_dispatcher training.parallel.pipeline",
        "Megatron-Core's all-gather wants rows of one length, but microbatches of different lengths pass through "
        "a pipeline. Use alltoall, or pipeline = 1",
    )

    processes = launched_processes() or parallel.processes
    dense = parallel.tensor * parallel.pipeline * parallel.context
    check(
        processes % dense == 0,
        "training.parallel.processes training.parallel.tensor training.parallel.pipeline training.parallel.context",
        f"{processes} trainer processes cannot be cut into groups of tensor x pipeline x context = "
        f"{parallel.tensor} x {parallel.pipeline} x {parallel.context} = {dense}. Use a multiple of {dense}",
    )
    experts = parallel.expert * parallel.expert_tensor * parallel.pipeline
    check(
        processes % experts == 0,
        "training.parallel.expert training.parallel.expert_tensor training.parallel.pipeline "
        "training.parallel.processes",
        f"{processes} trainer processes cannot be cut into groups of expert x expert_tensor x pipeline = "
        f"{parallel.expert} x {parallel.expert_tensor} x {parallel.pipeline} = {experts}. "
        f"Use a multiple of {experts}",
    )

    rollout = config.rollout
    if rollout.base_port is not None:
        check(
            rollout.base_port + rollout.replicas - 1 <= 65535,
            "rollout.base_port rollout.replicas",
            f"{rollout.replicas} servers from port {rollout.base_port} on would pass 65535. Lower base_port",
        )
    check(
        config.validation.questions is not None or config.validation.every == 0,
        "validation.every validation.questions",
        "there is nothing to validate with. Name a file of held-out questions in validation.questions",
    )
    return faults


# ---------------------------------------------------------------------------------------- paths


def _resolve_paths(config: Config, folder: Callable[[str], Path]) -> None:
    """Make input paths absolute; `folder` gives that of the YAML file with a key."""
    config.model.path = _resolve(config.model.path, folder("model.path"))
    config.data.documents = _resolve(config.data.documents, folder("data.documents"))
    if config.validation.questions is not None:
        config.validation.questions = _resolve(config.validation.questions, folder("validation.questions"))
    # the name of a prompt set of the package stays a name
    if "/" in config.selfplay.prompts or config.selfplay.prompts.startswith("~"):
        config.selfplay.prompts = str(_resolve(Path(config.selfplay.prompts), folder("selfplay.prompts")))
    config.run.output_dir = config.run.output_dir.expanduser()


def _resolve(path: Path, yaml_folder: Path) -> Path:
    path = path.expanduser()
    beside_yaml = yaml_folder / path
    return (beside_yaml if beside_yaml.exists() and not path.exists() else path).absolute()
