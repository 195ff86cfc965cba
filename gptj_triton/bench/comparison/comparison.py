"""Makes the measurements of a comparison: which systems at which numbers of clients, and how many requests. Does not
know how systems are started."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

from tokenizers import Tokenizer
from tqdm import tqdm

from gptj_triton.bench.comparison.cost import measure_cost
from gptj_triton.bench.comparison.load import Exchange
from gptj_triton.bench.comparison.measurement import (
    Measurement,
    count_equal,
    fewest_requests,
    least_seconds,
    make_measurement,
    request_count,
)
from gptj_triton.bench.comparison.prompts import make_prompts
from gptj_triton.bench.comparison.systems import BASELINE, BATCHED, NAMES, STREAMED, THIS, Server
from gptj_triton.bench.machine import gpu_name, processor
from gptj_triton.bench.results import Result, make_result

FEWEST_REQUESTS = 16
WARM_UP_TOKENS = 4
TOO_LONG = 6  # times --phase-seconds: a measurement that takes longer at the fewest requests is left out

# Sends bodies to a URL, so many at a time, within a timeout in seconds.
Drive: TypeAlias = Callable[[str, list[dict[str, Any]], int, float], list[Exchange]]


class Comparison:
    """All measurements, as they are made; `options` are those of compare.py."""

    def __init__(self, drive: Drive, tokenizer: Tokenizer, options: argparse.Namespace) -> None:
        self._drive, self._tokenizer, self._options = drive, tokenizer, options
        self._texts: dict[int, dict[str, dict[str, str]]] = {}  # clients, system, prompt
        self._alone: dict[str, float] = {}  # seconds that one request of each system takes when there is no other
        self._rates: dict[str, float] = {}  # the most requests a second of each system so far
        self._measurements: list[Measurement] = []
        self._left_out: list[str] = []

    def run(self, servers: Sequence[Server]) -> Iterator[Result]:
        """The result so far after each measurement, with a progress bar on stderr. Raises what starting a server and
        driving it raise."""
        with tqdm(total=len(self._options.concurrency) * len(NAMES), unit="measurement") as bar:
            for clients in self._options.concurrency:
                for server in servers:
                    for _ in self._run_server(server, clients, bar):
                        yield self.result()

    def _run_server(self, server: Server, clients: int, bar: Any) -> Iterator[None]:
        """Measures each system of `server` that is not too slow. It is not even started where all are known to be."""
        names = [name for name in server.names if not self._leaves_out(name, clients, server.at_once)]
        bar.update(len(server.names) - len(names))
        if not names:
            return
        with server.start() as running:
            for name in names:
                bar.set_description(f"{name}, {clients} clients")
                url = running.endpoints[name]
                if name not in self._alone:
                    self._ask(url, f"{name}, first", 1, 1, WARM_UP_TOKENS)
                    [alone] = self._ask(url, f"{name}, alone", 1, 1, self._options.output_tokens)
                    self._alone[name] = alone.last - alone.sent
                    self._rates[name] = 1 / self._alone[name]
                if not self._leaves_out(name, clients, server.at_once):
                    self._measure(running.pid, name, url, clients, server.at_once)
                bar.update()
                yield

    def _leaves_out(self, name: str, clients: int, at_once: int) -> bool:
        """Whether a measurement would take too long, as far as is known; notes it."""
        seconds = least_seconds(clients, at_once, self._alone.get(name, 0.0))
        if seconds <= TOO_LONG * self._options.phase_seconds:
            return False
        requests = fewest_requests(clients, at_once)
        self._left_out.append(f"{name} at {clients} clients: {requests} requests would take {seconds:.0f} s")
        return True

    def _measure(self, pid: int, name: str, url: str, clients: int, at_once: int) -> None:
        options = self._options
        self._ask(url, f"{clients}, {name}, warm-up", clients, clients, WARM_UP_TOKENS)
        wanted = max(clients * options.requests_per_client, 0 if options.quick else FEWEST_REQUESTS)
        fewest = fewest_requests(clients, at_once)
        count = request_count(wanted, fewest, self._rates[name], options.phase_seconds)
        # The same prompts for all servers; but the two endpoints of one share an engine, which keeps what it computed.
        prompts = f"{clients}, streamed" if name == STREAMED else f"{clients}"
        exchanges, cost = measure_cost(pid, lambda: self._ask(url, prompts, count, clients, options.output_tokens))
        measurement = make_measurement(name, clients, exchanges, options.output_tokens, cost)
        self._measurements.append(measurement)
        self._rates[name] = max(self._rates[name], measurement.requests_per_second)
        self._texts.setdefault(clients, {})[name] = {exchange.prompt: exchange.text for exchange in exchanges}

    def _ask(self, url: str, prompts: str, count: int, clients: int, output_tokens: int) -> list[Exchange]:
        """`count` requests with the prompts of that name."""
        length = {"max_tokens": output_tokens, "min_tokens": output_tokens}
        texts = make_prompts(self._tokenizer, self._options.prompt_tokens, count, prompts)
        bodies = [{"text_input": text, **length} for text in texts]
        return self._drive(url, bodies, clients, 2 * TOO_LONG * self._options.phase_seconds)

    def _equal_texts(self) -> list[dict[str, Any]]:
        """How many of the prompts that the baseline answered too got the same text."""
        found = []
        for clients, systems in self._texts.items():
            for system in (BATCHED, THIS):
                equal, of = count_equal(systems.get(BASELINE, {}), systems.get(system, {}))
                if of:
                    found.append({"clients": clients, "system": system, "equal": equal, "of": of})
        return found

    def result(self) -> Result:
        """What results.json holds."""
        options = self._options
        gpu = None if options.device == "cpu" else gpu_name()
        data_type = options.data_type or ("fp16" if gpu else "fp32")
        return make_result(
            "comparison",
            self._measurements,
            model=options.model.name,
            machine=gpu or processor(),
            device="cuda" if gpu else "cpu",
            data_type=data_type,
            prompt_tokens=options.prompt_tokens,
            output_tokens=options.output_tokens,
            texts=self._equal_texts(),
            left_out=self._left_out,
        )
