"""One rank of a trainer that pushes into running engines in several layouts; see `test_push`.

Usage: torchrun push_worker.py JSON of [urls, [[checkpoint folder, training.parallel], ...]].
"""

import json
import sys

import torch.distributed as dist
from engine_fixtures import open_engines
from torchrun import end_layout

from spell_megatron.config.schema import Config
from spell_megatron.training import backend
from spell_megatron.training.model import build_model
from spell_megatron.training.policy import PolicyModel
from spell_megatron.weights.check import compare, read_checkpoint
from spell_megatron.weights.huggingface import load_weights
from spell_megatron.weights.push import WeightPusher
from spell_megatron.weights.reshard import Export


def push(urls: list[str], folder: str, parallel: dict) -> None:
    config = Config(
        model={"path": folder, "dtype": "float32"},
        data={"documents": "unused.parquet"},
        run={"device": "cpu"},
        rollout={"urls": urls, "sampling": {"max_prompt_tokens": 256, "max_response_tokens": 256}},
        training={"parallel": parallel},
    )
    policy = PolicyModel.load(folder, "float32")
    backend.initialise(policy, config.training, "cpu")
    model = build_model(policy, config.training)
    load_weights(model, folder)
    engines = None if dist.get_rank() else open_engines(config, config.model.path)
    pusher = WeightPusher(engines, bucket_bytes=1 << 18)
    done = pusher.push(Export(model, fuse_experts=True).stream(1 << 18), str(parallel), verify=True)
    if engines:
        count, differences = compare(read_checkpoint(config.model.path), engines.engines)
        print(f"RESULT {done.tensors} sent, {count} compared, {differences} differ", flush=True)
    pusher.close()
    end_layout()


if __name__ == "__main__":
    urls, tasks = json.loads(sys.argv[1])
    for folder, parallel in tasks:
        push(urls, folder, parallel)
    backend.shutdown()
