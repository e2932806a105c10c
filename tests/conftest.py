"""Fixtures that several folders of tests share. This file also puts `tests/` on the import path."""

import os
import signal
from pathlib import Path

import hypothesis
import pytest
from engine_fixtures import engines_for, policy  # noqa: F401  (fixtures)
from tiers import LONG, markers_of

# A busy machine must not make a test fail; `hypothesis` would time each example.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


# Processes that tests start import the package of this checkout, whatever is installed.
ROOT = Path(__file__).parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

# A shell ignores SIGINT in what it starts in the background. Processes that tests start must not inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    for path in Path(__file__).parent.rglob("*.py"):
        config.addinivalue_line("filterwarnings", f"error:::{path.stem}$")


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(items):
    for item in items:
        for marker in markers_of(item):
            item.add_marker(marker)
        if not any(item.get_closest_marker(name) for name in LONG):
            item.add_marker("fast")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Escape half surrogate pairs in what a test logged or printed: xdist cannot send them."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(autouse=True)
def signal_mask():
    """`spell train` blocks signals for good: what later tests start must not inherit that."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@pytest.fixture(scope="module")
def process_group():
    """Megatron's process groups of this process alone, on the CPU."""
    from transformers import LlamaConfig

    from spell_megatron.config.schema import TrainingConfig
    from spell_megatron.training import backend
    from spell_megatron.training.policy import PolicyModel

    backend.initialise(PolicyModel.of(LlamaConfig()), TrainingConfig(), "cpu")
    yield
    backend.shutdown()


@pytest.fixture(scope="session")
def hf_checkpoint(tmp_path_factory):
    """hf_checkpoint(case) -> (transformers model, its folder), once for each case of `hf_models.CASES`."""
    from hf_models import CASES, make

    made = {}

    def get(case: str):
        if case not in made:
            model = make(*CASES[case])
            folder = tmp_path_factory.mktemp(case)
            model.save_pretrained(folder)
            made[case] = model, folder
        return made[case]

    return get
