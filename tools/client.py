"""Asks the server for text. `--help` lists the options."""

import sys

from gptj_triton.client.command import main

if __name__ == "__main__":
    sys.exit(main())
