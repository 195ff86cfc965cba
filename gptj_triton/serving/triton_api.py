"""The calls that the launcher makes to its tritonserver over HTTP. Knows Triton's paths and answers, not what they are
good for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import requests

HTTP_SECONDS = 5.0


class TritonApi:
    """The HTTP endpoint at `url` (http://HOST:PORT); `headers` go with each request. Every method raises
    requests.RequestException where nothing answers in time."""

    def __init__(self, url: str, headers: Mapping[str, str]) -> None:
        self._url = url
        self._session = requests.Session()
        self._session.trust_env = False  # a proxy has no business between here and our own child
        # A connection left open holds tritonserver up when it is to stop.
        self._session.headers.update({**headers, "Connection": "close"})

    def is_ready(self) -> bool:
        return bool(self._get("v2/health/ready").ok)

    def is_model_ready(self, model: str) -> bool:
        return bool(self._get(f"v2/models/{model}/ready").ok)

    def index(self) -> list[dict[str, str]] | None:
        """All models: [{"name", "version", "state", "reason"}]; None where the server does not let us see them."""
        answer = self._post("v2/repository/index")
        return list(answer.json()) if answer.ok else None

    def load(self, model: str, config: Mapping[str, Any] | None = None) -> bool:
        """Loads a model, with a configuration other than the repository's if one is given; whether that succeeded."""
        parameters = {} if config is None else {"config": json.dumps(config)}
        return bool(self._post(f"v2/repository/models/{model}/load", parameters).ok)

    def unload(self, model: str) -> bool:
        return bool(self._post(f"v2/repository/models/{model}/unload").ok)

    def _get(self, path: str) -> requests.Response:
        return self._session.get(f"{self._url}/{path}", timeout=HTTP_SECONDS)

    def _post(self, path: str, parameters: Mapping[str, str] | None = None) -> requests.Response:
        body = {"parameters": dict(parameters)} if parameters else {}
        return self._session.post(f"{self._url}/{path}", json=body, timeout=HTTP_SECONDS)


def why_not_ready(models: Sequence[Mapping[str, str]]) -> str:
    """One line from the index of models; an ensemble whose step failed has no reason of its own."""
    reasons = {model["name"]: model["reason"] for model in models if model.get("reason", "unloaded") != "unloaded"}
    if not reasons:
        missing = ", ".join(model["name"] for model in models if model.get("state") != "READY")
        return f"not ready, and Triton gives no reason: {missing}"
    # What follows is the stub's traceback, which stands in the log above.
    return "; ".join(f"model {name} cannot be loaded: {reason.split('At:')[0]}" for name, reason in reasons.items())
