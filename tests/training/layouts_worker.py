"""One rank of `test_model_layouts`: several layouts of small models against logits of transformers.

Usage: torchrun layouts_worker.py CASES.json, a list of [folder, training.parallel]. Each folder holds a
checkpoint and `tree.pt`: tokens, position ids, end and the expected logits of the whole row.
"""

import json
import sys

import torch
import torch.distributed as dist
from hf_models import apart
from megatron.core import parallel_state, tensor_parallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from safetensors.torch import load_file
from torchrun import end_layout

from spell_megatron.config.schema import TrainingConfig
from spell_megatron.training import backend
from spell_megatron.training.model import build_model
from spell_megatron.training.policy import PolicyModel
from spell_megatron.weights.huggingface import load_weights
from spell_megatron.weights.reshard import Export, export


def check(folder: str, parallel: dict) -> None:
    policy, training = PolicyModel.load(folder, "float32"), TrainingConfig(parallel=parallel)
    backend.initialise(policy, training, "cpu")
    model = build_model(policy, training)
    load_weights(model, folder)
    saved = load_file(f"{folder}/model.safetensors")
    # Small buckets, so that several are on their way.
    exported = {n: tensor.clone() for n, tensor in export(model, bucket_bytes=20_000)}
    if dist.get_rank():
        assert not exported
        wrong = []
    else:
        wrong = [n for n in exported if n not in saved or not torch.equal(exported[n], saved[n])]
        wrong += saved.keys() - exported.keys()
    everywhere = {n: t.clone() for n, t in export(model, bucket_bytes=20_000, everywhere=True)}
    assert everywhere.keys() == saved.keys()
    wrong += [f"{n} on rank {dist.get_rank()}" for n in saved if not torch.equal(everywhere[n], saved[n])]

    # Experts of a layer as one tensor, of one kind of matrices or of both; again and again.
    together = Export(model, fuse_experts=True)
    for room in (60_000, 1 << 20, 1 << 20):
        stream = {n: tensor.clone() for n, tensor in together.stream(room, everywhere=True)}
        fused = apart(stream)
        assert fused.keys() == saved.keys() and (len(stream) < len(saved)) == bool(policy.arch.experts)
        wrong += [f"fused {n} on rank {dist.get_rank()}" for n in saved if not torch.equal(fused[n], saved[n])]

    tree = torch.load(f"{folder}/tree.pt")
    found = []

    def forward_step(batches, model):
        next(batches)
        hidden = model(tree["tokens"][None], tree["position_ids"][None], tree["end"])

        def loss(hidden):
            logits = model.output_layer(hidden, weight=model.output_weight)[0]
            logits = tensor_parallel.gather_from_tensor_model_parallel_region(logits)
            found.append(logits[:, 0, : policy.arch.vocabulary].detach())
            return logits.square().sum(), torch.tensor(1, dtype=torch.int), {}

        return hidden, loss

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(range(2)),
        model=[model],
        num_microbatches=2,
        seq_length=len(tree["tokens"]),
        micro_batch_size=1,
        forward_only=False,
    )
    error = max(((x - tree["logits"]).abs().max().item() for x in found), default=None)
    assert (error is not None) == parallel_state.is_pipeline_last_stage()
    print("RESULT " + json.dumps([parallel, error, sorted(wrong)]), flush=True)
    end_layout()


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        for case in json.load(file):
            check(*case)
    backend.shutdown()
