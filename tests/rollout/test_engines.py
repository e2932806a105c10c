"""Real engines as a group: guarded, attached to, put to sleep."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import requests
from engine_fixtures import engine_config, open_engines

from spell_megatron.errors import UserError
from spell_megatron.rollout.engines import Engines
from spell_megatron.rollout.transports.gloo import GLOO
from spell_megatron.rollout.transports.ipc import IPC


def test_every_route_but_health_demands_the_key(engines_for):
    engines = engines_for("dense")
    url = engines.urls[0]
    paths = requests.get(
        f"{url}/openapi.json", headers={"Authorization": f"Bearer {engines.api_key}"}, timeout=30
    ).json()["paths"]
    assert {"/update_weights", "/collective_rpc", "/pause", "/inference/v1/generate"} <= paths.keys()
    open_routes = []
    for path, methods in paths.items():
        for method in methods:
            for headers in ({}, {"Authorization": "Bearer wrong"}):
                status = requests.request(method, url + path, headers=headers, timeout=30).status_code
                if status != 401:
                    open_routes.append((method, path, status))
    assert {path for _, path, _ in open_routes} == {"/health"}


def test_the_key_is_not_on_any_command_line(engines_for):
    engines = engines_for("dense")
    for process in psutil.process_iter(["cmdline"]):
        assert engines.api_key not in " ".join(process.info["cmdline"] or ())


def test_engines_that_share_gpus_sleep(engines_for, monkeypatch):
    """Only the calls: vLLM has nothing to free on CPUs."""
    engines = engines_for("dense")
    (engine,) = engines.engines
    engines.sleep()
    assert engine.get("/is_sleeping") == {"is_sleeping": False}  # no GPU is shared
    monkeypatch.setattr(engines, "transport", IPC)
    engines.sleep()
    assert engine.get("/is_sleeping") == {"is_sleeping": True}
    engines.restart([])  # of another one
    engines.new_step()
    monkeypatch.setattr(engines, "transport", IPC)
    engines.wake("weights")
    assert engine.get("/is_sleeping") == {"is_sleeping": True}
    engines.wake("kv_cache")
    assert engine.get("/is_sleeping") == {"is_sleeping": False}


@pytest.mark.parametrize("address", ["http://127.0.0.1:3", "http://127.0.0.1:1"])
def test_only_engines_that_were_restarted_are_asked_again(address, tmp_path):
    """Those that sleep call themselves paused. A restarted one may have its old address (rollout.base_port)."""
    asked = []
    source = SimpleNamespace(restartable=True, restart=lambda broken: [address, "http://127.0.0.1:2"])

    def check(engine):
        asked.append(engine.url)
        return {"weight_transfer": "ipc", "routed_experts": True}

    engines = Engines(source, "key", check, hang_timeout=1, log_folder=tmp_path)
    engines._use(["http://127.0.0.1:1", "http://127.0.0.1:2"])
    engines.restart([0])
    assert asked == ["http://127.0.0.1:1", "http://127.0.0.1:2", address]
    assert engines.urls == [address, "http://127.0.0.1:2"]


def test_attaching_names_what_does_not_fit(engines_for, policy, monkeypatch, tmp_path: Path):
    engines = engines_for("dense")
    monkeypatch.setenv("SPELL_API_KEY", engines.api_key)

    def attach(model: Path, **rollout: object) -> Engines:
        return open_engines(engine_config(model, urls=engines.urls, **rollout), tmp_path)

    attached = attach(policy("dense", 1))
    assert (attached.urls, attached.transport) == (engines.urls, GLOO)
    assert "on CPUs" in attached.no_routing
    attached.stop()
    assert engines.engines[0].healthy()  # what was not started here is not stopped here

    with pytest.raises(UserError, match="serves Qwen3ForCausalLM .*Qwen3MoeForCausalLM.*--middleware"):
        attach(policy("moe"))
    long = {"sampling": {"max_prompt_tokens": 4000, "max_response_tokens": 100}}
    with pytest.raises(UserError, match="--max-model-len 1024 is less than the 4100 tokens"):
        attach(policy("dense"), **long)
    with pytest.raises(
        UserError,
        match=r"in float32, but rollout.quantization is fp8; .* without VLLM_BATCH_INVARIANT=1.*"
        r"Start it as: .*VLLM_BATCH_INVARIANT=1 python .*--quantization fp8_per_channel",
    ):
        attach(policy("dense"), quantization="fp8", batch_invariant=True)
    engines.engines[0].post("/pause")
    with pytest.raises(UserError, match="paused"):
        attach(policy("dense"))
    engines.engines[0].post("/resume")
    with pytest.raises(UserError, match="No healthy engine answers at http://127.0.0.1:9"):
        open_engines(engine_config(policy("dense"), urls=["http://127.0.0.1:9"]), tmp_path)
    monkeypatch.setenv("SPELL_API_KEY", "wrong")
    with pytest.raises(UserError, match="refuses the API key"):
        attach(policy("dense"))
    monkeypatch.delenv("SPELL_API_KEY")
    with pytest.raises(UserError, match="SPELL_API_KEY"):
        attach(policy("dense"))
