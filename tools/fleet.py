"""Kills and restarts servers behind a proxy, under load. `--help` lists the options."""

import sys

from gptj_triton.bench.holding.fleet import main

if __name__ == "__main__":
    sys.exit(main())
