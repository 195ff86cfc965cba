"""FasterTransformer's tensors to the engine's requests and back: shapes, defaults, refusals that name what is wrong."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from tritonclient.utils import triton_to_np_dtype

from gptj_triton.engine.sampling_params import Limits, SamplingParams
from gptj_triton.errors import InvalidRequestError
from gptj_triton.fields import BY_TENSOR
from gptj_triton.process.messages import Finished, Result, Welcome
from gptj_triton.triton.output_tensors import PieceTensors, write_tensors
from gptj_triton.triton.tensors import (
    SCALARS,
    derived_seed,
    lacks_batch_dimension,
    read_rows,
    read_stream,
    read_timeout,
    refuse_no_rows,
)

LIMITS = Limits(vocab_size=100, context_length=32, stop_strings=True, num_pages=20, page_size=16, max_sequences=64)
MODEL = Welcome(engine_pid=1, limits=LIMITS, start_id=98, end_ids=(99,))


def dtype_of(name: str) -> Any:
    tensor = BY_TENSOR[name].tensor
    assert tensor is not None
    return triton_to_np_dtype(tensor.dtype)


def request(*prompts: list[int], new: int = 4, **scalars: Any) -> dict[str, NDArray[Any]]:
    """Tensors of a request; a scalar is given once for all rows or as a list of one a row."""
    batch, width = len(prompts), max(map(len, prompts))
    tensors: dict[str, NDArray[Any]] = {
        "input_ids": np.array([prompt + [99] * (width - len(prompt)) for prompt in prompts], np.uint32),
        "input_lengths": np.array([[len(prompt)] for prompt in prompts], np.uint32),
        "request_output_len": np.full((batch, 1), new, np.uint32),
    }
    for name, value in scalars.items():
        values = value if isinstance(value, list) else [value] * batch
        tensors[name] = np.array(values, dtype_of(name)).reshape(batch, 1)
    return tensors


def answer(number: int, tokens: list[int], reason: str, log_probs: list[float]) -> Finished:
    return Finished(number, [Result(tokens, reason, log_probs)])


def words(*words: list[int], pad: int = 0) -> NDArray[np.int32]:
    """int32 [1, 2, W]: the contract's form of a list of words."""
    tokens = [token for word in words for token in word]
    ends = np.cumsum([len(word) for word in words]).tolist()
    width = max(len(tokens), len(ends), 1) + pad
    return np.array([[tokens + [0] * (width - len(tokens)), ends + [-1] * (width - len(ends))]], np.int32)


def only_params(tensors: dict[str, NDArray[Any]]) -> SamplingParams:
    [row] = read_rows(tensors, MODEL)
    [params] = row.sequences
    return params


def test_absent_optional_tensors_mean_the_defaults() -> None:
    [row] = read_rows(request([1, 2, 3]), MODEL)
    assert row.prompt == [1, 2, 3]
    assert row.sequences == [SamplingParams(request_output_len=4, end_ids=(99,))]


def test_every_scalar_reaches_the_parameters() -> None:
    given: dict[str, Any] = {
        "min_length": 2,
        "runtime_top_k": 5,
        "runtime_top_p": 0.5,
        "temperature": 0.25,
        "repetition_penalty": 1.5,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.75,
        "random_seed": 2**64 - 1,
        "is_return_log_probs": True,
        "top_p_decay": 0.5,
        "top_p_min": 0.125,
    }
    assert only_params(request([1], end_id=7, **given)) == SamplingParams(request_output_len=4, end_ids=(7,), **given)
    assert only_params(request([1], top_p_reset_ids=13)).top_p_reset_ids == 13


@pytest.mark.parametrize("name", [name for name in SCALARS if BY_TENSOR[name].maximum is not None])
def test_every_range_ends_where_the_table_says(name: str) -> None:
    field = BY_TENSOR[name]
    assert field.minimum is not None and field.maximum is not None
    roomy = Welcome(1, msgspec.structs.replace(LIMITS, num_pages=1000), 98, (99,))
    step = 0 if field.above_minimum else 1
    for value in (field.minimum - step, field.maximum + 1):
        if value < 0 and np.issubdtype(dtype_of(name), np.unsignedinteger):
            continue
        with pytest.raises(InvalidRequestError, match=f"^{name} is .*, allowed: {field.range()}$"):
            read_rows(request([1], new=2, **{name: value}), roomy)
    [row] = read_rows(request([1], new=2, **{name: field.maximum}), roomy)
    assert getattr(row.sequences[0], name) == field.maximum


