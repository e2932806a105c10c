"""What a run with transformer-engine makes of the checkpoints of plain layers; see `test_transformer_engine`.

usage: transformer_engine_worker.py FOLDER
FOLDER holds policies, runs that plain layers saved and conversions that they made; results are written beside them.
"""

import sys
from pathlib import Path

import transformer_engine_stub  # before Megatron-Core


def main(folder: Path) -> None:
    import torch
    from checkpoint_cases import CASES_OF_TRANSFORMER_ENGINE, OPTIMIZERS, config_of, describe, entries_of
    from trainer_cases import initialise, make_trainer, save
    from transformer_engine.pytorch import GroupedLinear, LayerNormLinear
    from transformer_engine.pytorch.optimizers import FusedAdam

    from spell_megatron.checkpoint.folder import latest
    from spell_megatron.checkpoint.restore import load
    from spell_megatron.config.schema import ParallelConfig
    from spell_megatron.training import backend, layers, model
    from spell_megatron.training.optimizer import optimizer_parts
    from spell_megatron.weights.convert import compare, hf_to_megatron

    transformer_engine_stub.pretend_a_gpu()
    model._has_transformer_engine = lambda: True
    layers._wants_grouped_experts = lambda use_te: False
    for case in CASES_OF_TRANSFORMER_ENGINE:
        for optimizer in OPTIMIZERS:
            run = folder / f"{case}_{optimizer}"
            config = config_of(folder / case, optimizer)
            initialise(config)
            trainer = make_trainer(config)
            kinds = {type(module) for module in trainer.model.modules()}
            assert any(issubclass(kind, LayerNormLinear) for kind in kinds)
            assert any(issubclass(kind, GroupedLinear) for kind in kinds) == (case != "dense")
            inner = optimizer_parts(trainer.optimizer)[0].optimizer
            assert isinstance(inner, FusedAdam)
            load(latest(run), trainer)
            assert all(group["step"] == 2 for group in inner.param_groups)
            torch.save(entries_of(trainer), folder / f"{run.name}_entries.pt")
            save(folder / f"{run.name}_te", 2, trainer, config, {})
            backend.shutdown()
        torch.save(describe(folder / case), folder / f"{case}_te.pt")
        hf_to_megatron(folder / case, folder / f"{case}_te_megatron", ParallelConfig(tensor=2))
        compare(folder / f"{case}_megatron", folder / case)


if __name__ == "__main__":  # saving starts processes
    main(Path(sys.argv[1]))
