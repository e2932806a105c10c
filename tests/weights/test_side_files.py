"""Files beside the weights: which are carried along, and those that cannot be read."""

import errno
import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from trainer_cases import initialise, make_config, make_policy, make_trainer, saver

from spell_megatron.cli import main
from spell_megatron.errors import UserError, explain
from spell_megatron.files import appearing_folder
from spell_megatron.training import backend
from spell_megatron.weights.convert import hf_to_megatron
from spell_megatron.weights.side_files import read_side_files, write_side_files


@pytest.fixture
def policy(tmp_path) -> Path:
    make_policy("qwen3", tmp_path / "policy")
    return tmp_path / "policy"


def test_folders_special_files_and_indices_stay_behind(policy, tmp_path):
    (policy / "notes.txt").mkdir()
    os.mkfifo(policy / "pipe.json")
    (policy / "endless.txt").symlink_to("/dev/zero")
    (policy / "model.safetensors.index.json").write_text("{}")
    (policy / "vocab.txt").symlink_to(policy / "config.json")
    (policy / "additional_chat_templates").mkdir()
    (policy / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    files = read_side_files(policy)
    own = ["additional_chat_templates/tool_use.jinja", "config.json", "generation_config.json", "vocab.txt"]
    assert sorted(files) == own
    out = tmp_path / "out"
    out.mkdir()
    write_side_files(files, out, torch.bfloat16)
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()) == own
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert (out / "vocab.txt").read_bytes() == (policy / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("/nowhere", "a link to /nowhere, which is missing"),
        ("notes.txt", "Too many levels of symbolic links"),
        ("/proc/self/mem", "reports an error .EIO."),  # the first page of memory cannot be read
    ],
)
def test_a_file_that_cannot_be_read_is_named_and_no_disk_is_blamed(policy, tmp_path, target, reason):
    (policy / "notes.txt").symlink_to(target)
    out = tmp_path / "out"
    with pytest.raises(
        UserError, match=f"notes.txt, which goes into every checkpoint, cannot be read: .*{reason}"
    ) as e:
        hf_to_megatron(policy, out, make_config(policy).training.parallel)
    assert not out.exists()
    assert not any(word in str(e.value) for word in ("space", "could not be written", "disk is full"))


def test_a_run_needs_the_models_folder_no_more(policy, tmp_path):
    config = make_config(policy)
    initialise(config)
    try:
        with saver(tmp_path / "run", make_trainer(config), config) as saving:
            (policy / "added.json").write_text("{}")
            before = (policy / "generation_config.json").read_bytes()
            shutil.rmtree(policy)
            saving.save(0, {"step": 0})
            saving.finish()
    finally:
        backend.shutdown()
    saved = tmp_path / "run" / "checkpoints" / "step_000000" / "hf"
    assert sorted(path.name for path in saved.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert (saved / "generation_config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EDQUOT, "quota is used up"),
        (errno.EROFS, "can only be read"),
        (errno.EACCES, "no permission"),
        (errno.ESTALE, "lost the file"),
        (errno.EIO, "EIO"),
    ],
)
def test_a_disk_is_full_only_if_it_is(tmp_path, number, words):
    with pytest.raises(UserError, match=words) as error, appearing_folder(tmp_path / "out"):
        raise OSError(number, os.strerror(number), "file")
    assert ("Free some space" in str(error.value)) == (number in (errno.ENOSPC, errno.EDQUOT))
    assert explain(OSError(errno.ECHILD, "")) is None


def test_the_command_tells_what_the_machine_says(policy, tmp_path, capsys):
    """A limit of open files and one of a file's size, met by real commands."""
    words = ["convert", "hf-to-megatron", "--hf", str(policy), "--megatron", str(tmp_path / "out")]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        assert main(words) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    said = capsys.readouterr().err
    assert "becomes larger than is allowed. Raise the limit" in said and "Free some space" not in said
