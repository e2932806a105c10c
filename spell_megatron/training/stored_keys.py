"""Keys of distributed checkpoints that earlier versions wrote otherwise."""

from __future__ import annotations

from collections.abc import Container

_NOW, _BEFORE = ".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_"


def stored_key(key: str, stored: Container[str]) -> str:
    """The key, among those that a checkpoint holds, of the tensor that has `key` now; `key` if it holds none.

    Version 0.1 gave the norm before experts, where it was no layer of transformer-engine, the key that it has before a
    dense feed-forward. The moments of an optimizer have the key of their weight behind a name of their own.
    """
    before = key.replace(_NOW, _BEFORE)
    return before if key not in stored and before in stored else key
