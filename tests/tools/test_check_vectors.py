"""The vectors tool on vectors of our own (tests/data/vectors.json), and on vectors that must fail."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
VECTORS = ROOT / "tests" / "data" / "vectors.json"


def run(path):
    command = [sys.executable, str(ROOT / "tools" / "check_vectors.py"), str(path)]
    return subprocess.run(
        command,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_no_vector_fails():
    result = run(VECTORS)
    assert result.returncode == 0, result.stdout + result.stderr
    last = result.stdout.splitlines()[-1]
    assert last == "60 passed, 0 failed, 26 decided otherwise"
    assert len(json.loads(VECTORS.read_text())) == 60 + 26


def test_only_marked_vectors_are_decided_otherwise(tmp_path):
    """Without the marked cases, only the list of docmath.normalize is left to our own decision."""
    cases = [case for case in json.loads(VECTORS.read_text()) if "[ref-quirk]" not in case["note"]]
    path = tmp_path / "plain.json"
    path.write_text(json.dumps(cases))
    assert run(path).stdout.splitlines()[-1] == f"{len(cases) - 1} passed, 0 failed, 1 decided otherwise"


def wrong(expected):
    """A result that is certainly not the expected one."""
    if isinstance(expected, dict):
        return {**expected, next(iter(expected)): "wrong"} if expected else {"wrong": 1}
    return "wrong"


def test_wrong_expectations_fail(tmp_path):
    """Every function notices a wrong expectation, unless its rule does not use it (26 of 27 when written)."""
    cases = [case for case in json.loads(VECTORS.read_text()) if "[ref-quirk]" not in case["note"]]
    unheeded = (
        "verifier.",
        "responder.combine",
        "eval.judge_parse",
        "docmath.normalize",
        "docmath.parse_model_answer",
        "docmath.compare_two_numbers",
        "docqa.",
        "mc.parse_model_answer",
        "batch_composition",
    )
    cases = [{**c, "expected": wrong(c["expected"])} for c in cases if not c["function"].startswith(unheeded)]
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(cases))
    result = run(path)
    assert result.returncode == 1
    assert result.stdout.count("FAILED") >= 0.93 * len(cases)


def test_unknown_functions_fail_and_unreadable_files_are_reported(tmp_path):
    path = tmp_path / "vectors.json"
    path.write_text(json.dumps([{"function": "no.such", "input": {}, "expected": 1, "note": ""}]))
    assert run(path).stdout.splitlines()[-1] == "0 passed, 1 failed, 0 decided otherwise"
    path.write_text("{")
    result = run(path)
    assert result.returncode == 2 and "cannot be read" in result.stderr
