"""The kernels of flash-linear-attention take what `training.delta_rule` gives them."""

import ast

import pytest

from spell_megatron.training import delta_rule

pytestmark = pytest.mark.contracts


def test_their_arguments_are_those_that_are_given(contract_sources):
    folder = contract_sources("fla-core") / "fla" / "ops" / "gated_delta_rule"
    assert "chunk_gated_delta_rule" in (folder / "__init__.py").read_text(encoding="utf-8")
    functions = ast.walk(ast.parse((folder / "chunk.py").read_text(encoding="utf-8")))
    kernel = next(x for x in functions if isinstance(x, ast.FunctionDef) and x.name == "chunk_gated_delta_rule")
    taken = [argument.arg for argument in kernel.args.args]
    with open(delta_rule.__file__, encoding="utf-8") as file:
        calls = [x for x in ast.walk(ast.parse(file.read())) if isinstance(x, ast.Call)]
    (call,) = [x for x in calls if isinstance(x.func, ast.Name) and x.func.id == kernel.name]
    given = [keyword.arg for keyword in call.keywords]
    assert not call.args and set(given) <= set(taken), set(given) - set(taken)
    described = ast.get_docstring(kernel)
    for said in (
        "values of shape `[B, T, HV, V]`",  # more heads of values than of keys
        "`g` should be in log space",
        "Initial state of shape `[N, HV, K, V]`",
        "Cumulative sequence lengths of shape `[N+1]`",
    ):
        assert said in described
