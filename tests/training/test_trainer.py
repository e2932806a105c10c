"""The trainer on real Megatron models, against plain torch on the Hugging Face models."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from trainer_cases import (
    POLICIES,
    difference,
    every_row_alone,
    gradients,
    make_config,
    make_policy,
    make_rows,
    make_trainer,
    near_the_policy,
    reference,
    saved,
    update_in_pieces,
    weights,
)

from spell_megatron.training import model
from spell_megatron.training.moe import routers
from spell_megatron.training.prefix_tree import Row, plan
from spell_megatron.training.state import random_states

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    """family -> folder of its checkpoint, made on first use."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            make_policy(family, made[family])
        return made[family]

    return get


@pytest.mark.parametrize("family", POLICIES)
def test_gradient_equals_plain_torch_on_the_hf_model(family, policies, tmp_path):
    """Loss, metrics and every gradient within 1e-5 relative."""
    rows = make_rows()
    trainer = make_trainer(make_config(policies(family)))
    calls = []
    metrics = trainer.update(rows, lambda done, total: calls.append((done, total)))
    expected, model = reference(policies(family), rows)
    error = difference(gradients(trainer), saved(model, tmp_path))
    print(f"{family}: gradient {error:.1e}, loss {abs(metrics['loss'] / expected['loss'] - 1):.1e}")
    assert error <= 1e-5
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients(trainer).values()))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert metrics["skipped"] == 0
    assert metrics["response_tokens"] == sum(len(row.weights) for row in rows)
    assert metrics["microbatches"] > 1 and metrics["sharing"] > 1.5
    assert calls == [(i + 1, len(calls)) for i in range(int(metrics["microbatches"]))]


@pytest.mark.parametrize("budget", [10_000, 60])
@pytest.mark.parametrize("sampling", ["token", "sequence"])
def test_importance_weights_equal_plain_torch(sampling, budget, policies, tmp_path):
    """Gradient and metrics with truncated importance weights, per token and per response, however the rows are cut:
    within 1e-5 relative, the share of capped weights exactly."""
    rows = near_the_policy(policies("qwen3"), make_rows())
    trainer = make_trainer(
        make_config(
            policies("qwen3"),
            training__importance_sampling=sampling,
            training__importance_cap=1.5,
            training__tokens_per_microbatch=budget,
        )
    )
    metrics = trainer.update(rows)
    expected, model = reference(policies("qwen3"), rows, sampling, 1.5)
    error = difference(gradients(trainer), saved(model, tmp_path))
    mean, capped = metrics["importance_weight"], metrics["importance_capped"]
    print(f"{sampling}: gradient {error:.1e}, mean {mean}, capped {capped}")
    assert error <= 1e-5
    # The terms of the loss, about 1 in size, cancel down to 0.005 here.
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert metrics["importance_capped"] == pytest.approx(expected["importance_capped"], rel=1e-12) != 0
    plain = make_trainer(make_config(policies("qwen3")))
    plain.update(rows)
    assert difference(gradients(plain), gradients(trainer)) > 0.05


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "qwen3_5_text"])
def test_gradient_does_not_depend_on_the_cut(family, policies, monkeypatch):
    """One forest, several, and every row alone (nothing shared): 1e-5 relative in gradient and loss."""
    rows = make_rows()
    results = []
    for budget in (10_000, 150, 60, 1, None):
        if budget is None:
            monkeypatch.setattr("spell_megatron.training.trainer.plan", every_row_alone)
        trainer = make_trainer(make_config(policies(family), training__tokens_per_microbatch=budget or 1))
        metrics = trainer.update(rows)
        results.append((metrics, gradients(trainer)))
    assert results[0][0]["microbatches"] == 1 and results[-1][0]["microbatches"] == len(rows)
    assert results[-1][0]["sharing"] == 1
    for metrics, gradient in results[1:]:
        error = difference(gradient, results[0][1])
        print(f"{family}: {metrics['microbatches']:.0f} microbatches, gradient {error:.1e}")
        assert error <= 1e-5
        assert metrics["loss"] == pytest.approx(results[0][0]["loss"], rel=1e-5)


