"""Breaks parts of a running server. `--help` lists the options."""

import sys

from gptj_triton.bench.holding.faults import main

if __name__ == "__main__":
    sys.exit(main())
