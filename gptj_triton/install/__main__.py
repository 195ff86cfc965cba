"""`python3 -m gptj_triton.install FOLDER` makes FOLDER the virtual environment that `make` installs into."""

import argparse
import sys
from pathlib import Path

from gptj_triton.install.environment import make_environment
from gptj_triton.install.programs import InstallError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 -m gptj_triton.install", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    try:
        make_environment(parser.parse_args().folder.absolute())
    except (InstallError, OSError) as error:
        print(f"make: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
