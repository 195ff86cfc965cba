"""What an answer holds: any subset of its outputs, their shapes, and the counts of a stream."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from numpy.typing import NDArray

from tests.server.test_streaming import GrpcStream, is_marked_last, tokens

TEXTS = ("text_output", "finish_reason")
COUNTS = ("num_input_tokens", "num_output_tokens")
OUTPUTS = (*TEXTS, "sequence_length", *COUNTS, "cum_log_probs", "output_log_probs")
# What the last piece of a stream and a whole answer have in common, however the stream was cut.
OF_THE_WHOLE = {"finish_reason", "sequence_length", "num_input_tokens", "cum_log_probs", "output_log_probs"}
PROMPT = "Once upon a time"
TYPES = {"uint32": "UINT32", "uint64": "UINT64", "int32": "INT32", "float32": "FP32", "bool": "BOOL", "object": "BYTES"}
PREPROCESSED = ("input_ids", "input_lengths", "request_output_len", "end_id", "stream", "bad_words_list")

Arrays = dict[str, NDArray[Any]]


def fields(*prompts: str, max_tokens: int = 3, **others: Any) -> Arrays:
    """Tensors of an ensemble's request for all that it can answer; `others` hold for every row."""
    flags = ("return_num_input_tokens", "return_num_output_tokens", "return_log_probs")
    columns = {"max_tokens": np.int32(max_tokens), **dict.fromkeys(flags, np.bool_(True)), **others}
    arrays = {name: np.full((len(prompts), 1), value) for name, value in columns.items()}
    return {"text_input": np.array([[prompt.encode()] for prompt in prompts], np.object_), **arrays}


class Asker:
    """Asks for one answer in tensors, over HTTP or gRPC."""

    def __init__(self, protocol: Any, url: str) -> None:
        self._protocol = protocol
        self.client = protocol.InferenceServerClient(url)

    def ask(self, model: str, arrays: Arrays, outputs: Iterable[str] | None = None) -> dict[str, NDArray[Any]]:
        """The outputs that came, by name."""
        inputs = []
        for name, array in arrays.items():
            inputs.append(self._protocol.InferInput(name, list(array.shape), TYPES[array.dtype.name]))
            inputs[-1].set_data_from_numpy(array)
        wanted = None if outputs is None else [self._protocol.InferRequestedOutput(name) for name in outputs]
        return by_name(self.client.infer(model, inputs, outputs=wanted))


def by_name(result: Any) -> dict[str, NDArray[Any]]:
    response = result.get_response()
    outputs = response["outputs"] if isinstance(response, dict) else response.outputs
    names = [output["name"] if isinstance(output, dict) else output.name for output in outputs]
    return {name: result.as_numpy(name) for name in names}


@pytest.fixture(params=["http", "grpc"])
def asker(server: Any, request: Any) -> Iterator[Asker]:
    protocol = {"http": tritonclient.http, "grpc": tritonclient.grpc}[request.param]
    asker = Asker(protocol, getattr(server, f"{request.param}_url"))
    yield asker
    asker.client.close()


@pytest.fixture
def grpc(server: Any) -> Iterator[Any]:
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        yield client


def stream(client: Any, model: str, arrays: Arrays, outputs: Iterable[str] = OUTPUTS) -> list[dict[str, NDArray[Any]]]:
    """The outputs of each piece."""
    wanted = [tritonclient.grpc.InferRequestedOutput(name) for name in outputs]
    pieces = GrpcStream(client, model, arrays, outputs=wanted).all()
    client.stop_stream()
    assert is_marked_last(pieces[-1])
    return [by_name(piece) for piece in pieces]


def subsets(names: Iterable[str]) -> list[tuple[str, ...]]:
    names = tuple(names)
    return [subset for size in range(1, len(names) + 1) for subset in itertools.combinations(names, size)]


def assert_equal(answer: dict[str, NDArray[Any]], expected: dict[str, NDArray[Any]]) -> None:
    for name, values in answer.items():
        np.testing.assert_array_equal(values, expected[name], name)


def test_any_subset_of_the_outputs_is_answered(asker: Asker) -> None:
    everything = asker.ask("ensemble", fields(PROMPT))
    assert set(everything) == set(OUTPUTS)
    for subset in subsets(OUTPUTS):
        answer = asker.ask("ensemble", fields(PROMPT), subset)
        assert set(answer) == set(subset)
        assert_equal(answer, everything)


