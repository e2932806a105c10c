"""The streaming roles, driven by a scripted policy whose answers depend only on prompt and seed.

A scripted policy makes every timing and every kind of bad sample happen on demand; the same pipeline
runs against real engines in tests/test_train.py.
"""

import asyncio
import json
import random

import numpy as np
import pytest
from simulated_run import Bytes

from spell_megatron.config.schema import SamplingConfig, SelfPlayConfig
from spell_megatron.errors import UserError
from spell_megatron.rollout.client import Completion
from spell_megatron.selfplay.documents import Cluster
from spell_megatron.selfplay.history import History
from spell_megatron.selfplay.prompts import PromptSet
from spell_megatron.selfplay.sampler import ClusterSampler
from spell_megatron.selfplay.seeds import derive_seed
from spell_megatron.selfplay.selfplay import SelfPlay

TASKS = ("docmath_qa", "doc_general_qa", "doc_mc")
KINDS = ("mixed", "mixed", "right", "wrong", "format", "zero", "known", "long")


class ScriptedPolicy:
    """Acts on the behaviour named in the cluster's documents; `jitter` reorders completions."""

    def __init__(self, jitter=0, version="1", fail=None):
        self.jitter, self.version, self.fail = random.Random(jitter) if jitter else None, version, fail
        self.requests, self.cancelled, self.running = [], 0, 0

    async def generate(self, prompt_ids, *, n, seed, max_tokens, affinity, prompt_routing=True):
        prompt = bytes(prompt_ids).decode()
        self.requests.append((affinity, prompt, seed, n))
        try:
            for _ in range(self.jitter.randrange(8) if self.jitter else 0):
                await asyncio.sleep(0)
            if affinity.endswith("slow"):
                await asyncio.sleep(0.05)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.fail and self.fail in prompt:
            raise UserError("engine 0 is gone")
        texts = [self.text(prompt, affinity, seed + i) for i in range(n)]
        start = len(prompt_ids) if prompt_routing else 0
        return [
            Completion(ids, [-0.5] * len(ids), reason, self.version, np.zeros((start + len(text) - 1, 2, 2)))
            for text, reason in texts
            for ids in [list(text.encode())]
        ]

    def text(self, prompt, affinity, seed):
        role, task = prompt.split("|")[:2]
        kind = affinity.split("-")[1]
        coin = random.Random(seed).random() < 0.5
        if role == "questioner":
            if kind == "format":
                return "no json here", "stop"
            if kind == "long":
                return "and on and on", "length"
            record = {"question": f"What about {affinity} {seed}?", "answer": "B" if task == "doc_mc" else "42"}
            if kind == "zero":
                record["answer"] = "0" if task == "docmath_qa" else "word " * 50
            if task == "doc_mc":
                record["options"] = {"A": "one", "B": "42", "C": "three", "D": "four"}
            return json.dumps(record), "stop"
        if role == "responder":
            right = {"mixed": coin, "right": True, "known": True}.get(kind, False)
            if "|Empty|" in prompt:
                right = kind == "known"
            value = "42" if right else "7"
            if task == "doc_mc":  # the letter whose option is the value
                wanted = "42" if right else "three"
                value = next((line[1] for line in prompt.splitlines() if line.startswith("(") and wanted in line), "C")
            return f"So the answer is {value}.", "stop"
        reference, prediction = prompt.split("|")[3:5]
        vote = reference == prediction if random.Random(seed).random() < 0.8 else reference != prediction
        return ("[[YES]]" if vote else "[[NO]]") if random.Random(seed + 7).random() < 0.95 else "hmm", "stop"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    texts = {"document": "{{document}}", "example": "{{number}} {{question}} {{answer}}"}
    for task in TASKS:
        letter = "|{{letter}}" if task == "doc_mc" else ""
        texts[f"questioner_{task}"] = f"questioner|{task}|{{{{documents}}}}{letter}"
        texts[f"questioner_{task}_history"] = f"questioner|{task}|{{{{documents}}}}|{{{{examples}}}}{letter}"
        texts[f"responder_{task}"] = f"responder|{task}|{{{{documents}}}}|{{{{question}}}}"
    texts["verifier"] = "verifier||{{question}}|{{reference}}|{{prediction}}"
    for name, text in texts.items():
        (folder / f"{name}.md").write_text(text)
    return PromptSet.load(str(folder))


