#!/usr/bin/env python
"""Turn a Hugging Face checkpoint into a Megatron one; the same as `spell convert hf-to-megatron`."""

import sys

from spell_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "hf-to-megatron", *sys.argv[1:]]))
