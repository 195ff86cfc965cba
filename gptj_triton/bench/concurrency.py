"""Times the same requests one after another and all at once, and what one request costs by itself and of that without
an engine.

Repeats are interleaved and medians are compared, since a machine's speed drifts. Prompts are those of perf_inputs.json,
greedy, each answered with the same number of tokens. Knows the client, and nothing of how the server works.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from typing import Any

from gptj_triton.bench.fake_server import server_of_fakes
from gptj_triton.bench.local_server import ServerFailedError, local_server
from gptj_triton.bench.machine import processor
from gptj_triton.bench.perf_inputs import shipped_prompts
from gptj_triton.bench.results import make_result
from gptj_triton.client import MODEL, Answer, Client, ClientError


def seconds(work: Callable[..., object], *arguments: Any) -> float:
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def ask(client: Client, prompt: str, tokens: int) -> Answer:
    return client.generate(prompt, max_tokens=tokens, min_tokens=tokens)


@dataclass(frozen=True)
class Measurement:
    """Medians. `own_ms` is a request for one token to an engine that computes nothing; None where a running server was
    named."""

    sequential_s: float
    concurrent_s: float
    ratio: float
    one_token_ms: float
    two_tokens_ms: float
    own_ms: float | None


def measure_concurrency(clients: list[Client], prompts: list[str], tokens: int, repeats: int) -> tuple[float, float]:
    """Median seconds for all prompts, one client in turn and a client each at once. One of each is for warming up."""

    def in_turn() -> list[Answer]:
        return [ask(clients[0], prompt, tokens) for prompt in prompts]

    def at_once() -> list[Answer]:
        return list(pool.map(ask, clients, prompts, [tokens] * len(prompts)))

    with ThreadPoolExecutor(len(clients)) as pool:
        pairs = [(seconds(in_turn), seconds(at_once)) for _ in range(1 + repeats)]
    sequential, concurrent = (median(times) for times in zip(*pairs[1:], strict=True))
    return sequential, concurrent


def measure_one_request(client: Client, prompt: str, repeats: int) -> tuple[float, float]:
    """Median milliseconds of a request for one token and for two. Their difference is a decode step."""
    pairs = [(seconds(ask, client, prompt, 1), seconds(ask, client, prompt, 2)) for _ in range(repeats)]
    one, two = (1000 * median(times) for times in zip(*pairs, strict=True))
    return one, two


def measure_own_cost(prompts: list[str], requests: int) -> float:
    """Median milliseconds of a request for one token to a server of its own whose engine computes nothing, by the
    `generate` endpoint, one client. What the standard library's HTTP client takes is in it. Raises ServerFailedError.
    """
    with server_of_fakes(step_ms=0) as server:
        connection = http.client.HTTPConnection(server.http)

        def ask_plainly(prompt: str) -> None:
            connection.request(
                "POST", f"/v2/models/{MODEL}/generate", json.dumps({"text_input": prompt, "max_tokens": 1})
            )
            response = connection.getresponse()
            text = response.read().decode()
            if response.status != http.HTTPStatus.OK:
                raise ServerFailedError(f"a request was answered {response.status}: {text}")

        with contextlib.closing(connection):
            warm_up = 20
            times = [seconds(ask_plainly, prompts[i % len(prompts)]) for i in range(warm_up + requests)]
    return 1000 * median(times[warm_up:])


def report(measurement: Measurement, options: argparse.Namespace) -> str:
    requests, tokens = options.requests, options.max_tokens
    lines = [f"{requests} requests of {tokens} tokens, median of {options.repeats} interleaved repeats:"]
    for words, took in (
        ("one after another", measurement.sequential_s),
        ("at the same time", measurement.concurrent_s),
    ):
        lines.append(f"  {words:<18} {took:8.3f} s {requests * tokens / took:8.1f} tokens/s")
    lines.append(f"  ratio              {measurement.ratio:8.3f}")
    one, two = measurement.one_token_ms, measurement.two_tokens_ms
    lines.append(f"one client: 1 token {one:.2f} ms, 2 tokens {two:.2f} ms, so a step {two - one:.2f} ms")
    lines.append(f"            and all else (the prompt, the ensemble, the client) {2 * one - two:.2f} ms")
    if measurement.own_ms is not None:
        lines.append(f"            1 token from an engine that computes nothing {measurement.own_ms:.2f} ms")
    return "\n".join(lines)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compares requests one after another with the same requests at once.")
    # tritonclient's HTTP client belongs to the thread that made it, so it is not among these.
    parser.add_argument("--protocol", choices=["generate", "grpc"], default="generate", help="default: %(default)s")
    parser.add_argument("--url", metavar="HOST:PORT", help="the endpoint of a running server (default: starts one)")
    parser.add_argument("--requests", type=int, default=16, metavar="N", help="default: %(default)s")
    parser.add_argument("--max-tokens", type=int, default=32, metavar="N", help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="default: %(default)s")
    options = parser.parse_args(arguments)
    if min(options.requests, options.max_tokens, options.repeats) < 1:
        parser.error("--requests, --max-tokens and --repeats must be 1 or more")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    texts = shipped_prompts()
    prompts = [texts[i % len(texts)] for i in range(options.requests)]
    own = None
    try:
        with contextlib.ExitStack() as stack:
            url = options.url
            if url is None:
                server = stack.enter_context(local_server())
                url = server.grpc if options.protocol == "grpc" else server.http
            clients = [stack.enter_context(Client(url, options.protocol)) for _ in prompts]
            sequential, concurrent = measure_concurrency(clients, prompts, options.max_tokens, options.repeats)
            one, two = measure_one_request(clients[0], prompts[0], 10 * options.repeats)
        if not options.url:
            own = measure_own_cost(texts, 40 * options.repeats)
    except (ClientError, ServerFailedError) as error:
        print(f"benchmark_concurrency.py: {error}", file=sys.stderr)
        return 1
    measurement = Measurement(sequential, concurrent, concurrent / sequential, one, two, own)
    print(report(measurement, options))
    facts = {name: getattr(options, name) for name in ("protocol", "requests", "max_tokens", "repeats")}
    print(json.dumps(make_result("concurrency", [measurement], machine=processor(), **facts)))
    return 0
