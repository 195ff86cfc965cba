"""Serves the model repository on Triton Inference Server. `--help` lists the options."""

import sys

from gptj_triton.serving.command import main

if __name__ == "__main__":
    sys.exit(main())