def make_selfplay(prompts, n_clusters=120, groups=10, kinds=KINDS, documents=7, asked=None, **settings):
    clusters = [
        Cluster(
            f"{i}-{kinds[i % len(kinds)]}",
            tuple(f"Document {j} of cluster {i}." for j in range(documents)),
            tuple(f"{i}/{j}" for j in range(documents)),
            "fiction",
            **(asked(i) if asked else {}),
        )
        for i in range(n_clusters)
    ]
    sampling, untrained = settings.pop("sampling", SamplingConfig()), settings.pop("untrained", ())
    config = SelfPlayConfig(**{"groups": groups, "group_size": 4, "clusters_per_round": 30} | settings)
    sampler = ClusterSampler(clusters, config.tasks, {}, config.clusters_per_round, 3)
    history = History(config.questioner.history)
    return SelfPlay(config, sampling, prompts, Bytes(), sampler, history, 11, untrained)


def roll(selfplay, policy, step=1, version="1"):
    return asyncio.run(selfplay.roll_out(policy, step, version))


def summary(rollout):
    return [(s.uid, s.role, s.group, s.outcome, s.prompt, s.response, s.reward, s.advantage) for s in rollout.batch]


def test_two_timings_give_the_same_batches_history_and_sampler(prompts):
    one, two = make_selfplay(prompts), make_selfplay(prompts)
    for step in (1, 2, 3):
        calm, wild = roll(one, ScriptedPolicy(), step), roll(two, ScriptedPolicy(jitter=step), step)
        assert calm.clusters == wild.clusters
        assert summary(calm) == summary(wild)
        assert one.state_dict() == two.state_dict()
    assert one.state_dict()["history"], "three steps must have left something in the history"


def test_resume_from_state_gives_the_same_next_batch(prompts):
    one = make_selfplay(prompts)
    roll(one, ScriptedPolicy(), 1)
    state = json.loads(json.dumps(one.state_dict()))
    other = make_selfplay(prompts)
    other.load_state_dict(state)
    assert summary(roll(one, ScriptedPolicy(), 2)) == summary(roll(other, ScriptedPolicy(jitter=5), 2))


def test_the_step_uses_the_shortest_prefix_with_n_mixed_groups(prompts):
    selfplay = make_selfplay(prompts)
    order = [cluster.id for cluster, _ in zip_first(selfplay.sampler.upcoming(), 60)]
    rollout = roll(selfplay, ScriptedPolicy(jitter=2))
    assert rollout.clusters == order[: len(rollout.clusters)]
    mixed = {s.uid for s in rollout.batch if s.role == "responder"}
    assert len(mixed) == 10 and f"1.{len(rollout.clusters) - 1}" in mixed
    # the next step begins where the prefix ended: surplus clusters were given back
    following = [cluster.id for cluster, _ in zip_first(selfplay.sampler.upcoming(), 5)]
    assert following == order[len(rollout.clusters) : len(rollout.clusters) + 5]


def test_samples_carry_their_routings(prompts):
    """One answer of a group has that of the prompt too; answers that are not trained on have none."""
    rollout = roll(make_selfplay(prompts), ScriptedPolicy())
    assert len({s.role for s in rollout.batch}) == 3
    for sample in rollout.batch:
        assert len(sample.routing) + 1 in (len(sample.response_ids), len(sample.prompt_ids) + len(sample.response_ids))
    groups = {}
    for sample in rollout.samples:
        groups.setdefault((sample.role, sample.group), []).append(sample)
    for (role, _), samples in groups.items():
        whole = [s.routing is not None and len(s.routing) >= len(s.prompt_ids) for s in samples]
        if role != "responder":
            assert all(whole)
        elif len({s.reward for s in samples}) > 1:
            assert whole == [True, False, False, False] and all(len(s.routing) for s in samples)
        else:
            assert all(s.routing is None for s in samples)


def zip_first(iterator, count):
    return [next(iterator) for _ in range(count)]


