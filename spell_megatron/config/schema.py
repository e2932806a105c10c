"""The settings of a run: what its YAML file may hold, with defaults and meaning.

The text under each setting is its help (`spell train --help`). Checks between settings are in `config.relations`.
"""

from __future__ import annotations

import math
from datetime import date
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from spell_megatron.config.section import Section
from spell_megatron.config.selfplay_sections import SelfPlayConfig


class RunConfig(Section):
    """The run as a whole."""

    name: str = "spell"
    """Name of the run. Its folder is `output_dir/name`."""
    output_dir: Path = Path("runs")
    """Folder that holds the folders of all runs."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Every random choice of the run follows from this seed."""
    steps: int = Field(70, ge=0)
    """Number of updates. The paper's runs stop at about 70."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the trainer runs. `auto` chooses CUDA if there is a GPU."""


class ModelConfig(Section):
    """The policy."""

    path: Path
    """Folder of a Hugging Face checkpoint (config.json, safetensors, tokenizer); or a model of the hub, ORG/NAME, with
    @REVISION for one that is not the newest. The run's config.yaml names the commit."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the weights in trainer and engines. Use float32 on CPUs, where bfloat16 is slow."""
    prompt_date: date | None = None
    """Day (2026-11-29) for chat templates that print the date, such as Llama 3.1's. null: the day on which the run
    began, after a resume too; in an evaluation the day of the model's run, or else that of the evaluation's start."""


class DataConfig(Section):
    """The documents that questions are asked about."""

    documents: Path
    """Parquet (or .jsonl) file of document clusters. `spell prepare` writes it."""
    sources: dict[str, list[str]] = {}
    """Tasks of each value of the `source` column. A source not named here serves all tasks of `selfplay.tasks`. The
    clusters of a source are divided evenly among its tasks: a cluster keeps its task for the whole run."""


class SamplingConfig(Section):
    """How the engines sample, and how long prompts and responses may be."""

    temperature: float = Field(0.7, gt=0, le=2)
    """Sampling temperature of all roles. The trainer divides its logits by it, too."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Nucleus sampling: only the most probable tokens with this total probability are sampled."""
    max_prompt_tokens: int = Field(18000, ge=1)
    """Longest prompt, in tokens. A longer prompt of the responder is dropped; one of the questioner loses documents."""
    max_response_tokens: int = Field(4096, ge=1)
    """Longest response of the questioner and the responder, in tokens."""
    max_verdict_tokens: int | None = Field(None, ge=1)
    """Longest response of the verifier, in tokens. null: max_response_tokens."""
    max_no_context_tokens: int | None = Field(None, ge=1)
    """Longest answer without documents (selfplay.grounding), in tokens. null: max_response_tokens."""

    @property
    def longest_sequence(self) -> int:
        """Tokens that an engine must have room for: the longest prompt and the longest response."""
        return self.max_prompt_tokens + max(
            self.max_response_tokens, self.max_verdict_tokens or 0, self.max_no_context_tokens or 0
        )


class RolloutConfig(Section):
    """The engines: vLLM servers that generate."""

    urls: list[str] = []
    """Addresses of running vLLM servers, such as http://host:8000. If empty, the run starts `replicas` servers."""
    replicas: int = Field(1, ge=1)
    """Number of servers that the run starts."""
    tensor_parallel: int = Field(1, ge=1)
    """Number of GPUs (on CPUs: processes) per server."""
    colocated: bool = False
    """The servers share the trainer's GPUs, and both work in turn: each GPU has one trainer process and belongs to one
    server. false: servers get GPUs of their own, unless the machine has just as many as either of both needs."""
    concurrency: int = Field(256, ge=1)
    """Number of sequences that a server generates at the same time (vLLM's --max-num-seqs)."""
    gpu_memory_utilization: float | None = Field(None, gt=0, le=1)
    """Share of a GPU's memory that a server may use. null: 0.85; on the trainer's GPUs what the trainer leaves of it
    while servers work. `spell plan` and `--dry-run` print it."""
    cpu_kv_cache_gib: float = Field(1.0, gt=0)
    """KV cache of a server on CPUs, in GiB."""
    threads: int = Field(1, ge=1)
    """Number of threads of a server on CPUs."""
    base_port: int | None = Field(None, ge=1, le=65535)
    """Port of the first server; the others follow it. null: the run chooses free ports."""
    start_timeout: float = Field(1800.0, gt=0)
    """Longest time that a server may take to start, in seconds. A shared filesystem that has not read the model lately
    may need 20 minutes for 60 GB."""
    request_timeout: float = Field(3600.0, gt=0)
    """Longest time that a request may take, in seconds."""
    hang_timeout: float = Field(300.0, gt=0)
    """Time in seconds after which the run asks an engine that has requests whether it is alive, and in which the engine
    must answer. An engine that does not answer is restarted."""
    quantization: Literal["none", "fp8"] = "none"
    """Type in which servers compute linear layers. fp8: float8 with a scale for each output channel, and activations
    with one for each token. vLLM quantises the weights of every push. The trainer computes as before, so that the two
    differ more; `training.importance_sampling` corrects for that. Needs `model.dtype: bfloat16` and GPUs of compute
    capability 8.9 or higher, such as H100. On CPUs, dense models only."""
    batch_invariant: bool = False
    """Use vLLM's batch-invariant kernels: what a server computes for a sequence does not depend on the others that it
    computes at the same time. Slower. Needs GPUs of compute capability 8.0 or higher, such as A100."""
    verify_weights: bool = False
    """After each push of weights, compare a checksum of every tensor on both sides. Pushes then take longer."""
    api_key_env: str = "SPELL_API_KEY"
    """Environment variable that holds the servers' API key. If it is not set, each run makes a random key."""
    extra_args: list[str] = []
    """Further arguments of `vllm serve`, appended unchanged."""
    sampling: SamplingConfig = SamplingConfig()


