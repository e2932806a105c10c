#!/usr/bin/env python3
"""`spell launch` as a script: submit a run to a Slurm cluster by NeMo-Run. `slurm/launch.py --help` explains it.

Any Python 3 starts it. If that has no nemo-run, it goes on in .venv-slurm, which `make environment-slurm` makes.
"""

import os
import sys
from importlib.util import find_spec

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PYTHON = os.path.join(ROOT, ".venv-slurm", "bin", "python")

if __name__ == "__main__":
    if find_spec("nemo_run") is None and sys.prefix != os.path.join(ROOT, ".venv-slurm"):
        if not os.path.exists(PYTHON):
            sys.exit(f"{PYTHON} is not there, and this Python has no nemo-run: run `make environment-slurm`")
        os.execv(PYTHON, [PYTHON, os.path.abspath(__file__), *sys.argv[1:]])
    sys.path.insert(0, ROOT)
    from spell_megatron.cli import main

    sys.exit(main(["launch", *sys.argv[1:]]))
