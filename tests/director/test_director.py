"""Which roles are trained; the rest of it is tested with engines in tests/test_train.py."""

import pytest
from small_run import ROOT

from spell_megatron.config.reading import load_config
from spell_megatron.director.director import Director


@pytest.mark.parametrize(("weights", "untrained"), [("{}", []), ("{questioner: 0, verifier: 0.5}", ["questioner"])])
def test_roles_of_weight_0_are_not_trained(weights, untrained, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config("examples/quickstart.yaml", [f"--training.role_weights={weights}"])
    assert Director(config).selfplay.untrained == untrained