def test_scalars_may_come_with_or_without_their_second_dimension() -> None:
    tensors = request([1], [2, 3], runtime_top_k=[4, 5])
    flat = {name: array if name == "input_ids" else array.reshape(-1) for name, array in tensors.items()}
    assert read_rows(flat, MODEL) == read_rows(tensors, MODEL)


def test_rows_have_their_own_lengths_and_parameters() -> None:
    first, second = read_rows(request([1, 2, 3], [4], runtime_top_k=[0, 9], random_seed=[1, 2]), MODEL)
    assert (first.prompt, second.prompt) == ([1, 2, 3], [4])
    assert (first.sequences[0].runtime_top_k, second.sequences[0].runtime_top_k) == (0, 9)
    assert (first.sequences[0].random_seed, second.sequences[0].random_seed) == (1, 2)


def test_an_empty_prompt_starts_from_the_start_id() -> None:
    tensors = request([5]) | {"input_lengths": np.zeros((1, 1), np.uint32)}
    assert read_rows(tensors, MODEL)[0].prompt == [98]
    assert read_rows(tensors | {"start_id": np.array([[7]], np.uint32)}, MODEL)[0].prompt == [7]


def test_sequences_of_one_row_have_seeds_of_their_own_and_the_first_one_has_the_rows() -> None:
    [row] = read_rows(request([1], num_return_sequences=5, random_seed=2**64 - 1), MODEL)
    seeds = [params.random_seed for params in row.sequences]
    assert seeds[0] == 2**64 - 1
    assert len(set(seeds)) == 5
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert derived_seed(3, 0) == 3


@pytest.mark.parametrize("name", ["bad_words_list", "stop_words_list"])
def test_word_lists_are_read_without_their_padding_and_empty_words(name: str) -> None:
    for array, expected in [
        (words([1, 2], [3]), ((1, 2), (3,))),
        (words([1, 2], [3], pad=4), ((1, 2), (3,))),
        (words([0]), ((0,),)),
        (words([], [5], []), ((5,),)),
        (np.array([[[0], [-1]]], np.int32), ()),
        (np.zeros((1, 2, 0), np.int32), ()),
    ]:
        assert getattr(only_params(request([1]) | {name: array}), name) == expected


def test_stop_strings_are_bytes_of_each_row() -> None:
    strings = np.array([[b"a", "é".encode()], [b"b", b"c"]], np.object_)
    rows = read_rows(request([1], [2]) | {"stop_strings": strings}, MODEL)
    assert [row.sequences[0].stop_strings for row in rows] == [(b"a", b"\xc3\xa9"), (b"b", b"c")]


