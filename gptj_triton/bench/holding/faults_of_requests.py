"""Faults that a request makes: too large, too deep, too many, impossible shapes, work for hours."""

from __future__ import annotations

import asyncio
import json
import random
import time
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2

from gptj_triton.bench.holding.load import prompt
from gptj_triton.bench.holding.outcomes import Ended, Outcome
from gptj_triton.bench.holding.processes import TRITON, processes_by_role
from gptj_triton.bench.holding.raw_http import post_raw
from gptj_triton.bench.holding.scene import LONG, ONE_TOKEN, Fault, Scene, Seen, all_in_words
from gptj_triton.bench.machine import resident_mib

MIB = 1 << 20
ENDPOINTS = ("models/ensemble/generate", "models/ensemble_stream/generate_stream", "models/ensemble/infer")
KEPT_AT_MOST = 64.0  # MiB that a server may keep of what it was sent
SOON = 1.0  # seconds
RAW_PATIENCE = 15.0


async def lives_through(scene: Scene, *bodies: bytes, **options: Any) -> Seen:
    """Posts each body to each endpoint: all are answered in words, by the same tritonserver."""
    before = scene.role_pids()
    scene.strike()
    ends = [await scene.asker.post(path, body, **options) for body in bodies for path in ENDPOINTS]
    scene.hanging = max(each.seconds for each in ends)
    seen = all_in_words(ends, also=[Outcome.REFUSED])
    died = [role for role, pid in before.items() if scene.role_pids().get(role) != pid]
    return Seen(seen.words + "".join(f"; {role} died" for role in died), seen.ok and not died)


async def raw_bodies(scene: Scene, bodies: Sequence[bytes], headers: dict[str, str], chunk_bytes: int = 0) -> Seen:
    """Posts each body to each endpoint, as they are; tritonserver lives through it."""
    before = scene.role_pids().get(TRITON)
    scene.strike()
    ends = []
    for path in ENDPOINTS:
        for data in bodies:
            ends.append(await post_raw(scene.server.http, path, data, headers, chunk_bytes, RAW_PATIENCE))
    scene.hanging = max(each.seconds for each in ends)
    lives = scene.role_pids().get(TRITON) == before
    # Whoever sends more than is read may find the connection closed before the refusal can be read.
    seen = all_in_words(ends, also=[Outcome.CUT, Outcome.REFUSED])
    return Seen(seen.words if lives else f"{seen.words}; tritonserver died", lives and seen.ok)


async def body(scene: Scene) -> Seen:
    """As curl sends it: evhtp reads a body of this type as a form, and takes two bytes of stack for each of its own."""
    texts = [json.dumps({"text_input": "a" * size}).encode() for size in (4_300_000, 8 * MIB)]
    return await raw_bodies(scene, texts, {"Content-Type": "application/x-www-form-urlencoded"})


async def nesting(scene: Scene) -> Seen:
    return await lives_through(scene, b'{"a":' + b"[" * 110_000, b'{"a":' * 110_000, b"[" * 1_000_000)


async def chunks(scene: Scene) -> Seen:
    return await raw_bodies(scene, [b" " * 550_000], {}, chunk_bytes=1)


async def classification(scene: Scene) -> Seen:
    scene.strike()
    outputs = [{"name": "text_output", "parameters": {"classification": 3}}]
    ended = await scene.asker.infer([ONE_TOKEN], outputs=outputs)
    scene.hanging = ended.seconds
    return Seen(str(ended)[:120], ended.outcome is not Outcome.HUNG)


def overflowing(model: str, **inputs: tuple[str, list[int], bytes]) -> Any:
    """A ModelInferRequest whose tensors are (type, shape, bytes), which need not fit each other."""
    request = service_pb2.ModelInferRequest(model_name=model)
    for name, (datatype, shape, raw) in inputs.items():
        request.inputs.add(name=name, datatype=datatype, shape=shape)
        request.raw_input_contents.append(raw)
    return request


IDS = {"input_lengths": ("UINT32", [1, 1], b"\1\0\0\0"), "request_output_len": ("UINT32", [1, 1], b"\1\0\0\0")}
WRITTEN = {
    "sequence_length": ("UINT32", [1, 1], b"\1\0\0\0"),
    "input_lengths": ("UINT32", [1, 1], b"\1\0\0\0"),
    "end_id": ("UINT32", [1, 1], b"\0\0\0\0"),
}
OVERFLOWING = [
    overflowing("fastertransformer", input_ids=("UINT32", [1, 2**62 + 4], bytes(16)), **IDS),
    overflowing("fastertransformer_stream", input_ids=("UINT32", [1, 2**62 + 4], bytes(16)), **IDS),
    overflowing("postprocessing", output_ids=("UINT32", [1, 1, 2**62], b""), **WRITTEN),
    overflowing("postprocessing", output_ids=("UINT32", [1, 2**31, 2**31], b""), **WRITTEN),
    overflowing("preprocessing", text_input=("BYTES", [2**62, 4], b"")),
]


