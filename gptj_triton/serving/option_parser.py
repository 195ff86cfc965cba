"""The options of serve.py: their names, defaults, ranges and help."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from gptj_triton.checkpoint.data_types import COMPUTE_TYPES, FP8
from gptj_triton.engine.config import KV_CACHE_DATA_TYPES
from gptj_triton.errors import ConfigError
from gptj_triton.limits import parse_limit
from gptj_triton.project import REPOSITORY


class OneLineParser(argparse.ArgumentParser):
    """argparse with its errors on one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def port(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"{value} is not in 1 to 65535")
    return value


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


def limit(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    try:
        return name, parse_limit(name, number)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is not 0 or more")
    return value


def seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds, 0 or more")
    return value


def parser() -> OneLineParser:
    result = OneLineParser(
        prog="serve.py",
        description="Serves text in, text out with GPT-J on Triton Inference Server until SIGINT or SIGTERM.",
        epilog="Everything behind -- is given to tritonserver, for example: serve.py -- --log-verbose=1",
        allow_abbrev=False,
    )
    add = result.add_argument
    model_help = "Hugging Face or FasterTransformer directory, or hub id (default: the embedded storyteller)"
    add("--model", metavar="DIR_OR_HUB_ID", help=model_help)
    add(
        "--model-repository",
        type=Path,
        default=REPOSITORY,
        metavar="DIR",
        help="what to serve (default: this project's)",
    )
    add("--tokenizer", metavar="DIR_OR_HUB_ID", help="where its tokenizer is (default: beside the weights)")
    context_help = "its context in tokens, where no file of it says it (default: 2048 then)"
    add("--context-length", type=positive, metavar="N", help=context_help)
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: auto")
    add("--data-type", choices=[*COMPUTE_TYPES, FP8], help="default: fp32 on cpu, fp16 on cuda")
    add("--int8-mode", type=int, choices=[0, 1], default=0, help="1: weights in 8 bits, on one GPU (default: 0)")
    cache_help = "of the KV cache: auto as what is computed with, fp8 for half of that (default: auto)"
    add("--kv-cache-data-type", choices=KV_CACHE_DATA_TYPES, default="auto", help=cache_help)
    add("--tensor-para-size", type=positive, default=1, metavar="N", help="GPUs that share the model (default: 1)")
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    key_help = "its first line is a key that every request for text must bring, and that opens what reads"
    add("--api-key-file", type=Path, metavar="FILE", help=key_help)
    admin_help = "its first line is a key that opens Triton's APIs for models, shared memory, trace and logging"
    add("--open-admin-api", type=Path, metavar="FILE", help=admin_help)
    add("--http-port", type=port, default=8000, metavar="PORT", help="default: 8000")
    add("--grpc-port", type=port, default=8001, metavar="PORT", help="default: 8001")
    add("--metrics-port", type=port, default=8002, metavar="PORT", help="default: 8002")
    pace_help = "most pieces a second of all streams together (default: what the model repository says)"
    add("--stream-pieces-per-second", type=positive, metavar="N", help=pace_help)
    ensemble_help = "let `ensemble` stream where a request says stream: true, and lose `infer` on it"
    add("--streaming-ensemble", action="store_true", help=ensemble_help)
    limit_help = "the most that a request may hold, such as max_request_tokens=100000; may be given again"
    add("--limit", type=limit, action="append", default=[], metavar="NAME=NUMBER", help=limit_help)
    add("--backend-directory", type=Path, metavar="DIR", help="directory with NVIDIA's fastertransformer backend")
    triton_help = "which one to start, BIN/tritonserver beside backends/python (default: the first that is found)"
    add("--tritonserver", type=Path, metavar="PROGRAM", help=triton_help)
    add("--engine-python", default="python3", metavar="PROGRAM", help="the Python that has torch (default: this one)")
    timeout_help = "end the start where a model is not ready after so long (default: 1800)"
    add("--start-timeout", type=positive, default=1800, metavar="SECONDS", help=timeout_help)
    delay_help = "how long, after a signal to stop, it is not ready and still takes requests (default: 0)"
    add("--drain-delay", type=seconds, default=0.0, metavar="SECONDS", help=delay_help)
    drain_help = "how long requests may go on after a signal to stop (default: 30)"
    add("--drain-timeout", type=seconds, default=30.0, metavar="SECONDS", help=drain_help)
    restart_help = "how often tritonserver is started again when it dies, within --restart-window (default: 10)"
    add("--max-restarts", type=natural, default=10, metavar="N", help=restart_help)
    add("--restart-window", type=seconds, default=300.0, metavar="SECONDS", help="default: 300")
    format_help = "of the log on stderr, and of READY: text, or one JSON object a line (default: text)"
    add("--log-format", choices=["text", "json"], default="text", help=format_help)
    add("--print-command", action="store_true", help="print how to serve model_repository/ by hand, and end")
    return result
