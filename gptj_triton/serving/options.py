"""The command line of serve.py, read once into a frozen `Options`. Does not know what the options are used for."""

from __future__ import annotations

import argparse
import errno
import ipaddress
import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from gptj_triton.checkpoint.data_types import COMPUTE_TYPES, FP8
from gptj_triton.engine.config import KV_CACHE_DATA_TYPES
from gptj_triton.errors import ConfigError
from gptj_triton.limits import parse_limit
from gptj_triton.project import REPOSITORY
from gptj_triton.serving.errors import ServeError

# tritonserver's options that the launcher sets itself, and why another value would not do.
OWN_ADDRESSES = (
    "use --host, --http-port, --grpc-port and --metrics-port, which READY and the launcher's own calls go by"
)
OWN_MODELS = "put all that is to be served, and nothing else, into one directory and name it by --model-repository"
OWN_SERVER_OPTIONS = {
    **dict.fromkeys(["model-repository", "model-store", "load-model"], OWN_MODELS),
    "model-control-mode": "it is explicit, so that the launcher can say that the server is not ready",
    "strict-readiness": "it is true, so that the launcher can say that the server is not ready",
    "backend-directory": "use the launcher's own --backend-directory",
    "exit-on-error": "it is false, so that the server lives to say why a model did not load",
    "allow-http": "it is true: the launcher asks over HTTP whether the server is ready",
    **dict.fromkeys(
        ["http-address", "http-port", "grpc-address", "grpc-port", "metrics-address", "metrics-port"], OWN_ADDRESSES
    ),
    **dict.fromkeys(["http-restricted-api", "grpc-restricted-protocol"], "use --api-key-file and --open-admin-api"),
    **dict.fromkeys(["allow-sagemaker", "allow-vertex-ai"], "it is false, because its port asks for no key"),
}
# What a model repository served as committed takes from its own config.pbtxt.
OVERRIDING_OPTIONS = (
    *(
        "model",
        "model_repository",
        "tokenizer",
        "context_length",
        "device",
        "data_type",
        "int8_mode",
        "kv_cache_data_type",
        "tensor_para_size",
        "engine_python",
    ),
    *("stream_pieces_per_second", "streaming_ensemble", "limit", "backend_directory"),
    *("api_key_file", "open_admin_api"),
)

PORTS = ("http_port", "grpc_port", "metrics_port")


