"""The engines' addresses and ports."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import requests

from spell_megatron.config.schema import RolloutConfig
from spell_megatron.preflight.findings import Findings

_SECONDS = 5.0
"""How long an engine may take to say that it is well."""


def check_engine_urls(found: Findings, urls: Sequence[str]) -> None:
    """Addresses of running engines are addresses, each listed once."""
    seen: set[str] = set()
    for url in urls:
        if problem := url_problem(url):
            found.fault("rollout.urls", f"{url!r} {problem}. Write it as http://host:8000")
        if url.rstrip("/") in seen:
            found.fault("rollout.urls", f"{url!r} is listed twice. Remove one")
        seen.add(url.rstrip("/"))


def check_ports(found: Findings, rollout: RolloutConfig) -> None:
    """The ports of the engines to be started are free."""
    if rollout.base_port is None or rollout.urls:
        return
    ports = range(rollout.base_port, min(rollout.base_port + rollout.replicas, 65536))
    if taken := [str(port) for port in ports if not port_is_free(port)]:
        found.fault(
            "rollout.base_port rollout.replicas",
            f"port {', '.join(taken)} is in use or not allowed. End the program that holds it, choose another "
            "base_port, or leave it out, so that the run chooses free ports",
        )


def states(urls: Sequence[str], api_key: str | None) -> list[tuple[str, str]]:
    """(address, "" or what is wrong) of each engine, which is asked once whether it is well."""

    def ask(url: str) -> str:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        with requests.Session() as session:
            session.trust_env = False  # no proxy stands between us and an engine
            try:
                status = session.get(f"{url.rstrip('/')}/health", headers=headers, timeout=_SECONDS).status_code
            except requests.Timeout:
                return f"does not answer within {_SECONDS:.0f} s"
            except requests.RequestException:
                return "cannot be reached: nothing listens there, or its machine is not known"
        return "" if status == 200 else f"answers with HTTP status {status}"

    with ThreadPoolExecutor(max(1, len(urls))) as threads:
        return list(zip(urls, threads.map(ask, urls), strict=True))


def check_kernels(found: Findings, rollout: RolloutConfig, experts: bool, capability: tuple[int, int] | None) -> None:
    """vLLM has the kernels that the settings ask for, and can push weights into them again and again.

    Args:
        experts: the policy is a mixture of experts.
        capability: compute capability of the GPUs; None: the engines run on CPUs.
    """
    if rollout.urls:
        return
    here = "CPUs" if capability is None else f"GPUs of compute capability {capability[0]}.{capability[1]}"
    if rollout.quantization == "fp8":
        if capability is None and experts:
            found.fault(
                "rollout.quantization model.path",
                "vLLM's kernels for experts in float8 on CPUs have no scale for each output channel. Set "
                "rollout.quantization to none, use a dense model, or a GPU",
            )
        elif capability is not None and capability < (8, 9):
            found.fault(
                "rollout.quantization",
                f"{here} do not compute in float8. vLLM would compute in bfloat16 with weights that its Marlin kernel "
                "packs, and refuses that with a scale for each output channel. Set it to none, or use GPUs of 8.9 or "
                "higher, such as H100",
            )
    if rollout.batch_invariant and (capability or (0, 0)) < (8, 0):
        found.fault(
            "rollout.batch_invariant",
            f"vLLM has no batch-invariant kernels for {here}. Set it to false, or use GPUs of compute capability 8.0 "
            "or higher, such as A100",
        )


def url_problem(url: str) -> str | None:
    """What is wrong with an engine's address; None if nothing."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        return f"is not an address ({error})"
    if parts.scheme not in ("http", "https"):
        return "does not begin with http:// or https://"
    if not parts.hostname:
        return "names no host"
    if port == 0:
        return "has no usable port"
    if parts.path.strip("/") or parts.query or parts.fragment:
        return "has a path after the host, which the run adds itself"
    return None


def port_is_free(port: int) -> bool:
    """Whether a server could listen on this port of 127.0.0.1."""
    with socket.socket() as candidate:
        candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            candidate.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
