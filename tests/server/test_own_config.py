"""Configurations that users bring, on a plain tritonserver: NVIDIA's for GPT-J, FauxPilot's, and one that leaves out
all it can, serve NVIDIA's converted files; a checkpoint that is not there, or is not the file itself, is called that.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from tokenizers import Tokenizer

from gptj_triton.checkpoint.convert.conversion import Settings, convert
from tests.server.conftest import CLOSE, MARK, PROJECT, STOP_SECONDS, Server, free_ports, wait_until

REPOSITORY = PROJECT / "model_repository"
EMBEDDED = REPOSITORY / "fastertransformer" / "1" / "storyteller"
TOKENIZER = Tokenizer.from_file(str(EMBEDDED / "tokenizer.json"))
PROMPT = TOKENIZER.encode("Once upon a time").ids
NEW_TOKENS = 8
TEXT = " there was a king who had a daughter"

UINT32 = ["start_id", "end_id", "runtime_top_k", "beam_width", "prompt_learning_task_name_ids", "top_p_reset_ids"]
FP32 = ["runtime_top_p", "beam_search_diversity_rate", "temperature", "len_penalty", "repetition_penalty"]
FP32 += ["top_p_decay", "top_p_min"]
OUTPUTS = {"output_ids": "UINT32 -1,-1", "sequence_length": "UINT32 -1", "cum_log_probs": "FP32 -1"}
OUTPUTS |= {"output_log_probs": "FP32 -1,-1"}


def tensor(name: str, kind: str, dims: str, more: str = "") -> str:
    return f'{{ name: "{name}" data_type: TYPE_{kind} dims: [ {dims} ] {more} }}'


def config(parameters: dict[str, str], head: str, seed: str = "UINT64", scalar: str = "reshape: { shape: [ ] }") -> str:
    """A config.pbtxt with the tensors of NVIDIA's all_models/gptj/fastertransformer, and what a case adds."""
    optional = f"{scalar} optional: true"
    inputs = [tensor("input_ids", "UINT32", "-1"), tensor("input_lengths", "UINT32", "1", scalar)]
    inputs += [tensor("request_output_len", "UINT32", "-1"), tensor("random_seed", seed, "1", optional)]
    inputs += [tensor(name, "UINT32", "1", optional) for name in UINT32]
    inputs += [tensor(name, "FP32", "1", optional) for name in FP32]
    inputs += [tensor("is_return_log_probs", "BOOL", "1", optional)]
    inputs += [tensor(name, "INT32", "2, -1", "optional: true") for name in ("bad_words_list", "stop_words_list")]
    outputs = [tensor(name, *kind.split(" ")) for name, kind in OUTPUTS.items()]
    lines = [f'parameters {{ key: "{name}" value: {{ string_value: "{text}" }} }}' for name, text in parameters.items()]
    return "\n".join(
        ['backend: "fastertransformer"', head, f"input [ {', '.join(inputs)} ]", f"output [ {', '.join(outputs)} ]"]
        + lines
    )


