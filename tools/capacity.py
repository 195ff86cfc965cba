"""How many replicas a load needs, and where one saturates. `--help` lists the options."""

import sys

from gptj_triton.bench.capacity.command import main

if __name__ == "__main__":
    sys.exit(main())