def test_empty_stop_strings_are_skipped_also_where_no_stop_strings_are_served() -> None:
    strings = np.array([[b"", b"a"], [b"", b""]], np.object_)
    rows = read_rows(request([1], [2]) | {"stop_strings": strings}, MODEL)
    assert [row.sequences[0].stop_strings for row in rows] == [(b"a",), ()]
    blind = Welcome(1, msgspec.structs.replace(LIMITS, stop_strings=False), 98, (99,))
    assert read_rows(request([1]) | {"stop_strings": np.array([[b""]], np.object_)}, blind)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (request([1], new=0), "request_output_len is 0, allowed: 1 to 31, what the prompt leaves of 32"),
        (request([1] * 30, new=3), "request_output_len is 3, allowed: 1 to 2, what the prompt leaves of 32"),
        (request([1] * 32), "input_lengths is 32, allowed: 1 to 31, one less than the context"),
        (
            request([1]) | {"input_lengths": np.array([[2]])},
            "input_lengths is 2, allowed: 0 to 1, the width of input_ids",
        ),
        (
            request([1]) | {"input_lengths": np.array([[-1]])},
            "input_lengths is -1, allowed: 0 to 1, the width of input_ids",
        ),
        (request([1, 100]), "input_ids is 100, allowed: token ids from 0 to 99"),
        (request([1], min_length=5), "min_length is 5, allowed: 0 to 4"),
        (request([1], end_id=100), "end_id is 100, allowed: token ids from 0 to 99"),
        (request([1], runtime_top_p=1.5), "runtime_top_p is 1.5, allowed: 0 to 1"),
        (request([1], runtime_top_p=float("nan")), "runtime_top_p is nan, allowed: 0 to 1"),
        (request([1], temperature=-1.0), "temperature is -1, allowed: a finite number >= 0"),
        (request([1], temperature=float("inf")), "temperature is inf, allowed: a finite number >= 0"),
        (request([1], repetition_penalty=0.0), "repetition_penalty is 0, allowed: 0.001 to 1000"),
        (request([1], presence_penalty=float("nan")), "presence_penalty is nan, allowed: -1000 to 1000"),
        (request([1], frequency_penalty=float("-inf")), "frequency_penalty is -inf, allowed: -1000 to 1000"),
        (request([1], top_p_decay=0.0), "top_p_decay is 0, allowed: more than 0, at most 1"),
        (request([1], top_p_min=2.0), "top_p_min is 2, allowed: more than 0, at most 1"),
        (request([1], beam_width=0), "beam_width is 0, allowed: 1 to 64"),
        (request([1], beam_width=65), "beam_width is 65, allowed: 1 to 64"),
        (request([1], new=31, beam_width=20), "beam_width is 20, allowed: fewer beams or tokens: they need 40 pages"),
        (
            request([1], beam_width=2, num_return_sequences=2),
            "num_return_sequences is 2, allowed: 1 with beam search, which returns all its beams",
        ),
        (request([1], num_return_sequences=0), "num_return_sequences is 0, allowed: 1 to 64"),
        (request([1], num_return_sequences=65), "num_return_sequences is 65, allowed: 1 to 64"),
        (request([1], num_return_sequences=-1), "num_return_sequences is -1, allowed: 1 to 64"),
        (request([1], prompt_learning_task_name_ids=3), "prompt_learning_task_name_ids is 3, allowed: none"),
        (request([1]) | {"bad_words_list": words([100])}, "bad_words_list is 100, allowed: token ids from 0 to 99"),
        (request([1]) | {"stop_words_list": words([-2])}, "stop_words_list is -2, allowed: token ids from 0 to 99"),
        (
            request([1]) | {"bad_words_list": np.array([[[1, 2], [2, 1]]])},
            "bad_words_list is an end offset of 1, allowed: 2 to 2, then -1",
        ),
        (
            request([1]) | {"stop_words_list": np.array([[[1, 2], [3, -1]]])},
            "stop_words_list is an end offset of 3, allowed: 0 to 2, then -1",
        ),
    ],
    ids=lambda value: value.split(",")[0] if isinstance(value, str) else "",
)
def test_a_refusal_names_tensor_value_and_range_and_of_several_rows_the_row(
    tensors: dict[str, NDArray[Any]], message: str
) -> None:
    with pytest.raises(InvalidRequestError) as alone:
        read_rows(tensors, MODEL)
    assert str(alone.value).startswith(message)

    good = request([1] * tensors["input_ids"].shape[1], new=1)
    good |= {name: np.array([[1]]) for name in ("end_id", "top_p_decay", "top_p_min", "num_return_sequences")}
    good |= {name: np.array([[1]]) for name in ("repetition_penalty", "beam_width")}
    if tensors["input_ids"].shape[1] == 32:
        good["input_lengths"][:] = 1
    if "prompt_learning_task_name_ids" in tensors:
        return  # refused in every row, so the first one is named
    both = {name: np.concatenate([_row_like(good, name, array), array]) for name, array in tensors.items()}
    with pytest.raises(InvalidRequestError) as second:
        read_rows(both, MODEL)
    assert str(second.value).startswith(f"row 1: {message}")


def _row_like(good: dict[str, NDArray[Any]], name: str, array: NDArray[Any]) -> NDArray[Any]:
    """A row that is in order, of the shape of `array`."""
    if name in good:
        return good[name].astype(array.dtype)
    if name == "stop_strings":
        return np.full_like(array, b"x")
    row = np.zeros_like(array)
    if name in ("bad_words_list", "stop_words_list"):
        row[:, 1] = -1
    return row


