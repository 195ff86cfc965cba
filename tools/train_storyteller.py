"""Trains the embedded model. `--help` lists the options."""

import sys

from gptj_triton.storyteller.train import main

if __name__ == "__main__":
    sys.exit(main())
