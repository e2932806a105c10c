#!/usr/bin/env python
"""Turn documents into a corpus for `spell train`; the same as `spell prepare`."""

import sys

from spell_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main(["prepare", *sys.argv[1:]]))
