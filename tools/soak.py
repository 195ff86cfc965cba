"""Keeps a server under a mixed load for long. `--help` lists the options."""

import sys

from gptj_triton.bench.holding.soak import main

if __name__ == "__main__":
    sys.exit(main())
