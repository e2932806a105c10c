"""One engine over HTTP."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import psutil
import pytest
import requests
from engine_fixtures import engine_config, open_engines

from spell_megatron.rollout.engine import _faults


@pytest.mark.slow
def test_a_call_to_a_core_that_dies_fails(policy, tmp_path: Path):
    """The server would leave it without an answer."""
    with open_engines(engine_config(policy("dense")), tmp_path) as engines:
        server = psutil.Process(engines.source.servers[0].process.pid)
        (core,) = (child for child in server.children(recursive=True) if "EngineCore" in child.name())
        core.suspend()
        with ThreadPoolExecutor(1) as threads:
            call = threads.submit(engines.engines[0].call, "spell_describe", timeout=300)
            assert not wait([call], timeout=7).done  # longer than between two looks at the engine
            core.kill()
            with pytest.raises(requests.ConnectionError, match="has ended while"):
                call.result(timeout=120)
        assert engines.failed() == [0]


def test_an_engine_of_an_unknown_transport_does_not_fit(policy):
    config = engine_config(policy("dense"))
    about = {
        "architecture": "Qwen3ForCausalLM",
        "sizes": [64, 2, 260],
        "dtype": "float32",
        "max_model_len": 1024,
        "logprobs_mode": "processed_logprobs",
    }

    def faults(transport: str | None) -> list[str]:
        return list(_faults(about | {"weight_transfer": transport}, config.model, 1024))

    assert faults("gloo") == []
    assert faults("pigeons") == ["it receives weights by 'pigeons', and the trainer can send by gloo, nccl, ipc only"]
    assert faults(None) == ["it was started without --weight-transfer-config"]
