"""Many streams at once through a real server: clients that leave at random moments, and a step that takes its time."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.server.conftest import PROJECT, Server, is_idle, wait_until
from tests.server.test_streaming import PROMPT, frames, generate, post

CLIENTS, AT_ONCE = 500, 50
# Postprocessing that dawdles, so that an order which is not kept is lost.
DAWDLING = """

import random, time

class TritonPythonModel(TritonPythonModel):
    def execute(self, requests):
        time.sleep(random.random() * 0.03)
        return super().execute(requests)
"""
ONE_INSTANCE = "instance_group [ { count: 1  kind: KIND_CPU } ]"
TWO_IN_ORDER = "instance_group [ { count: 2  kind: KIND_CPU } ]\ndynamic_batching { preserve_ordering: true }"

Launch = Callable[..., Server]


async def leave(server: Server, events: int, seconds: float) -> None:
    """Asks for a long stream and closes the connection `seconds` after its `events`-th event."""
    body = json.dumps({"text_input": PROMPT, "max_tokens": 500, "min_tokens": 500})
    head = "POST /v2/models/ensemble_stream/generate_stream HTTP/1.1\r\nHost: localhost\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", server.ports[0])
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    for _ in range(events):
        await reader.readuntil(b"text_output")
    await asyncio.sleep(seconds)
    writer.close()
    await writer.wait_closed()


async def leave_all(server: Server, clients: int) -> None:
    """Some leave before their first event, others at any later one."""
    chance = random.Random(1)
    free = asyncio.Semaphore(AT_ONCE)

    async def one(events: int, seconds: float) -> None:
        async with free:
            await leave(server, events, seconds)

    await asyncio.gather(*(one(chance.randrange(6), chance.uniform(0, 0.1)) for _ in range(clients)))


def holdings(server: Server) -> dict[int, tuple[int, int]]:
    """Threads and open files of each process by its id."""
    return {process.pid: (process.num_threads(), process.num_fds()) for process in server.processes}


def test_clients_that_leave_at_random_moments_leave_nothing_behind(server: Server) -> None:
    asyncio.run(leave_all(server, AT_ONCE))  # what the first who leave make is there to stay
    expected = generate(server)
    wait_until(lambda: is_idle(server), "idle engine")
    before = holdings(server)

    asyncio.run(leave_all(server, CLIENTS))
    assert generate(server) == expected
    wait_until(lambda: is_idle(server), "idle engine", seconds=30)

    def is_as_before() -> bool:
        now = holdings(server)
        return now.keys() == before.keys() and all(
            threads <= before[pid][0] and files <= before[pid][1] for pid, (threads, files) in now.items()
        )

    wait_until(is_as_before, "process with as few threads and open files as before")


def make_dawdling_repository(repository: Path) -> Path:
    """The model repository with a slow postprocessing, and a second ensemble_stream, whose own has two instances."""
    for model in (PROJECT / "model_repository").iterdir():
        (repository / model.name).mkdir(parents=True)
        shutil.copy(model / "config.pbtxt", repository / model.name)
        if model.name != "postprocessing":
            (repository / model.name / "1").symlink_to(model / "1")
    slow, two, ensemble = (repository / name for name in ("postprocessing", "postprocessing_two", "ensemble_stream"))
    shutil.copytree(PROJECT / "model_repository" / "postprocessing" / "1", slow / "1")
    with (slow / "1" / "model.py").open("a") as file:
        file.write(DAWDLING)
    shutil.copytree(slow, two)
    shutil.copytree(ensemble, repository / "ensemble_two")
    for config, old, new in (
        (two, 'name: "postprocessing"', 'name: "postprocessing_two"'),
        (two, ONE_INSTANCE, TWO_IN_ORDER),
        (repository / "ensemble_two", 'name: "ensemble_stream"', 'name: "ensemble_two"'),
        (repository / "ensemble_two", 'model_name: "postprocessing"', 'model_name: "postprocessing_two"'),
    ):
        text = (config / "config.pbtxt").read_text()
        assert old in text
        (config / "config.pbtxt").write_text(text.replace(old, new))
    return repository


def test_pieces_keep_their_order_behind_a_step_that_dawdles(launch: Launch, tmp_path: Path) -> None:
    server = launch("--model-repository", make_dawdling_repository(tmp_path / "slow"), "--", "--exit-timeout-secs=5")
    server.wait_until_ready()
    expected = generate(server, max_tokens=40)["text_output"]
    for model in ("ensemble_stream", "ensemble_two"):

        def pieces(_: int, model: str = model) -> list[dict[str, Any]]:
            with post(server, f"{model}/generate_stream", max_tokens=40) as response:
                return list(frames(response))

        with ThreadPoolExecutor(6) as pool:
            streams = list(pool.map(pieces, range(6)))
        for each in streams:
            lengths = [piece["sequence_length"] for piece in each]
            assert lengths == sorted(set(lengths)) and len(lengths) > 5
            assert "".join(piece["text_output"] for piece in each) == expected
            assert [bool(piece["finish_reason"]) for piece in each] == [False] * (len(each) - 1) + [True]