def without_times(metrics):
    return {name: value for name, value in metrics.items() if "second" not in name}


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_gradient_does_not_depend_on_the_pieces(family, policies):
    """Rows given in random pieces, in random order: gradient and metrics within 1e-5 of all at once."""
    still = {"training__optimizer__lr": 1e-30, "training__optimizer__weight_decay": 0.0}
    trainer = make_trainer(make_config(policies(family), training__importance_sampling="sequence", **still))
    rows = make_rows()
    expected, whole = trainer.update(rows), gradients(trainer)
    of_the_cut = {"tokens_computed", "sharing", "microbatches", "seconds", "tokens_per_second", "lr"}
    worst = 0.0
    for seed in range(8):
        metrics = update_in_pieces(trainer, rows, seed)
        assert metrics.keys() == expected.keys()
        for name in metrics.keys() - of_the_cut:
            assert metrics[name] == pytest.approx(expected[name], rel=1e-5), name
        worst = max(worst, difference(gradients(trainer), whole))
    print(f"{family}: gradient {worst:.1e}")
    assert worst <= 1e-5


def test_with_an_auxiliary_loss_pieces_change_nothing(policies):
    """Its weight and its cut need all rows: they wait, and metrics and weights are equal to the last bit."""
    one, other = (make_trainer(make_config(policies("qwen3_moe"), training__moe_aux_loss=1.0)) for _ in range(2))
    rows = make_rows()
    expected = one.update(rows)
    other.begin()
    other.accumulate(rows[:5])
    other.accumulate(rows[5:])
    assert without_times(other.finish()) == without_times(expected)
    assert difference(weights(other), weights(one)) == 0


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("distributed", [False, True])
def test_an_update_that_is_dropped_has_never_begun(distributed, family, policies):
    """Weights, metrics, optimizer and random states of the updates after it: bit for bit."""
    config = make_config(policies(family), training__optimizer__distributed=distributed)
    dropped, plain = make_trainer(config), make_trainer(config)
    for seed in range(2):
        before = str(random_states())
        dropped.begin()
        dropped.accumulate(make_rows(7))
        dropped.drop()
        assert str(random_states()) == before
        dropped.begin()
        dropped.accumulate(make_rows(8))  # the next update drops it too
        assert without_times(dropped.update(make_rows(seed))) == without_times(plain.update(make_rows(seed)))
    assert difference(weights(dropped), weights(plain)) == 0
    with pytest.raises(RuntimeError, match="no update is under way"):
        dropped.accumulate(make_rows())


@st.composite
def pathological_rows(draw):
    """Rows that repeat, begin or continue each other, with prompts that end anywhere: up to 6 rows of 12 tokens."""
    rows = []
    for _ in range(draw(st.integers(2, 6))):
        begin = list(draw(st.sampled_from(rows)).tokens) if rows and draw(st.booleans()) else []
        tokens = begin[: draw(st.integers(0, len(begin)))] + draw(st.lists(st.integers(0, 2), max_size=6))
        tokens = np.array(tokens or [0], dtype=np.int64)
        prompt = draw(st.integers(1, len(tokens)))
        weights = np.linspace(0.5, 2, len(tokens) - prompt, dtype=np.float32)
        rows.append(Row(tokens, prompt, weights, -np.ones_like(weights)))
    return rows


def test_pathological_trees_have_the_gradient_of_separate_rows(policies, monkeypatch):
    """Gradient and loss within 1e-5 relative of every row computed by itself (measured 1e-6)."""
    still = {"training__optimizer__lr": 1e-30, "training__optimizer__weight_decay": 0.0}
    together, apart = (
        make_trainer(make_config(policies("qwen3"), training__tokens_per_microbatch=10_000, **still)) for _ in range(2)
    )
    worst = 0.0

    @settings(max_examples=25, deadline=None)
    @given(pathological_rows().filter(lambda rows: any(len(row.weights) for row in rows)))
    def compare(rows):
        nonlocal worst
        metrics = together.update(rows)
        with monkeypatch.context() as patched:
            patched.setattr("spell_megatron.training.trainer.plan", every_row_alone)
            expected = apart.update(rows)
        error = difference(gradients(together), gradients(apart))
        worst = max(worst, error)
        assert error <= 1e-5
        for name in ("loss", "entropy", "top_probability"):
            assert metrics[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-7)

    compare()
    print(f"gradient {worst:.1e}")


