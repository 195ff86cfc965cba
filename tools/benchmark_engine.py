"""Times the engine by itself beside transformers. `--help` lists the options."""

import sys

from gptj_triton.bench.engine import main

if __name__ == "__main__":
    sys.exit(main())
