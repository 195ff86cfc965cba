"""A checkpoint of another family, served by the launcher's one option: the text is that of `transformers`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import requests
import torch
from tokenizers import Tokenizer
from transformers import CodeGenConfig, CodeGenForCausalLM

from tests.server.conftest import CLOSE, PROJECT, Server

EMBEDDED = PROJECT / "model_repository" / "fastertransformer" / "1" / "storyteller"
PROMPT = "Once upon a time"
END = 4095  # the embedded tokenizer's last id


def test_a_codegen_is_served_and_its_greedy_text_is_that_of_transformers(
    launch: Callable[..., Server], tmp_path: Path
) -> None:
    shape = {"vocab_size": END + 1, "n_positions": 128, "n_embd": 64, "n_layer": 2, "n_head": 8, "rotary_dim": 4}
    torch.manual_seed(0)
    config = CodeGenConfig(**shape, bos_token_id=END, eos_token_id=END, initializer_range=0.2)
    model = CodeGenForCausalLM(config).eval()
    checkpoint = tmp_path / "codegen"
    model.save_pretrained(checkpoint)
    shutil.copy(EMBEDDED / "tokenizer.json", checkpoint)

    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    prompt = tokenizer.encode(PROMPT).ids
    answer = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=48, pad_token_id=END)
    expected = answer[0, len(prompt) :].tolist()
    assert len(set(expected)) > 5, "the model repeats itself, so the comparison shows nothing"

    server = launch("--model", checkpoint, "--device=cpu").wait_until_ready()
    fields = {"text_input": PROMPT, "max_tokens": 48}
    url = f"http://{server.http_url}/v2/models/ensemble/generate"
    served = requests.post(url, json=fields, headers=CLOSE, timeout=60).json()
    assert served["text_output"] == tokenizer.decode(expected)
    prompts = {"name": "input_ids", "datatype": "UINT32", "shape": [1, len(prompt)], "data": prompt}
    scalars = {"input_lengths": len(prompt), "request_output_len": 48}
    inputs = [{"name": name, "datatype": "UINT32", "shape": [1, 1], "data": [value]} for name, value in scalars.items()]
    url = f"http://{server.http_url}/v2/models/fastertransformer/infer"
    tensors = requests.post(url, json={"inputs": [prompts, *inputs]}, headers=CLOSE, timeout=60).json()
    [tokens] = [output["data"] for output in tensors["outputs"] if output["name"] == "output_ids"]
    assert tokens == prompt + expected
