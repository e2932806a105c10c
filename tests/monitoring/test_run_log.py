"""logs/train.log: times and levels, libraries' warnings, errors; and what is on the screen of it."""

import io
import logging
import re
import warnings

import pytest
from rich.console import Console

from spell_megatron.errors import UserError
from spell_megatron.monitoring.progress import Progress
from spell_megatron.monitoring.run_log import log_file, run_log


def test_what_is_said_is_logged_with_times_and_levels(tmp_path, capsys):
    console = Console(file=io.StringIO())
    with run_log(tmp_path, 0, "info"):
        Progress(console=console).line("step 1/2")
        logging.getLogger("megatron.core").warning("a library warns")
        logging.getLogger("megatron.core").info("a library talks")
        warnings.warn("this will change", DeprecationWarning, stacklevel=1)
        logging.getLogger("spell_megatron.selfplay").error("a cluster failed")
        logging.getLogger("spell_megatron.selfplay").info("of \ud83d")  # half a surrogate pair
    text = (tmp_path / "logs" / "train.log").read_text()
    assert re.search(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ INFO spell_megatron.*: step 1/2$", text, re.MULTILINE)
    assert "WARNING megatron.core: a library warns" in text and "a library talks" not in text
    assert (
        r"of \ud83d" in text
        and "this will change" in text
        and "ERROR spell_megatron.selfplay: a cluster failed" in text
    )
    assert console.file.getvalue() == "step 1/2\n"
    screen = capsys.readouterr()
    assert screen.out == "" and screen.err == "spell_megatron.selfplay: a cluster failed (logs/train.log has more)\n"


def test_levels(tmp_path):
    for level in ("debug", "warning"):
        with run_log(tmp_path / level, 0, level), Progress(console=Console(file=io.StringIO())).stage("update"):
            logging.getLogger("megatron.core").info("a library talks")
    text = log_file(tmp_path / "debug", 0).read_text()
    assert "update begins" in text and "update took" in text and "a library talks" in text
    assert log_file(tmp_path / "warning", 0).read_text() == ""


@pytest.mark.parametrize("error", [UserError("The disk is full."), ZeroDivisionError("a defect")])
def test_how_a_run_ends_is_logged_and_told_once(tmp_path, capsys, error):
    with pytest.raises(type(error)), run_log(tmp_path, 3, "info"):
        raise error
    text = log_file(tmp_path, 3).read_text()
    assert str(error) in text and ("Traceback" in text) == isinstance(error, ZeroDivisionError)
    assert capsys.readouterr().err == ""


def test_afterwards_everything_is_as_before(tmp_path):
    root, library = logging.getLogger(), logging.getLogger("transformers")
    before = root.level, list(root.handlers), list(library.handlers), library.propagate, warnings.showwarning
    with run_log(tmp_path, 0, "debug"):
        pass
    assert before == (root.level, list(root.handlers), list(library.handlers), library.propagate, warnings.showwarning)


def test_a_full_disk_takes_neither_the_screen_nor_the_error(tmp_path, capsys):
    log = log_file(tmp_path, 0)
    log.parent.mkdir()
    log.symlink_to("/dev/full")  # no byte can be written to it
    with pytest.raises(UserError, match="the disk is full"), run_log(tmp_path, 0, "info"):
        logging.getLogger("spell_megatron.train").info("step 1")
        raise UserError("the disk is full")
    assert capsys.readouterr().err == ""
