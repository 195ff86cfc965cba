"""The benchmark of the GPU starts everywhere, and says where it cannot run."""

from __future__ import annotations

import pytest
import torch
from benchmark_gpu import main


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and it would be measured")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick"]) == 1
    assert capsys.readouterr().err == "benchmark_gpu.py: torch finds no CUDA GPU here\n"
