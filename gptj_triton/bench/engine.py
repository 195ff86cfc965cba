"""Times the engine by itself beside `transformers`: the same checkpoint, batch, data type, device and threads.

Every sequence has a random prompt of its own and is continued greedily by the same number of tokens. Repeats are
interleaved and medians are compared, since a machine's speed drifts; each has new prompts, because the engine keeps
what it computed of old ones. Knows the engine's Python interface, and nothing of the server.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

from gptj_triton.engine.config import cpu_settings

os.environ.update(cpu_settings() | os.environ)  # torch reads them when it is imported

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from gptj_triton.bench.machine import processor
from gptj_triton.bench.results import make_result
from gptj_triton.checkpoint.data_types import COMPUTE_TYPES
from gptj_triton.checkpoint.model_config import ModelConfig
from gptj_triton.engine.config import DEVICES, EngineConfig
from gptj_triton.engine.device import choose_device, compute_type
from gptj_triton.engine.engine import Engine
from gptj_triton.engine.load import load_engine
from gptj_triton.engine.sampling_params import SamplingParams
from gptj_triton.engine.sequence import Sequence
from gptj_triton.errors import ConfigError, EngineError
from gptj_triton.project import EMBEDDED_MODEL

QUICK = {"concurrency": [1, 4], "prompt_tokens": 8, "new_tokens": 4, "repeats": 1}

Tokens: TypeAlias = list[list[int]]  # a list for each sequence
Generate: TypeAlias = Callable[[Tokens, int], Tokens]  # prompts, and how many tokens each is continued by


def engine_generate(engine: Engine) -> Generate:
    """All prompts at once through the engine, stepped until it is idle."""

    def generate(prompts: Tokens, new_tokens: int) -> Tokens:
        end_ids = engine.model_config.end_ids
        params = SamplingParams(request_output_len=new_tokens, min_length=new_tokens, end_ids=end_ids)
        sequences = [Sequence(number, prompt, params) for number, prompt in enumerate(prompts)]
        for sequence in sequences:
            engine.submit(sequence)
        while engine.busy:
            engine.step()
        return [sequence.output for sequence in sequences]

    return generate


def transformers_generate(model: Any) -> Generate:
    """All prompts as one batch of `transformers`."""

    @torch.inference_mode()
    def generate(prompts: Tokens, new_tokens: int) -> Tokens:
        ids = torch.tensor(prompts, device=model.device)  # [concurrency, prompt_tokens]
        exactly = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
        end_id = model.config.eos_token_id
        answer = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=end_id, **exactly
        )
        outputs: Tokens = answer[:, ids.shape[1] :].tolist()
        return outputs

    return generate


def load_contenders(options: argparse.Namespace) -> dict[str, Generate]:
    """Both sides by name, on one device and in one data type; EngineError if the checkpoint or an option forbids it."""
    # On a GPU the engine's KV cache takes most of what is free, so the other's weights must be there before.
    dtype = COMPUTE_TYPES[options.data_type].dtype
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).to(options.device).eval()
    config = EngineConfig(
        str(options.model),
        data_type=options.data_type,
        device=options.device,
        kv_cache_gib=options.kv_cache_gib,
        max_sequences=max(options.concurrency),
    )
    engine = load_engine(config)
    check_room(engine, options)
    return {"engine": engine_generate(engine), "transformers": transformers_generate(model)}


def check_room(engine: Engine, options: argparse.Namespace) -> None:
    """ConfigError if a sequence is too long for the model, or not all of them fit the KV cache at once: some would then
    be computed twice.
    """
    length, limits = options.prompt_tokens + options.new_tokens, engine.limits
    if length > limits.context_length:
        raise ConfigError(f"--prompt-tokens + --new-tokens is {length}, the model's context is {limits.context_length}")
    most = limits.num_pages // -(-length // limits.page_size)
    if max(options.concurrency) > most:
        raise ConfigError(f"--concurrency is {max(options.concurrency)}, the KV cache has room for {most} sequences")


def random_prompts(count: int, length: int, vocab_size: int, seed: str) -> Tokens:
    chance = random.Random(seed)
    return [chance.choices(range(vocab_size), k=length) for _ in range(count)]


def timed(generate: Generate, prompts: Tokens, new_tokens: int) -> tuple[float, Tokens]:
    """Seconds, and the new tokens; that these are lists on the host shows that a GPU has finished."""
    start = time.perf_counter()
    outputs = generate(prompts, new_tokens)
    return time.perf_counter() - start, outputs


@dataclass(frozen=True)
class Measurement:
    """Both sides at one number of sequences. `equal_sequences` counts, of the `sequences` of all timed batches, those
    that got the same tokens from both; `tokens` are those of a batch."""

    concurrency: int
    tokens: int
    engine_tokens_per_s: float
    transformers_tokens_per_s: float
    ratio: float
    equal_sequences: int
    sequences: int

    def __str__(self) -> str:
        return (
            f"{self.concurrency:>9} {self.engine_tokens_per_s:>10.1f} {self.transformers_tokens_per_s:>13.1f} "
            f"{self.ratio:>7.2f}   {self.equal_sequences} of {self.sequences} sequences"
        )


def measure(contenders: dict[str, Generate], batches: list[Tokens], new_tokens: int) -> Measurement:
    """The median of each contender over `batches`, of which the first one is for warming up."""
    runs = [{name: timed(contenders[name], prompts, new_tokens) for name in contenders} for prompts in batches][1:]
    answers = [list(zip(*(outputs for _, outputs in run.values()), strict=True)) for run in runs]
    tokens = {sum(map(len, outputs)) for run in runs for _, outputs in run.values()}
    assert len(tokens) == 1, f"not all runs gave the same number of tokens: {sorted(tokens)}"
    [count] = tokens
    engine, transformers = (count / median(run[name][0] for run in runs) for name in ("engine", "transformers"))
    return Measurement(
        len(batches[0]),
        count,
        engine,
        transformers,
        engine / transformers,
        equal_sequences=sum(all(output == given[0] for output in given) for batch in answers for given in batch),
        sequences=sum(map(len, answers)),
    )


def heading(options: argparse.Namespace) -> str:
    return (
        f"{options.model.name}, {options.data_type} on {options.device}, {torch.get_num_threads()} CPU thread(s): "
        f"{options.prompt_tokens} tokens in, {options.new_tokens} out, "
        f"tokens/s in the median of {options.repeats} interleaved repeats\n"
        f"{'sequences':>9} {'engine':>10} {'transformers':>13} {'ratio':>7}   equal greedy tokens"
    )


def counts(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compares the engine's tokens/s with those of transformers' generate.")
    parser.add_argument("--model", type=Path, default=EMBEDDED_MODEL, metavar="DIR", help="default: the embedded model")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="default: %(default)s")
    parser.add_argument(
        "--data-type", choices=("auto", *COMPUTE_TYPES), default="auto", help="default: fp16 on a GPU, else fp32"
    )
    parser.add_argument(
        "--concurrency", type=counts, default=[1, 4, 16, 64], metavar="N,N,...", help="default: 1,4,16,64"
    )
    parser.add_argument("--prompt-tokens", type=int, default=32, metavar="N", help="default: %(default)s")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N", help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--kv-cache-gib", type=float, default=1.0, metavar="GIB", help="the engine's KV cache; default: %(default)s"
    )
    parser.add_argument("--quick", action="store_true", help="other defaults, which only show that it runs")
    options = parser.parse_args(arguments)
    if options.quick:
        parser.set_defaults(**QUICK)
        options = parser.parse_args(arguments)
    if min(*options.concurrency, options.prompt_tokens, options.new_tokens, options.repeats) < 1:
        parser.error("--concurrency, --prompt-tokens, --new-tokens and --repeats must be 1 or more")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        device = choose_device(options.device)
        options.device, options.data_type = device.type, compute_type(options.data_type, device).name
        vocab_size = ModelConfig.read(options.model).vocab_size  # refuses an unknown model in one line
        contenders = load_contenders(options)
        print(heading(options))
        measurements = []
        for count in options.concurrency:
            batches = [
                random_prompts(count, options.prompt_tokens, vocab_size, f"{count} sequences, repeat {repeat}")
                for repeat in range(1 + options.repeats)
            ]
            measurements.append(measure(contenders, batches, options.new_tokens))
            print(measurements[-1], flush=True)
    except (EngineError, OSError) as error:  # the latter is transformers' for files that are missing
        print(f"benchmark_engine.py: {error}", file=sys.stderr)
        return 1
    facts = {"model": options.model.name, "threads": torch.get_num_threads()}
    facts |= {
        name: getattr(options, name) for name in ("device", "data_type", "prompt_tokens", "new_tokens", "repeats")
    }
    print(json.dumps(make_result("engine", measurements, machine=processor(), **facts)))
    return 0
