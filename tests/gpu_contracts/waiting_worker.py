"""One of two trainer ranks whose default process group gives up after two seconds, as NCCL's does after ten minutes;
see `test_waiting`."""

import time
from datetime import timedelta

import torch.distributed as dist

from spell_megatron.processes.collective import from_all, from_rank_0

dist.init_process_group("gloo")
rank = dist.get_rank()
from_rank_0("the engines are ready")
dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2), dist.group.WORLD)
if rank == 0:
    time.sleep(5)  # a rollout
order = from_rank_0("update" if rank == 0 else "")
if rank == 1:
    time.sleep(5)  # a slow disk
written = from_all(f"part {rank}")
print(f"RESULT {order} {written}\n", end="", flush=True)
dist.destroy_process_group()
