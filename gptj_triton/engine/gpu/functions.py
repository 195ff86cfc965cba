"""Functions of numbers in registers that several kernels use."""

from __future__ import annotations

import triton
import triton.language as tl

from gptj_triton.engine.device import FLOAT8
from gptj_triton.engine.gpu.weights import LARGEST

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)  # below all scores, and finite: the difference of two infinities is no number
LARGEST_FLOAT8 = tl.constexpr(LARGEST[FLOAT8])


@triton.jit
def gelu_tanh(x):
    """GELU's tanh form, of float32: x / 2 * (1 + tanh(u)) is x / (1 + exp(-2u))."""
    twice = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(-twice))


@triton.jit
def scale_to_float8(vectors):
    """The scales that make the largest number of each vector along the first axis the largest one of float8; a vector
    of zeros has one, too.
    """
    return tl.maximum(tl.max(tl.abs(vectors), axis=0) / LARGEST_FLOAT8, 1e-12)
