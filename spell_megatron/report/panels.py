"""What the report plots: panels, and which logged metrics each shows.

Everything a run logs can be plotted under "Any metric" of the page; here is what a reader should see first.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from spell_megatron.report.outcomes import ends
from spell_megatron.report.panel import (
    COLOURS,
    ROLE_COLOURS,
    ROLES,
    Panel,
    Section,
    Series,
    all_and_tasks,
    all_or_by_task,
    by_task,
    roles_and_tasks,
    single,
)
from spell_megatron.selfplay.outcomes import Outcome


def sections(tasks: Sequence[str], names: Collection[str]) -> list[Section]:
    """The page's plots.

    Args:
        tasks: tasks of the runs.
        names: every metric that a run logged, for k in pass@k and whether updates overlapped rollouts.
    """
    ks = sorted({int(n.removeprefix("validation/pass@")) for n in names if n.startswith("validation/pass@")})
    return [
        _results(tasks, ks),
        _outcomes(tasks),
        _curriculum(tasks),
        _verifier(tasks),
        _training(),
        _speed(names),
    ]


def _results(tasks: Sequence[str], ks: Sequence[int]) -> Section:
    held_out = [
        Series(f"pass@{k}", (f"validation/pass@{k}",), colour, "validation/standard_error" if k == 1 else None)
        for k, colour in zip(ks, COLOURS, strict=False)
    ]
    held_out_by_task = [
        replace(series, error=f"validation/{task}/standard_error")
        for task, series in zip(tasks, by_task(tasks, "validation/{task}/pass@1"), strict=False)
    ]
    return Section(
        "results",
        "Reward, accuracy, length",
        "Rewards and lengths are means over all that the roles wrote in a step, not only over the update's rows.",
        [
            Panel(
                "Accuracy on held-out questions",
                "Share of questions, which training never sees, with a right answer by the rule check: a single one "
                "(pass@1), one of k (pass@k). Bars: one standard error.",
                "share",
                {"all tasks": held_out}
                | {f"pass@{k} by task": by_task(tasks, f"validation/{{task}}/pass@{k}") for k in ks}
                | ({"pass@1 by task": held_out_by_task} if 1 in ks else {}),
                sparse=True,
            ),
            Panel(
                "Answers that the rule check finds right",
                "Share of the answers to self-made questions. The questions change as the policy learns.",
                "share",
                all_or_by_task(tasks, "right by the rule check", "rule_score"),
            ),
            Panel(
                "Mean reward",
                "Questions: −1 to 1, highest when half of the answers are right. Answers: 0 or 1. "
                "Judgments: 1 with the majority, −1 if invalid.",
                "number",
                roles_and_tasks(tasks, "reward"),
            ),
            Panel(
                "Length of what the roles write",
                "Tokens of a response, mean.",
                "tokens",
                roles_and_tasks(tasks, "response_tokens"),
            ),
            Panel(
                "Answers cut off or without a result",
                "Share of the answers that reached the token limit, or in which no final answer was found.",
                "share",
                all_and_tasks(tasks, {"cut off": "rate/truncated_answers", "no result found": "rate/unparsed_answers"}),
            ),
        ],
    )


def _outcomes(tasks: Sequence[str]) -> Section:
    everything = ["", *(f"{task}/" for task in tasks)]
    return Section(
        "outcomes",
        "What becomes of the questions",
        "Every cluster of documents gives one attempt at a question. Only mixed groups, whose answers are neither "
        "all right nor all wrong, teach the responder.",
        [
            Panel(
                "How attempts end",
                "Share of the step's attempts.",
                "share",
                {(p[:-1] or "all tasks"): ends(f"selfplay/{p}") for p in everything},
                stacked=True,
            ),
            Panel(
                "Why questions are dropped without penalty",
                "Share of the step's attempts.",
                "share",
                all_and_tasks(
                    tasks,
                    {outcome.meaning: f"rate/{outcome}" for outcome in Outcome if outcome.dropped},
                ),
            ),
            Panel(
                "Attempts that a step needs",
                "Until it has its mixed groups. Surplus attempts were begun in vain and are repeated later.",
                "number",
                single(
                    ("attempts", "selfplay/clusters"),
                    ("surplus", "selfplay/surplus_clusters"),
                    ("mixed groups", "selfplay/mixed_groups"),
                ),
            ),
            Panel(
                "Answers right without documents",
                "Share of the grounding check's answers. A question whose answer needs no documents is refused.",
                "share",
                all_or_by_task(tasks, "right without documents", "rate/no_context_right"),
            ),
            Panel(
                "Answers in the gate that reach the reference",
                "Share of the gate's answers. A question whose reference too few of them reach is refused.",
                "share",
                all_or_by_task(tasks, "reach the reference", "rate/gate_answers_reaching_reference"),
            ),
            Panel(
                "What the gate costs",
                "Tokens of its prompts, most of which the engines have in their cache, and of its answers.",
                "number",
                single(
                    ("prompt tokens", "selfplay/count/gate_prompt_tokens"),
                    ("response tokens", "selfplay/count/gate_response_tokens"),
                    ("response tokens of all roles", "selfplay/generated_tokens"),
                ),
            ),
        ],
    )


def _curriculum(tasks: Sequence[str]) -> Section:
    return Section(
        "curriculum",
        "Curriculum",
        "The questioner sees the solved questions that it remembers of a cluster, with their documents, and must "
        "ask something new: its context grows, and questions get harder.",
        [
            Panel(
                "Remembered questions in the questioner's prompt",
                "Mean over the step's attempts.",
                "number",
                all_or_by_task(tasks, "remembered questions", "history_depth"),
            ),
            Panel(
                "Documents in the questioner's prompt",
                "Mean: the new documents and the documents of remembered questions.",
                "number",
                all_or_by_task(tasks, "documents", "context_documents"),
            ),
            Panel(
                "Length of prompts",
                "Tokens, mean. The responder always sees all documents of the cluster.",
                "tokens",
                roles_and_tasks(tasks, "prompt_tokens"),
            ),
            Panel(
                "Questions in the history",
                "Clusters of which at least one question is remembered, and questions that the step added.",
                "number",
                single(("clusters with a history", "history/clusters"), ("added by the step", "history/entered")),
            ),
            Panel(
                "Depth of the history",
                "Remembered questions per cluster that has any, mean.",
                "number",
                single(("depth", "history/mean_depth")),
            ),
        ],
    )


def _verifier(tasks: Sequence[str]) -> Section:
    return Section(
        "verifier",
        "Verifier",
        "Several judgments of an answer are votes; the majority is the verdict. An answer is rewarded if the rule "
        "check or the verdict says that it is right.",
        [
            Panel(
                "Agreement of the judgments",
                "Share of valid votes that are with the majority, and of answers with no two different votes.",
                "share",
                all_and_tasks(
                    tasks,
                    {"votes with the majority": "rate/agreeing_votes", "unanimous answers": "rate/unanimous_votes"},
                ),
            ),
            Panel(
                "Verdicts against the rule check",
                "Share of judged answers. Where only the verdict says right, the verifier alone gives the reward: "
                "a rise may mean that it is being fooled.",
                "share",
                all_and_tasks(
                    tasks,
                    {
                        "only the verdict says right": "rate/right_by_verdict_only",
                        "only the rule says right": "rate/right_by_rule_only",
                    },
                ),
            ),
            Panel(
                "Votes that say YES",
                "Share of valid votes, on answers that the rule check finds right and on others. A verifier that "
                "judges keeps the two apart; one that says NO to everything looks unanimous above, too.",
                "share",
                all_and_tasks(
                    tasks,
                    {
                        "on answers right by the rule": "rate/yes_on_right",
                        "on answers wrong by the rule": "rate/yes_on_wrong",
                    },
                ),
            ),
            Panel(
                "Judgments without use",
                "Share of votes that are invalid; of answers with a tie, or with too few valid votes.",
                "share",
                all_and_tasks(
                    tasks,
                    {
                        "invalid votes": "rate/invalid_votes",
                        "tied answers": "rate/tied_votes",
                        "no verdict": "rate/no_verdict",
                    },
                ),
            ),
        ],
    )


def _training() -> Section:
    return Section(
        "training",
        "Training",
        "Over all response tokens of the update.",
        [
            Panel(
                "Gradient norm",
                "Length of the gradient before clipping at training.optimizer.clip_grad.",
                "number",
                single(("gradient norm", "train/grad_norm")),
            ),
            Panel(
                "Entropy",
                "Of the policy's next-token distribution, in nats: 0 if it is always sure of the next token.",
                "number",
                single(("entropy", "train/entropy")),
            ),
            Panel(
                "How sure the policy is",
                "Mean probability of the most likely token; share of sampled tokens that were the most likely.",
                "share",
                single(
                    ("probability of the most likely", "train/top_probability"),
                    ("most likely was sampled", "train/top_share"),
                ),
            ),
            *_mismatch(),
            Panel(
                "Loss",
                "Its sign and size say little in policy gradients.",
                "number",
                single(("loss", "train/loss")),
            ),
            Panel("Learning rate", "Of the optimizer.", "number", single(("learning rate", "train/lr"))),
            Panel(
                "Rows of the update",
                "By role.",
                "number",
                single(
                    *((label, f"batch/{role}/rows") for role, label in ROLES.items()),
                    colours=ROLE_COLOURS,
                ),
                stacked=True,
            ),
            *_experts(),
        ],
    )


def _mismatch() -> list[Panel]:
    return [
        Panel(
            "Mismatch of engine and trainer",
            "d: log-probability of a token by the trainer, minus that by the engine; 0 is agreement. Mean |d|, and the "
            "divergence by the k3 estimate.",
            "number",
            single(("mean |d|", "train/mismatch_abs"), ("divergence", "train/mismatch_kl")),
            log=True,
        ),
        Panel(
            "Largest ratio of engine and trainer",
            "exp(|d|) of the token on which they differ most; 1 is agreement.",
            "number",
            single(("largest ratio", "train/mismatch_max_ratio")),
        ),
    ]


def _experts() -> list[Panel]:
    """Panels of policies with mixtures of experts."""
    return [
        Panel(
            "Load of the experts",
            "Tokens of the busiest expert over the mean; 1 is balanced. Mean and maximum over layers.",
            "number",
            single(("mean", "train/moe_load_imbalance"), ("maximum", "train/moe_load_imbalance_max")),
        ),
        Panel(
            "Routings changed by replay",
            "Share of replayed tokens that the trainer would have sent to other experts.",
            "share",
            single(("changed", "train/routing_changed")),
        ),
    ]


OVERLAP = Panel(
    "Update during the rollout",
    "Seconds of the update that ran while the engines wrote, and of all of it.",
    "seconds",
    single(("during the rollout", "time/hidden"), ("the whole update", "train/seconds")),
)
"""Of runs whose update does not wait for the end of the rollout."""


def _speed(names: Collection[str]) -> Section:
    return Section(
        "speed",
        "Speed",
        "",
        [
            Panel(
                "Time of a step, by stage",
                "Seconds. Of the update, what was left after the rollout.",
                "seconds",
                {
                    "": [
                        Series("rollout", ("time/rollout",), "blue"),
                        Series("update", ("train/seconds", "-time/hidden"), "orange"),
                        Series("push of weights", ("time/push",), "green"),
                        Series("checkpoint", ("time/checkpoint",), "purple"),
                        Series("validation", ("time/validation",), "red"),
                    ]
                },
                stacked=True,
            ),
            *([OVERLAP] if "time/hidden" in names else []),
            Panel(
                "Tokens per second of the trainer",
                "Prompts and responses of all rows, as if each were computed alone.",
                "tokens",
                single(("trainer", "train/tokens_per_second")),
            ),
            Panel(
                "Tokens per second of the engines",
                "Tokens that the roles wrote, over the time of the rollout; prompts and surplus do not count.",
                "tokens",
                single(("engines", "rollout/tokens_per_second")),
            ),
            Panel(
                "Tokens of the update",
                "In all rows, and those computed once shared prefixes are merged.",
                "tokens",
                single(("in the rows", "train/tokens_unshared"), ("computed", "train/tokens_computed")),
            ),
        ],
    )
