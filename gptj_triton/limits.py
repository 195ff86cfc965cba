"""The one table of limits on what a request may hold. Knows neither Triton nor numpy.

Each limit is a parameter of the same name in config.pbtxt of the models that keep it, and is set by `serve.py --limit
NAME=NUMBER`. `make configs` writes the parameters and the table in docs/reference.md. A limit is kept by every model
that can be asked, because a client may leave out the steps before it.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from gptj_triton.errors import ConfigError, InvalidRequestError

PREPROCESSING, FRONTEND, POSTPROCESSING = "preprocessing", "fastertransformer", "postprocessing"
EVERYWHERE = (PREPROCESSING, FRONTEND, POSTPROCESSING)
BEFORE_TEXT = (PREPROCESSING, FRONTEND)
# A word becomes two lists of token ids, as it is and after a space, of no more ids than it has bytes.
SPELLINGS = 2
NEAR_MISS = 0.85  # difflib's ratio from which an unknown parameter counts as a limit misspelt


def _limit(default: int, models: tuple[str, ...], meaning: str) -> Any:
    return dataclasses.field(default=default, metadata={"models": models, "meaning": meaning})


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """The most of everything. Those whose default is 0 leave the decision to the model's context."""

    max_request_bytes: int = _limit(2**24, EVERYWHERE, "bytes of a request: all its tensors, as a model gets them")
    max_request_rows: int = _limit(128, EVERYWHERE, "rows of a request; more need a larger `max_batch_size`, too")
    max_request_sequences: int = _limit(1024, EVERYWHERE, "sequences of a request: rows × sequences or beams of a row")
    max_request_tokens: int = _limit(
        2**18, EVERYWHERE, "tokens of a request: prompt and new tokens asked for, of all sequences"
    )
    max_request_strings: int = _limit(
        2**14, EVERYWHERE, "strings of a tensor, rows × longest list: prompts or words, also empty ones"
    )
    max_request_text_bytes: int = _limit(2**22, (PREPROCESSING,), "bytes of all prompts of a request")
    max_request_word_bytes: int = _limit(
        2**20,
        EVERYWHERE,
        "bytes of all stop and bad words of a request, counted for each sequence: 4 a word and those of its text, or 4 "
        "a token id",
    )
    max_words: int = _limit(
        1024, EVERYWHERE, "words of a list in one row; twice as many where words are token ids; end ids of a row"
    )
    max_word_bytes: int = _limit(
        2**16, EVERYWHERE, "bytes of a list of words in one row; twice as many ids where words are token ids"
    )
    max_prompt_tokens: int = _limit(0, BEFORE_TEXT, "tokens of a prompt; 0: what the context holds")
    max_new_tokens: int = _limit(0, BEFORE_TEXT, "new tokens of a sequence; 0: what the prompt leaves of the context")
    max_parameters: int = _limit(
        128, BEFORE_TEXT, "parameters of a request: keys that are no fields, and headers that are handed on"
    )
    max_parameter_bytes: int = _limit(2**16, BEFORE_TEXT, "bytes of a request's parameters, as JSON")

    def check(self, name: str, value: int, what: str, times: int = 1) -> None:
        """Raise InvalidRequestError where `value` is above the limit `name`, that many `times`; `what` has that value.

        A limit that is 0 allows everything.
        """
        most = getattr(self, name) * times
        if value > most > 0:
            raise InvalidRequestError(what, value, f"0 to {most} (limit {name})")


LIMITS = {field.name: field for field in dataclasses.fields(RequestLimits)}
DEFAULTS = RequestLimits()


def limits_of(model: str) -> dict[str, int]:
    """The limits that a model keeps, with their defaults."""
    return {name: getattr(DEFAULTS, name) for name, field in LIMITS.items() if model in field.metadata["models"]}


def read_limits(parameters: Mapping[str, str], known: Collection[str] = ()) -> RequestLimits:
    """The limits among a model's parameters, which are strings; an empty one, or none, means the default.

    `known` are other parameters of that model. Raises ConfigError for a value that is no limit, and for a name that may
    be a limit misspelt.
    """
    given = {name: parse_limit(name, text) for name, text in parameters.items() if name in LIMITS and text.strip()}
    for name in parameters:
        near = [] if name in known or name in LIMITS else difflib.get_close_matches(name, LIMITS, 1, NEAR_MISS)
        if near:
            raise ConfigError(f"parameter {name} is unknown; {near[0]} is a limit of requests")
    return RequestLimits(**given)


def parse_limit(name: str, text: str) -> int:
    """The value of the limit `name` as a number; ConfigError where it is none, or there is no such limit."""
    if name not in LIMITS:
        raise ConfigError(f"no limit is named {name!r}, allowed: {', '.join(LIMITS)}")
    least = 1 if LIMITS[name].default else 0
    if not text.strip().isdecimal() or int(text) < least:
        raise ConfigError(f"parameter {name} is {text!r}, allowed: a whole number, {least} or more")
    return int(text)
