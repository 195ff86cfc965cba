"""Turns Hugging Face's files into FasterTransformer's, or back. `--help` lists the options."""

import sys

from gptj_triton.checkpoint.convert.command import main

if __name__ == "__main__":
    sys.exit(main())
