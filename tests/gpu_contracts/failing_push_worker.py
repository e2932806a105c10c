"""One of two trainer ranks whose GPUs the engines share, in a push that fails; see `test_failing_push`.

What needs a GPU is left out: each rank makes a handle of its own buffer in memory of the CPU. The engine is a fake that
refuses the bucket, or the call, that argv names.
"""

import sys
from types import SimpleNamespace

import requests
import torch
import torch.distributed as dist
from torch.multiprocessing import reductions

from spell_megatron.errors import UserError
from spell_megatron.processes.collective import from_rank_0
from spell_megatron.rollout.transports.ipc import IPC
from spell_megatron.weights.push import WeightPusher

path, refused = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo")
rank = dist.get_rank()
move = torch.Tensor.to
torch.Tensor.to = lambda t, *a, **k: t if a[:1] == ("cuda",) else move(t, *a, **k)
torch.cuda.synchronize = lambda: None
torch.cuda.get_device_properties = lambda device: SimpleNamespace(uuid=f"GPU-{rank}")


def handle(tensor):
    if path == "memory" and rank == refused and tensor[0] == 2:
        raise RuntimeError("CUDA out of memory")
    return None, ("handle", rank)


reductions.reduce_tensor = handle


class Engine:
    url = "http://127.0.0.1:9"
    posts = 0

    def call(self, method, *args, timeout=0):
        return (
            [{"workers": 1}]
            if method == "spell_describe"
            else [{"received": {f"w{n}": "" for n in range(6)}, "unused": [], "missing": []}]
        )

    def post(self, route, body=None, params=None, timeout=0):
        if route == path:
            self.posts += 1
            if self.posts == refused:
                raise requests.HTTPError(f"no {route}")
        return {"success": True}


def stream():
    """As `reshard.export`: every tensor is a collective of all ranks."""
    for number in range(6):
        tensor = torch.full((4,), number, dtype=torch.uint8)
        dist.broadcast(tensor, src=number % 2)
        yield f"w{number}", tensor


engines = SimpleNamespace(engines=[Engine()], transport=IPC, urls=[Engine.url]) if rank == 0 else None
pusher = WeightPusher(engines, bucket_bytes=4)
try:
    pusher.push(stream(), "1")
    outcome = "went along"
except UserError as error:
    outcome = f"failed: {str(error)[:80]}"
print(f"RESULT {rank} {outcome}; then {from_rank_0('restart')}\n", end="", flush=True)
dist.destroy_process_group()