def test_any_subset_is_answered_without_what_nobody_asked_for(asker: Asker) -> None:
    plain = {name: array for name, array in fields(PROMPT).items() if not name.startswith("return_")}
    everything = asker.ask("ensemble", plain)
    assert set(everything) == {*TEXTS, "sequence_length"}
    for subset in subsets(OUTPUTS):
        assert set(asker.ask("ensemble", plain, subset)) == set(everything) & set(subset)


def test_any_subset_of_the_outputs_is_streamed(grpc: Any) -> None:
    *_, last = stream(grpc, "ensemble_stream", fields(PROMPT))
    for subset in subsets(OUTPUTS):
        pieces = stream(grpc, "ensemble_stream", fields(PROMPT), subset)
        assert all(set(piece) == set(subset) for piece in pieces)
        assert_equal({name: pieces[-1][name] for name in OF_THE_WHOLE & set(subset)}, last)


def test_any_subset_of_the_outputs_is_had_of_each_step(asker: Asker, grpc: Any) -> None:
    before = asker.ask("preprocessing", fields(PROMPT))
    asked = tokens([5, 6, 7], new=3, is_return_log_probs=[True])
    model = asker.ask("fastertransformer", asked)
    after = {name: model[name] for name in ("output_ids", "sequence_length")}
    after |= {"input_lengths": asked["input_lengths"], "end_id": np.array([[0]], np.uint32)}
    after |= {f"return_{count}": np.array([[True]]) for count in COUNTS}
    for step, arrays, names in (
        ("preprocessing", fields(PROMPT), PREPROCESSED),
        ("fastertransformer", asked, tuple(model)),
        ("postprocessing", after, (*TEXTS, "sequence_length", *COUNTS)),
    ):
        for subset in subsets(names):
            answer = asker.ask(step, arrays, subset)
            assert set(answer) == set(subset), step
            assert_equal(answer, {"preprocessing": before, "fastertransformer": model}.get(step, answer))
    for subset in subsets((*model, "previous_length", "input_lengths", "end_id")):
        assert all(set(piece) == set(subset) for piece in stream(grpc, "fastertransformer_stream", asked, subset))


@pytest.mark.parametrize("rows", [1, 2])
def test_a_row_of_one_sequence_has_one_text_and_one_reason(asker: Asker, grpc: Any, rows: int) -> None:
    asked = fields(*[PROMPT, "The wolf"][:rows])
    answer = asker.ask("ensemble", asked)
    assert answer["text_output"].shape == answer["finish_reason"].shape == (rows,)
    assert answer["text_output"][0].decode() == " there was a"
    for piece in stream(grpc, "ensemble_stream", asked):
        assert piece["text_output"].shape == piece["finish_reason"].shape == (rows,)


@pytest.mark.parametrize("several", [{"beam_width": 3}, {"num_return_sequences": 3}])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_row_of_several_sequences_has_a_text_and_a_reason_for_each(
    asker: Asker, grpc: Any, rows: int, several: dict[str, Any]
) -> None:
    others: dict[str, Any] = {name: np.int32(value) for name, value in several.items()}
    asked = fields(*[PROMPT, "The wolf"][:rows], **others)
    answers = [asker.ask("ensemble", asked)]
    answers += stream(grpc, "ensemble_stream", asked | {"stream": np.full((rows, 1), "beam_width" not in several)})
    for answer in answers:
        assert answer["text_output"].shape == answer["finish_reason"].shape == (rows, 3)


@pytest.mark.parametrize("stop", [None, " king"])
def test_counts_come_with_every_piece_and_add_up(grpc: Any, asker: Asker, stop: str | None) -> None:
    asked = fields(PROMPT, "The old king", max_tokens=24, num_return_sequences=np.int32(2), seed=np.uint64(3))
    asked["temperature"] = np.full((2, 1), np.float32(1.0))
    if stop is not None:
        asked["stop_words"] = np.full((2, 1), stop.encode(), np.object_)
    whole, pieces = asker.ask("ensemble", asked), stream(grpc, "ensemble_stream", asked)
    assert len(pieces) > 2
    for piece in pieces:
        np.testing.assert_array_equal(piece["num_input_tokens"], whole["num_input_tokens"])
        assert piece["num_output_tokens"].shape == (2, 2)
    total = np.sum([piece["num_output_tokens"] for piece in pieces], axis=0)
    np.testing.assert_array_equal(total, whole["num_output_tokens"])
    np.testing.assert_array_equal(total + whole["num_input_tokens"], pieces[-1]["sequence_length"])
