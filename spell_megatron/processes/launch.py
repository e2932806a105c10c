"""Start the trainer's processes on this machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from signal import Signals

from spell_megatron.config.schema import TrainingConfig
from spell_megatron.processes.signals import answering

_MODULE = "spell_megatron"

_KILLED = (
    "spell: Process {rank} of the trainer ({pid}) was killed by signal {number}. If the system has killed it, memory "
    "was short. Resume the run from its last checkpoint."
)
"""Of one that could not say so itself. The others may be ended before they have noticed it."""


def launch_processes(training: TrainingConfig, argv: Sequence[str]) -> int:
    """Run this command line in the trainer's processes on this machine.

    Requests to stop are theirs: they get those that reach this process, and take the time that they need.

    Returns the exit status of the first process that fails, or 0. One that is killed is told here.
    """
    import logging

    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
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
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),  # it would leave a folder for each start
        # Of the others it would make an end within 30 seconds, also of SIGHUP where nohup ignores that.
        signals_to_handle="SIGQUIT",
    )
    try:
        with answering(_pass_on):
            elastic_launch(launch, sys.executable)("-m", _MODULE, *argv)
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        if first.exitcode > 0:
            return first.exitcode
        number = -first.exitcode
        print(_KILLED.format(rank=rank, pid=first.pid, number=number), file=sys.stderr)
        return 128 + number
    except SignalException as error:
        return 128 + error.sigval
    return 0


def _pass_on(request: Signals) -> None:
    """Send a request to the trainer's processes; before there are any it ends this one."""
    import psutil

    def ours(child: psutil.Process) -> bool:
        try:
            return _MODULE in child.cmdline()
        except psutil.NoSuchProcess:  # it has just ended
            return True

    processes = list(filter(ours, psutil.Process().children()))
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(request)
    if not processes:
        os._exit(128 + request)
