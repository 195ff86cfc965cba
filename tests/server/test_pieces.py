"""Pieces at the step that makes their text: rows and sequences of one request, each cut in its own places."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http
import zmq
from tokenizers import Tokenizer

from gptj_triton.process.cancel_handle import make_handle
from gptj_triton.process.messages import Cancel

CHECKPOINT = Path(__file__).parents[2] / "model_repository" / "fastertransformer" / "1" / "storyteller"
PROMPTS = ["Once upon a time", "The wolf"]
TEXTS = [["👩‍👩‍👧‍👦 昔々、老婆。", "a\u0301 नमस्ते  two  spaces "], ["He slept. 👍🏽 It is over.", "aaab aaabaab"]]
STOP_WORDS = ["over.", "aab"]
DATATYPES = {np.dtype(np.uint32): "UINT32", np.dtype(np.bool_): "BOOL", np.dtype(np.object_): "BYTES"}
Counts = np.ndarray[Any, Any]  # how many new tokens each sequence has: [2, 2]


class Postprocessing:
    """Asks the step for the text of PROMPTS, each continued by its TEXTS."""

    def __init__(self, url: str) -> None:
        self.client = tritonclient.http.InferenceServerClient(url)
        tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
        self.end = tokenizer.token_to_id("<|endoftext|>")
        self.prompts = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
        self.new = [[tokenizer.encode(text).ids for text in row] for row in TEXTS]
        self.all = np.array([[len(tokens) for tokens in row] for row in self.new])

    def ask(self, now: Counts, before: Counts | None = None, last: bool = True, **flags: Any) -> dict[str, Any]:
        """The outputs by name, as lists; `flags` are further tensors."""
        ids = [
            [[*prompt, *tokens[:count]] for tokens, count in zip(row, counts, strict=True)]
            for prompt, row, counts in zip(self.prompts, self.new, now, strict=True)
        ]
        width = max(len(sequence) for row in ids for sequence in row)
        tensors = {
            "output_ids": np.array([[[*each, *[self.end] * (width - len(each))] for each in row] for row in ids]),
            "sequence_length": np.array([[len(each) for each in row] for row in ids]),
            "input_lengths": np.array([[len(prompt)] for prompt in self.prompts]),
            "end_id": np.full((2, 1), self.end),
        }
        tensors = {name: array.astype(np.uint32) for name, array in tensors.items()}
        if before is not None:
            tensors["previous_length"] = tensors["input_lengths"] + before.astype(np.uint32)
        tensors["finish_reason"] = np.full((2, 2), b"length" if last else b"", dtype=np.object_)
        tensors["stop_words"] = np.array([[word.encode() for word in STOP_WORDS]] * 2, dtype=np.object_)
        for flag in ("return_num_input_tokens", "return_num_output_tokens"):
            tensors[flag] = np.ones((2, 1), dtype=np.bool_)
        inputs = []
        for name, array in (tensors | flags).items():
            inputs.append(tritonclient.http.InferInput(name, list(array.shape), DATATYPES[array.dtype]))
            inputs[-1].set_data_from_numpy(array)
        result = self.client.infer("postprocessing", inputs)
        names = [output["name"] for output in result.get_response()["outputs"]]
        return {name: result.as_numpy(name).tolist() for name in names}


@pytest.fixture
def postprocessing(server: Any) -> Any:
    step = Postprocessing(server.http_url)
    yield step
    step.client.close()


@pytest.mark.parametrize("with_prompt", [False, True])
def test_pieces_of_several_rows_and_sequences_are_their_whole_texts(
    postprocessing: Postprocessing, with_prompt: bool
) -> None:
    chance = random.Random(3)
    shown = np.full((2, 1), not with_prompt)
    whole = postprocessing.ask(postprocessing.all, exclude_input_in_output=shown)
    joined = np.full((2, 2), b"", dtype=np.object_)
    now = np.zeros((2, 2), dtype=int)
    while (now < postprocessing.all).any():
        before, steps = now, [[chance.choice([0, 1, 1, 2, 5]) for _ in row] for row in now]
        now = np.minimum(postprocessing.all, before + steps)
        piece = postprocessing.ask(now, before, last=False, exclude_input_in_output=shown)
        assert piece["finish_reason"] == [[b"", b""]] * 2
        assert piece["num_input_tokens"] == whole["num_input_tokens"]
        assert piece["num_output_tokens"] == (now - before).tolist()
        joined += np.array(piece["text_output"], dtype=np.object_)
    last = postprocessing.ask(now, now, exclude_input_in_output=shown)
    joined += np.array(last.pop("text_output"), dtype=np.object_)
    assert joined.tolist() == whole.pop("text_output")
    assert last.pop("num_output_tokens") == [[0, 0]] * 2
    assert whole.pop("num_output_tokens") == now.tolist()
    assert last == whole


@pytest.fixture
def engine(server: Any) -> Iterator[Path]:
    """The directory of a second engine of the server, in which something else listens in the engine's place."""
    (engines,) = server.temporary.glob("gptj-triton-*/engines")
    directory = engines / "0123456789ab"
    directory.mkdir(mode=0o700)
    yield directory
    shutil.rmtree(directory)


@pytest.mark.parametrize("handle", [None, b"ipc://{folder}/engine.sock\ncancel", b"nonsense", b""])
def test_a_handle_of_a_client_that_waits_is_not_used(
    postprocessing: Postprocessing, engine: Path, handle: bytes | None
) -> None:
    """None stands for the handle of a request of that engine."""
    if handle is None:
        handle = make_handle(engine.name, Cancel("frontend", 0))
    with zmq.Context() as context, context.socket(zmq.PULL) as inbox:
        inbox.bind(f"ipc://{engine}/engine.sock")
        handle = handle.replace(b"{folder}", str(engine).encode())
        handles = np.full((2, 2), handle, dtype=np.object_)
        answer = postprocessing.ask(postprocessing.all, postprocessing.all, cancel_handle=handles)
        assert answer["finish_reason"] == [[b"length", b"length"], [b"stop", b"stop"]]
        assert not inbox.poll(300)
