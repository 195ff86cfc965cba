"""Converts a checkpoint between Hugging Face's layout and FasterTransformer's, or to another split or type.

    python tools/convert_checkpoint.py gpt-j-6b gpt-j-6b-ft/2-gpu --to fastertransformer --tensor-para-size 2

The command line only: reads the options, and puts errors in one line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from gptj_triton.checkpoint.convert.conversion import Settings, convert
from gptj_triton.checkpoint.data_types import WEIGHT_TYPES
from gptj_triton.errors import ConfigError


def parse_settings(arguments: Sequence[str] | None) -> Settings:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("source", type=Path, metavar="SRC", help="directory of either kind, or the parent of a <t>-gpu")
    add("target", type=Path, metavar="DST", help="directory to make; it is DST.partial until it is complete")
    add("--to", required=True, choices=["fastertransformer", "huggingface"])
    add("--tensor-para-size", type=int, default=1, metavar="T", help="GPUs that share the weights (default: 1)")
    add("--weight-data-type", choices=list(WEIGHT_TYPES), help="default: the source's own")
    add(
        "--context-length",
        type=int,
        default=0,
        metavar="N",
        help="tokens, where no config.json beside SRC says it (default: 2048)",
    )
    return Settings(**vars(parser.parse_args(arguments)))


def main(arguments: Sequence[str] | None = None) -> int:
    settings = parse_settings(arguments)
    try:
        convert(settings)
    except (ConfigError, OSError) as error:
        print(f"convert_checkpoint.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("convert_checkpoint.py: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0
