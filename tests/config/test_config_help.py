"""The help text of every setting."""

from __future__ import annotations

import yaml
from config_files import MINIMAL

from spell_megatron.config.help import all_settings
from spell_megatron.config.schema import Config


def test_every_setting_is_explained():
    listed = list(all_settings())
    assert len(listed) > 80
    assert [setting.key for setting in listed if not setting.help] == []
    assert [setting.key for setting in listed if setting.default is None] == ["model.path", "data.documents"]
    for setting in listed:  # what the help shows as the default is one
        if setting.default is not None:
            raw = yaml.safe_load(MINIMAL)
            *sections, leaf = setting.key.split(".")
            inner = raw
            for section in sections:
                inner = inner.setdefault(section, {})
            inner[leaf] = yaml.safe_load(setting.default)
            assert Config.model_validate(raw) == Config.model_validate(yaml.safe_load(MINIMAL))
