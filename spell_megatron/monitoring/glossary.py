"""What each metric of a run means."""

from __future__ import annotations

import re
from collections.abc import Iterator

from spell_megatron.selfplay.outcomes import Outcome

_OF_SELFPLAY = {
    "reward": "mean reward of the answers, 0 to 1",
    "rule_score": "share of the answers that the rule check finds right",
    "history_depth": "remembered questions on the cluster of an attempt, mean",
    "context_documents": "documents that the questioner was shown, mean",
    "<role>/reward": "mean reward of what a role wrote: questions -1 to 1, answers 0 or 1, judgments -1 to 1",
    "<role>/prompt_tokens": "mean length of a role's prompts, in tokens",
    "<role>/response_tokens": "mean length of what a role wrote, in tokens",
    "rate/valid": "share of attempts with a usable question: those answered, and those without need of documents or "
    "with a reference that is not confirmed",
    **{f"rate/{outcome}": f"share of attempts that end so: {outcome.meaning}" for outcome in Outcome},
    "rate/truncated_answers": "share of answers cut off at rollout.sampling.max_response_tokens",
    "rate/unparsed_answers": "share of answers that state no final answer",
    "rate/invalid_votes": "share of judgments that are neither yes nor no",
    "rate/tied_votes": "share of judged answers with as many yes as no",
    "rate/unanimous_votes": "share of judged answers whose judgments are all alike",
    "rate/no_verdict": "share of judged answers without a majority",
    "rate/verdict_against_rule": "share of judged answers where verdict and rule check differ",
    "rate/right_by_verdict_only": "share of judged answers that only the verdict finds right",
    "rate/right_by_rule_only": "share of judged answers that only the rule check finds right",
    "rate/agreeing_votes": "share of valid judgments that equal the verdict, where there is one",
    "rate/yes_on_right": "share of yes among valid judgments of answers that the rule check finds right",
    "rate/yes_on_wrong": "share of yes among valid judgments of the other answers; a verifier that judges keeps it "
    "below yes_on_right",
    "rate/no_context_right": "share of answers without documents that are right (selfplay.grounding)",
    "rate/gate_answers_reaching_reference": "share of the gate's answers that reach the reference (selfplay.gate)",
    "rate/quotes_found": "share of the questioner's quotes that stand in its documents (selfplay.questioner.quotes)",
    "rate/unknown_names": "share of names in questions that the documents do not hold",
    "count/context_documents_cut": "documents taken out of questioners' prompts because they did not fit",
    "count/verifier_prompt_too_long": "answers not judged because the verifier's prompt did not fit",
    "count/gate_prompt_tokens": "tokens of the gate's prompts",
    "count/gate_response_tokens": "tokens of the gate's answers",
}
"""Names behind `selfplay/`, and behind `selfplay/<task>/` for the attempts of one task."""