def test_a_request_can_fill_the_context_to_its_last_token_and_not_one_more() -> None:
    assert only_params(request([1] * 26, new=6)).request_output_len == 6
    with pytest.raises(InvalidRequestError, match="request_output_len is 7, allowed: 1 to 6"):
        read_rows(request([1] * 26, new=7), MODEL)


def test_more_beams_than_sequences_may_run_are_refused() -> None:
    crowded = Welcome(1, msgspec.structs.replace(LIMITS, max_sequences=8), 98, (99,))
    assert read_rows(request([1], beam_width=8), crowded)
    with pytest.raises(InvalidRequestError, match="beam_width is 9, allowed: 1 to 8"):
        read_rows(request([1], beam_width=9), crowded)


def test_stop_strings_are_refused_where_the_text_of_tokens_is_unknown() -> None:
    blind = Welcome(1, msgspec.structs.replace(LIMITS, stop_strings=False), 98, (99,))
    tensors = request([1]) | {"stop_strings": np.array([[b"a"]], np.object_)}
    with pytest.raises(InvalidRequestError, match="stop_strings is given, allowed: none"):
        read_rows(tensors, blind)


def test_outputs_have_the_contracts_shapes_types_and_padding() -> None:
    tensors = request([1, 2, 3], [4], new=4, num_return_sequences=2, is_return_log_probs=True, end_id=[50, 60])
    rows = read_rows(tensors, MODEL)
    answers = [
        answer(0, [10, 11, 12, 13], "length", [-1.0, -2.0, -3.0, -4.0]),
        answer(1, [10, 50], "stop", [-1.0, -0.5]),
        answer(2, [60], "stop", [-0.25]),
        answer(3, [20, 21, 22, 23], "length", [-0.5, -0.5, -0.5, -0.5]),
    ]
    outputs = write_tensors(tensors, rows, answers)
    assert {name: (array.shape, array.dtype.name) for name, array in outputs.items()} == {
        "output_ids": ((2, 2, 7), "uint32"),
        "sequence_length": ((2, 2), "uint32"),
        "cum_log_probs": ((2, 2), "float32"),
        "output_log_probs": ((2, 2, 4), "float32"),
        "finish_reason": ((2, 2), "object"),
    }
    assert outputs["output_ids"].tolist() == [
        [[1, 2, 3, 10, 11, 12, 13], [1, 2, 3, 10, 50, 50, 50]],
        [[4, 60, 60, 60, 60, 60, 60], [4, 20, 21, 22, 23, 60, 60]],
    ]
    assert outputs["sequence_length"].tolist() == [[7, 5], [2, 5]]
    assert outputs["cum_log_probs"].tolist() == [[-10.0, -1.5], [-0.25, -2.0]]
    assert outputs["output_log_probs"][0, 1].tolist() == [-1.0, -0.5, 0.0, 0.0]
    assert outputs["finish_reason"].tolist() == [[b"length", b"stop"], [b"stop", b"length"]]


def test_the_width_of_the_outputs_is_that_of_the_row_that_asked_for_most() -> None:
    tensors = request([1, 2], [3]) | {"request_output_len": np.array([[2], [9]], np.uint32)}
    answers = [answer(0, [5, 6], "length", []), answer(1, [7], "stop", [])]
    outputs = write_tensors(tensors, read_rows(tensors, MODEL), answers)
    assert outputs["output_ids"].shape == (2, 1, 11)


def test_log_prob_outputs_are_empty_but_there_when_nobody_asked() -> None:
    tensors = request([1, 2], [3], num_return_sequences=3)
    answers = [answer(number, [5], "length", []) for number in range(6)]
    outputs = write_tensors(tensors, read_rows(tensors, MODEL), answers)
    assert outputs["cum_log_probs"].shape == (2, 0)
    assert outputs["output_log_probs"].shape == (2, 3, 0)


