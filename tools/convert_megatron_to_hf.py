#!/usr/bin/env python
"""Turn a Megatron checkpoint into a Hugging Face one; the same as `spell convert megatron-to-hf`."""

import sys

from spell_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "megatron-to-hf", *sys.argv[1:]]))