def make_repository(folder: Path) -> Path:
    """A repository of users' models; the weights beside it are as NVIDIA's converter leaves them: config.ini alone."""
    weights = folder / "c-model" / "2-gpu"
    weights.parent.mkdir()
    convert(Settings(EMBEDDED, weights, "fastertransformer", tensor_para_size=2, weight_data_type="fp32"))
    for path in weights.glob("*.json"):
        path.unlink()
    pointer = shutil.copytree(weights, folder / "pointer")
    (pointer / "model.wte.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4194304\n")
    fauxpilots = shutil.copytree(weights, folder / "fauxpilots")
    keys: dict[str, Any] = {
        "vocab_size": 4096,
        "n_positions": 1024,
        "n_embd": 256,
        "n_layer": 6,
        "n_head": 4,
        "rotary_dim": 32,
    }
    keys |= {"n_inner": None, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-05, "torch_dtype": None}
    keys |= {"bos_token_id": 4095, "eos_token_id": 4095, "weight_data_type": "fp32", "infer_gpu_num": 2}
    (fauxpilots / "config.ini").write_text("[gpt]\n" + "".join(f"{key} = {value}\n" for key, value in keys.items()))

    group = "instance_group [ { count: 1 kind: KIND_CPU } ]"
    nvidia = {"tensor_para_size": "2", "pipeline_para_size": "1", "data_type": "fp16", "model_type": "GPT-J"}
    nvidia |= {"model_checkpoint_path": f"{weights}/", "enable_custom_all_reduce": "0"}
    head = 'default_model_filename: "gpt-j-6b" max_batch_size: 1024 ' + group
    policy = "model_transaction_policy { decoupled: False }"
    older = {"max_seq_len": "528", "is_half": "0", "head_num": "4", "size_per_head": "64", "decoder_layers": "6"}
    older |= {"model_name": "codegen", "model_type": "GPT-J", "model_checkpoint_path": str(fauxpilots)}
    repository = folder / "models"
    for name, text in {
        "nvidia": config(nvidia, f"{head} {policy}"),
        "fauxpilot": config(older, head, seed="INT32"),
        "bare": config(nvidia, "", scalar=""),
        "decoupled": config(nvidia, "max_batch_size: 4 model_transaction_policy { decoupled: true }"),
        "missing": config(nvidia | {"model_checkpoint_path": "/no/such/4-gpu"}, head),
        "a_file": config(nvidia | {"model_checkpoint_path": f"{weights}/config.ini"}, head),
        "pointer": config(nvidia | {"model_checkpoint_path": str(pointer)}, head),
    }.items():
        (repository / name / "1").mkdir(parents=True)
        (repository / name / "config.pbtxt").write_text(f'name: "{name}"\n{text}')
    return repository


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A plain tritonserver on all of them, of which some cannot be loaded."""
    folder = tmp_path_factory.mktemp("own")
    repository = make_repository(folder)
    temporary = Path(tempfile.mkdtemp(prefix="gptj-test-", dir="/tmp"))
    ports = tuple(free_ports(3))
    options = [f"--{name}-port={port}" for name, port in zip(("http", "grpc", "metrics"), ports, strict=True)]
    printed = subprocess.check_output(
        [sys.executable, str(PROJECT / "tools" / "serve.py"), "--print-command", *options], text=True
    )
    script = printed.replace(f"--model-repository={REPOSITORY}", f"--model-repository={repository}").rstrip()
    assert str(repository) in script
    environment = {**os.environ, MARK: str(folder), "TMPDIR": str(temporary)}
    with (folder / "stderr").open("wb") as log:
        shell = subprocess.Popen(
            ["bash", "-c", f"{script} --exit-on-error=false --strict-readiness=false"],
            env=environment,
            stdout=log,
            stderr=log,
        )
    server = Server(folder, temporary, shell, (ports[0], ports[1], ports[2]))
    try:
        server.wait_until(lambda: is_live(server), "live server")
        yield server
        assert server.tritonserver is not None
        server.tritonserver.send_signal(signal.SIGINT)
        assert shell.wait(STOP_SECONDS) == 0
        wait_until(lambda: not server.processes, "end of the engines")
    finally:
        for process in server.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(temporary)


def is_live(server: Server) -> bool:
    try:
        return bool(requests.get(f"http://{server.http_url}/v2/health/live", headers=CLOSE, timeout=5).ok)
    except requests.RequestException:
        return False


def request(lead: list[int], **more: tuple[str, list[int], list[Any]]) -> dict[str, Any]:
    """A request for one row, whose batch dimension is `lead`."""
    tensors = {"input_ids": ("UINT32", [*lead, len(PROMPT)], PROMPT)}
    tensors |= {"input_lengths": ("UINT32", [*lead, 1], [len(PROMPT)])}
    tensors |= {"request_output_len": ("UINT32", [*lead, 1], [NEW_TOKENS])}
    return {
        "inputs": [
            {"name": name, "datatype": kind, "shape": shape, "data": data}
            for name, (kind, shape, data) in (tensors | more).items()
        ]
    }


def infer(server: Server, model: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """The status, and the outputs by name or the error."""
    url = f"http://{server.http_url}/v2/models/{model}/infer"
    answer = requests.post(url, json=body, headers=CLOSE, timeout=60)
    if not answer.ok:
        return answer.status_code, dict(answer.json())
    return answer.status_code, {output["name"]: output for output in answer.json()["outputs"]}


def new_text(outputs: dict[str, Any]) -> str:
    return str(TOKENIZER.decode(outputs["output_ids"]["data"][len(PROMPT) :]))


def reason(server: Server, model: str) -> str:
    """Why a model could not be loaded."""
    assert server.tritonserver is not None
    [key] = {key for word in server.tritonserver.cmdline() for key in re.findall("authorization=(.+)", word)}
    headers = {**CLOSE, "Authorization": key}  # the printed command has one, which all local users see
    index = requests.post(f"http://{server.http_url}/v2/repository/index", headers=headers, timeout=10).json()
    [found] = [entry.get("reason", "") for entry in index if entry["name"] == model]
    return str(found)


@pytest.mark.parametrize("model", ["nvidia", "fauxpilot"])
def test_configurations_of_nvidia_and_fauxpilot_serve_their_converted_files(model: str, own: Server) -> None:
    status, outputs = infer(own, model, request([1]))
    assert status == 200, outputs
    assert new_text(outputs) == TEXT
    assert {name: output["shape"] for name, output in outputs.items()} == {
        "output_ids": [1, 1, len(PROMPT) + NEW_TOKENS],
        "sequence_length": [1, 1],
    }


def test_a_context_length_that_nothing_names_is_2048_and_the_log_says_so(own: Server) -> None:
    long = {"request_output_len": ("UINT32", [1, 1], [4000])}
    status, error = infer(own, "nvidia", request([1], **long))
    assert status == 400 and "what the prompt leaves of 2048" in error["error"]
    status, error = infer(own, "fauxpilot", request([1], **long))
    assert status == 400 and "what the prompt leaves of 1024" in error["error"]
    log = own.log.read_text()
    assert "2-gpu/config.ini does not say how many tokens the context holds" in log
    assert "fauxpilots/config.ini does not say" not in log
    assert "parameters that mean nothing here, and are passed over: " in log


def test_without_max_batch_size_a_request_is_one_row_without_a_batch_dimension(own: Server) -> None:
    status, outputs = infer(own, "bare", request([]))
    assert status == 200, outputs
    assert new_text(outputs) == TEXT
    assert outputs["output_ids"]["shape"] == [1, len(PROMPT) + NEW_TOKENS]
    assert outputs["sequence_length"]["shape"] == [1]
    king = TOKENIZER.encode(" king").ids
    words = [*king, *[len(king)], *[-1] * (len(king) - 1)]
    status, outputs = infer(own, "bare", request([], bad_words_list=("INT32", [2, len(king)], words)))
    assert status == 200, outputs
    assert "king" not in new_text(outputs)
    status, error = infer(own, "bare", request([], temperature=("FP32", [1], [-1])))
    assert (status, error) == (400, {"error": "temperature is -1, allowed: a finite number >= 0"})


def test_a_decoupled_model_of_a_user_streams_what_its_configuration_declares(own: Server) -> None:
    body = {"input_ids": PROMPT, "input_lengths": len(PROMPT), "request_output_len": NEW_TOKENS}
    url = f"http://{own.http_url}/v2/models/decoupled/generate_stream"
    with requests.post(url, json=body, headers=CLOSE, timeout=60, stream=True) as answer:
        events = [line for line in answer.iter_lines() if line]
    assert answer.status_code == 200 and len(events) >= 2, events
    assert b"output_ids" in events[-1] and b"previous_length" not in events[-1]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("missing", "parameter model_checkpoint_path: /no/such/4-gpu does not exist, expected the directory of"),
        ("a_file", "2-gpu/config.ini is a file, expected the directory of a checkpoint"),
        ("pointer", "pointer/model.wte.bin is a Git LFS pointer, not the file itself: run `git lfs pull` in "),
    ],
)
def test_what_keeps_a_users_model_from_loading_is_called_what_it_is(model: str, message: str, own: Server) -> None:
    assert message in reason(own, model)


def test_the_launcher_serves_nvidias_files_with_a_tokenizer_and_no_other_option(
    own: Server, launch: Callable[..., Server]
) -> None:
    server = launch("--model", own.folder / "c-model", "--tokenizer", EMBEDDED, "--device=cpu").wait_until_ready()
    fields = {"text_input": "Once upon a time", "max_tokens": NEW_TOKENS}
    url = f"http://{server.http_url}/v2/models/ensemble/generate"
    answer = requests.post(url, json=fields, headers=CLOSE, timeout=60).json()
    assert answer["text_output"] == TEXT
    assert "2048 are taken, as GPT-J has" in server.log.read_text()


def test_the_launcher_calls_a_broken_checkpoint_what_it_is(launch: Callable[..., Server], tmp_path: Path) -> None:
    broken = shutil.copytree(EMBEDDED, tmp_path / "broken")
    (broken / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    (tmp_path / "empty").mkdir()
    for model, message in (
        (broken, f"{broken}/model.safetensors is a Git LFS pointer, not the file itself"),
        (broken / "config.json", "config.json: a file, expected the directory that has it"),
        (tmp_path / "empty", "empty is an empty directory: no config.json and no config.ini in it"),
        (tmp_path / "absent", "absent: no such directory"),
    ):
        server = launch("--model", model)
        assert server.wait() == 1
        assert message in server.last_line