class ParallelConfig(Section):
    """The layout: how the trainer's processes share the model and the tokens."""

    processes: int = Field(1, ge=1)
    """Number of trainer processes, each with its own GPU. The run starts them on this machine unless torchrun or srun
    has started them."""
    tensor: int = Field(1, ge=1)
    """Tensor-parallel size: number of processes that share each layer's matrices."""
    pipeline: int = Field(1, ge=1)
    """Pipeline-parallel size: number of processes that share the layers."""
    context: int = Field(1, ge=1)
    """Context-parallel size: number of processes that share the tokens of a row."""
    expert: int = Field(1, ge=1)
    """Expert-parallel size: number of processes that share the experts of a mixture-of-experts model."""
    expert_tensor: int = Field(1, ge=1)
    """Tensor-parallel size within an expert: number of processes that share its matrices."""

    @property
    def dense_ranks(self) -> int:
        """Number of processes that hold one copy of the dense layers."""
        return self.tensor * self.pipeline * self.context

    @property
    def expert_ranks(self) -> int:
        """Number of processes that hold one copy of the experts."""
        return self.expert * self.expert_tensor * self.pipeline

    @property
    def fewest_processes(self) -> int:
        """Number of processes of the smallest run with whole copies of all layers, without context parallelism."""
        return self.pipeline * math.lcm(self.tensor, self.expert * self.expert_tensor)

    def divides(self, processes: int) -> bool:
        """Whether this number of processes holds whole copies of all layers."""
        return processes % self.dense_ranks == 0 and processes % self.expert_ranks == 0


class OptimizerConfig(Section):
    """AdamW and its learning rate."""

    lr: float = Field(2e-6, gt=0)
    """Peak learning rate."""
    warmup_steps: int = Field(0, ge=0)
    """Number of updates over which the learning rate rises linearly from 0."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls after the warm-up."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate at the last update if it decays."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the first and second moments."""
    eps: float = Field(1e-8, gt=0)
    """Term that AdamW adds to the denominator."""
    clip_grad: float = Field(1.0, ge=0)
    """Largest norm of the gradient; a larger gradient is scaled down to it. 0 turns clipping off."""
    distributed: bool = True
    """Shard the optimizer's state over the data-parallel ranks."""
    offload: bool = False
    """Keep the optimizer's state in host memory, where it never fits the GPUs. A step takes it to the GPU in pieces."""


