"""The memory plan that a dry run of `spell launch` shows."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from spell_megatron.config.reading import to_yaml
from spell_megatron.config.schema import Config
from spell_megatron.jobs.site import Site


def memory_plan(config: Config, site: Site) -> str:
    """What `spell plan` says, run by a Python that has torch, because this one may lack it."""
    title = "# Memory plan\n\n"
    if not site.gpus_per_node or config.run.device == "cpu":
        return f"{title}(none: the run uses CPUs)"
    candidates = [site.venv / "bin" / "python"] if site.venv and not site.ssh.host else []
    candidates += [Path(sys.executable)] if find_spec("torch") else []
    python = next((path for path in candidates if path.exists()), None)
    if python is None:
        return (
            f"{title}(none: it needs torch, which this Python lacks, and the cluster's venv is not on this machine. "
            f"Where spell_megatron is installed, run: spell plan --config ... --gpu {site.gpu} --gpus-per-node "
            f"{site.gpus_per_node})"
        )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(to_yaml(config), encoding="utf-8")
        arguments = ["--config", str(file), "--gpu", site.gpu, "--gpus-per-node", str(site.gpus_per_node)]
        if site.colocated:
            arguments.append("--rollout.colocated=true")
        plan = subprocess.run(
            [python, "-m", "spell_megatron", "plan", *arguments], capture_output=True, text=True, cwd=folder
        )
    return title + (plan.stdout or plan.stderr).strip()
