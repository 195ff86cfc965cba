"""The benchmark of the GPU starts everywhere, and says where it cannot run."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from gptj_triton.bench.gpu import main

# What a machine that only measures the engine need not have.
NEEDLESS = ("zmq", "psutil", "requests", "tqdm", "matplotlib", "tritonclient", "aiohttp", "google.protobuf")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and it would be measured")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick"]) == 1
    assert capsys.readouterr().err == "benchmark_gpu.py: torch finds no CUDA GPU here\n"


def test_it_needs_no_package_that_the_engine_does_not_need() -> None:
    code = f"import sys; sys.modules.update(dict.fromkeys({NEEDLESS}))\nimport gptj_triton.bench.gpu"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
