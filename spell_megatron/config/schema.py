"""The settings of a run, with their defaults and their meaning: what a YAML file may hold."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal, TypeVar

# pydantic, not jsonargparse: pydantic reports every fault of a file, jsonargparse stops at the first.
from pydantic import BaseModel, ConfigDict, Field

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


def subsection(schema: type[Section], name: object) -> type[Section] | None:
    """The schema of the section `name` of a schema; None if that is a single setting or unknown."""
    field = schema.model_fields.get(name) if isinstance(name, str) else None
    annotation = field.annotation if field else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


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

    @property
    def dense_ranks(self) -> int:
        """Processes that hold one copy of the dense layers."""
        return self.tensor * self.pipeline * self.context

    @property
    def expert_ranks(self) -> int:
        """Processes that hold one copy of the experts."""
        return self.expert * self.expert_tensor * self.pipeline

    @property
    def fewest_processes(self) -> int:
        """Processes of the smallest run with whole copies of all layers, without context parallelism."""
        return self.pipeline * math.lcm(self.tensor, self.expert * self.expert_tensor)

    def divides(self, processes: int) -> bool:
        """Whether so many processes hold whole copies of all layers."""
        return processes % self.dense_ranks == 0 and processes % self.expert_ranks == 0


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
