"""Before and after: a FastAPI service around transformers, and this server. `--help` lists the options."""

import sys

from gptj_triton.bench.comparison.command import main

if __name__ == "__main__":
    sys.exit(main())
