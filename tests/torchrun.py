"""Starts test programs in several processes."""

import gc
import os
import subprocess
import sys
from pathlib import Path


def torchrun(processes: int, worker: Path, *arguments: object, timeout: float) -> str:
    """What `worker` printed, run by torchrun with one thread per process; a failure fails the test."""
    tests = Path(__file__).parent
    launched = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"),
            *(worker, *map(str, arguments)),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)]), "OMP_NUM_THREADS": "1"},
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


def end_layout() -> None:
    """In such a program: leaves all process groups but the default one, for another layout to be made.

    (Not backend.shutdown(): torchrun's store cannot serve a second default process group. And the groups have to go:
    each that is left keeps a thread of gloo, which wakes up a hundred times a second.)
    """
    import torch.distributed as dist
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    gc.collect()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