@dataclass(frozen=True)
class Options:
    """What the user asked for; None where the launcher is to choose."""

    model: str | None
    model_repository: Path
    tokenizer: str | None
    context_length: int | None  # tokens
    device: str
    data_type: str | None
    int8_mode: int
    kv_cache_data_type: str
    tensor_para_size: int
    host: str
    api_key_file: Path | None
    open_admin_api: Path | None
    http_port: int
    grpc_port: int
    metrics_port: int
    stream_pieces_per_second: int | None
    streaming_ensemble: bool
    limit: list[tuple[str, int]]  # each name and number that was given
    backend_directory: Path | None
    tritonserver: Path | None
    engine_python: str
    log_format: str
    print_command: bool
    server_arguments: tuple[str, ...]
    start_timeout: int  # seconds
    drain_timeout: float  # seconds
    max_restarts: int
    restart_window: float  # seconds
    exit_timeout: int  # seconds that tritonserver waits for its connections when it is told to stop

    @property
    def url(self) -> str:
        return f"http://{in_url(self.host)}:{self.http_port}"

    @property
    def local_url(self) -> str:
        """The same for a client on this machine, where a server for all addresses listens too."""
        local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.address, self.address)
        return f"http://{in_url(local)}:{self.http_port}"

    @property
    def address(self) -> str:
        """The address that `host` stands for, of IPv4 if it has one: tritonserver binds to addresses only."""
        try:
            found = socket.getaddrinfo(self.host.strip("[]"), None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "no name"
            raise ServeError(f"--host {self.host}: not a host name or IP address ({reason})") from None
        found.sort(key=lambda each: each[0] != socket.AF_INET)
        address = ipaddress.ip_address(found[0][4][0])
        if address.version == 6 and address.is_link_local:
            raise ServeError(f"--host {self.host}: tritonserver cannot listen on a link-local address of IPv6")
        # libevhtp cannot listen on ::ffff:127.0.0.1, which is 127.0.0.1.
        return str((address.version == 6 and address.ipv4_mapped) or address)

    @property
    def listening_arguments(self) -> list[str]:
        """tritonserver's options for the addresses and ports."""
        address = self.address
        http = f"ipv6:{address}" if ":" in address else address  # as libevhtp, its HTTP server, writes it
        return [
            f"--http-address={http}",
            f"--grpc-address={in_url(address)}",
            f"--metrics-address={http}",
            f"--http-port={self.http_port}",
            f"--grpc-port={self.grpc_port}",
            f"--metrics-port={self.metrics_port}",
        ]


def in_url(host: str) -> str:
    """A host as it stands before a port: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


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
    triton_help = "its program, beside ../backends/python (default: PATH's, /opt/tritonserver's, the wheel's)"
    add("--tritonserver", type=Path, metavar="PROGRAM", help=triton_help)
    add("--engine-python", default="python3", metavar="PROGRAM", help="the Python that has torch (default: this one)")
    timeout_help = "end the start where a model is not ready after so long (default: 1800)"
    add("--start-timeout", type=positive, default=1800, metavar="SECONDS", help=timeout_help)
    drain_help = "how long requests may go on after a signal to stop (default: 30)"
    add("--drain-timeout", type=seconds, default=30.0, metavar="SECONDS", help=drain_help)
    restart_help = "how often tritonserver is started again when it dies, within --restart-window (default: 10)"
    add("--max-restarts", type=natural, default=10, metavar="N", help=restart_help)
    add("--restart-window", type=seconds, default=300.0, metavar="SECONDS", help="default: 300")
    format_help = "of the log on stderr, and of READY: text, or one JSON object a line (default: text)"
    add("--log-format", choices=["text", "json"], default="text", help=format_help)
    add("--print-command", action="store_true", help="print how to serve model_repository/ by hand, and end")
    return result


def read_options(arguments: Sequence[str]) -> Options:
    """Parses the command line; a bad option ends the program with status 2 and one line on stderr."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    command_line = parser()
    given = vars(command_line.parse_args(arguments[:end]))
    behind = tuple(arguments[end + 1 :])
    options = Options(**given, server_arguments=behind, exit_timeout=exit_timeout_in(behind))
    for argument in options.server_arguments:
        name = argument.removeprefix("--").partition("=")[0]
        own = own_option(argument)
        if own is not None:
            command_line.error(f"--{name} stands behind --, but the launcher sets it: {OWN_SERVER_OPTIONS[own]}")
    if options.print_command:
        for name in OVERRIDING_OPTIONS:
            if given[name] != command_line.get_default(name):
                command_line.error(f"--print-command serves the repository as committed: leave out {flag(name)}")
    if options.streaming_ensemble and options.backend_directory is not None:
        command_line.error("--streaming-ensemble: NVIDIA's library (--backend-directory) is served without streams")
    if options.data_type == FP8 and options.backend_directory is not None:
        command_line.error("--data-type fp8: NVIDIA's library (--backend-directory) computes in fp32, fp16 or bf16")
    if len({getattr(options, name) for name in PORTS}) < len(PORTS):
        values = ", ".join(f"{flag(name)} {getattr(options, name)}" for name in PORTS)
        command_line.error(f"the ports must differ: {values}")
    return options


def own_option(argument: str) -> str | None:
    """The option of tritonserver that the launcher sets and that the argument is, or abbreviates."""
    return next((option for option in OWN_SERVER_OPTIONS if is_or_abbreviates(argument, [option])), None)


def is_or_abbreviates(argument: str, options: Sequence[str]) -> bool:
    """Whether tritonserver, whose getopt takes abbreviations, may read the argument as one of its `options`."""
    name = argument.removeprefix("--").partition("=")[0]
    return argument.startswith("--") and name != "" and any(option.startswith(name) for option in options)


def exit_timeout_in(server_arguments: Sequence[str]) -> int:
    """tritonserver's own option where it is given, else the launcher's default: it stops when all is answered."""
    server = OneLineParser(prog="serve.py", add_help=False, allow_abbrev=False)
    server.add_argument("--exit-timeout-secs", type=int, default=5)
    return int(server.parse_known_args(server_arguments)[0].exit_timeout_secs)


def flag(name: str) -> str:
    """The option that sets the field `name`."""
    return "--" + name.replace("_", "-")


def resolve_engine_python(options: Options) -> str:
    """The engine's interpreter as an absolute path where one is named, and as given where the stubs' PATH decides."""
    program = options.engine_python
    if program == parser().get_default("engine_python"):
        return program
    found = shutil.which(program)
    if found is None:
        raise ServeError(f"--engine-python {program}: no such program")
    return str(Path(found).absolute())


def check_ports_are_free(options: Options) -> None:
    """Raises ServeError that names the first port of ours which something else listens on."""
    host = options.address
    for name in PORTS:
        port_number = getattr(options, name)
        try:
            with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
                # A port whose last connections are still winding down is free; one with a listener is not.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port_number))
        except OSError as error:
            if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise ServeError(f"--host {options.host}: this machine has no address {host}") from None
            cause = "another program listens there" if error.errno == errno.EADDRINUSE else error.strerror
            raise ServeError(f"{flag(name)} {port_number} on {host}: {cause}") from None
