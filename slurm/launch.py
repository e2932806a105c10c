#!/usr/bin/env python3
"""`spell launch` as a script: submit a run to a Slurm cluster by NeMo-Run. `slurm/launch.py --help` explains it."""

import sys

from spell_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main(["launch", *sys.argv[1:]]))