def test_slow_clusters_keep_their_place(prompts):
    """A slow cluster admitted early is waited for; fast later ones do not displace it."""
    selfplay = make_selfplay(prompts, kinds=("mixed-slow", "mixed"), groups=4)
    rollout = roll(selfplay, ScriptedPolicy())
    used = {s.cluster_id for s in rollout.batch if s.role == "responder"}
    assert any(cluster.endswith("slow") for cluster in used)
    assert {s.cluster_id for s in rollout.batch} <= set(rollout.clusters)


def test_surplus_is_cancelled(prompts):
    selfplay = make_selfplay(prompts, kinds=("mixed", "mixed", "mixed", "mixed-slow"), groups=3)
    policy = ScriptedPolicy()
    rollout = roll(selfplay, policy)
    if rollout.metrics["selfplay/surplus_clusters"]:
        assert policy.cancelled or len(policy.requests) > 0
    assert rollout.metrics["selfplay/mixed_groups"] == 3


def test_every_kind_of_outcome_is_counted_and_rewarded(prompts):
    rollout = roll(make_selfplay(prompts, groups=20), ScriptedPolicy())
    rates = {k.removeprefix("selfplay/rate/"): v for k, v in rollout.metrics.items() if k.startswith("selfplay/rate/")}
    for name in ("mixed", "all_0", "all_1", "ungrounded", "bad_format", "truncated", "valid"):
        assert rates[name] > 0, name
    assert rates["zero_answer"] + rates["long_reference"] + rates["all_0"] > 0
    outcomes = ("mixed", "all_0", "all_1", "ungrounded", "bad_format", "truncated", "zero_answer", "long_reference")
    assert sum(rates[name] for name in outcomes) == pytest.approx(1)
    for task in TASKS:
        assert f"selfplay/{task}/rate/mixed" in rollout.metrics
    rewards = {"bad_format": -1.0, "ungrounded": -0.5, "all_0": 0.0, "all_1": 0.0}
    questions = [s for s in rollout.samples if s.role == "questioner"]
    for outcome, reward in rewards.items():
        assert {s.reward for s in questions if s.outcome == outcome} == {reward}
    assert rollout.metrics["selfplay/rate/invalid_votes"] > 0


@pytest.mark.parametrize("task", ["", *TASKS])
def test_metrics_of_roles_and_votes_are_those_of_the_samples(prompts, task):
    selfplay = make_selfplay(prompts, groups=30)
    for step in (1, 2):  # in the second some questions are remembered
        before = selfplay.history.state_dict()
        rollout = roll(selfplay, ScriptedPolicy(), step)
    samples = [s for s in rollout.samples if task in ("", s.task)]
    metrics = {k.removeprefix(f"selfplay/{task}/" if task else "selfplay/"): v for k, v in rollout.metrics.items()}
    for role in ("questioner", "responder", "verifier"):
        rows = [s for s in samples if s.role == role]
        for name, value in (
            ("reward", lambda s: s.reward),
            ("prompt_tokens", lambda s: len(s.prompt_ids)),
            ("response_tokens", lambda s: len(s.response_ids)),
        ):
            assert metrics[f"{role}/{name}"] == pytest.approx(np.mean([value(s) for s in rows]))
    answers = [s for s in samples if s.role == "responder"]
    judged = [s for s in answers if s.prediction is not None]
    kinds = {
        "verdict_against_rule": [s.verdict is not None and s.verdict != s.rule_score for s in judged],
        "right_by_verdict_only": [s.verdict == 1 and not s.rule_score for s in judged],
        "right_by_rule_only": [s.verdict == 0 and s.rule_score == 1 for s in judged],
        "no_verdict": [s.verdict is None for s in judged],
    }
    for name, cases in kinds.items():
        assert metrics[f"rate/{name}"] == pytest.approx(np.mean(cases))
    # a vote for the verdict has the reward 1, a valid one against it 0
    valid = [s.reward for s in samples if s.role == "verifier" and s.reward >= 0]
    assert 0 < np.mean(valid) < 1 and metrics["rate/agreeing_votes"] == pytest.approx(np.mean(valid))
    for name, rule in (("yes_on_right", 1), ("yes_on_wrong", 0)):
        votes = [s.verdict for s in samples if s.role == "verifier" and s.rule_score == rule and s.verdict in (0, 1)]
        assert metrics[f"rate/{name}"] == pytest.approx(np.mean(votes))
    if not task:
        assert metrics["rate/right_by_verdict_only"] > 0
        assert metrics["generated_tokens"] == sum(len(s.response_ids) for s in rollout.samples)
        entries = {(task, cluster): len(entries) for task, cluster, entries in before["entries"]}
        tasks = {s.cluster_id: s.task for s in samples}
        depths = [entries.get((tasks.get(cluster), cluster), 0) for cluster in rollout.clusters]
        assert sum(depths) > 0 and metrics["history_depth"] == pytest.approx(np.mean(depths))


