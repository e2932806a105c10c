"""The settings of self-play: `selfplay` and the sections in it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from pydantic import Field

from spell_megatron.config.section import Section

Task = Literal["docmath_qa", "doc_general_qa", "doc_mc"]
TASKS: tuple[Task, ...] = get_args(Task)
"""The built-in tasks."""

Reward = Literal["gaussian", "azr", "r_zero", "variance"]


class QuestionerConfig(Section):
    """The role that asks questions about documents."""

    enabled: bool = True
    """Ask questions. If false, the questions come from the documents file, whose rows then also have task, question
    and answer (RLVR, the paper's baseline). The grounding filter, the gate and the history are then off."""
    new_documents: int = Field(5, ge=1)
    """m: number of new documents that the questioner sees per attempt."""
    history: int = Field(3, ge=0)
    """L: number of solved questions remembered per task and cluster. 0 turns the history off."""
    history_documents: Literal["all", "new", "none"] = "none"
    """Which documents of a remembered question the questioner sees again: none, so that the remembered questions are
    examples only and the questioner always sees `new_documents` documents; those that were new to it (the paper); all
    that it was shown (the released code), so that the context grows with each success."""
    history_low: float = 0.0
    """A question enters the history only if its mean responder reward is above this."""
    history_high: float = 1.0
    """A question enters the history only if its mean responder reward is below this. The paper asks for 0 < mean < 1.
    The released code also admits 1; set 1.01 to do the same."""
    quotes: bool = False
    """Ask the questioner to quote what its answer rests on. A question is dropped unless it has quotes and each stands
    in the documents, word for word. The prompt set must have the file evidence.md, and {{evidence}} in the questioner's
    prompts."""
    known_names: bool = False
    """Drop a question if it names something that the documents of its questioner do not. Names are words that start
    with a capital inside a sentence. This costs nothing to check."""
    max_reference_tokens: int = Field(40, ge=1)
    """Longest reference answer of general QA, in tokens. Questions with longer ones are dropped."""
    reward: str = "gaussian"
    """How the questioner's reward follows from the mean responder reward. gaussian: a Gaussian of the mean; azr: 1 -
    mean (Absolute Zero); r_zero: 1 - 2 |mean - 1/2| (R-Zero); variance: a Gaussian of the answers' variance (SPICE);
    MODULE:FUNCTION: a function of your own of (mean, question, reference) to a number from 0 to 1."""
    mu: float = 0.5
    """Mean responder reward at which the Gaussian reward is highest."""
    sigma: float = Field(1 / 6, gt=0)
    """Standard deviation of the Gaussian reward."""
    bad_format_reward: float = -1.0
    """Reward of a question that does not parse."""
    ungrounded_reward: float = -0.5
    """Reward of a question that the policy answers correctly without its documents."""
    unconfirmed_reward: float = -0.5
    """Reward of a question whose reference does not pass selfplay.gate, or whose quotes or names are not in the
    documents. A penalty can drive the questioner to questions that are ever easier; with 0 such questions are only left
    out."""
    advantage_group: Literal["task", "batch"] = "task"
    """Questioner rewards are normalised over the rows of a task, or of the whole batch."""

    @property
    def own_reward(self) -> str | None:
        """MODULE:FUNCTION of the user's own reward; None if it is a built-in one."""
        return self.reward if ":" in self.reward else None


class GroundingConfig(Section):
    """The filter of questions that need no documents."""

    enabled: bool = True
    """Drop questions that the policy answers correctly without documents."""
    samples: int = Field(1, ge=1)
    """Number of answers without documents per question."""
    mc_samples: int = Field(4, ge=1)
    """Number of answers without documents per multiple-choice question. Each sees the options in another order."""
    mc_threshold: float = Field(0.5, gt=0, le=1)
    """A multiple-choice question is dropped if more than this share of these answers is correct."""


class GateConfig(Section):
    """The check that a question's reference follows from the documents. It needs no labels."""

    enabled: bool = True
    """Answer each question from the documents that its questioner saw, before the responder does. Drop the question if
    too few of these answers reach its reference."""
    answers: int = Field(4, ge=1)
    """Number of these answers per question."""
    distractors: int = Field(2, ge=0)
    """Number of other documents of the cluster that are mixed in. As many as fit are used."""
    shuffle: bool = True
    """Draw other distractors and another order of the documents for each of the answers. An answer that was guessed
    changes with them. If false, all answers of a question share one prompt, which costs less on long documents."""
    condition: Literal["share", "majority"] = "share"
    """share: the share of answers that reach the reference must be at least `threshold`. majority: more answers must
    reach the reference than give any other answer."""
    threshold: float = Field(0.75, gt=0, le=1)
    """Smallest share of answers that must reach the reference, for the condition `share`."""


class ResponderConfig(Section):
    """The role that answers."""

    shuffle_documents: bool = False
    """Show each answer the documents in an order of its own. Answers to a question then share no prompt, so that they
    cost more to generate and to train on."""


class VerifierConfig(Section):
    """The role that judges answers."""

    enabled: bool = True
    """Let the policy judge answers. If false, rewards come from the rule check alone."""
    votes: int | None = Field(None, ge=1)
    """Number of judgments per answer. null: selfplay.group_size. With 1, the paper's ablation without a vote, the
    verifier learns to agree with the rule check."""
    agreement_low: float = 0.51
    """Judgments of an answer are trained on if at least this share of the valid ones agrees with the majority."""
    agreement_high: float = 0.99
    """Judgments of an answer are trained on if at most this share of the valid ones agrees with the majority. A single
    judgment always agrees with itself, so this limit does not apply to it."""
    require_rule_agreement: bool = True
    """Judgments of an answer are trained on only if the majority agrees with the rule check."""
    share: float = Field(0.125, ge=0)
    """Number of verifier rows per responder row in an update."""


class SelfPlayConfig(Section):
    """How a step asks, answers and judges questions."""

    tasks: dict[str, float] = {"docmath_qa": 1.0, "doc_general_qa": 1.0, "doc_mc": 1.0}
    """Share of each task among the clusters that are drawn. Only the ratios count. Besides the three built-in tasks
    there are those of own_tasks."""
    own_tasks: dict[str, str] = {}
    """Tasks of your own: for the name of each, MODULE:NAME of a spell_megatron.selfplay.tasks.Task, which holds its
    prompts, how questions and answers are read, and its rule check."""
    rule: str | None = None
    """Rule check of the built-in tasks: MODULE:FUNCTION of a function of your own of (task, prediction, reference) that
    says whether the prediction is right. null: numbers, texts and letters as the paper compares them."""
    code: Path | None = None
    """Folder with the modules that own_tasks, rule and questioner.reward name. null: they are installed."""
    prompts: str = "full"
    """Prompt set: name of a folder in spell_megatron/selfplay/prompt_sets, or path of a folder."""
    groups: int = Field(128, ge=1)
    """N: number of mixed groups per update. A group is the answers to one question; it is mixed if some of them are
    right and some wrong."""
    group_size: int = Field(8, ge=2)
    """G: number of answers per question, and of judgments per answer unless verifier.votes is set."""
    clusters_per_round: int = Field(480, ge=1)
    """Number of clusters in a round. The shares of the tasks hold within each round."""
    max_rounds: int = Field(10, ge=1)
    """Largest number of rounds in a step. After them the step updates with fewer than `groups` mixed groups."""
    negatives_per_positive: float = Field(1.0, ge=0)
    """Number of questioner rows with a reward of 0 or less per row with a positive reward."""
    questioner: QuestionerConfig = QuestionerConfig()
    grounding: GroundingConfig = GroundingConfig()
    gate: GateConfig = GateConfig()
    responder: ResponderConfig = ResponderConfig()
    verifier: VerifierConfig = VerifierConfig()
    shuffle_rewards: bool = False
    """Control experiment: permute the advantages among the rows of each role before the update."""

    @property
    def known_tasks(self) -> tuple[str, ...]:
        """The built-in tasks and the user's own."""
        return (*TASKS, *self.own_tasks)

    @property
    def own_code(self) -> dict[str, str]:
        """MODULE:NAME of each setting that names code of the user's own."""
        named = {"selfplay.rule": self.rule, "selfplay.questioner.reward": self.questioner.own_reward}
        tasks = {f"selfplay.own_tasks.{task}": name for task, name in self.own_tasks.items()}
        return {setting: name for setting, name in (named | tasks).items() if name is not None}

    @property
    def votes(self) -> int:
        """Judgments per answer."""
        return self.verifier.votes or self.group_size