async def send_overflowing(scene: Scene, request: Any) -> Ended:
    """Sends it as it is, which tritonclient would not."""
    stub = scene.asker.grpc_stub

    async def send() -> Ended:
        if request.model_name == "fastertransformer_stream":
            async for response in stub.ModelStreamInfer(aiter_of(request)):
                return Ended(Outcome.REFUSED if response.error_message else Outcome.ANSWERED, response.error_message)
            return Ended(Outcome.CUT)
        await stub.ModelInfer(request)
        return Ended(Outcome.ANSWERED)

    return await scene.asker.end(send())


async def aiter_of(request: Any) -> Any:
    yield request


async def shapes(scene: Scene) -> Seen:
    await scene.fly_all_kinds(each=1)
    scene.strike()
    ends = await asyncio.gather(*(send_overflowing(scene, request) for request in OVERFLOWING))
    scene.hanging = max(each.seconds for each in ends)
    others = await scene.landed()
    return all_in_words([*ends, *others], also=[Outcome.CUT, Outcome.REFUSED])


async def kept_after(scene: Scene, *bodies: bytes, **options: Any) -> Seen:
    """Posts bodies to `generate`: the server lives and gives back what they took."""

    def held() -> float:
        return resident_mib(processes_by_role(scene.server.pid).values())

    before = held()
    seen = await lives_through(scene, *bodies, **options)
    await asyncio.sleep(2.0)
    kept = held() - before
    return Seen(f"{seen.words}; {kept:.0f} MiB kept", seen.ok and kept < KEPT_AT_MOST)


async def deflate_bomb(scene: Scene) -> Seen:
    text = zlib.compress(b'{"text_input": "' + b"a" * (400 * MIB) + b'"}', 9)
    return await kept_after(scene, text, headers={"Content-Encoding": "deflate"})


async def large_body(scene: Scene) -> Seen:
    return await kept_after(scene, json.dumps({"text_input": "a" * (64 * MIB)}).encode())


async def keys(scene: Scene) -> Seen:
    many = {f"k{index}": index for index in range(60_000)}
    return await lives_through(scene, json.dumps({"text_input": "Once", **many}).encode())


def refused_soon(scene: Scene, ended: Ended) -> Seen:
    scene.hanging = ended.seconds
    return Seen(f"{ended}"[:160], ended.outcome is Outcome.REFUSED and ended.seconds < SOON)


async def rows(scene: Scene) -> Seen:
    row = {"text_input": "Once", "max_tokens": 900, "num_return_sequences": 64}
    scene.strike()
    return refused_soon(scene, await scene.asker.infer([row] * 128))


async def stop_strings(scene: Scene) -> Seen:
    words = np.array([[f"word {index}".encode() for index in range(100_000)]], np.object_)
    ids = np.array([[5, 6]], np.uint32)
    one = np.array([[2]], np.uint32)
    tensors = {"input_ids": ids, "input_lengths": one, "request_output_len": one, "stop_strings": words}
    scene.strike()
    return refused_soon(scene, await scene.asker.grpc_infer("fastertransformer", tensors))


async def flood(scene: Scene) -> Seen:
    chance = random.Random(3)
    scene.fly(*(scene.asker.generate(text_input=prompt(chance, 480), max_tokens=8) for _ in range(64)))
    await asyncio.sleep(0.3)
    ended = await scene.asker.generate(**ONE_TOKEN)
    flooding = all_in_words(await scene.landed())
    scene.hanging = 0.0
    words = f"one token after {ended.seconds:.2f} s; the flood: {flooding.words}"
    return Seen(words, ended.outcome is Outcome.ANSWERED and ended.seconds < SOON and flooding.ok)


async def queue(scene: Scene) -> Seen:
    """More than any queue takes: some are refused at once, the others answered, and small ones go on."""
    started = time.monotonic()
    scene.fly(*(scene.asker.generate(**{**LONG, "max_tokens": 40, "min_tokens": 40}) for _ in range(1500)))
    ends = await scene.landed()
    scene.hanging = 0.0
    return Seen(f"{all_in_words(ends).words} in {time.monotonic() - started:.0f} s", all_in_words(ends).ok)


async def half_requests(scene: Scene) -> Seen:
    """Clients that send half of a request and wait take nothing from the others."""
    half = b"POST /v2/models/ensemble/generate HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{"
    writers = []
    for _ in range(200):
        _, writer = await asyncio.open_connection(*scene.server.http.split(":"))
        writer.write(half)
        writers.append(writer)
    scene.strike()
    ended = await scene.asker.generate(**ONE_TOKEN)
    scene.hanging = ended.seconds
    for writer in writers:
        writer.close()
    return Seen(f"{ended} after {ended.seconds:.2f} s", ended.outcome is Outcome.ANSWERED and ended.seconds < SOON)


FAULTS = [
    Fault("body", body, short=True),
    Fault("nesting", nesting),
    Fault("chunks", chunks),
    Fault("large-body", large_body, patience=40.0, hangs_at_most=20.0),
    Fault("deflate-bomb", deflate_bomb, patience=40.0, hangs_at_most=20.0),
    Fault("keys", keys, patience=60.0, hangs_at_most=40.0),
    Fault("classification", classification, serves_within=5.0),
    Fault("shapes", shapes, short=True),
    Fault("rows", rows),
    Fault("stop-strings", stop_strings),
    Fault("flood", flood, patience=90.0),
    Fault("half-requests", half_requests),
    Fault("queue", queue, patience=90.0),
]
