"""What leaves the trainer's device while engines work: freed, back unchanged, and without effect on the updates."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from swap_cases import compare_swapped, held, memory, ordinary, updates
from torchrun import torchrun
from trainer_cases import make_config, make_policy, make_trainer

from spell_megatron.errors import UserError
from spell_megatron.training import host_copy
from spell_megatron.training.host_copy import HostCopy
from spell_megatron.training.swap import Swap, left

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("policies")
    for policy in ("qwen2", "qwen3", "qwen3_moe"):
        make_policy(policy, folder / policy)
    return folder


@pytest.mark.parametrize(
    ("what", "dtype", "distributed"),
    [("all", "float32", False), ("all", "bfloat16", True), ("state", "bfloat16", False)],
)
def test_updates_are_those_of_a_trainer_that_never_swaps(what, dtype, distributed, folder):
    config = make_config(folder / "qwen3", model__dtype=dtype, training__optimizer__distributed=distributed)
    compare_swapped(config, what, ordinary(config))


def test_two_processes_in_several_layouts(folder):
    """Also with weights, gradients and state that belong to one rank only."""
    torchrun(2, Path(__file__).with_name("swap_worker.py"), folder, timeout=900)


@pytest.mark.parametrize(
    ("what", "dtype"), [("none", "bfloat16"), ("state", "bfloat16"), ("all", "bfloat16"), ("all", "float32")]
)
def test_bytes_that_leave_are_those_of_the_plan(what, dtype, folder):
    config = make_config(folder / "qwen3_moe", model__dtype=dtype, training__optimizer__distributed=True)
    trainer = make_trainer(config)
    list(updates(trainer, count=1))
    tensors = held(trainer)
    sizes = {kind: memory(tensors, kind) for kind in ("weights", "gradients", "state")}
    swap = Swap(trainer.model, trainer.optimizer, what)
    swap.leave()
    stay = sum(memory(tensors, kind) for kind in sizes)
    planned = left(what, sizes["weights"], sizes["gradients"], sizes["state"])
    assert sum(sizes.values()) - stay == planned.gpu
    host = len(swap._state._host) + len(swap._weights._host)
    assert planned.host <= host <= planned.host + 64 * len(tensors)
    assert (planned.gpu > 0) == (what != "none")


def test_views_of_one_storage_leave_together_and_stay_views():
    whole = torch.arange(12.0)
    first, second, alone = whole[:5], whole[5:].view(7, 1), torch.ones(3, dtype=torch.bfloat16)
    copy = HostCopy(lambda: [first, second, alone], "a setting")
    copy.leave()
    assert copy.away and whole.untyped_storage().nbytes() == alone.untyped_storage().nbytes() == 0
    assert copy.on_host(second)[2] == 7 and copy.on_host(alone).tolist() == [1, 1, 1]
    copy.on_host(second)[2] = 70
    copy.come_back()
    assert not copy.away and copy.on_host(second) is None
    assert whole.tolist() == [0, 1, 2, 3, 4, 5, 6, 70, 8, 9, 10, 11]
    whole[0] = 9
    assert first[0] == 9


def test_nothing_is_lost_where_the_host_lacks_memory(monkeypatch):
    tensor = torch.ones(4)
    copy = HostCopy(lambda: [tensor], "training.swap")
    real = torch.empty

    def refuse(*size, **options):
        if size[0]:
            raise RuntimeError("can't allocate memory")
        return real(*size, **options)

    monkeypatch.setattr(host_copy.torch, "empty", refuse)
    with pytest.raises(UserError, match=r"GiB of host memory .*change training.swap"):
        copy.leave()
    assert not copy.away and tensor.tolist() == [1, 1, 1, 1]


def test_memory_for_gpus_is_pinned_as_it_is(monkeypatch):
    """With the calls by which torch.distributed pins memory; the status is theirs, too."""
    calls, status = [], 0

    def register(address, size, flags):
        calls.append((address, size, flags))
        return status

    cudart = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=calls.append)
    monkeypatch.setattr(host_copy.torch.cuda, "cudart", lambda: cudart)
    memory = host_copy._host_memory(100, torch.device("cuda"), "training.swap")
    address = memory.data_ptr()
    assert calls == [(address, 100, 0)] and len(memory) == 100
    del memory
    assert calls[1:] == [address]
    status = 2
    with pytest.raises(UserError, match=r"cannot get them \(CUDA error 2\).*training.swap"):
        host_copy._host_memory(100, torch.device("cuda"), "training.swap")


def test_a_return_that_failed_can_be_repeated(monkeypatch):
    tensors = [torch.full((4,), float(number)) for number in range(3)]
    copy = HostCopy(lambda: tensors, "training.swap")
    copy.leave()
    real, calls = torch.UntypedStorage.resize_, []

    def refuse_second(storage, size):
        calls.append(size)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(storage, size)

    monkeypatch.setattr(torch.UntypedStorage, "resize_", refuse_second)
    with pytest.raises(UserError, match=r"rollout.gpu_memory_utilization"):
        copy.come_back()
    assert copy.away
    copy.come_back()
    assert [tensor[0].item() for tensor in tensors] == [0, 1, 2]


def test_memory_that_numpy_has_looked_into_stays():
    seen, other = torch.arange(4.0), torch.arange(4.0)
    seen.numpy()
    copy = HostCopy(lambda: [seen, other], "training.swap")
    copy.leave()
    assert seen.tolist() == [0, 1, 2, 3] and other.untyped_storage().nbytes() == 0
    copy.come_back()
    assert seen.tolist() == other.tolist() == [0, 1, 2, 3]
