"""Process groups of the trainer."""

import pytest
from transformers import LlamaConfig

from spell_megatron.config.schema import TrainingConfig
from spell_megatron.errors import UserError
from spell_megatron.training import backend
from spell_megatron.training.policy import PolicyModel

pytestmark = pytest.mark.usefixtures("process_group")


def test_processes_must_fit_the_layout():
    backend.shutdown()
    policy = PolicyModel.of(LlamaConfig())
    try:
        with pytest.raises(UserError, match="1 trainer processes cannot be divided into groups"):
            backend.initialise(policy, TrainingConfig(parallel={"tensor": 2}), "cpu")
        with pytest.raises(UserError, match="no GPU"):
            backend.initialise(policy, TrainingConfig(), "cuda")
    finally:
        backend.initialise(policy, TrainingConfig(), "cpu")