def test_one_row_may_ask_for_log_probs_and_another_not() -> None:
    tensors = request([1], [2], is_return_log_probs=[False, True])
    answers = [answer(0, [5, 6], "length", []), answer(1, [7], "stop", [-1.5])]
    outputs = write_tensors(tensors, read_rows(tensors, MODEL), answers)
    assert outputs["output_log_probs"].tolist() == [[[0.0]], [[-1.5]]]
    assert outputs["cum_log_probs"].tolist() == [[0.0], [-1.5]]


def test_a_prompt_of_no_width_begins_with_the_start_id() -> None:
    tensors = request([1]) | {"input_ids": np.zeros((1, 0), np.uint32), "input_lengths": np.zeros((1, 1), np.uint32)}
    outputs = write_tensors(tensors, read_rows(tensors, MODEL), [answer(0, [1, 2, 3, 4], "length", [])])
    assert outputs["output_ids"].tolist() == [[[98, 1, 2, 3, 4]]]


def test_beams_stand_best_first_in_their_row() -> None:
    tensors = request([1, 2], [3], beam_width=2, is_return_log_probs=True)
    answers = [
        Finished(0, [Result([7, 8], "length", [-1.0, -1.0]), Result([9], "stop", [-3.0])]),
        Finished(1, [Result([5], "stop", [-0.5]), Result([6, 6], "length", [-2.0, -2.0])]),
    ]
    outputs = write_tensors(tensors, read_rows(tensors, MODEL), answers)
    assert outputs["output_ids"][:, :, :4].tolist() == [[[1, 2, 7, 8], [1, 2, 9, 99]], [[3, 5, 99, 99], [3, 6, 6, 99]]]
    assert outputs["sequence_length"].tolist() == [[4, 3], [2, 3]]
    assert outputs["cum_log_probs"].tolist() == [[-2.0, -3.0], [-0.5, -4.0]]


def test_rows_that_would_return_unequal_numbers_of_sequences_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="row 1: beam_width is 3, allowed: 2, as in row 0"):
        read_rows(request([1], [1], beam_width=[2, 3]), MODEL)
    with pytest.raises(InvalidRequestError, match="row 1: num_return_sequences is 1, allowed: 4, as in row 0"):
        read_rows(request([1], [1], num_return_sequences=[4, 1]), MODEL)


def test_a_stream_carries_all_tokens_so_far_and_says_where_the_last_piece_ended() -> None:
    tensors = request([1, 2, 3], [4], new=4, num_return_sequences=2, end_id=[50, 60])
    pieces = PieceTensors(tensors, read_rows(tensors, MODEL))
    pieces.add(0, [10], [])
    pieces.add(3, [20, 21], [])
    first = pieces.piece(last=False)
    assert {name: (array.shape, array.dtype.name) for name, array in first.items()} == {
        "output_ids": ((2, 2, 4), "uint32"),
        "sequence_length": ((2, 2), "uint32"),
        "previous_length": ((2, 2), "uint32"),
        "cum_log_probs": ((2, 0), "float32"),
        "output_log_probs": ((2, 2, 0), "float32"),
        "finish_reason": ((2, 2), "object"),
        "input_lengths": ((2, 1), "uint32"),
        "end_id": ((2, 1), "uint32"),
    }
    assert first["output_ids"].tolist() == [[[1, 2, 3, 10], [1, 2, 3, 50]], [[4, 60, 60, 60], [4, 20, 21, 60]]]
    assert first["sequence_length"].tolist() == [[4, 3], [1, 3]]
    assert first["previous_length"].tolist() == first["input_lengths"].repeat(2, axis=1).tolist() == [[3, 3], [1, 1]]
    for index, tokens in enumerate([[10, 11, 12, 13], [10, 50], [60], [20, 21, 22, 23]]):
        pieces.end(index, Result(tokens, "length" if len(tokens) == 4 else "stop", []))
    last = pieces.piece(last=True)
    assert last["output_ids"].tolist() == [
        [[1, 2, 3, 10, 11, 12, 13], [1, 2, 3, 10, 50, 50, 50]],
        [[4, 60, 60, 60, 60, 60, 60], [4, 20, 21, 22, 23, 60, 60]],
    ]
    assert last["previous_length"].tolist() == [[4, 3], [1, 3]]
    assert set(first["finish_reason"].ravel()) == {b""}
    assert last["finish_reason"].tolist() == [[b"length", b"stop"], [b"stop", b"length"]]


