"""Which roles are trained, and what does not stop the event loop; the rest is tested with engines in
tests/test_train.py."""

import gc
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from small_run import ROOT

from spell_megatron.config.reading import load_config
from spell_megatron.director.director import Director
from spell_megatron.errors import UserError


@pytest.mark.parametrize(("weights", "untrained"), [("{}", []), ("{questioner: 0, verifier: 0.5}", ["questioner"])])
def test_roles_of_weight_0_are_not_trained(weights, untrained, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config("examples/quickstart.yaml", [f"--training.role_weights={weights}"])
    assert Director(config).selfplay.untrained == untrained


@pytest.mark.parametrize("fails", [False, True])
def test_garbage_is_not_looked_for_while_a_step_is_under_way(fails, monkeypatch):
    monkeypatch.chdir(ROOT)
    director = Director(load_config("examples/quickstart.yaml"))
    collected = []

    async def roll_out(*arguments):
        collected.append(gc.isenabled())
        if fails:
            raise UserError("no engine answers")

    director.selfplay = SimpleNamespace(roll_out=roll_out)
    director.connect(["http://127.0.0.1:1"], "key")
    with pytest.raises(UserError) if fails else nullcontext():
        director.roll_out(1, "0", ["http://127.0.0.1:1"], print)
    director.close()
    assert collected == [False] and gc.isenabled()
