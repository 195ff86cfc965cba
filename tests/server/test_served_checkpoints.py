"""The small files of a checkpoint mean what they mean to `transformers`: end ids, prefix space, added tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import requests
import torch
from transformers import AutoTokenizer, GPTJForCausalLM

from gptj_triton.project import EMBEDDED_MODEL
from tests.server.conftest import CLOSE, Server, start

END = 4095
MOST = 12
COUNTS = {"return_num_input_tokens": True, "return_num_output_tokens": True}


@dataclass(frozen=True)
class Served:
    """A server of the embedded model with other small files, and the same model in `transformers`.

    `free` are the greedy tokens that follow the prompt where only END ends the text; the model's end ids are END and
    `also_end`, one of them.
    """

    server: Server
    tokenizer: Any
    prompt: list[int]
    free: list[int]
    also_end: int

    def post(self, path: str, fields: dict[str, Any]) -> requests.Response:
        return requests.post(f"http://{self.server.http_url}/v2/models/{path}", json=fields, headers=CLOSE, timeout=60)

    def generate(self, **fields: Any) -> dict[str, Any]:
        answer = self.post("ensemble/generate", {"text_input": "king", "max_tokens": MOST, **COUNTS, **fields})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("checkpoint")
    shutil.copytree(EMBEDDED_MODEL, folder, dirs_exist_ok=True)
    beyond = {"content": "<x>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    end = {**beyond, "content": "<|endoftext|>", "special": True}
    added = {str(END): end, str(END + 1): {**beyond, "special": False}}
    config = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True, "added_tokens_decoder": added}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = GPTJForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = tokenizer("king")["input_ids"]
    answer = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=MOST, pad_token_id=END)
    free = answer[0, len(prompt) :].tolist()
    also_end = next(token for place, token in enumerate(free) if place >= 2 and token not in free[:place])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [END, also_end]}))
    launched = start(tmp_path_factory.mktemp("server"), "--model", str(folder), "--", "--exit-timeout-secs=5")
    try:
        yield Served(launched.wait_until_ready(), tokenizer, prompt, free, also_end)
    finally:
        launched.close()


def test_a_prefix_space_of_the_settings_is_in_the_prompt(served: Served) -> None:
    assert served.prompt == served.tokenizer(" king")["input_ids"]
    answer = served.generate(end_id=END, exclude_input_in_output=False)
    assert (answer["num_input_tokens"], answer["num_output_tokens"]) == (len(served.prompt), MOST)
    assert answer["text_output"] == served.tokenizer.decode(served.prompt + served.free)


def test_each_end_id_of_the_model_ends_the_text(served: Served) -> None:
    place = served.free.index(served.also_end)
    expected = served.tokenizer.decode(served.free[:place])
    answer = served.generate()
    assert (answer["text_output"], answer["finish_reason"]) == (expected, "stop")
    assert answer["num_output_tokens"] == place + 1
    fields = {"text_input": "king", "max_tokens": MOST}
    stream = served.post("ensemble_stream/generate_stream", fields).text
    pieces = [json.loads(line.removeprefix("data: ")) for line in stream.splitlines() if line]
    assert "".join(piece["text_output"] for piece in pieces) == expected
    assert pieces[-1]["finish_reason"] == "stop"


def test_an_end_id_of_the_request_replaces_them_row_by_row(served: Served) -> None:
    inputs = [
        {"name": "text_input", "datatype": "BYTES", "shape": [2, 1], "data": ["king", "king"]},
        {"name": "max_tokens", "datatype": "INT32", "shape": [2, 1], "data": [MOST, MOST]},
        {"name": "end_id", "datatype": "INT32", "shape": [2, 1], "data": [END, served.free[1]]},
    ]
    outputs = served.post("ensemble/infer", {"inputs": inputs}).json()["outputs"]
    [texts] = [output["data"] for output in outputs if output["name"] == "text_output"]
    assert texts == [served.tokenizer.decode(served.free), served.tokenizer.decode(served.free[:1])]


def test_no_end_id_is_chosen_before_the_minimum(served: Served) -> None:
    assert served.generate(min_tokens=8)["num_output_tokens"] >= 8
    assert min(served.generate(min_tokens=8, beam_width=3)["num_output_tokens"]) >= 8


def test_without_an_end_id_fastertransformer_takes_all_of_the_model(served: Served) -> None:
    scalars = {"input_lengths": len(served.prompt), "request_output_len": MOST}
    inputs = [{"name": name, "datatype": "UINT32", "shape": [1, 1], "data": [value]} for name, value in scalars.items()]
    shape = [1, len(served.prompt)]
    inputs.append({"name": "input_ids", "datatype": "UINT32", "shape": shape, "data": served.prompt})
    outputs = served.post("fastertransformer/infer", {"inputs": inputs}).json()["outputs"]
    [ids] = [output["data"] for output in outputs if output["name"] == "output_ids"]
    place = served.free.index(served.also_end)
    assert ids == served.prompt + served.free[: place + 1] + [END] * (MOST - place - 1)


def test_nvidias_library_gets_the_other_end_ids_as_stop_words(served: Served) -> None:
    inputs = [{"name": "text_input", "datatype": "BYTES", "shape": [1, 1], "data": ["king"]}]
    wanted = {"inputs": inputs, "outputs": [{"name": "end_id"}, {"name": "stop_words_list"}]}
    outputs = {
        output["name"]: output["data"] for output in served.post("preprocessing/infer", wanted).json()["outputs"]
    }
    assert (outputs["end_id"], outputs["stop_words_list"]) == ([END], [served.also_end, 1])


def test_a_token_that_the_model_lacks_is_refused_in_a_prompt_and_never_comes_as_a_word(served: Served) -> None:
    answer = served.post("ensemble/generate", {"text_input": "a <x>"})
    assert answer.status_code == 400
    assert "text_input has the token 4096; it must have only tokens of the model's vocabulary" in answer.json()["error"]
    assert served.generate(bad_words=["<x>"], stop_words=["<x>"]) == served.generate()
