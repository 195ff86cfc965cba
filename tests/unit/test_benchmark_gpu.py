"""The benchmark of the GPU starts everywhere, and says where it cannot run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gptj_triton.bench.plot_performance import plot

from gptj_triton.bench.gpu import main

RESULT = Path(__file__).resolve().parents[2] / "docs" / "performance-h100.json"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and it would be measured")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick"]) == 1
    assert capsys.readouterr().err == "benchmark_gpu.py: torch finds no CUDA GPU here\n"


def test_the_committed_result_can_be_drawn(tmp_path: Path) -> None:
    plot(json.loads(RESULT.read_text()), 989.4, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
