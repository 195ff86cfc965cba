"""Writes the models' configurations, and tables of docs/reference.md. `--help` lists the options."""

import sys

from gptj_triton.triton.write_configs import main

if __name__ == "__main__":
    sys.exit(main())
