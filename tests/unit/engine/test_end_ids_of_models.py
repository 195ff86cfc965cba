"""A model with several end ids, or none, ends as `transformers` ends it, with the same files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPTJForCausalLM

from gptj_triton.engine.config import EngineConfig
from gptj_triton.engine.load import load_engine
from gptj_triton.engine.sampling_params import SamplingParams
from gptj_triton.engine.sequence import Sequence

PROMPT = [2167, 716, 258, 515]
KING, WAS, A = 513, 308, 258  # of " there was a king who had a daughter", which follows
NO_FILE = "no file"


def checkpoint(folder: Path, storyteller: Path, in_config: Any, in_generation_config: Any) -> Path:
    """The embedded model with other end ids."""
    shutil.copytree(storyteller, folder, dirs_exist_ok=True)
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(raw | {"eos_token_id": in_config}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": in_generation_config}))
    if in_generation_config == NO_FILE:
        (folder / "generation_config.json").unlink()
    return folder


@pytest.mark.parametrize(
    ("in_config", "in_generation_config"),
    [
        (4095, [4095, A]),
        (A, [KING, 4095]),
        ([KING, A], NO_FILE),
        (A, NO_FILE),
        (A, None),
        (None, NO_FILE),
        (4095, [A, 50256]),
        (A, -1),
    ],
    ids=str,
)
def test_a_model_ends_where_transformers_ends_it(
    in_config: Any, in_generation_config: Any, storyteller: Path, tmp_path: Path
) -> None:
    folder = checkpoint(tmp_path, storyteller, in_config, in_generation_config)
    prompt = torch.tensor([PROMPT])
    model = GPTJForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    engine = load_engine(EngineConfig(str(folder), device="cpu", kv_cache_gib=0.05))
    for least in (0, 5):
        expected = model.generate(prompt, do_sample=False, max_new_tokens=12, min_new_tokens=least, pad_token_id=4095)
        end_ids = engine.model_config.end_ids
        params = SamplingParams(request_output_len=12, min_length=least, end_ids=end_ids)
        sequence = Sequence(least, PROMPT, params)
        engine.submit(sequence)
        while engine.busy:
            engine.step()
        assert sequence.output == expected[0, len(PROMPT) :].tolist()
        assert sequence.finish_reason == ("stop" if sequence.output[-1] in end_ids else "length")