MEANINGS = {
    "selfplay/clusters": "clusters that the step used: one question was tried on each",
    "selfplay/surplus_clusters": "clusters begun and not needed",
    "selfplay/mixed_groups": "questions with both right and wrong answers; the step aims at selfplay.groups",
    "selfplay/generated_tokens": "tokens of all questions, answers and judgments",
    **{f"selfplay/{name}": meaning for name, meaning in _OF_SELFPLAY.items()},
    **{f"selfplay/<task>/{name}": f"of one task: {meaning}" for name, meaning in _OF_SELFPLAY.items()},
    "batch/<role>/rows": "rows of a role in the update",
    "batch/<role>/reward": "mean reward of a role's rows in the update",
    "batch/<role>/response_tokens": "mean length of a role's responses in the update, in tokens",
    "batch/<role>/truncated": "share of a role's rows in the update that were cut off",
    "history/clusters": "clusters with remembered questions",
    "history/mean_depth": "remembered questions per such cluster, mean",
    "history/entered": "questions that the step added to the history",
    "train/loss": "policy loss per response token; on-policy its value says little, its gradient counts",
    "train/grad_norm": "norm of the gradient before clipping (training.optimizer.clip_grad)",
    "train/lr": "learning rate of the update",
    "train/skipped": "1 if the gradient was not finite, so that the weights did not change",
    "train/empty": "1 if there was nothing to train on",
    "train/entropy": "mean entropy of the policy at the response tokens, in nats; near 0 it hardly varies",
    "train/top_probability": "mean probability of the most likely token",
    "train/top_share": "share of response tokens that are the most likely one",
    "train/mismatch_abs": "mean |trainer - engine| of log-probabilities of sampled tokens",
    "train/mismatch_kl": "estimate of KL(engine || trainer) per token",
    "train/mismatch_max_ratio": "largest ratio of the two probabilities of a token",
    "train/importance_weight": "mean of the truncated importance weights (training.importance_sampling)",
    "train/importance_capped": "share of importance weights that reach training.importance_cap",
    "train/staleness": "updates between the weights that wrote the rows and those that learn from them, mean over rows",
    "train/response_tokens": "tokens that the loss is a mean of",
    "train/tokens_unshared": "tokens of all rows; shown as `tokens`",
    "train/tokens_computed": "tokens computed, shared prefixes once",
    "train/sharing": "tokens_unshared / tokens_computed",
    "train/microbatches": "microbatches of a data-parallel rank",
    "train/seconds": "time of the update, in seconds, also of that part which ran during the rollout",
    "train/tokens_per_second": "tokens_unshared / seconds, over all ranks",
    "train/moe_load_imbalance": "tokens of the fullest expert over the mean, mean over layers",
    "train/moe_load_imbalance_max": "the same in the layer where it is largest",
    "train/moe_unused_experts": "share of experts that got no token",
    "train/moe_aux_loss": "load-balancing loss without its coefficient (training.moe_aux_loss); 1 is balanced",
    "train/routing_replayed": "share of tokens that went to the experts to which the engine sent them",
    "train/routing_changed": "share of these that the trainer alone would have sent to other experts",
    "validation/pass@<k>": "share of held-out questions with a right answer among k, by the rule check",
    "validation/questions": "number of held-out questions",
    "validation/standard_error": "standard error of pass@1 over the questions",
    "validation/question_set": "checksum of the held-out questions: where it is equal, they are",
    "validation/<task>/pass@<k>": "the same of one task",
    "validation/<task>/questions": "held-out questions of one task",
    "validation/<task>/standard_error": "standard error of pass@1 over the questions of one task",
    "rollout/tokens_per_second": "generated tokens per second of the rollout that wrote them",
    "rollout/restarts": "engines that were started again in the step",
    "push/bytes": "bytes of weights sent to the engines",
    "push/verified": "tensors whose checksums were compared after the push (rollout.verify_weights)",
    "time/rollout": "seconds of questions, answers and judgments in the step; with `training.staleness` those of the "
    "next step's batch",
    "time/hidden": "seconds of the update that ran during a rollout (`training.overlap`, `training.staleness`)",
    "time/push": "seconds in which the weights went to the engines",
    "time/swap": "seconds in which rank 0 left GPUs that engines share, and came back (`training.swap`)",
    "time/checkpoint": "seconds of saving a checkpoint, or of preparing one that is written in the background",
    "time/validation": "seconds of the validation",
    "time/step": "seconds of the whole step, without the validation",
}
"""Name of a metric -> what it means. `<task>`, `<role>` and `<k>` stand for any task, role and number."""

LEGEND = (
    "reward: mean of the answers. mixed: share of questions with right and wrong answers, which teach. valid: share of "
    "usable questions. tokens: of the update. `spell metrics` explains every number of metrics.jsonl."
)
"""What the line of a step shows, for its first occurrence."""


def meaning(name: str) -> str | None:
    """What a metric of this name means; None if it is not known."""
    return MEANINGS.get(name) or next((text for form, text in MEANINGS.items() if _matches(form, name)), None)


def search(word: str) -> Iterator[tuple[str, str]]:
    """(name, meaning) of the metric of this name, or else of those whose name or meaning holds the word."""
    if exact := meaning(word):
        yield word, exact
        return
    yield from ((name, text) for name, text in MEANINGS.items() if word.lower() in f"{name} {text}".lower())


def _matches(form: str, name: str) -> bool:
    kinds = {"<role>": "(?:questioner|responder|verifier)", "<task>": "[a-z][a-z0-9_]*", "<k>": r"\d+"}
    pattern = re.escape(form)
    for kind, choice in kinds.items():
        pattern = pattern.replace(re.escape(kind), choice)
    return re.fullmatch(pattern, name) is not None
