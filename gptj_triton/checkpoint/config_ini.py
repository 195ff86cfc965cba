"""Reads FasterTransformer's `config.ini`. Knows nothing of its keys."""

from __future__ import annotations

import ast
import configparser
from pathlib import Path
from typing import Any

from gptj_triton.errors import ConfigError
from gptj_triton.stand_ins import refuse_stand_in


def read_config_ini(path: Path) -> dict[str, str]:
    """The section `[gptj]` of FasterTransformer's `config.ini`, or FauxPilot's `[gpt]`; ConfigError where it cannot be
    read.
    """
    refuse_stand_in(path)
    parser = configparser.ConfigParser(interpolation=None, inline_comment_prefixes=(";",))
    try:
        parser.read_string(path.read_text(encoding="utf-8-sig"))
        return dict(parser["gptj" if parser.has_section("gptj") else "gpt"])
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; FasterTransformer's files need it") from None
    except (configparser.Error, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no ini file: {' '.join(str(error).split())}") from None
    except KeyError:
        raise ConfigError(f"{path} has no section [gptj], found: {', '.join(parser.sections()) or 'none'}") from None


def python_value(text: str) -> Any:
    """What a converter wrote as Python prints it: a number, None or a list. Any other text stays as it is."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
