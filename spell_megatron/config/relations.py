"""Settings that are each in range, but do not fit together."""

from __future__ import annotations

from spell_megatron.config.faults import Fault
from spell_megatron.config.layout import division_faults
from spell_megatron.config.schema import Config
from spell_megatron.ranks import launched_processes


def trains_verifier(config: Config) -> bool:
    """Whether judgments are meant to be among the rows of an update."""
    verifier = config.selfplay.verifier
    return verifier.enabled and verifier.share > 0 and config.training.role_weights.get("verifier", 1) > 0


def relation_faults(config: Config) -> list[Fault]:
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

    faults += division_faults(parallel, launched_processes() or parallel.processes)

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
