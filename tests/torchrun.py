"""Starts test programs in several processes."""

import os
import subprocess
import sys
from pathlib import Path


def torchrun(processes: int, worker: Path, *arguments: object, timeout: float) -> str:
    """What `worker` printed, run by torchrun with one thread per process; a failure fails the test."""
    launched = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"),
            *(worker, *map(str, arguments)),
        ],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        output, errors = launched.communicate(timeout=timeout)
    finally:
        launched.terminate()  # torchrun then ends its workers
    assert launched.returncode == 0, errors[-5000:]
    return output
