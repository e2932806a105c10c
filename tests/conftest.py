"""Fixtures that several folders of tests share. This file also puts `tests/` on the import path."""

import pytest

from engine_fixtures import engines_for, policy  # noqa: F401  (fixtures)


@pytest.fixture(scope="session")
def hf_checkpoint(tmp_path_factory):
    """hf_checkpoint(case) -> (transformers model, its folder), once for each case of `hf_models.CASES`."""
    from hf_models import CASES, make

    made = {}

    def get(case: str):
        if case not in made:
            model = make(*CASES[case])
            folder = tmp_path_factory.mktemp(case)
            model.save_pretrained(folder)
            made[case] = model, folder
        return made[case]

    return get
