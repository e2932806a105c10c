"""Faults of Megatron-Core without transformer-engine and apex are corrected on GPUs as on CPUs."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path

from spell_megatron.training import backend, cpu

WORKER = Path(__file__).with_name("corrections_worker.py")
TESTS = WORKER.parents[1]


def resumed(*words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, WORKER, *words], capture_output=True, text=True, env=environment)


def test_a_run_resumes_with_the_correction_and_not_without_it():
    corrected, plain = resumed(), resumed("uncorrected")
    assert "RESULT resumed after step 1" in corrected.stdout, corrected.stderr[-2000:]
    assert plain.returncode and "KeyError: 'step'" in plain.stderr, plain.stderr[-2000:]


def test_the_corrections_do_not_depend_on_the_device():
    """`initialise` makes them outside of its branches, and the redirection to CPUs has no part of them."""
    body = ast.parse(inspect.getsource(backend.initialise)).body[0].body
    called = [ast.unparse(statement) for statement in body]
    assert "correct_megatron()" in called
    source = inspect.getsource(cpu)
    assert "DistributedOptimizer" not in source and "te_general_gemm" not in source
