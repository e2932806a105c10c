"""What only a GPU can show, in ten minutes on one GPU: four stages, the most important first. `run.sh` calls this file.

    python benchmarks/gpu/run.py [--tiny] [--only STAGE ...] [--seconds N] [--out FOLDER]

    1 correctness   attention, log-probabilities, logits, one update and experts are right (correctness.py)
    2 engine        trainer and vLLM on one GPU: sampling, sleep, update, push of the weights (engine.py)
    3 trees         prefix trees compared with separate sequences, 16K to 100K tokens: time and memory (trees.py)
    4 mfu           share of the GPU's arithmetic that does useful work; memory compared with the planner (mfu.py)

Each stage is a process with a result file of its own, FOLDER/gpu-1-correctness.json and so on. The file holds what the
stage had measured when it ended, however it ended. A stage that fails, hangs or crashes keeps no other from running. A
stage has a time limit; what it leaves of its time goes to the next ones.

--tiny takes sizes at which everything also runs on a CPU; this tests only the scripts. The last line is one JSON
object; `holds` says whether all stages ended and met their goals.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
STAGES = {"correctness": 120, "engine": 160, "trees": 190, "mfu": 110}
"""Seconds of each stage, in the order of their worth."""
NEEDED = {
    "megatron": "the wheel of megatron-core",
    "pydantic": "the wheels of pydantic, pydantic-core, annotated-types and typing-inspection",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU: proves the scripts only")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE")
    parser.add_argument("--seconds", type=float, default=sum(STAGES.values()), help="time of all stages together")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results", help="folder of the result files")
    options = parser.parse_args()
    if not options.tiny and not sees_gpu():
        parser.exit(3, "skipped: torch sees no GPU (--tiny runs the scripts on a CPU)\n")
    options.out.mkdir(parents=True, exist_ok=True)
    start, share = time.monotonic(), options.seconds / sum(STAGES[name] for name in options.only)
    results, until = {}, start
    for name in options.only:
        until += STAGES[name] * share
        number = list(STAGES).index(name) + 1
        file = options.out / f"gpu-{number}-{name}.json"
        results[name] = result = run_stage(name, file, until - time.monotonic(), options.tiny)
        print(f"stage {number} {name}: {summary(result)}", flush=True)
    holds = all(result["holds"] for result in results.values())
    print(json.dumps({"benchmark": "gpu", "holds": holds, "stages": results}))


def sees_gpu() -> bool:
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code]).returncode == 0


def run_stage(name: str, file: Path, limit: float, tiny: bool) -> dict:
    """The result of a stage, which its file then holds too."""
    file.unlink(missing_ok=True)
    start = time.monotonic()
    command = [sys.executable, "-W", "ignore", str(HERE / f"{name}.py"), "--result", str(file), *["--tiny"] * tiny]
    print(f"stage {name}, at most {max(0, limit):.0f} s", flush=True)
    path = os.pathsep.join(filter(None, [str(HERE.parents[1]), os.environ.get("PYTHONPATH")]))
    # A session of its own, so that the engines and trainers that it started end with it.
    environment = os.environ | {"PYTHONPATH": path}
    process = subprocess.Popen(command, cwd=HERE.parents[1], env=environment, start_new_session=True)
    try:
        status = process.wait(max(0, limit))
        ended = "ended" if status == 0 else f"failed with exit status {status}"
    except subprocess.TimeoutExpired:
        ended = f"cut off by its time limit of {limit:.0f} s"
    finally:
        end_session(process)
    result = json.loads(file.read_text()) if file.exists() else {"started": [], "figures": {}}
    done = result["figures"].values()
    result |= {
        "stage": name,
        "ended": ended,
        "seconds": time.monotonic() - start,
        "holds": ended == "ended" and all(part["holds"] for part in done),
    }
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def end_session(process: subprocess.Popen) -> None:
    """End what is left of a stage: first it may stop its engines, then everything is killed."""
    for number, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue


def summary(result: dict) -> str:
    """One line about a stage."""
    parts = result["figures"]
    failed = [name for name, figures in parts.items() if not figures["holds"]]
    skipped = [f"{name} ({figures['skipped']})" for name, figures in parts.items() if "skipped" in figures]
    absent = sorted({figures["missing"] for figures in parts.values() if "missing" in figures})
    line = f"{result['ended']} after {result['seconds']:.0f} s, {len(parts)} of {len(result['started'])} parts done"
    line += ", all goals met" if result["holds"] else ""
    line += f"; not met: {', '.join(failed)}" if failed else ""
    line += f"; skipped: {', '.join(skipped)}" if skipped else ""
    for module in absent:
        wheel = NEEDED.get(module.split(".")[0], f"the wheels of {module}")
        line += f"; {module} is missing here: put {wheel} into benchmarks/gpu/wheels (`benchmarks/gpu/run.sh wheels`)"
    return line


if __name__ == "__main__":
    main()
