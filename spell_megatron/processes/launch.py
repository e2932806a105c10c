"""Start the trainer's processes on this machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from spell_megatron.config.schema import TrainingConfig


def launch_processes(training: TrainingConfig, argv: Sequence[str]) -> int:
    """Run this command line in the trainer's processes on this machine.

    Returns the exit status of the first process that fails, or 0.
    """
    import logging

    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The processes say what went wrong. The launcher would add its own reports and stack traces.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(training.threads))
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=training.parallel.processes,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        run_id=f"spell-{os.getpid()}",
        max_restarts=0,
        local_addr="127.0.0.1",
    )
    try:
        elastic_launch(launch, sys.executable)("-m", "spell_megatron", *argv)
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode  # negative: a signal's number
    except SignalException as error:
        return 128 + error.sigval
    return 0
