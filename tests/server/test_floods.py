"""A flood of long requests on a real server: a short one is answered at once, and one too many refused at once."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.server.conftest import CLOSE, PROJECT, Server, load, wait_until

pytestmark = pytest.mark.alone
SOON = 5.0  # seconds, on a machine that does other things too; alone it takes 0.2
LIMITS = {"max_sequences": 4, "max_waiting_requests": 6}
LONG = {"text_input": "Once upon a time", "max_tokens": 600, "min_tokens": 600, "timeout": 60_000_000}


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    copy = tmp_path / "repository"
    shutil.copytree(PROJECT / "model_repository", copy)
    for name in ("fastertransformer", "fastertransformer_stream"):
        with (copy / name / "config.pbtxt").open("a") as config:
            for parameter, value in LIMITS.items():
                config.write(f'parameters {{ key: "{parameter}" value: {{ string_value: "{value}" }} }}\n')
    return copy


def generate(server: Server, **fields: Any) -> tuple[requests.Response, float]:
    """The answer, and the seconds that it took."""
    began = time.monotonic()
    url = f"http://{server.http_url}/v2/models/ensemble/generate"
    response = requests.post(url, json=fields, headers=CLOSE, timeout=120)
    return response, time.monotonic() - began


def infer(server: Server, **fields: Any) -> requests.Response:
    types = {"text_input": "BYTES", "max_tokens": "INT32"}
    inputs = [{"name": name, "datatype": types[name], "shape": [1, 1], "data": [fields[name]]} for name in fields]
    url = f"http://{server.http_url}/v2/models/ensemble/infer"
    return requests.post(url, json={"inputs": inputs}, headers=CLOSE, timeout=120)


def test_under_a_flood_a_short_request_is_answered_at_once_and_one_too_many_is_refused_at_once(
    launch: Callable[..., Server], repository: Path
) -> None:
    server = launch("--model-repository", repository).wait_until_ready()
    with ThreadPoolExecutor(10) as pool:
        flood = [pool.submit(generate, server, **LONG) for _ in range(9)]
        wait_until(lambda: load(server)["gptj_num_requests_waiting"] == 5, "five that wait")

        response, seconds = generate(server, text_input="Once upon a time", max_tokens=1)
        assert (response.status_code, response.json()["finish_reason"]) == (200, "length"), response.text
        assert seconds < SOON
        response, seconds = generate(server, **{**LONG, "timeout": 300_000})
        assert response.status_code == 400
        assert "the request waited for its whole timeout, and was not begun" in response.json()["error"]
        assert 0.3 <= seconds < SOON

        flood.append(pool.submit(generate, server, **LONG))
        wait_until(lambda: load(server)["gptj_num_requests_waiting"] == 6, "six that wait")
        for _ in range(3):
            response, seconds = generate(server, text_input="Once upon a time", max_tokens=1)
            assert response.status_code == 400
            assert "6 requests wait, the most that may (max_waiting_requests)" in response.json()["error"]
            assert seconds < SOON
        assert infer(server, text_input="Once upon a time", max_tokens=1).status_code == 503
        answers = [each.result()[0] for each in flood]
    assert [answer.status_code for answer in answers] == [200] * 10
