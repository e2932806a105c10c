"""Derived seeds."""

from spell_megatron.selfplay.seeds import derive_seed


def test_a_seed_depends_on_each_part():
    parts = (0, 1, 2, "cluster", "responder", 3)
    variants = {derive_seed(*parts[:i], f"x{p}", *parts[i + 1 :]) for i, p in enumerate(parts)}
    assert len(variants | {derive_seed(*parts)}) == len(parts) + 1
