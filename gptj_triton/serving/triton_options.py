"""The options of tritonserver that stand behind `--`: which of them the launcher sets itself, or must know."""

from __future__ import annotations

from collections.abc import Sequence

from gptj_triton.serving.option_parser import OneLineParser

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


def own_option(argument: str) -> str | None:
    """The option of tritonserver that the launcher sets and that the argument is, or abbreviates."""
    return next((option for option in OWN_SERVER_OPTIONS if is_or_abbreviates(argument, [option])), None)


def is_or_abbreviates(argument: str, options: Sequence[str]) -> bool:
    """Whether tritonserver, whose getopt takes abbreviations, may read the argument as one of its `options`."""
    name = argument.removeprefix("--").partition("=")[0]
    return argument.startswith("--") and name != "" and any(option.startswith(name) for option in options)


def exit_timeout_in(server_arguments: Sequence[str]) -> int:
    """tritonserver's own option where it is given, else the launcher's default: it stops when all is answered."""
    server = OneLineParser(prog="serve.py", add_help=False)  # takes abbreviations, as tritonserver does
    server.add_argument("--exit-timeout-secs", type=int, default=5)
    return int(server.parse_known_args(server_arguments)[0].exit_timeout_secs)