def test_no_finish_reason_is_told_before_the_last_piece() -> None:
    tensors = request([1], [2], new=3)
    pieces = PieceTensors(tensors, read_rows(tensors, MODEL))
    pieces.end(0, Result([99], "stop", []))
    assert pieces.piece(last=False)["finish_reason"].tolist() == [[b""], [b""]]
    pieces.end(1, Result([5, 6, 7], "length", []))
    assert pieces.piece(last=True)["finish_reason"].tolist() == [[b"stop"], [b"length"]]


def test_a_piece_has_the_log_probs_of_all_new_tokens_so_far() -> None:
    tensors = request([1, 2], [3], new=4, is_return_log_probs=[True, False])
    pieces = PieceTensors(tensors, read_rows(tensors, MODEL))
    pieces.add(0, [5, 6], [-1.0, -2.0])
    pieces.add(1, [7], [])
    outputs = pieces.piece(last=False)
    assert outputs["output_log_probs"].tolist() == [[[-1.0, -2.0]], [[0.0, 0.0]]]
    assert outputs["cum_log_probs"].tolist() == [[-3.0], [0.0]]
    pieces.end(0, Result([5, 6, 7], "timeout", [-1.0, -2.0, -3.0]))
    pieces.end(1, Result([7], "timeout", []))
    assert pieces.piece(last=True)["output_log_probs"].tolist() == [[[-1.0, -2.0, -3.0]], [[0.0, 0.0, 0.0]]]


def test_a_piece_without_a_new_token_has_the_shapes_of_the_others() -> None:
    tensors = request([1, 2], is_return_log_probs=True)
    pieces = PieceTensors(tensors, read_rows(tensors, MODEL))
    pieces.end(0, Result([], "timeout", []))
    outputs = pieces.piece(last=True)
    assert outputs["output_ids"].tolist() == [[[1, 2]]]
    assert (outputs["output_log_probs"].shape, outputs["finish_reason"].tolist()) == ((1, 1, 0), [[b"timeout"]])


def test_what_postprocessing_needs_passes_through_as_it_came() -> None:
    given = {
        "stop_strings": np.array([[b"a", b"b"]], np.object_),
        "exclude_input_in_output": np.array([[False]]),
        "return_num_input_tokens": np.array([[True]]),
    }
    tensors = request([1, 2]) | given
    pieces = PieceTensors(tensors, read_rows(tensors, MODEL))
    handles = [b"ipc:///engine.sock\nmessage"]
    outputs = pieces.piece(last=False, cancel_handles=handles)
    assert {name: outputs[name].tolist() for name in given} == {name: array.tolist() for name, array in given.items()}
    assert (outputs["input_lengths"].tolist(), outputs["end_id"].tolist()) == ([[2]], [[99]])
    assert outputs["cancel_handle"].tolist() == [handles]
    assert not {"return_num_output_tokens", "cancel_handle"} & set(pieces.piece(last=False))


def test_what_ends_a_row_is_its_end_ids_else_its_end_id_else_all_of_the_models() -> None:
    model = msgspec.structs.replace(MODEL, end_ids=(97, 99))
    tensors = request([1], [2], end_id=[50, 60])
    lists = {"end_ids": np.array([[7, 8, 7], [-1, -1, -1]], np.int32)}
    for given, expected in (
        (request([1], [2]), [(97, 99)] * 2),
        (tensors, [(50,), (60,)]),
        (tensors | lists, [(7, 8), ()]),
        (request([1], [2]) | lists, [(7, 8), ()]),
    ):
        assert [row.sequences[0].end_ids for row in read_rows(given, model)] == expected
    for wrong in (100, -2):
        with pytest.raises(InvalidRequestError, match=f"end_ids is {wrong}, allowed: token ids from 0 to 99"):
            read_rows(request([1]) | {"end_ids": np.array([[7, wrong]])}, model)


