"""Asks the server for text. `--help` lists the options."""

import sys

from gptj_triton.client import main

if __name__ == "__main__":
    sys.exit(main())
