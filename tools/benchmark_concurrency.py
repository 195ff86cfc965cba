"""Times the same requests one after another and all at once. `--help` lists the options."""

import sys

from gptj_triton.bench.concurrency import main

if __name__ == "__main__":
    sys.exit(main())
