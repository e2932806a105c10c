"""The names of GPUs."""

import pytest

from spell_megatron.errors import UserError
from spell_megatron.planner.gpus import GPUS, find_gpu


@pytest.mark.parametrize("name", ["H100-80G", "h100-80g", "H100-80GB", "h100", " H100 "])
def test_a_gpu_is_found_by_its_name_in_any_case(name):
    assert find_gpu(name) is GPUS["H100-80G"]


@pytest.mark.parametrize("name", ["H1000", "H", "", "80G", "H100-40G"])
def test_an_unknown_gpu_is_refused_with_those_that_are_known(name):
    with pytest.raises(UserError, match="Known are A100-80G, H100-80G, H200-141G, B200"):
        find_gpu(name)
