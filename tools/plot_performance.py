"""Draws what benchmark_gpu.py wrote. `--help` lists the options."""

import sys

from gptj_triton.bench.performance_plots import main

if __name__ == "__main__":
    sys.exit(main())
