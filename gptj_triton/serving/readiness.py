"""Makes `GET /v2/health/ready` say whether a request would be served now.

Triton says ready as long as every model is loaded. So the launcher serves one more model, an ensemble without code, and
makes its load fail as long as an engine is down or the server drains."""

from __future__ import annotations

import contextlib
from pathlib import Path

import requests
from google.protobuf import text_format

from gptj_triton.serving.background import Background
from gptj_triton.serving.errors import ServeError
from gptj_triton.serving.repository import read_config
from gptj_triton.serving.triton_api import TritonApi

MODEL = "engine_ready"
# Triton logs a failed load with this name.
NOT_READY = {"name": MODEL, "backend": "none_because_no_engine_is_ready"}


def stage_ready_model(repository: Path) -> None:
    """Adds the model to a staged repository: an ensemble of one step, any model that is none. ServeError where there is
    a model of that name already."""
    if (repository / MODEL).exists():
        raise ServeError(f"model {MODEL}: the launcher adds a model of this name itself; call yours something else")
    configs = map(read_config, sorted(repository.glob("*/config.pbtxt")))
    step = next((config for config in configs if not config.ensemble_scheduling.step), None)
    if step is None:
        return
    ensemble = type(step)(name=MODEL, platform="ensemble", max_batch_size=step.max_batch_size)
    ensemble.model_transaction_policy.decoupled = step.model_transaction_policy.decoupled
    only = ensemble.ensemble_scheduling.step.add(model_name=step.name, model_version=-1)
    for tensor in step.input:  # with the shape that users see, before a reshape
        ensemble.input.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, optional=tensor.optional)
        only.input_map[tensor.name] = tensor.name
    for tensor in step.output:
        ensemble.output.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        only.output_map[tensor.name] = tensor.name
    (repository / MODEL / "1").mkdir(parents=True)
    (repository / MODEL / "config.pbtxt").write_text(text_format.MessageToString(ensemble), encoding="utf-8")


class Readiness:
    """Whether the server that `api` reaches says that it is ready. It does so from its start on."""

    def __init__(self, api: TritonApi, engines: Path) -> None:
        """`engines` is the directory of the engines' directories."""
        self._api = api
        self._engines = engines
        self._said = True
        self._calls = Background[bool]()

    def follow_engines(self) -> None:
        """Says what the engines' frontends say."""
        self.say(self.engines_are_ready())

    def engines_are_ready(self) -> bool:
        """Whether each frontend, which has a NAME.sock, has a NAME.ready too. True where there is no engine."""
        sockets = (path for path in self._engines.glob("*/*.sock") if path.name != "engine.sock")
        return all(socket.with_suffix(".ready").exists() for socket in sockets)

    def say(self, ready: bool) -> None:
        """Tells Triton, if it is news. Waits for its answer a moment at most; to be called again, for then an answer
        that came late is heard, and what did not succeed is tried again."""
        if ready == self._said and not self._calls.is_busy:
            return
        with contextlib.suppress(requests.RequestException):
            said = self._calls.take(lambda: self._tell(ready))
            self._said = self._said if said is None else said

    def _tell(self, ready: bool) -> bool:
        """Returns what Triton says from now on."""
        if ready:
            return self._api.load(MODEL)
        self._api.unload(MODEL)
        self._api.load(MODEL, NOT_READY)
        return False
