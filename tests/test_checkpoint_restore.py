"""What a checkpoint may differ in from the trainer that it is loaded into, and what is told of a damaged one."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_fixtures import save_byte_tokenizer
from safetensors.numpy import save_file
from trainer_cases import (
    Settings,
    difference,
    initialise,
    make_config,
    make_policy,
    make_routed_rows,
    make_rows,
    make_trainer,
    save,
    weights,
)

from spell_megatron.checkpoint.folder import latest, note_score
from spell_megatron.checkpoint.restore import load, restore
from spell_megatron.errors import UserError
from spell_megatron.training import backend
from spell_megatron.training.prefix_tree import Row
from spell_megatron.training.rows_file import read_rows, write_rows


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    make_policy("qwen3", folder)
    save_byte_tokenizer(folder)
    initialise(make_config(folder))
    yield folder
    backend.shutdown()


@pytest.fixture(scope="module")
def saved(policy, tmp_path_factory) -> Path:
    """The folder of a run with checkpoints of steps 1 and 2."""
    run, config = tmp_path_factory.mktemp("run"), make_config(policy)
    trainer = make_trainer(config)
    for step in (1, 2):
        trainer.update(make_rows(step))
        save(run, step, trainer, config, {"step": step}, make_routed_rows(step) if step == 2 else None)
    return run


@pytest.fixture
def run(saved, tmp_path) -> Path:
    """A copy of it."""
    return shutil.copytree(saved, tmp_path / "a run")


def settings(policy: Path, dtype: str, distributed: bool) -> Settings:
    return make_config(policy, model__dtype=dtype, training__optimizer__distributed=distributed)


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_other_kind_of_optimizer_goes_on_exactly(policy, tmp_path, dtype, distributed):
    config = settings(policy, dtype, distributed)
    trainer = make_trainer(config)
    trainer.update(make_rows(0))
    folder = save(tmp_path, 1, trainer, config, {})
    other = make_trainer(settings(policy, dtype, not distributed))
    load(folder, other)
    for seed in (1, 2):
        theirs, ours = trainer.update(make_rows(seed)), other.update(make_rows(seed))
        assert [ours[name] for name in ("loss", "lr")] == [theirs[name] for name in ("loss", "lr")]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-6)  # summed in another order
    assert difference(weights(other), weights(trainer)) == 0


@pytest.mark.parametrize("kinds", [(False, True), (True, False), (False, False)])
def test_the_other_type_of_weights_loses_nothing(policy, tmp_path, kinds):
    """Weights and moments go from float32 to bfloat16, which keeps float32 copies, and back unchanged."""
    config = settings(policy, "float32", kinds[0])
    trainer = make_trainer(config)
    trainer.update(make_rows(0))
    between = settings(policy, "bfloat16", kinds[1])
    rounded = make_trainer(between)
    load(save(tmp_path / "float32", 1, trainer, config, {}), rounded)
    exact = weights(trainer)
    assert all(torch.equal(held, exact[name].bfloat16().float()) for name, held in weights(rounded).items())
    back = make_trainer(config)
    load(save(tmp_path / "bfloat16", 1, rounded, between, {}), back)
    for seed in (1, 2):
        assert back.update(make_rows(seed))["grad_norm"] == trainer.update(make_rows(seed))["grad_norm"]
    assert difference(weights(back), weights(trainer)) == 0


def another_vocabulary(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def another_rule(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["add_prefix_space"] = True
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def another_setting(**fields: object):
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))

    return change


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (another_vocabulary, "the vocabulary"),
        (another_rule, "how a text is cut into tokens"),
        (lambda folder: (folder / "chat_template.jinja").write_text("{{ messages[0].content }}"), "the chat template"),
        (lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": 100}'), "end a response"),
        (another_setting(rms_norm_eps=1e-3), "rms_norm_eps 1e-06 .now 0.001"),
    ],
)
def test_another_model_of_the_same_sizes_is_refused(policy, saved, tmp_path, change, what):
    other = shutil.copytree(policy, tmp_path / "other")
    change(other)
    with pytest.raises(UserError, match=f"another model than that of model.path: .*{what}.*Set model.path to.*/hf"):
        load(latest(saved), make_trainer(make_config(other)))


def test_the_same_tokenizer_in_other_words_is_accepted(policy, saved, tmp_path):
    other = shutil.copytree(policy, tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).write_text(json.dumps(json.loads((other / name).read_text()), indent=5))
    load(latest(saved), make_trainer(make_config(other)))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "file",
    [
        *(
            "state.json",
            "meta.json",
            "rng/rank_00000.pt",
            "hf/config.json",
            "hf/tokenizer.json",
            "rows.safetensors",
            "trainer/metadata.json",
        ),
        *("trainer/.metadata", "trainer/common.pt", "trainer/__0_0.distcp"),
    ],
)
@pytest.mark.parametrize("damage", [Path.unlink, cut, lambda path: path.write_bytes(b"abc")])
def test_a_damaged_file_is_named_with_the_command_that_goes_back(policy, run, file, damage):
    newest = run / "checkpoints" / "step_000002"
    if (file, damage) == ("hf/tokenizer.json", Path.unlink):
        pytest.skip("policies without a tokenizer can be saved")
    damage(newest / file)
    with pytest.raises(UserError) as error:
        restore(run, make_trainer(make_config(policy)))
    message = str(error.value)
    assert (newest / file).name in message or file.endswith(".distcp") or "is incomplete: it lacks meta.json" in message
    command = f"echo step_000001 > '{newest.parent / 'latest'}'"
    assert f"To resume from step_000001, which loses the updates after it, run `{command}`" in message
    assert "emove" not in message


def same(one: Row, two: Row) -> bool:
    arrays = ("tokens", "weights", "rollout_logprobs", "routing")
    return one.prompt_length == two.prompt_length and all(
        np.array_equal(getattr(one, name), getattr(two, name)) for name in arrays
    )


def test_rows_of_the_next_update_come_back(policy, saved, run, tmp_path):
    step, _, rows = restore(run, make_trainer(make_config(policy)))
    expected = make_routed_rows(2)
    assert step == 2 and rows is not None and all(map(same, rows, expected)) and len(rows) == len(expected)
    (run / "checkpoints" / "latest").write_text("step_000001")
    assert restore(run, make_trainer(make_config(policy)))[2] is None
    write_rows(tmp_path / "none", [])
    assert read_rows(tmp_path / "none") == []


def test_rows_of_another_number_or_format_are_refused(policy, run):
    file = run / "checkpoints" / "step_000002" / "rows.safetensors"
    write_rows(file, make_rows(0)[:3])
    (run / "checkpoints" / "latest").write_text("step_000002")
    with pytest.raises(UserError, match="has 3 rows, and meta.json there says .*To resume from step_000001"):
        restore(run, make_trainer(make_config(policy)))
    save_file({"prompts": np.zeros(3)}, file, {"format": "2"})
    with pytest.raises(UserError, match="its format is 2, and .* reads format 1.*To resume from step_000001"):
        restore(run, make_trainer(make_config(policy)))


def test_the_command_that_goes_back(policy, run):
    import subprocess

    pointer = run / "checkpoints" / "latest"
    pointer.write_text("step_000009")
    with pytest.raises(UserError, match="step_000009 does not exist") as error:
        latest(run)
    subprocess.run(str(error.value).split("`")[1], shell=True, check=True)
    assert latest(run).name == "step_000002"
    shutil.rmtree(run / "checkpoints" / "step_000001")
    (run / "checkpoints" / "step_000002" / "state.json").unlink()
    with pytest.raises(UserError, match="no other complete checkpoint.*--model.path=.*/step_000002/hf"):
        restore(run, make_trainer(make_config(policy)))


@pytest.mark.parametrize("content", [b"", b"\xff", b"../../elsewhere", b"\0\0\0\0"])
def test_a_damaged_pointer(run, content):
    (run / "checkpoints" / "latest").write_bytes(content)
    with pytest.raises(UserError, match="checkpoints/latest.*To resume from step_000002"):
        latest(run)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"checkpoint": 3}', '{"checkpoint": "step_000001"}'])
def test_a_damaged_record_of_the_best_checkpoint(policy, run, content):
    record = run / "checkpoints" / "best.json"
    record.write_text(content)
    with pytest.raises(UserError, match="best.json"):
        restore(run, make_trainer(make_config(policy)))
    record.write_text("{}")  # the remedy
    note_score(run, 2, 0.5)
    assert json.loads(record.read_text())["checkpoint"] == "step_000002"
