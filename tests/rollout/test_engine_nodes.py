"""Engines that other nodes of a job have started."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from engine_fixtures import engine_config, open_engines

from spell_megatron.cli import main
from spell_megatron.config.reading import to_yaml
from spell_megatron.errors import ProcessLost, UserError
from spell_megatron.processes.rendezvous import BEGUN, Rendezvous
from spell_megatron.rollout import engine_nodes
from spell_megatron.rollout.engine_nodes import EngineNodes, serve
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


def test_engines_wait_until_the_trainer_has_the_folder(policy, tmp_path: Path, monkeypatch):
    """Until then the run may belong to another job, whose logs they would write into."""
    config, events = tmp_path / "config.yaml", []
    config.write_text(to_yaml(engine_config(policy("dense"))))
    monkeypatch.setattr(engine_nodes, "serve", lambda *_, **__: events.append("engines start"))
    monkeypatch.setattr("signal.signal", lambda *_: None)
    rendezvous = Rendezvous(tmp_path / "meeting")

    def begin() -> None:
        events.append("trainer begins")
        rendezvous.publish(BEGUN, {})

    threading.Timer(0.3, begin).start()
    assert main(["engines", "--config", str(config), "--rendezvous", str(rendezvous.folder)]) == 0
    assert events == ["trainer begins", "engines start"]


def test_a_lost_node_is_no_fault_of_the_user(tmp_path: Path):
    """The job is queued again, which exit status 2 would prevent."""
    meeting = Rendezvous(tmp_path, engine_nodes=2)
    for node in range(2):
        meeting.publish(f"engines-{node}", {"urls": [f"http://10.0.0.{node}:1"], "request": 0})
    nodes = EngineNodes(meeting, start_timeout=0.1)
    nodes._seconds = 0.1
    assert nodes.start() == ["http://10.0.0.0:1", "http://10.0.0.1:1"]
    meeting.publish("engines-0", {"urls": ["http://10.0.0.0:2"], "request": 1})
    with pytest.raises(ProcessLost, match=r"Engine node 1 \(http://10.0.0.1:1\) has not answered for 0.1 s"):
        nodes.restart(["http://10.0.0.1:1"])
    meeting.publish("engines-0", {"urls": ["http://10.0.0.0:2"], "request": 2})
    meeting.publish("engines-1", {"urls": ["http://10.0.0.1:2"], "request": 2})
    assert nodes.restart([]) == ["http://10.0.0.0:2", "http://10.0.0.1:2"]