def test_end_ids_that_are_not_one_pass_through_and_the_first_fills() -> None:
    model = msgspec.structs.replace(MODEL, end_ids=(97, 99))
    rows = read_rows(request([1, 2], [3]), model)
    pieces = PieceTensors({}, rows)
    pieces.add(0, [10], [])
    outputs = pieces.piece(last=False)
    assert outputs["output_ids"].tolist() == [[[1, 2, 10]], [[3, 97, 97]]]
    assert (outputs["end_id"].tolist(), outputs["end_ids"].tolist()) == ([[97], [97]], [[97, 99], [97, 99]])
    assert "end_ids" not in PieceTensors({}, read_rows(request([1]), MODEL)).piece(last=False)
    endless = PieceTensors({}, read_rows(request([1]), msgspec.structs.replace(MODEL, end_ids=()))).piece(last=False)
    assert (endless["end_id"].tolist(), endless["end_ids"].tolist()) == ([[0]], [[-1]])


def test_the_streaming_model_streams_unless_it_is_told_not_to() -> None:
    rows = read_rows(request([1], [2]), MODEL)
    assert read_stream({}, rows)
    assert read_stream({"stream": np.array([[True], [True]])}, rows)
    assert not read_stream({"stream": np.array([[False], [False]])}, rows)
    with pytest.raises(InvalidRequestError, match="row 1: stream is False, allowed: True, as in row 0"):
        read_stream({"stream": np.array([[True], [False]])}, rows)


def test_beams_are_not_streamed() -> None:
    tensors = request([1], beam_width=3)
    rows = read_rows(tensors, MODEL)
    with pytest.raises(InvalidRequestError, match="beam_width is 3, allowed: 1 in a stream: beams are not streamed"):
        read_stream(tensors, rows)
    assert not read_stream(tensors | {"stream": np.array([[False]])}, rows)


def test_a_timeout_comes_from_triton_or_among_the_parameters_of_generate() -> None:
    assert read_timeout(250_000, {}) == 0.25
    assert read_timeout(0, {"timeout": 1500000, "id": "a"}) == 1.5
    assert read_timeout(0, {}) == read_timeout(0, {"timeout": 0}) == 0.0


@pytest.mark.parametrize("value", ["soon", -1, 1.5, True, None, [1]])
def test_a_timeout_that_is_no_number_of_microseconds_is_refused(value: object) -> None:
    with pytest.raises(InvalidRequestError, match=r"^timeout is .*, allowed: a whole number of microseconds, 0 for"):
        read_timeout(0, {"timeout": value})


def test_a_request_of_one_row_may_lack_the_batch_dimension() -> None:
    assert lacks_batch_dimension({"input_ids": np.array([1, 2], np.uint32)})
    assert not lacks_batch_dimension({"input_ids": np.array([[1, 2]], np.uint32)})
    assert not lacks_batch_dimension({})
    with pytest.raises(InvalidRequestError, match=r"^input_ids is .*, allowed: \[B, L\], or \[L\]"):
        lacks_batch_dimension({"input_ids": np.array([[[1]]], np.uint32)})


def test_tensors_that_differ_in_their_rows_or_have_another_shape_are_refused_by_their_name() -> None:
    tensors = request([1, 2, 3]) | {"temperature": np.ones((2, 1), np.float32)}
    with pytest.raises(InvalidRequestError, match=r"temperature is of 2 rows, allowed: 1, as input_ids has"):
        read_rows(tensors, MODEL)
    for shape in ((1, 3), (1, 1, 3), (1, 3, 3)):
        tensors = request([1, 2, 3]) | {"bad_words_list": np.zeros(shape, np.int32)}
        with pytest.raises(InvalidRequestError, match=r"bad_words_list is of shape .*, allowed: \[B, 2, W\]"):
            read_rows(tensors, MODEL)


def test_a_seed_below_0_of_an_older_configuration_is_the_unsigned_number_of_the_same_bits() -> None:
    tensors = request([1]) | {"random_seed": np.array([[-1]], np.int32)}
    assert only_params(tensors).random_seed == 2**64 - 1


def test_a_request_of_no_rows_has_lost_that_dimension() -> None:
    with pytest.raises(InvalidRequestError, match="input_ids is of 0 rows, allowed: 1 or more"):
        refuse_no_rows({"input_ids": np.array([1, 2], np.uint32)}, "input_ids", 2)
    refuse_no_rows({"input_ids": np.array([[1, 2]], np.uint32)}, "input_ids", 2)
    refuse_no_rows({}, "input_ids", 2)
