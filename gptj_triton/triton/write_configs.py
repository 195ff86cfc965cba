"""Writes what is made from code, `make configs`: the models' configurations, and tables of docs/reference.md."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from gptj_triton.project import PROJECT, REPOSITORY
from gptj_triton.triton.configs import make_configs
from gptj_triton.triton.reference import with_tables


def main(arguments: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(prog="make_configs.py", description=__doc__).parse_args(arguments)
    for name, text in make_configs().items():
        (REPOSITORY / name / "config.pbtxt").write_text(text, encoding="utf-8")
    reference = PROJECT / "docs" / "reference.md"
    reference.write_text(with_tables(reference.read_text(encoding="utf-8")), encoding="utf-8")
    return 0
