"""Times the engine by itself on a GPU. `--help` lists the options."""

import sys

from gptj_triton.bench.gpu import main

if __name__ == "__main__":
    sys.exit(main())
