"""Measures streams: how soon, how many, how much memory. `--help` lists the options."""

import sys

from gptj_triton.bench.streaming import main

if __name__ == "__main__":
    sys.exit(main())
