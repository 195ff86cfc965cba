"""Serves the model repository on Triton Inference Server: text in, text out.

Stages a backend directory and a copy of the model repository with the command line's choices in it, starts tritonserver
on them, prints `READY http://HOST:PORT` on stdout when every model is ready, and stops everything on SIGINT or SIGTERM.
All else goes to stderr. Exit status: 0 after a stop that was asked for, 128 + signal when that came before READY, 2 for
a bad option, 1 for every other failure, whose cause is the last line on stderr. Does not know how tokens
are computed."""

from __future__ import annotations

import shlex
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from gptj_triton.project import BACKEND, EMBEDDED_MODEL, REPOSITORY, require_checkout
from gptj_triton.serving.checkpoint import ModelRequest, find_checkpoint
from gptj_triton.serving.errors import ServeError
from gptj_triton.serving.installation import Stage, find_triton, stage_backends
from gptj_triton.serving.options import Options, check_ports_are_free, read_options, resolve_engine_python
from gptj_triton.serving.process import StopRequestedError, TritonProcess, new_region_prefix
from gptj_triton.serving.repository import Overrides, stage_repository


def main(arguments: Sequence[str] | None = None) -> int:
    # Until the server runs, SIGTERM unwinds like Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options = read_options(sys.argv[1:] if arguments is None else arguments)
    try:
        if options.print_command:
            print_command(options)
            return 0
        with tempfile.TemporaryDirectory(prefix="gptj-triton-") as folder:
            return serve(options, Path(folder))
    except (ServeError, OSError) as error:
        print(f"serve.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def serve(options: Options, folder: Path) -> int:
    """Prepares, starts and stops one server, with all that it needs staged in `folder`."""
    check_ports_are_free(options)
    stage = stage_backends(folder / "stage", find_triton(), backend_of(options))
    overrides = choose_overrides(options, folder)
    stage_repository(
        options.model_repository, folder / "models", overrides, nvidia_backend=options.backend_directory is not None
    )
    region_prefix = new_region_prefix()
    command = [
        *server_command(options, folder / "models", stage),
        f"--backend-config=python,shm-region-prefix-name={region_prefix}",
        # Every config is complete; completing it would load each model twice.
        "--disable-auto-complete-config",
        # So that the server lives to say why a model did not load.
        "--exit-on-error=false",
        *options.server_arguments,
    ]
    server = TritonProcess(command, stage.environment, region_prefix, options.exit_timeout)
    ready = False
    try:
        server.wait_until_ready(options.local_url)
        ready = True
        print(f"READY {options.url}", flush=True)
        server.wait()
    except StopRequestedError as request:
        return 0 if ready else 128 + request.signal_number
    finally:
        server.stop()


def choose_overrides(options: Options, folder: Path) -> Overrides:
    """What this run sets in the configurations; what the checkpoint lacks is written to `folder`."""
    request = ModelRequest(options.model, options.tokenizer, options.context_length)
    # Our engine knows what its torch can use; NVIDIA's library runs on GPUs only and must be told a type.
    open_data_type = "auto" if options.backend_directory is None else "fp16"
    return Overrides(
        checkpoint=find_checkpoint(request, EMBEDDED_MODEL, folder / "tokenizer"),
        device=options.device,
        data_type=options.data_type or open_data_type,
        int8_mode=options.int8_mode,
        tensor_para_size=options.tensor_para_size,
        engine_python=resolve_engine_python(options),
        stream_pieces_per_second=options.stream_pieces_per_second,
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
    stage = stage_backends(Path(sys.prefix) / "share" / "gptj-triton", find_triton(), BACKEND)
    command = [*server_command(options, REPOSITORY, stage), *options.server_arguments]
    print(*stage.shell_exports, shlex.join(command), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
