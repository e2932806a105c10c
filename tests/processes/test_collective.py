"""What a process sees of the end of another one."""

import os
import subprocess
import sys

CODE = """
import os, sys
import torch.distributed as dist
from spell_megatron.processes.collective import from_rank_0, lost_connection
rank = int(sys.argv[2])
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1], 2), rank=rank, world_size=2)
from_rank_0("both are there")
if rank == 0:
    os._exit(9)
try:
    from_rank_0("never said")
except RuntimeError as error:
    print(lost_connection(error), lost_connection(RuntimeError("out of memory")))
"""


def test_a_process_knows_that_another_one_has_ended(tmp_path):
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CODE, str(tmp_path / "store")]
    with (
        subprocess.Popen([*command, "0"], env=environment) as first,
        subprocess.Popen([*command, "1"], env=environment, stdout=subprocess.PIPE, text=True) as second,
    ):
        assert second.communicate(timeout=300)[0] == "True False\n"
    assert first.returncode == 9