def hf_routing(folder, rows, trees):
    """The policy's own routing of every distinct token of the batch, by transformers: for each tree the router
    logits [layers, tokens, experts] of its fresh tokens, with gradients into the returned model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    logits = []  # of each row [layers, tokens, experts]
    for row in rows:
        output = model(torch.from_numpy(row.tokens)[None], output_router_logits=True)
        logits.append(torch.stack([layer.view(len(row.tokens), -1) for layer in output.router_logits]))
    where = {tuple(row.tokens[: i + 1]): (n, i) for n, row in enumerate(rows) for i in range(len(row.tokens))}
    routed = []
    for tree in trees:
        prefixes = [tuple(tree.tokens[: q + 1][tree.end[: q + 1] > q]) for q in np.flatnonzero(tree.fresh)]
        places = [where[prefix] for prefix in prefixes]
        routed.append(torch.stack([logits[number][:, place] for number, place in places], dim=1))
    return model, routed


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("budget", [10_000, 60])
def test_expert_load_equals_transformers_routing(budget, recompute, policies):
    """Tokens per layer and expert, each distinct token once, whatever is cut, padded or computed again."""
    rows = make_rows()
    trainer = make_trainer(
        make_config(policies("qwen3_moe"), training__tokens_per_microbatch=budget, training__recompute=recompute)
    )
    metrics = trainer.update(rows)
    _, routed = hf_routing(policies("qwen3_moe"), rows, plan(rows, 10_000, 1)[0])
    chosen = torch.cat(routed, dim=1).topk(2, dim=-1).indices
    load = torch.stack([layer.flatten().bincount(minlength=8) for layer in chosen])
    assert torch.equal(torch.stack([router.tokens_per_expert for router in routers(trainer.model)]), load.double())
    distinct = {tuple(row.tokens[:i]) for row in rows for i in range(1, len(row.tokens) + 1)}
    assert load.sum(1).tolist() == [2 * len(distinct)] * 2  # two experts per token: none is dropped
    imbalance = load.amax(1) / load.float().mean(1)
    assert metrics["moe_load_imbalance"] == pytest.approx(imbalance.mean().item())
    assert metrics["moe_load_imbalance_max"] == pytest.approx(imbalance.max().item())
    assert metrics["moe_unused_experts"] == (load == 0).float().mean().item()
    assert "moe_aux_loss" not in metrics


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("budget", [10_000, 60])
def test_auxiliary_loss_equals_plain_torch_on_the_hf_model(budget, recompute, policies, tmp_path):
    """Gradient of the policy loss plus 10 times the balancing loss of every microbatch and layer, weighted by
    distinct tokens: within 1e-5 relative."""
    rows = make_rows()
    options = dict(training__tokens_per_microbatch=budget, training__recompute=recompute)
    trainer = make_trainer(make_config(policies("qwen3_moe"), training__moe_aux_loss=10.0, **options))
    metrics = trainer.update(rows)
    without = make_trainer(make_config(policies("qwen3_moe"), **options))
    expected = without.update(rows)

    (trees,) = plan(rows, budget, 1, trainer._cost)
    model, routed = hf_routing(policies("qwen3_moe"), rows, trees)
    total = sum(logits.shape[1] for logits in routed)
    loss = 0.0
    for logits in routed:
        _, tokens, experts = logits.shape
        for layer in logits:
            share = layer.topk(2, dim=-1).indices.flatten().bincount(minlength=experts) / (2 * tokens)
            loss += tokens / total * experts * (share * layer.softmax(-1).mean(0)).sum()
    (10 * loss).backward()
    for parameter in model.parameters():
        parameter.data = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
    balancing, found = saved(model, tmp_path), gradients(trainer)
    sums = {name: gradient + balancing[name] for name, gradient in gradients(without).items()}
    error = difference(found, sums)
    print(f"budget {budget}, recompute {recompute}: gradient {error:.1e}")
    assert error <= 1e-5
    assert difference(found, gradients(without)) > 0.5
    assert metrics["moe_aux_loss"] == pytest.approx(loss.item() / 2, rel=1e-5)  # mean over layers
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-6)  # of the policy alone


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_offload_changes_only_where_the_inputs_wait(family, policies, monkeypatch):
    """Every layer is computed again from a copy that the hooks made (on a GPU: in host memory), no parameter and
    nothing that all layers share is copied, and metrics and weights after two updates are equal to the last bit."""
    copies, again, pack = [], [], model._to_host

    def packing(saved):
        packed = pack(saved)
        if packed is saved:
            assert isinstance(saved, torch.nn.Parameter) or not saved.requires_grad
        else:
            assert saved.shape[1] == 1 and saved.data_ptr() != packed[1].data_ptr()  # [tokens, 1, ...]
            copies.append(packed[1])
        return packed

    def looking(_, args, kwargs):
        if torch.is_grad_enabled():  # not so the first time
            again.append(kwargs["hidden_states"].data_ptr())

    monkeypatch.setattr(model, "_to_host", packing)
    results = []
    for offload in (False, True):
        options = dict(training__recompute="full", training__offload=offload, training__tokens_per_microbatch=60)
        trainer = make_trainer(make_config(policies(family), **options))
        for layer in trainer.model.decoder.layers:
            layer.register_forward_pre_hook(looking, with_kwargs=True)
        again.clear()
        metrics = [trainer.update(make_rows(seed)) for seed in range(2)]
        assert len(again) == 2 * sum(m["microbatches"] for m in metrics)  # two layers
        assert ({copy.data_ptr() for copy in copies} >= set(again)) == offload
        results.append(([{k: v for k, v in m.items() if "second" not in k} for m in metrics], weights(trainer)))
    (metrics, before), (offloaded_metrics, after) = results
    assert offloaded_metrics == metrics
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("family", POLICIES)
def test_two_full_updates(family, policies):
    """Rewarding the same responses twice raises their likelihood."""
    rows = [dataclasses.replace(row, weights=np.ones_like(row.weights)) for row in make_rows()]
    trainer = make_trainer(make_config(policies(family), training__optimizer__distributed=True))
    before = weights(trainer)
    first, second = trainer.update(rows), trainer.update(rows)
    assert 0 < difference(weights(trainer), before) < 1
    # With weights of one the loss is -1 at any parameters; the likelihood shows in the k3 estimate's d.
    likelihood = [-m["mismatch_abs"] for m in (first, second)]
    assert likelihood[0] != likelihood[1]
    assert second["grad_norm"] > 0 and second["lr"] == 1e-3


def test_likelihood_rises_with_positive_weights(policies):
    """Rollout log-probabilities of zero make mean |d| the negative log-likelihood: it must fall."""
    rows = [
        dataclasses.replace(row, weights=np.ones_like(row.weights), rollout_logprobs=np.zeros_like(row.weights))
        for row in make_rows()
    ]
    trainer = make_trainer(make_config(policies("qwen3")))
    losses = [trainer.update(rows)["mismatch_abs"] for _ in range(4)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.95 * losses[0]


def test_adamw_step_equals_torch(policies):
    """Weights after two clipped updates, against torch.optim.AdamW on the same model's gradients."""
    options = dict(training__optimizer__clip_grad=0.05, training__optimizer__weight_decay=0.1)
    trainer = make_trainer(make_config(policies("qwen3"), **options))
    other = make_trainer(make_config(policies("qwen3"), training__optimizer__clip_grad=0.0)).model
    matrices = [p for p in other.parameters() if p.dim() > 1]
    vectors = [p for p in other.parameters() if p.dim() == 1]  # norms and biases do not decay
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
    )
    for seed in (0, 1):
        trainer.update(make_rows(seed))
        for mine, theirs in zip(trainer.model.parameters(), other.parameters()):
            theirs.grad = mine.main_grad.clone()  # clipped in place by the optimizer
        assert torch.cat([p.grad.flatten() for p in other.parameters()]).norm() == pytest.approx(0.05, rel=1e-4)
        optimizer.step()
        for mine, theirs in zip(trainer.model.parameters(), other.parameters()):
            torch.testing.assert_close(mine.data, theirs.data, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "decay, expected",
    [
        ("constant", [0.5, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 0.55, 0.1]),
        ("cosine", [0.5, 1.0, 0.55, 0.1]),
    ],
)
def test_learning_rate(decay, expected, policies):
    """Two warm-up updates of four: rises to the peak at the second, at the last update it is min_lr."""
    trainer = make_trainer(
        make_config(
            policies("qwen3"),
            run__steps=4,
            training__optimizer__lr=1.0,
            training__optimizer__warmup_steps=2,
            training__optimizer__decay=decay,
            training__optimizer__min_lr=0.1,
        )
    )
    rates = [trainer.update(make_rows(groups=1, group_size=2))["lr"] for _ in range(4)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_the_mismatch_is_that_of_an_update_and_changes_nothing(family, policies):
    rows = make_rows()
    trainer, other = (make_trainer(make_config(policies(family))) for _ in range(2))
    before = random_states()
    found = trainer.mismatch(rows)
    assert str(random_states()) == str(before)
    assert len(set(found)) > len(rows) // 2
    lengths = [len(row.weights) for row in rows]
    metrics, without = trainer.update(rows), other.update(rows)
    mean = sum(value * n for value, n in zip(found, lengths, strict=True)) / sum(lengths)
    assert mean == pytest.approx(metrics["mismatch_abs"], rel=1e-6)
    assert {k: v for k, v in metrics.items() if "second" not in k} == {
        k: v for k, v in without.items() if "second" not in k
    }
    assert all(torch.equal(a, b) for a, b in zip(weights(trainer).values(), weights(other).values(), strict=True))


@pytest.mark.parametrize("distributed", [False, True])
def test_a_gradient_that_is_not_finite_is_skipped(distributed, policies):
    rows = make_rows()
    bad = dataclasses.replace(rows[0], weights=np.full_like(rows[0].weights, np.nan))
    trainer = make_trainer(
        make_config(
            policies("qwen3"),
            training__optimizer__distributed=distributed,
            training__optimizer__warmup_steps=2,
        )
    )
    before = weights(trainer)
    metrics = trainer.update([bad, *rows[1:]])
    assert metrics["skipped"] == 1 and trainer.skipped == 1
    assert difference(weights(trainer), before) == 0
    after = trainer.update(rows)
    assert after["skipped"] == 0 and trainer.skipped == 1 and after["lr"] == 5e-4
    assert math.isfinite(after["grad_norm"]) and difference(weights(trainer), before) > 0


def test_role_weights_enter_the_numerator_only(policies):
    """Doubling all weights doubles loss and gradient: the denominator is the number of tokens."""
    rows = make_rows()
    doubled = [dataclasses.replace(row, weights=2 * row.weights) for row in rows]
    one, two = (make_trainer(make_config(policies("qwen3"))) for _ in range(2))
    first, second = one.update(rows), two.update(doubled)
    assert second["loss"] == pytest.approx(2 * first["loss"], rel=1e-6)
    assert second["grad_norm"] == pytest.approx(2 * first["grad_norm"], rel=1e-6)


def test_bad_batches_are_refused(policies):
    trainer = make_trainer(make_config(policies("qwen3")))
    with pytest.raises(ValueError, match="nothing to train on"):
        trainer.update([Row(np.arange(3), 3, np.zeros(0, np.float32), np.zeros(0, np.float32))])
    trainer.begin()
    trainer.accumulate([])
    with pytest.raises(ValueError, match="nothing to train on"):
        trainer.finish()
    with pytest.raises(ValueError, match="vocabulary has 128"):
        trainer.update([Row(np.array([1, 500]), 1, np.ones(1, np.float32), np.zeros(1, np.float32))])
