"""The baseline of the comparison: text in, text out as people write it, with FastAPI, uvicorn and `transformers`.

It is what `compare.py` measures this project against, and never part of serving. It takes the JSON fields of
`ensemble` that `transformers` has too, answers one request at a time, or with `--batch-size` those together that arrive
within a few milliseconds and ask for the same (padded on the left). Prints `READY URL` when it answers, and ends on
SIGINT. Imports nothing of this project, so that it runs wherever torch, transformers and FastAPI are.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from socket import socket
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WARM_UP_TOKENS = 8


class GenerateRequest(BaseModel):
    """The fields that both services know, with the same meanings and defaults."""

    model_config = ConfigDict(extra="forbid")

    text_input: str = Field(min_length=1)
    max_tokens: int = Field(default=16, ge=1)
    min_tokens: int = Field(default=0, ge=0)
    temperature: float = Field(default=1.0, ge=0)
    top_k: int = Field(default=0, ge=0)
    top_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0)
    seed: int | None = Field(default=None, ge=0)

    def may_join(self, other: GenerateRequest) -> bool:
        """Whether both can be one call of `generate`, which has one set of parameters for all its rows."""
        return self.model_dump(exclude={"text_input"}) == other.model_dump(exclude={"text_input"})

    def generate_arguments(self) -> dict[str, Any]:
        """The same request in the words of `transformers`."""
        asked = self.top_k or self.top_p or "temperature" in self.model_fields_set
        arguments = {
            "max_new_tokens": self.max_tokens,
            "min_new_tokens": self.min_tokens,
            "repetition_penalty": self.repetition_penalty,
            "do_sample": bool(asked) and self.temperature > 0,
        }
        if arguments["do_sample"]:
            arguments |= {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p or 1.0}
        return arguments


class GenerateAnswer(BaseModel):
    text_output: str


class Model:
    """A checkpoint in Hugging Face's layout, and its tokenizer. For one thread at a time."""

    def __init__(self, directory: Path, device: str, data_type: str) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._model = AutoModelForCausalLM.from_pretrained(directory, dtype=DTYPES[data_type]).to(device).eval()

    @torch.inference_mode()
    def generate(self, requests: list[GenerateRequest]) -> list[str]:
        """The new text of each; the first one's parameters are for all."""
        if requests[0].seed is not None:
            torch.manual_seed(requests[0].seed)
        texts = [request.text_input for request in requests]
        prompts = self._tokenizer(texts, padding=True, return_tensors="pt").to(self._model.device)
        outputs = self._model.generate(  # [requests, padded prompt + new tokens]
            input_ids=prompts["input_ids"],
            attention_mask=prompts["attention_mask"],
            pad_token_id=self._tokenizer.pad_token_id,
            **requests[0].generate_arguments(),
        )
        new = outputs[:, prompts["input_ids"].shape[1] :]
        answers: list[str] = self._tokenizer.batch_decode(new, skip_special_tokens=True)
        return answers

    def warm_up(self, batch_size: int) -> None:
        for size in {1, batch_size}:
            self.generate([GenerateRequest(text_input="Once upon a time", max_tokens=WARM_UP_TOKENS)] * size)


class Batcher:
    """Hands requests to the model in the order in which they came, up to `batch_size` at a time, on a thread of its
    own. The first of a batch waits `window` seconds for others; with a batch of one nothing waits."""

    def __init__(self, model: Model, batch_size: int, window: float) -> None:
        self._model, self._batch_size, self._window = model, batch_size, window
        self._waiting: list[tuple[GenerateRequest, asyncio.Future[str]]] = []
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1)

    async def answer(self, request: GenerateRequest) -> str:
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        self._arrived.set()
        return await future

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await self._arrived.wait()
            if self._batch_size > 1:
                await asyncio.sleep(self._window)
            requests, futures = zip(*self._take_batch(), strict=True)
            work = asyncio.get_running_loop().run_in_executor(self._thread, self._model.generate, list(requests))
            try:
                answers = await work
            except Exception as error:  # every request of the batch gets it, whatever it was
                for future in filter(still_waiting, futures):
                    future.set_exception(error)
            else:
                for future, text in zip(futures, answers, strict=True):
                    if still_waiting(future):
                        future.set_result(text)

    def _take_batch(self) -> list[tuple[GenerateRequest, asyncio.Future[str]]]:
        """The oldest request, and the next ones that may join it."""
        oldest = self._waiting[0][0]
        batch: list[tuple[GenerateRequest, asyncio.Future[str]]] = []
        others: list[tuple[GenerateRequest, asyncio.Future[str]]] = []
        for each in self._waiting:
            (batch if len(batch) < self._batch_size and oldest.may_join(each[0]) else others).append(each)
        self._waiting = others
        if not others:
            self._arrived.clear()
        return batch


def still_waiting(future: asyncio.Future[str]) -> bool:
    """False when its client has left."""
    return not future.done()


def make_app(model: Model, batch_size: int, window: float) -> FastAPI:
    """POST /generate; `window` in seconds."""
    batcher = Batcher(model, batch_size, window)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(batcher.run())
        yield
        task.cancel()

    app = FastAPI(lifespan=lifespan)

    @app.post("/generate")
    async def generate(request: GenerateRequest) -> GenerateAnswer:
        return GenerateAnswer(text_output=await batcher.answer(request))

    return app


class AnnouncingServer(uvicorn.Server):
    async def startup(self, sockets: list[socket] | None = None) -> None:
        await super().startup(sockets)
        print(f"READY http://{self.config.host}:{self.config.port}", flush=True)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The comparison's baseline: FastAPI and transformers' generate.")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="in Hugging Face's layout")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: %(default)s")
    parser.add_argument("--data-type", choices=list(DTYPES), help="default: fp32 on cpu, fp16 on cuda")
    parser.add_argument("--port", type=int, default=8000, metavar="PORT", help="of 127.0.0.1; default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="most at a time; default: %(default)s")
    parser.add_argument(
        "--batch-window-ms", type=float, default=5.0, metavar="MS", help="wait for others; default: %(default)s"
    )
    options = parser.parse_args(arguments)
    if options.batch_size < 1 or options.batch_window_ms < 0:
        parser.error("--batch-size must be 1 or more, --batch-window-ms 0 or more")
    return options


def main() -> int:
    options = parse_arguments()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = Model(options.model, device, options.data_type or ("fp16" if device == "cuda" else "fp32"))
    except (OSError, ValueError) as error:  # what transformers raises for files that are missing or are none of its own
        print(f"baseline_server.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    model.warm_up(options.batch_size)
    app = make_app(model, options.batch_size, options.batch_window_ms / 1000)
    config = uvicorn.Config(app, host="127.0.0.1", port=options.port, log_level="warning", access_log=False)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises SIGINT again once it has stopped
        AnnouncingServer(config).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
