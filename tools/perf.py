"""Measures a server with Triton's perf_analyzer. `--help` lists the options."""

import sys

from gptj_triton.bench.perf import main

if __name__ == "__main__":
    sys.exit(main())
