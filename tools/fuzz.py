"""Sends a server any input. `--help` lists the options."""

import sys

from gptj_triton.bench.holding.fuzz import main

if __name__ == "__main__":
    sys.exit(main())
