"""Engines that other nodes of a job have started."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_fixtures import engine_config, open_engines

from spell_megatron.errors import UserError
from spell_megatron.processes.rendezvous import Rendezvous
from spell_megatron.rollout.engine_nodes import serve
from spell_megatron.rollout.transports.gloo import GLOO


def test_engines_of_other_nodes_are_found(engines_for, policy, tmp_path: Path):
    """By what they publish; they are left running. Replicas that do not divide over the nodes are refused."""
    engines = engines_for("dense")
    rendezvous = Rendezvous(tmp_path, engine_nodes=1)
    (tmp_path / "key").write_text(engines.api_key)
    rendezvous.publish("engines-0", {"urls": engines.urls, "request": 0})
    with open_engines(engine_config(policy("dense")), tmp_path, rendezvous) as found:
        assert found.urls == engines.urls and found.transport is GLOO
    assert engines.engines[0].healthy()
    with pytest.raises(UserError, match="3 engines cannot be spread evenly over 2"):
        config = engine_config(policy("dense"), replicas=3)
        nodes = Rendezvous(tmp_path, 2)
        serve(config.model, config.rollout, tmp_path, nodes, 0, device="cpu", seed=0, routing=True, trainers=0)
