"""The command line of serve.py, read once into a frozen `Options`. Does not know what the options are used for."""

from __future__ import annotations

import errno
import ipaddress
import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gptj_triton.checkpoint.data_types import FP8
from gptj_triton.serving.errors import ServeError
from gptj_triton.serving.option_parser import parser
from gptj_triton.serving.triton_options import OWN_SERVER_OPTIONS, exit_timeout_in, own_option

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
    drain_delay: float  # seconds
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
