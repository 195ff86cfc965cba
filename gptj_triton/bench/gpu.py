"""How fast the engine is on one GPU, for a model of the shape of GPT-J 6B with random weights: decode steps beside the
least time that reading weights and KV cache takes, time to the first token, whole runs, and prompts as MLPerf has them,
with four beams and without.

The engine alone, without Triton and in this process. Prompts are distinct and random; every sequence runs to its full
length. Times are of the host's clock around work that has ended. The last line is JSON."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from gptj_triton.bench.random_checkpoint import GPTJ_6B, write_random_checkpoint
from gptj_triton.bench.results import Result, make_result, write_json
from gptj_triton.checkpoint.data_types import FP8
from gptj_triton.checkpoint.tensor_table import model_tensors
from gptj_triton.engine.config import KV_CACHE_DATA_TYPES, EngineConfig
from gptj_triton.engine.engine import Engine
from gptj_triton.engine.load import load_engine
from gptj_triton.engine.sampling_params import SamplingParams
from gptj_triton.engine.sequence import Sequence
from gptj_triton.errors import EngineError

STEPS = [(batch, context) for context in (128, 512) for batch in (1, 8, 32, 64, 128)] + [(256, 128)]
FIRST_TOKENS = [(1, 128), (1, 512), (1, 2048), (8, 128), (8, 512), (64, 512)]
# Requests, tokens in and out. The second kind fills a KV cache of 16 bits a number; one of 8 bits gets twice as many.
RUNS = [(64, 128, 128), (1024, 128, 128)]
FILLING_RUNS = [(264, 2048, 128), (36, 2048, 2048), (160, 128, 2048)]
# MLPerf Inference's GPT-J: summaries of news. Lengths are drawn from a lognormal distribution, cut at the longest.
SUMMARIES, MEAN_LENGTH, LONGEST, SPREAD, NEW_TOKENS = 256, 838, 1919, 0.55, 69
# The choices of --data-type, and how many bytes each number of the layers' matrices then takes.
MATRIX_BYTES = {"fp16": 2, "bf16": 2, "fp8": 1, "int8": 1}


@dataclass(frozen=True)
class Measurement:
    """One figure. `floor` is what the copy bandwidth allows at best, in the same unit; `flops` are the operations
    of the matrix products and attention, `bytes` what must be read at least. 0 where none is given.
    """

    what: str
    value: float
    unit: str
    floor: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0

    def __str__(self) -> str:
        beside = f"   floor {self.floor:10.2f}   {self.floor / self.value:6.1%} of the bandwidth" if self.floor else ""
        return f"{self.what:<52}{self.value:10.2f} {self.unit:<9}{beside}"


class Benchmark:
    """One engine, and what reading its weights and cache costs on its GPU."""

    def __init__(self, engine: Engine, data_type: str, cache_bytes: int, bandwidth: float) -> None:
        """`cache_bytes` are those of a number in the KV cache; `bandwidth` in bytes a second."""
        self._engine = engine
        self._bandwidth = bandwidth
        self._random = random.Random(0)
        model, size = engine.model_config, MATRIX_BYTES[data_type]
        tensors = model_tensors(model).values()
        weights = {tensor.name: torch.Size(tensor.shape).numel() for tensor in tensors if tensor.name != "wte"}
        self._weight_bytes = sum(
            number * (size if name.startswith("layers.") else 2) for name, number in weights.items()
        )
        self._head_flops = 2 * weights["lm_head.weight"]  # for each token whose logits are wanted
        self._layer_flops = 2 * sum(weights.values()) - self._head_flops  # for each token
        self._attention_flops = 4 * model.num_layers * model.hidden_size  # for each token and position it sees
        filling = [(requests * 2 // cache_bytes, length, new) for requests, length, new in FILLING_RUNS]
        self.runs = RUNS + filling
        self._token_bytes = 2 * model.num_layers * model.hidden_size * cache_bytes  # K and V

    def decode_step(self, batch: int, context: int, steps: int = 32) -> Measurement:
        """Time of a step of `batch` sequences, each with a context of `context` tokens or little more."""
        engine = self._engine
        while_prompts_are_computed = batch * context // engine.scheduler.step_tokens + 2
        self._submit(self._sequences(batch, context, while_prompts_are_computed + steps + 8))
        while len(engine.scheduler.running) < batch or not all(one.decoding for one in engine.scheduler):
            engine.step()
        cached = sum(sequence.num_cached for sequence in engine.scheduler) + batch * steps / 2
        times = []
        for _ in range(4):
            start = time.perf_counter()
            for _ in range(steps // 4):
                engine.step()
            torch.cuda.synchronize()
            times.append((time.perf_counter() - start) / (steps // 4))
        self._drain()
        flops = batch * (self._layer_flops + self._head_flops) + cached * self._attention_flops
        read = self._weight_bytes + cached * self._token_bytes
        what = f"decode step, batch {batch}, context {context}"
        return Measurement(what, 1e3 * median(times), "ms", 1e3 * read / self._bandwidth, flops, read)

    def first_token(self, batch: int, length: int) -> Measurement:
        """Time from the arrival of `batch` prompts to the first token of the last of them."""
        times = []
        for _ in range(3):
            sequences = self._sequences(batch, length, 1)
            start = time.perf_counter()
            self._submit(sequences)
            self._drain()
            times.append(time.perf_counter() - start)
        flops = batch * (length * self._layer_flops + self._head_flops + length**2 / 2 * self._attention_flops)
        what = f"first token, {batch} x {length} tokens"
        return Measurement(what, 1e3 * median(times[1:]), "ms", flops=flops, bytes=self._weight_bytes)

    def whole_run(self, requests: int, length: int, new: int) -> Measurement:
        """Output tokens a second of requests that arrive all at once, from the first prompt to the last token."""
        sequences = self._sequences(requests, length, new)
        start = time.perf_counter()
        self._submit(sequences)
        self._drain()
        seconds = time.perf_counter() - start
        return Measurement(f"whole run {length}/{new}, {requests} requests", requests * new / seconds, "tokens/s")

    def summaries(self, beam_width: int) -> Measurement:
        """Requests a second of prompts of MLPerf's lengths that arrive all at once."""
        chance = random.Random(1)
        centre = math.log(MEAN_LENGTH) - SPREAD**2 / 2
        lengths = [min(LONGEST, max(1, round(chance.lognormvariate(centre, SPREAD)))) for _ in range(SUMMARIES)]
        sequences = [self._sequence(number, length, NEW_TOKENS, beam_width) for number, length in enumerate(lengths)]
        start = time.perf_counter()
        self._submit(sequences)
        self._drain()
        seconds = time.perf_counter() - start
        how = f"{beam_width} beams" if beam_width > 1 else "greedy"
        what = f"{SUMMARIES} prompts of {sum(lengths) / SUMMARIES:.0f}, {NEW_TOKENS} new, {how}"
        return Measurement(what, SUMMARIES / seconds, "samples/s")

    def _sequences(self, count: int, length: int, new: int) -> list[Sequence]:
        return [self._sequence(number, length, new) for number in range(count)]

    def _sequence(self, number: int, length: int, new: int, beam_width: int = 1) -> Sequence:
        end_ids, vocabulary = self._engine.model_config.end_ids, range(self._engine.model_config.vocab_size)
        params = SamplingParams(request_output_len=new, min_length=new, end_ids=end_ids, beam_width=beam_width)
        return Sequence(number, self._random.choices(vocabulary, k=length), params)

    def _submit(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            self._engine.submit(sequence)

    def _drain(self) -> None:
        while self._engine.busy:
            self._engine.step()


def copy_bandwidth() -> float:
    """Bytes a second that a copy within the GPU's memory reads and writes."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return 2 * source.numel() / float(median(times[2:]))


def measure(benchmark: Benchmark, quick: bool) -> Iterator[Measurement]:
    """All figures, each as soon as it is measured; with `quick` only the smallest of each kind."""
    yield from (benchmark.decode_step(*step) for step in (STEPS[:1] if quick else STEPS))
    yield from (benchmark.first_token(*prompts) for prompts in (FIRST_TOKENS[:1] if quick else FIRST_TOKENS))
    yield from (benchmark.whole_run(*run) for run in benchmark.runs[: 1 if quick else None])
    yield from (benchmark.summaries(beam_width) for beam_width in (4, 1))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, metavar="DIR", help="a checkpoint (default: random weights)")
    parser.add_argument("--data-type", choices=MATRIX_BYTES, default="fp16", help="int8: the weights alone")
    parser.add_argument("--kv-cache-data-type", choices=KV_CACHE_DATA_TYPES, default="auto", help="default: auto")
    parser.add_argument("--quick", action="store_true", help="one figure of each kind")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the result besides")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, checkpoint: Path) -> Iterator[Result]:
    """Prints the table as it grows; gives the result so far after each line."""
    bandwidth = copy_bandwidth()
    torch.cuda.empty_cache()  # the engine takes what is left
    if options.model is None:
        write_random_checkpoint(checkpoint, GPTJ_6B, "bf16" if options.data_type == "bf16" else "fp16")
    started = time.perf_counter()
    is_int8 = options.data_type == "int8"
    data_type = "fp16" if is_int8 else options.data_type
    settings = {"data_type": data_type, "kv_cache_data_type": options.kv_cache_data_type, "int8_mode": int(is_int8)}
    engine = load_engine(EngineConfig(str(checkpoint), device="cuda", **settings))
    ready = time.perf_counter() - started
    device = torch.cuda.get_device_name()
    types = f"{options.data_type}, KV cache {options.kv_cache_data_type}"
    print(f"{device}, copy bandwidth {bandwidth / 1e12:.2f} TB/s, {types}; {engine.summary()}")
    facts: dict[str, object] = {"torch": torch.__version__, "copy_bandwidth": bandwidth, "data_type": options.data_type}
    facts["kv_cache_data_type"] = options.kv_cache_data_type
    facts["kv_cache_tokens"] = engine.limits.num_pages * engine.limits.page_size
    measurements: list[Measurement] = []
    cache_bytes = 1 if options.kv_cache_data_type == FP8 else 2
    figures = measure(Benchmark(engine, options.data_type, cache_bytes, bandwidth), options.quick)
    for each in itertools.chain(
        [Measurement("engine ready, with the files in the system's cache", ready, "s")], figures
    ):
        print(each, flush=True)
        measurements.append(each)
        yield make_result("gpu", measurements, machine=device, **facts)
    engine.check_integrity()


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if not torch.cuda.is_available():
        print("benchmark_gpu.py: torch finds no CUDA GPU here", file=sys.stderr)
        return 1
    try:
        with tempfile.TemporaryDirectory(prefix="gptj-benchmark-") as folder:
            for result in run(options, options.model or Path(folder)):
                if options.json:  # each time, so that a run that is cut short keeps what it has
                    write_json(result, options.json)
    except EngineError as error:
        print(f"benchmark_gpu.py: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result))
    return 0
