"""Every field of a request does what it says, alone and in a batch of rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import tritonclient.grpc
import tritonclient.http
from numpy.typing import NDArray
from tokenizers import Tokenizer

CHECKPOINT = Path(__file__).resolve().parents[2] / "model_repository" / "fastertransformer" / "1" / "storyteller"
PROMPT = "Once upon a time"
COUNTS = {"return_num_input_tokens": True, "return_num_output_tokens": True}
DATATYPES = {int: ("INT32", np.int32), float: ("FP32", np.float32), bool: ("BOOL", np.bool_), str: ("BYTES", object)}
OUTPUTS = ("text_output", "finish_reason", "sequence_length", "num_input_tokens", "num_output_tokens")


def generate(server: Any, **fields: Any) -> dict[str, Any]:
    url = f"http://{server.http_url.removeprefix('http://')}/v2/models/ensemble/generate"
    response = requests.post(url, data=json.dumps({"text_input": PROMPT, **fields}), timeout=120)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))


@pytest.fixture(scope="module")
def greedy(server: Any) -> str:
    """The greedy continuation of PROMPT, 24 tokens long."""
    text = generate(server, max_tokens=24)["text_output"]
    assert isinstance(text, str)
    return text


def test_a_bare_prompt_gets_at_most_sixteen_new_tokens(server: Any) -> None:
    answer = generate(server, **COUNTS)
    assert 1 <= answer["num_output_tokens"] <= 16
    assert answer["finish_reason"] == ("length" if answer["num_output_tokens"] == 16 else "stop")
    assert answer["text_output"]
    assert not answer["text_output"].startswith(PROMPT)


def test_outputs_that_nobody_asked_for_are_absent(server: Any) -> None:
    answer = generate(server, max_tokens=2)
    assert {name for name in answer if not name.startswith("model_")} == {
        *("text_output", "finish_reason", "sequence_length"),
        *("sequence_id", "sequence_start", "sequence_end"),  # Triton's own
    }


def test_counts_of_tokens_add_up(server: Any, tokenizer: Tokenizer) -> None:
    answer = generate(server, max_tokens=5, **COUNTS)
    assert answer["num_input_tokens"] == len(tokenizer.encode(PROMPT).ids)
    assert answer["num_output_tokens"] == 5
    assert answer["sequence_length"] == answer["num_input_tokens"] + answer["num_output_tokens"]


def test_the_prompt_is_in_the_text_only_when_asked_for(server: Any) -> None:
    new = generate(server, max_tokens=5)["text_output"]
    assert generate(server, max_tokens=5, exclude_input_in_output=True)["text_output"] == new
    assert generate(server, max_tokens=5, exclude_input_in_output=False)["text_output"] == PROMPT + new


def test_a_shorter_answer_is_the_beginning_of_a_longer_one(server: Any, greedy: str) -> None:
    for max_tokens in (1, 2, 7):
        assert greedy.startswith(generate(server, max_tokens=max_tokens)["text_output"])


@pytest.mark.parametrize(
    "fields", [{"temperature": 0}, {"temperature": 0, "top_k": 5, "seed": 3}, {"top_k": 1}, {"min_p": 1.0}]
)
def test_temperature_zero_and_one_candidate_are_greedy(server: Any, greedy: str, fields: dict[str, Any]) -> None:
    assert generate(server, max_tokens=24, **fields)["text_output"] == greedy


def test_a_temperature_alone_samples(server: Any) -> None:
    texts = {generate(server, max_tokens=24, temperature=1.0)["text_output"] for _ in range(4)}
    assert len(texts) == 4


@pytest.mark.parametrize("name", ["seed", "random_seed"])
def test_a_seed_repeats_its_text_and_another_seed_does_not(server: Any, name: str) -> None:
    sampling = {"max_tokens": 24, "temperature": 1.0, "top_p": 0.95}
    texts = [generate(server, **sampling, **{name: seed})["text_output"] for seed in (2**64 - 1, 2**64 - 1, 7)]
    assert texts[0] == texts[1] != texts[2]


def test_the_text_ends_before_the_first_stop_word(server: Any, greedy: str) -> None:
    middle = len(greedy) // 2
    stop_words = [greedy[middle : middle + 4], "never in any tale"]
    answer = generate(server, max_tokens=24, stop_words=stop_words)
    assert answer["text_output"] == greedy[: greedy.index(stop_words[0])]
    assert answer["finish_reason"] == "stop"


def test_generation_ends_soon_after_a_stop_word(server: Any, greedy: str) -> None:
    answer = generate(server, max_tokens=24, stop_words=[greedy[:1]], **COUNTS)
    assert answer["text_output"] == ""
    assert answer["num_output_tokens"] == 1


def test_a_bad_word_does_not_come_back(server: Any, greedy: str) -> None:
    word = next(word for word in greedy.split() if word.isalpha())
    answer = generate(server, max_tokens=24, bad_words=[word])
    assert answer["text_output"] != greedy
    assert word not in answer["text_output"].split()[: greedy.split().index(word) + 1]


def test_an_end_id_of_ones_own_ends_the_text_unseen(server: Any, tokenizer: Tokenizer, greedy: str) -> None:
    ids = tokenizer.encode(greedy).ids
    answer = generate(server, max_tokens=24, end_id=ids[3], **COUNTS)
    first = ids.index(ids[3])
    assert answer["finish_reason"] == "stop"
    assert answer["num_output_tokens"] == first + 1
    assert answer["text_output"] == tokenizer.decode(ids[:first])


@pytest.mark.parametrize("name", ["min_tokens", "min_length"])
def test_min_tokens_holds_the_end_back(server: Any, tokenizer: Tokenizer, greedy: str, name: str) -> None:
    end_id = tokenizer.encode(greedy).ids[0]
    assert generate(server, max_tokens=12, end_id=end_id, **COUNTS)["num_output_tokens"] == 1
    assert generate(server, max_tokens=12, end_id=end_id, **{name: 6}, **COUNTS)["num_output_tokens"] >= 6


@pytest.mark.parametrize(
    "fields", [{"repetition_penalty": 2.0}, {"presence_penalty": 2.0}, {"frequency_penalty": 2.0}], ids=str
)
def test_penalties_change_the_text(server: Any, fields: dict[str, Any]) -> None:
    assert generate(server, max_tokens=60, **fields)["text_output"] != generate(server, max_tokens=60)["text_output"]


def test_log_probabilities_add_up(server: Any) -> None:
    answer = generate(server, max_tokens=6, return_log_probs=True, **COUNTS)
    assert len(answer["output_log_probs"]) == answer["num_output_tokens"] == 6
    assert all(value <= 0 for value in answer["output_log_probs"])
    assert answer["cum_log_probs"] == pytest.approx(sum(answer["output_log_probs"]), rel=1e-4)


def test_several_sequences_come_back_for_one_prompt(server: Any) -> None:
    answer = generate(server, max_tokens=24, temperature=1.0, num_return_sequences=3, **COUNTS)
    assert len(set(answer["text_output"])) == 3
    assert len(answer["finish_reason"]) == len(answer["num_output_tokens"]) == len(answer["sequence_length"]) == 3


def test_the_stream_field_may_say_false(server: Any, greedy: str) -> None:
    assert generate(server, max_tokens=24, stream=False, pad_id=0)["text_output"] == greedy


ROWS: list[dict[str, Any]] = [
    {"text_input": "Once upon a time", "max_tokens": 12, "temperature": 0.0, "seed": 1, "stop_words": ["zzz", "yyy"]},
    {"text_input": "The wolf", "max_tokens": 1, "temperature": 1.0, "seed": 2, "stop_words": [".", ","]},
    {"text_input": "A", "max_tokens": 30, "temperature": 0.7, "seed": 3, "stop_words": ["e", "the"]},
    {
        "text_input": "There was once a king who had three daughters, and the youngest of them was so fair that",
        "max_tokens": 20,
        "temperature": 0.0,
        "seed": 4,
        "stop_words": ["zzz", "yyy"],
    },
    {"text_input": "\U0001f600 שלום", "max_tokens": 7, "temperature": 1.3, "seed": 2, "stop_words": ["\n", " "]},
]


def infer(server: Any, protocol: Any, rows: list[dict[str, Any]]) -> list[list[Any]]:
    """One infer request of several rows; for each row the values of OUTPUTS."""
    url = server.http_url if protocol is tritonclient.http else server.grpc_url
    fields = {name: [row[name] for row in rows] for name in rows[0]}
    fields.update({name: [True] * len(rows) for name in COUNTS})
    inputs = []
    for name, values in fields.items():
        first = values[0][0] if isinstance(values[0], list) else values[0]
        datatype, dtype = ("UINT64", np.uint64) if name == "seed" else DATATYPES[type(first)]
        array: NDArray[Any] = np.array([value if isinstance(value, list) else [value] for value in values], dtype)
        inputs.append(protocol.InferInput(name, list(array.shape), datatype))
        inputs[-1].set_data_from_numpy(array)
    with protocol.InferenceServerClient(url.split("//")[-1]) as client:
        result = client.infer("ensemble", inputs)
        columns = [result.as_numpy(name).tolist() for name in OUTPUTS]
    return [[column[index] for column in columns] for index in range(len(rows))]


@pytest.mark.parametrize("protocol", [tritonclient.http, tritonclient.grpc], ids=lambda module: module.__name__)
def test_rows_of_a_batch_equal_the_same_prompts_sent_alone(server: Any, protocol: Any) -> None:
    batch = infer(server, protocol, ROWS)
    assert batch == [infer(server, protocol, [row])[0] for row in ROWS]
    assert batch == infer(server, protocol, ROWS[::-1])[::-1]


def test_a_batch_over_generate_equals_the_same_prompts_sent_alone(server: Any) -> None:
    rows = [{"text_input": row["text_input"], "max_tokens": row["max_tokens"]} for row in ROWS]
    batch = generate(server, **{name: [row[name] for row in rows] for name in rows[0]})
    alone = [generate(server, **row) for row in rows]
    for name in ("text_output", "finish_reason", "sequence_length"):
        assert batch[name] == [answer[name] for answer in alone]


def test_rows_without_a_seed_sample_differently(server: Any) -> None:
    rows = 4
    answer = generate(server, text_input=[PROMPT] * rows, max_tokens=[24] * rows, temperature=[1.0] * rows)
    assert len(set(answer["text_output"])) == rows


def test_every_row_counts_its_own_tokens(server: Any, tokenizer: Tokenizer) -> None:
    prompts = ["A", "There was once a king"]
    answer = generate(server, text_input=prompts, max_tokens=[2, 3], return_num_input_tokens=[True, False])
    assert answer["num_input_tokens"] == [len(tokenizer.encode(prompt).ids) for prompt in prompts]
