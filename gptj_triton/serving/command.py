"""Serves the model repository on Triton Inference Server: text in, text out.

Stages a backend directory and a copy of the model repository with the command line's choices in it, starts tritonserver
on them, prints `READY http://HOST:PORT` on stdout when every model is ready, and stops everything on SIGINT, SIGTERM or
SIGHUP. All else goes to stderr. Exit status: 0 after a stop that was asked for, 3 when requests were cut by it, 128 +
signal when it came before READY, 2 for a bad option, 1 for every other failure, whose cause is the last line on stderr.
Does not know how tokens are computed."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from gptj_triton.process.directory import RUN_VARIABLE
from gptj_triton.process.temporary import is_plain
from gptj_triton.project import BACKEND, EMBEDDED_MODEL, REPOSITORY, require_checkout
from gptj_triton.serving.access import choose_access, command_with_keys
from gptj_triton.serving.checkpoint import Checkpoint, ModelRequest, find_checkpoint
from gptj_triton.serving.errors import ServeError
from gptj_triton.serving.hidden_arguments import plain
from gptj_triton.serving.home import missing_settings
from gptj_triton.serving.installation import Stage, find_triton, stage_backends
from gptj_triton.serving.log import log
from gptj_triton.serving.options import Options, check_ports_are_free, read_options, resolve_engine_python
from gptj_triton.serving.plain_paths import PlainPaths
from gptj_triton.serving.process import TritonProcess
from gptj_triton.serving.readiness import stage_ready_model
from gptj_triton.serving.relay import Relay
from gptj_triton.serving.repository import Overrides, stage_repository
from gptj_triton.serving.restarts import Restarts
from gptj_triton.serving.run_directory import RunDirectory, run_directory
from gptj_triton.serving.signals import STOP_SIGNALS, StopRequestedError
from gptj_triton.serving.supervisor import Supervisor
from gptj_triton.serving.triton_api import TritonApi

RESTARTS_VARIABLE = "GPTJ_TRITON_RESTARTS"  # how often tritonserver was started again, for the frontends' metrics
REQUESTS_CUT = 3  # an exit status


def main(arguments: Sequence[str] | None = None) -> int:
    # Until the server runs, a signal unwinds what has been done.
    for number in STOP_SIGNALS:
        signal.signal(number, stop_early)
    options = read_options(sys.argv[1:] if arguments is None else arguments)
    log.as_json = options.log_format == "json"
    try:
        if options.print_command:
            print_command(options)
            return 0
        with run_directory() as run:
            check_ports_are_free(options)
            return serve(options, run)
    except (ServeError, OSError) as error:
        log.say(str(error), "error")
        return 1
    except StopRequestedError as request:
        return 128 + request.signal_number


def stop_early(number: int, frame: FrameType | None) -> NoReturn:
    raise StopRequestedError(number)


def serve(options: Options, run: RunDirectory) -> int:
    """Prepares, starts and stops one server, with all that it needs staged in the directory of `run`."""
    os.environ.update(missing_settings(os.environ, run.path / "home"))  # for this process and all that it starts
    os.environ[RUN_VARIABLE] = str(run.path)
    os.environ["TMPDIR"] = str(run.path.parent)  # some of these have other working directories
    stage = stage_backends(run.path / "stage", find_triton(options.tritonserver), backend_of(options))
    plain = PlainPaths(run.path)
    overrides = choose_overrides(options, run.path, plain)
    models = stage_repository(
        options.model_repository,
        run.path / "models",
        overrides,
        nvidia_backend=options.backend_directory is not None,
        streaming_ensemble=options.streaming_ensemble,
    )
    access = choose_access(options)
    stage_ready_model(run.path / "models")
    command = [
        *server_command(options, run.path / "models", stage),
        # So that the launcher can say that the server is not ready.
        "--model-control-mode=explicit",
        "--load-model=*",
        f"--exit-timeout-secs={options.exit_timeout}",
        f"--backend-config=python,shm-region-prefix-name={run.region_prefix}",
        # Every config is complete; completing it would load each model twice.
        "--disable-auto-complete-config",
        # So that the server lives to say why a model did not load.
        "--exit-on-error=false",
        *options.server_arguments,
    ]
    with_keys = command_with_keys(command, access)

    def start(relay: Relay, restarts: int) -> TritonProcess:
        environment = {**stage.environment, RESTARTS_VARIABLE: str(restarts)}
        return TritonProcess(with_keys, environment, relay)

    try:
        supervisor = Supervisor(
            start,
            models,
            [options.http_port],
            TritonApi(options.local_url, access.admin_headers),
            run,
            Restarts(options.max_restarts, options.restart_window),
            options.start_timeout,
            options.drain_delay,
            options.drain_timeout,
            options.exit_timeout,
        )
        cut = supervisor.serve(lambda: log.say_ready(options.url))
    except ServeError as error:
        raise ServeError(plain.in_users_words(str(error))) from None
    return REQUESTS_CUT if cut else 0


def choose_overrides(options: Options, folder: Path, plain: PlainPaths) -> Overrides:
    """What this run sets in the configurations; what the checkpoint lacks is written to `folder`."""
    request = ModelRequest(options.model, options.tokenizer, options.context_length)
    # Our engine knows what its torch can use; NVIDIA's library runs on GPUs only and must be told a type.
    open_data_type = "auto" if options.backend_directory is None else "fp16"
    found = find_checkpoint(request, EMBEDDED_MODEL, folder / "tokenizer")
    weights, tokenizer = plain.directory(found.weights, "model"), plain.directory(found.tokenizer, "model-tokenizer")
    return Overrides(
        checkpoint=Checkpoint(weights, tokenizer, found.context_length),
        device=options.device,
        data_type=options.data_type or open_data_type,
        int8_mode=options.int8_mode,
        kv_cache_data_type=options.kv_cache_data_type,
        tensor_para_size=options.tensor_para_size,
        engine_python=plain.program(resolve_engine_python(options), "engine-python"),
        stream_pieces_per_second=options.stream_pieces_per_second,
        limits=dict(options.limit),
    )


def backend_of(options: Options) -> Path:
    """The directory of the backend `fastertransformer`: this project's, or NVIDIA's where that is asked for."""
    if options.backend_directory is None:
        require_checkout()
        return BACKEND
    nvidia = options.backend_directory / "fastertransformer"
    if not nvidia.is_dir():
        raise ServeError(f"--backend-directory {options.backend_directory}: no directory fastertransformer in it")
    return nvidia


def server_command(options: Options, models: Path, stage: Stage) -> list[str]:
    """The plain command line of tritonserver: what to serve and where."""
    return [
        str(stage.triton),
        f"--model-repository={models}",
        f"--backend-directory={stage.backends}",
        *options.listening_arguments,
    ]


def print_command(options: Options) -> None:
    """Stages the backends where they can stay, and prints what serves the committed repository with them."""
    require_checkout()
    root = Path(sys.prefix) / "share" / "gptj-triton"
    for path in (root, REPOSITORY):
        if not is_plain(path):
            raise ServeError(
                f"--print-command: Triton cannot serve from {str(path)!r}: it knows plain ASCII paths only"
            )
    stage = stage_backends(root, find_triton(options.tritonserver), BACKEND)
    closed = plain(choose_access(options).arguments)
    command = [*server_command(options, REPOSITORY, stage), *closed, *options.server_arguments]
    print(*stage.shell_exports, "umask 077", shlex.join(command), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