class TrainingConfig(Section):
    """The update: loss, memory, layout and optimizer."""

    tokens_per_microbatch: int = Field(32768, ge=1)
    """Largest number of tokens in a microbatch, a row of packed prefix trees. A shared prefix counts once. A longer
    response with its prompt makes a larger one, of up to an eighth more tokens than it has."""
    logprob_chunk: int = Field(512, ge=1)
    """Number of response positions whose logits are computed at the same time. They take 4 bytes per position and token
    of the vocabulary."""
    role_weights: dict[Literal["questioner", "responder", "verifier"], float] = {}
    """Weight of a role's rows in the loss. Roles not named have 1. Rows of a role with 0 are left out of the update."""
    clip_low: float = Field(0.2, ge=0)
    """PPO clips the ratio of probabilities at 1 - clip_low. On-policy the ratio is 1."""
    clip_high: float = Field(0.2, ge=0)
    """PPO clips the ratio of probabilities at 1 + clip_high."""
    clip_dual: float = Field(3.0, gt=1)
    """Dual-clip PPO: largest ratio of probabilities that counts with a negative advantage."""
    importance_sampling: Literal["none", "token", "sequence"] = "none"
    """Weight each token's loss by the ratio of the trainer's probability to the engine's: the ratio of the token, or of
    its whole response. This corrects for engines that compute differently from the trainer."""
    importance_cap: float = Field(2.0, gt=0)
    """Largest weight of importance_sampling. Larger ones are lowered to it."""
    routing_replay: bool = True
    """Mixture-of-experts models: send each token to the experts to which the engine sent it. Turned off automatically
    when the engines do not report their routing (vLLM on CPUs)."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Which activations are computed again in the backward pass to save memory. selective: those of the feed-forward
    layers; full: all but the inputs of the layers."""
    offload: bool = False
    """Keep the inputs of the layers in host memory until the backward pass needs them. Needs `recompute: full`."""
    swap: Literal["auto", "none", "state", "all"] = "auto"
    """What leaves the trainer's GPUs while the engines generate. none: nothing; state: gradients and optimizer; all:
    also weights. Optimizer and weights then wait in host memory. auto: all if engines share the trainer's GPUs, else
    none."""
    overlap: Literal["auto", "off"] = "auto"
    """Forward and backward on answers that are certain to be in the batch, while the engines write the others. Batch
    and gradient are those of an update that waits for all, up to the rounding of sums. auto: where trainer and engines
    share no GPUs; on CPUs where each of their threads has a core. off: an update begins when its rollout has ended."""
    staleness: Literal[0, 1] = 0
    """Updates that the weights which write a batch are behind those that learn from it. 1: the engines write the next
    batch while the trainer works on the one before, so that a step takes the longer of the two, but its gradient is no
    longer exactly on-policy. Needs `importance_sampling: token`, and engines with GPUs of their own."""
    moe_dispatcher: Literal["alltoall", "allgather"] = "alltoall"
    """How tokens reach experts on other processes. alltoall sends each token to the processes that need it. allgather
    sends all tokens to all processes, pads rows to one length and does not work with pipelines. Neither drops
    tokens."""
    moe_aux_loss: float = Field(0.0, ge=0)
    """Mixture-of-experts models: coefficient of the load-balancing loss, which is summed over layers. The loss is
    computed per microbatch, so its gradient depends on how the batch is divided. The policy's gradient does not."""
    threads: int = Field(1, ge=1)
    """Number of threads of each trainer process on CPUs."""
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()

    @field_validator("overlap", mode="before")
    @classmethod
    def _off(cls, value: object) -> object:
        """YAML takes a plain `off` for false."""
        return "off" if value is False else value


class CheckpointConfig(Section):
    """When checkpoints are saved, and how many are kept."""

    every: int = Field(10, ge=1)
    """Number of updates between checkpoints. The run always saves one at its end."""
    keep: int = Field(2, ge=1)
    """Number of checkpoints that are kept besides the best one. Older ones are deleted once a newer one is complete."""
    asynchronous: bool = False
    """Write weights and optimizer state in another process while the run goes on. On CPUs this can need as much
    additional memory as they take."""


class ValidationConfig(Section):
    """Accuracy on held-out questions during the run."""

    questions: Path | None = None
    """JSONL file of held-out questions: task, question, answer, documents. null: no validation."""
    every: int = Field(0, ge=0)
    """Number of updates between validations. 0: only before the first and after the last update. Each validation after
    an update comes with a checkpoint. The one with the highest pass@1 is kept; checkpoints/best.json names it."""
    limit: int | None = Field(None, ge=1)
    """Number of questions used, from the start of the file. null: all."""
    samples: int = Field(4, ge=1)
    """Number of answers per question. pass@1 and pass@samples are reported."""

    def due(self, step: int, steps: int) -> bool:
        """Whether to validate the weights after update `step` of `steps`; step 0 is the start."""
        return self.questions is not None and (step in (0, steps) or (self.every > 0 and step % self.every == 0))


class LoggingConfig(Section):
    """What a run logs besides its metrics."""

    wandb: bool = False
    """Also log to Weights & Biases. The wandb package must be installed."""
    wandb_project: str = "spell"
    """Project at Weights & Biases."""
    wandb_entity: str | None = None
    """User or team at Weights & Biases that the project belongs to. null: the one that is set there as the default."""
    wandb_group: str | None = None
    """Group of runs at Weights & Biases, such as the seeds of one experiment."""
    wandb_tags: list[str] = []
    """Tags of the run at Weights & Biases."""
    wandb_offline: bool = False
    """Write what Weights & Biases gets to the run's folder instead of sending it. `wandb sync` sends it later, from a
    machine that has network access. false: as the variable WANDB_MODE says, or else send it."""
    level: Literal["debug", "info", "warning", "error"] = "info"
    """What is written to logs/train.log in the run's folder: messages of this level and above. Libraries' warnings go
    there too, and with debug what else they say."""
    dump: Literal["none", "jsonl", "parquet"] = "jsonl"
    """Format of the files with the questions, answers and judgments of each step. none: no files."""


class Config(Section):
    """All settings of a run."""

    model: ModelConfig
    data: DataConfig
    run: RunConfig = RunConfig()
    selfplay: SelfPlayConfig = SelfPlayConfig()
    rollout: RolloutConfig = RolloutConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    logging: LoggingConfig = LoggingConfig()
