"""GiB that `spell plan` expects of the cases of mfu.py, as JSON. It needs no GPU."""

import json
import sys

from suite import GROUP, run_config, sizes

from spell_megatron.planner.gpus import Assumptions
from spell_megatron.planner.memory import trainer_memory
from spell_megatron.planner.model_size import ModelSize
from spell_megatron.training.policy import PolicyModel


def planned_gib(recompute: str, prompt: int, response: int, tiny: bool) -> float:
    """Memory of the trainer, without what the planner adds for other programs and for fragmentation."""
    config = run_config("bfloat16", prompt + GROUP * response, response)
    config.training.recompute = recompute
    policy = PolicyModel.of(sizes(tiny, num_hidden_layers=4), "bfloat16")
    memory = trainer_memory(ModelSize.of(policy), config, 1, Assumptions(reserve=0, fragmentation=0))
    return (memory.state + memory.working) / 2**30


tiny, response, cases = json.loads(sys.argv[1])
print(json.dumps({f"{kind}_{prompt}_gib": planned_gib(kind, prompt, response, tiny) for kind, prompt in cases}))
