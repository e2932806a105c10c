"""What tests of several files of self-play share."""

import pytest
from scripted import make_prompts


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    return make_prompts(tmp_path_factory.mktemp("prompts"))