def test_the_repr_of_a_step_has_no_tokens(prompts):
    """asyncio.Runner makes it twice a step; of prompts of 100,000 tokens it would take seconds."""
    rollout = roll(make_selfplay(prompts), ScriptedPolicy())
    assert "prompt_ids" not in repr(rollout) and rollout.clusters[0] in repr(rollout)


def test_the_history_counts_what_entered_it(prompts):
    selfplay = make_selfplay(prompts)
    entered = roll(selfplay, ScriptedPolicy()).metrics["history/entered"]
    assert entered == len(selfplay.history.depths()) > 0


def test_questions_dropped_without_penalty_are_not_trained_on(prompts):
    rollout = roll(make_selfplay(prompts, groups=20), ScriptedPolicy())
    assert not any("-long" in s.cluster_id for s in rollout.batch)


def test_limit_of_rounds_updates_with_what_there_is(prompts):
    selfplay = make_selfplay(prompts, kinds=("mixed", "wrong", "wrong", "wrong"), groups=50, max_rounds=1)
    rollout = roll(selfplay, ScriptedPolicy())
    assert len(rollout.clusters) == 30
    assert 0 < rollout.metrics["selfplay/mixed_groups"] < 50
    assert rollout.batch


@pytest.mark.parametrize("verifier", [False, True])
def test_questions_of_the_file_instead_of_a_questioner(prompts, verifier):
    tasks = ("doc_general_qa", "docmath_qa")

    def rolled(policy):
        selfplay = make_selfplay(
            prompts,
            kinds=("mixed", "right", "wrong"),
            asked=lambda i: {"task": tasks[i // 3 % 2], "question": f"What is in {i}?", "answer": "42"},
            verifier={"enabled": verifier},
            tasks=dict.fromkeys(tasks, 1.0),
            questioner={"enabled": False},
        )
        return roll(selfplay, policy)

    policy = ScriptedPolicy(jitter=5)
    rollout = rolled(policy)
    assert not [prompt for _, prompt, *_ in policy.requests if prompt.startswith("questioner") or "|Empty|" in prompt]
    for answer in (sample for sample in rollout.samples if sample.role == "responder"):
        number = int(answer.cluster_id.split("-")[0])
        assert answer.task == tasks[number // 3 % 2] and answer.reference == "42"
        assert answer.prompt.endswith(f"What is in {number}?")
    rows = [sample for sample in rollout.batch if sample.role == "responder"]
    assert len(rows) == 40
    assert verifier or all(row.cluster_id.endswith("mixed") for row in rows)
    assert {sample.role for sample in rollout.batch} == ({"responder", "verifier"} if verifier else {"responder"})
    for group in {row.group for row in rows}:
        assert sum(row.advantage for row in rows if row.group == group) == pytest.approx(0, abs=1e-6)
    assert rollout.metrics["history/clusters"] == 0
    assert summary(rolled(ScriptedPolicy(jitter=9))) == summary(rollout)


# Ablations: each setting of the table in docs/algorithm.md does what the table says, and nothing else


def rows_of(samples, role):
    return [sample for sample in samples if sample.role == role]


def asked(policy, role):
    """Requests for a role (prompts of the grounding check are not the responder's)."""
    wanted = {"grounding": "|Empty|", "questioner": "questioner|", "verifier": "verifier|"}[role]
    return [prompt for _, prompt, *_ in policy.requests if wanted in prompt]


def test_without_the_grounding_check_known_questions_are_put_to_the_responder(prompts):
    policy = ScriptedPolicy()
    rollout = roll(make_selfplay(prompts, groups=20, grounding={"enabled": False}), policy)
    assert not asked(policy, "grounding")
    assert rollout.metrics["selfplay/rate/ungrounded"] == 0 and "selfplay/rate/no_context_right" not in rollout.metrics
    known = [s for s in rollout.samples if s.cluster_id.endswith("-known")]
    assert rows_of(known, "responder")
    assert {s.outcome for s in rows_of(known, "questioner")} <= {
        "all_0",
        "all_1",
        "mixed",
    }


def test_one_grounding_answer_for_multiple_choice(prompts):
    def answers(**settings):
        policy = ScriptedPolicy()
        roll(make_selfplay(prompts, tasks={"doc_mc": 1.0}, kinds=("known",), max_rounds=1, **settings), policy)
        return len(asked(policy, "grounding")) / len(asked(policy, "questioner"))

    assert answers() == 4
    assert answers(grounding={"mc_samples": 1}) == 1


@pytest.mark.parametrize("reward", [-1.0, 0.0])
def test_questions_that_do_not_parse_lose_against_others_with_and_without_a_penalty(prompts, reward):
    """Without the penalty they still count as questions without reward, which are compared with rewarded ones."""
    kinds = ("mixed", "mixed", "format")
    selfplay = make_selfplay(prompts, kinds=kinds, groups=20, questioner={"bad_format_reward": reward})
    questions = rows_of(roll(selfplay, ScriptedPolicy()).batch, "questioner")
    bad = [s for s in questions if s.outcome == "bad_format"]
    assert bad and {s.reward for s in bad} == {reward}
    assert all(s.advantage < 0 for s in bad)
    ratio = make_selfplay(prompts, kinds=kinds, groups=20, negatives_per_positive=0.0)
    assert {s.outcome for s in rows_of(roll(ratio, ScriptedPolicy()).batch, "questioner")} == {"mixed"}


def test_no_verifier_share_judges_but_does_not_train(prompts):
    policy = ScriptedPolicy()
    plain, without = roll(make_selfplay(prompts), policy), roll(make_selfplay(prompts, verifier={"share": 0.0}), policy)
    assert rows_of(plain.batch, "verifier") and not rows_of(without.batch, "verifier")
    votes = [[(s.group, s.response, s.reward) for s in rows_of(r.samples, "verifier")] for r in (plain, without)]
    assert votes[0] == votes[1]
    assert rows_of(plain.batch, "responder") == rows_of(without.batch, "responder")


def test_without_a_verifier_the_rule_check_alone_rewards(prompts):
    policy = ScriptedPolicy()
    rollout = roll(make_selfplay(prompts, verifier={"enabled": False}), policy)
    assert not asked(policy, "verifier")
    assert all(s.reward == s.rule_score and s.verdict is None for s in rows_of(rollout.samples, "responder"))


def test_a_single_judgment_decides_and_learns_from_the_rule_check(prompts):
    policy = ScriptedPolicy()
    rollout = roll(make_selfplay(prompts, groups=20, verifier={"votes": 1, "share": 0.5}), policy)
    assert {n for _, prompt, _, n in policy.requests if prompt.startswith("verifier|")} == {1}
    judgments = {s.group: s for s in rows_of(rollout.samples, "verifier")}
    assert {s.verdict for s in judgments.values()} == {1, 0, -1}
    assert len({(s.group, s.prediction) for s in judgments.values()}) == len(judgments)  # one an answer
    trained = rows_of(rollout.batch, "verifier")
    assert len(trained) == 40  # half as many as the answers of 20 groups of 4
    for row in trained:
        assert row.verdict == row.rule_score and row.reward == 1.0
        assert row.advantage == pytest.approx(1, abs=1e-5)
    # it alone decides what an answer is worth beside the rule check
    for answer in rows_of(rollout.samples, "responder"):
        assert answer.reward == max(answer.rule_score, answer.verdict or 0)


def test_verdicts_against_the_rule_check_are_trained_on_if_asked_for(prompts):
    def against(**verifier):
        rollout = roll(make_selfplay(prompts, groups=20, verifier={"share": 4.0, **verifier}), ScriptedPolicy())
        answers = {}  # the judgments of an answer by their group
        for row in rows_of(rollout.batch, "verifier"):
            answers.setdefault(row.group, []).append(row)
        verdicts = [next(r.verdict for r in rows if r.reward == 1) for rows in answers.values()]
        rules = [rows[0].rule_score for rows in answers.values()]
        return sum(verdict != rule for verdict, rule in zip(verdicts, rules, strict=True)), len(answers)

    assert against()[0] == 0 < against()[1]
    wrong, groups = against(require_rule_agreement=False)
    assert wrong > 0 and groups > against()[1]


@pytest.mark.parametrize(
    ("settings", "value"),
    [
        ({}, lambda mean: np.exp(-((mean - 0.5) ** 2) / (2 / 36))),
        ({"sigma": 0.25}, lambda mean: np.exp(-((mean - 0.5) ** 2) / (2 / 16))),
        ({"reward": "azr"}, lambda mean: 1 - mean),
        ({"reward": "r_zero"}, lambda mean: 1 - 2 * abs(mean - 0.5)),
    ],
)
def test_rewards_of_questions(prompts, settings, value):
    rollout = roll(make_selfplay(prompts, groups=30, questioner=settings), ScriptedPolicy())
    answers = {}
    for answer in rows_of(rollout.samples, "responder"):
        answers.setdefault(answer.uid, []).append(answer.reward)
    means = set()
    for question in rows_of(rollout.samples, "questioner"):
        mean = np.mean(answers.get(question.uid, [0]))
        if question.outcome == "mixed":
            assert question.reward == pytest.approx(value(mean))
            means.add(mean)
        elif question.outcome not in ("bad_format", "ungrounded"):  # no question without a penalty has less than 0
            assert question.reward == 0
    assert means == {0.25, 0.5, 0.75}


@pytest.mark.parametrize("role", ["questioner", "responder", "verifier"])
def test_a_role_that_is_not_trained_plays_but_has_no_rows(prompts, role):
    """The rows of the others, advantages included, are what they are without it."""
    plain, without = roll(make_selfplay(prompts), ScriptedPolicy()), make_selfplay(prompts, untrained=[role])
    without = roll(without, ScriptedPolicy())
    assert without.samples == plain.samples
    assert rows_of(plain.batch, role) and without.batch == [s for s in plain.batch if s.role != role]
    assert without.metrics[f"batch/{role}/rows"] == 0 and f"batch/{role}/reward" not in without.metrics


def test_no_history(prompts):
    selfplay = make_selfplay(prompts, n_clusters=3, kinds=("mixed",), groups=3, max_rounds=1, questioner={"history": 0})
    for step in (1, 2, 3):
        policy = ScriptedPolicy()
        rollout = roll(selfplay, policy, step)
        assert rollout.metrics["selfplay/history_depth"] == rollout.metrics["history/entered"] == 0
        assert all(len(s.document_ids) == 5 for s in rows_of(rollout.samples, "questioner"))
        # the template with examples ends with the question that it is shown
        assert not [prompt for prompt in asked(policy, "questioner") if "What about" in prompt]


def test_all_right_questions_are_remembered_if_asked_for(prompts):
    def remembered(**questioner):
        selfplay = make_selfplay(prompts, kinds=("right",), max_rounds=1, questioner=questioner)
        roll(selfplay, ScriptedPolicy())
        return len(selfplay.history.depths())

    verifier_errs = remembered()  # none but where a mistaken judgment makes no difference: answers are right
    assert verifier_errs == 0 < remembered(history_high=1.01)


def test_the_group_size_is_that_of_answers_and_of_judgments(prompts):
    for size, votes in ((6, {}), (3, {"votes": 5})):
        policy = ScriptedPolicy()
        rollout = roll(make_selfplay(prompts, group_size=size, verifier={"share": 1.0, **votes}), policy)
        sizes = {}
        for row in rollout.batch:
            sizes.setdefault((row.role, row.group), []).append(row)
        assert {len(rows) for (role, _), rows in sizes.items() if role == "responder"} == {size}
        assert {len(rows) for (role, _), rows in sizes.items() if role == "verifier"} == {votes.get("votes", size)}


def test_no_mixed_group_at_all_gives_a_batch_without_answers(prompts):
    verifier = {"enabled": False}
    selfplay = make_selfplay(prompts, kinds=("wrong",), groups=5, max_rounds=1, verifier=verifier)
    rollout = roll(selfplay, ScriptedPolicy())
    assert not [s for s in rollout.batch if s.role == "responder"]


def test_a_bad_sample_is_an_outcome_not_the_end(prompts, monkeypatch):
    from spell_megatron.selfplay import roles

    real = roles.rule_score

    def fragile(task, prediction, reference):
        if task == "doc_mc" and prediction == "A":
            raise ZeroDivisionError("scorer broke")
        return real(task, prediction, reference)

    monkeypatch.setattr(roles, "rule_score", fragile)
    rollout = roll(make_selfplay(prompts, groups=12), ScriptedPolicy())
    assert rollout.metrics["selfplay/mixed_groups"] == 12


def test_a_broken_program_ends_the_step(prompts, monkeypatch):
    from spell_megatron.selfplay import roles

    def broken(*_):
        raise ZeroDivisionError("always")

    monkeypatch.setattr(roles, "parse_verdict", broken)
    with pytest.raises(UserError, match="internal error"):
        roll(make_selfplay(prompts, kinds=("mixed",), groups=60), ScriptedPolicy())


def test_engine_failure_ends_the_step_with_its_own_message(prompts):
    selfplay = make_selfplay(prompts)
    before = selfplay.state_dict()
    with pytest.raises(UserError, match="engine 0 is gone"):
        roll(selfplay, ScriptedPolicy(fail="responder|"))
    assert selfplay.state_dict() == before, "a failed step must leave no trace in the state"


def test_rows_of_another_weight_version_are_refused(prompts):
    with pytest.raises(UserError, match="mixed versions"):
        roll(make_selfplay(prompts), ScriptedPolicy(version="0"))


def test_history_grows_the_context(prompts):
    """5 documents, then 10, then 15: every solved question adds the new documents of its visit."""
    selfplay = make_selfplay(prompts, n_clusters=3, kinds=("mixed",), groups=3, documents=20, max_rounds=1)
    sizes = []
    for step in (1, 2, 3, 4):
        rollout = roll(selfplay, ScriptedPolicy(), step)
        sizes.append(max(len(s.document_ids) for s in rollout.samples if s.role == "questioner"))
    assert sizes[0] == 5 and sizes == sorted(sizes) and sizes[-1] > 10


def test_too_long_questioner_prompt_loses_documents(prompts):
    sampling = SamplingConfig(max_prompt_tokens=120)
    selfplay = make_selfplay(prompts, kinds=("format",), groups=1, max_rounds=1, sampling=sampling)
    selfplay.tokenizer.count = lambda text: len(text.encode())
    rollout = roll(selfplay, ScriptedPolicy())
    questions = [s for s in rollout.samples if s.role == "questioner"]
    assert questions and all(len(s.prompt_ids) <= 120 and 1 <= len(s.document_ids) < 5 for s in questions)
    assert rollout.metrics["selfplay/count/context_documents_cut"] > 0


def test_too_long_responder_prompt_is_dropped(prompts):
    sampling = SamplingConfig(max_prompt_tokens=150)
    selfplay = make_selfplay(prompts, kinds=("mixed",), groups=1, max_rounds=1, sampling=sampling)
    rollout = roll(selfplay, ScriptedPolicy())
    assert rollout.metrics["selfplay/rate/responder_prompt_too_long"] == 1


def test_shuffled_rewards_keep_the_advantages_but_not_their_rows(prompts):
    plain = roll(make_selfplay(prompts), ScriptedPolicy())
    control = roll(make_selfplay(prompts, shuffle_rewards=True), ScriptedPolicy())
    assert [s.response for s in plain.batch] == [s.response for s in control.batch]
    for role in ("questioner", "responder", "verifier"):
        before = [s.advantage for s in plain.batch if s.role == role]
        after = [s.advantage for s in control.batch if s.role == role]
        assert sorted(before) == sorted(after) and (before != after or len(set(before)) < 2)


def test_seeds_differ_between_all_requests_and_depend_on_each_part(prompts):
    policy = ScriptedPolicy()
    roll(make_selfplay(prompts), policy)
    seeds = [seed for *_, seed, _ in policy.requests]
    assert len(set(seeds)) == len(seeds)
    parts = (0, 1, 2, "cluster", "responder", 3)
    variants = {derive_seed(*parts[:i], f"x{p}", *parts[i + 1 :]) for i, p in enumerate(parts)}
    assert len(variants | {derive_seed(*parts)}) == len(parts) + 1
