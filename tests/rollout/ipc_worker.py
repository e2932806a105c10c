"""One rank of a trainer that shares its GPUs with engines; see `test_transports`. What needs a GPU is left out: each
rank makes a handle of its own buffer in memory of the CPU."""

import base64
import pickle
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.multiprocessing import reductions

from spell_megatron.rollout.transports.ipc import IpcChannel

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.Tensor.to = lambda tensor, device: tensor
torch.cuda.synchronize = lambda: None
torch.cuda.get_device_properties = lambda device: SimpleNamespace(uuid=f"GPU-{rank}")
reductions.reduce_tensor = lambda tensor: (None, ("handle of", rank, tensor.sum().item()))
channel = IpcChannel()
for number in (1, 2):
    told = channel.prepare([("a", torch.full((3,), number, dtype=torch.uint8)), ("b", torch.ones(2))])
    handles = pickle.loads(base64.b64decode(told["ipc_handles_pickled"]))
    print(f"RESULT {told['tensor_sizes']} {handles}\n", end="", flush=True)  # in one piece: ranks share the output
dist.destroy_process_group()
