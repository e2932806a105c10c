"""`python -m spell_megatron` is the `spell` command."""

import sys

from spell_megatron.cli import main

if __name__ == "__main__":  # saving a checkpoint starts processes that import this module
    sys.exit(main())
