"""The command line `client.py PROMPT`. Its options are the request fields; those that are given are sent."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from gptj_triton.api_key import ENVIRONMENT, ApiKeyError, read_key
from gptj_triton.client.answer import Answer
from gptj_triton.client.client import DEFAULT_URLS, Client
from gptj_triton.client.errors import ClientError, InvalidFieldError, UnavailableError
from gptj_triton.client.request import FIELDS, PROMPT, python_type

INTERRUPTED = 130  # the exit status that shells give a program ended by Ctrl-C


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Asks the model for text.")
    parser.add_argument("prompt", metavar="PROMPT", help="the text to go on from, or - to read it from standard input")
    parser.add_argument("--protocol", choices=list(DEFAULT_URLS), default="generate", help="default: %(default)s")
    parser.add_argument("--url", metavar="HOST:PORT", help="default: localhost:8000, or localhost:8001 for grpc")
    key_help = f"its first line is the server's key (default: the environment variable {ENVIRONMENT})"
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help=key_help)
    parser.add_argument("--timeout", type=float, default=300.0, metavar="SECONDS", help="default: %(default)g")
    parser.add_argument("--stream", action="store_true", help="print the text as it comes; Ctrl-C ends the request")
    parser.add_argument("--json", action="store_true", help="print the whole answer as JSON, or each piece of a stream")
    group = parser.add_argument_group("fields of the request (what is not given is not sent)")
    for name, field in FIELDS.items():
        option, of_type = f"--{name.replace('_', '-')}", python_type(field)
        about = "; ".join(filter(None, [field.help, field.range(), f"default: {field.default_in_words}"]))
        if of_type is bool:
            group.add_argument(option, action=argparse.BooleanOptionalAction, help=about)
        else:
            group.add_argument(
                option,
                type=of_type,
                action="append" if field.many else "store",
                metavar=of_type.__name__.upper(),
                help=f"{about} (may be given again)" if field.many else about,
            )
    return parser.parse_args(arguments)


def given_fields(options: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name in FIELDS if (value := getattr(options, name)) is not None}


def read_prompt(prompt: str) -> str:
    """`prompt`, or for `-` standard input without the newline that ends it."""
    if prompt != "-":
        return prompt
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InvalidFieldError(f"{PROMPT}: not valid UTF-8 at byte {error.start}") from None


def print_answer(client: Client, options: argparse.Namespace) -> None:
    answer = client.generate(read_prompt(options.prompt), **given_fields(options))
    print(as_json(answer) if options.json else "\n".join(answer.text))


def print_stream(client: Client, options: argparse.Namespace) -> None:
    """Prints each piece as it comes. Raises ClientError's subclasses, also when text has been printed already."""
    fields = given_fields(options)
    if fields.get("num_return_sequences", 1) > 1 and not options.json:
        raise InvalidFieldError("num_return_sequences: --stream prints one text; with --json it prints all")
    begun = False
    try:
        with contextlib.closing(client.stream(read_prompt(options.prompt), **fields)) as pieces:
            for piece in pieces:
                begun = begun or not options.json
                print(as_json(piece) if options.json else piece.text[0], end="\n" if options.json else "", flush=True)
    finally:
        if begun:
            print()


def as_json(answer: Answer) -> str:
    return json.dumps(dataclasses.asdict(answer), ensure_ascii=False)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # else gRPC writes lines of its own beside the error
    try:
        api_key = read_key(options.api_key_file) if options.api_key_file else None
        with Client(options.url, options.protocol, options.timeout, api_key) as client:
            (print_stream if options.stream else print_answer)(client, options)
    except (ClientError, ApiKeyError) as error:
        print(f"client.py: {error}", file=sys.stderr)
        return os.EX_TEMPFAIL if isinstance(error, UnavailableError) else 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it flushes at exit
        return 1
    return 0
