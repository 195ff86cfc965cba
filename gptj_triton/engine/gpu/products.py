"""Products of activations with weights: chooses the kernel by the number of rows and the type of the weights.

Weights in float8 are multiplied by activations in float8, with a scale a row. Weights in int8 are widened to the type
of the activations, in registers or, for many rows, in memory. Knows no layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gptj_triton.engine.device import FLOAT8
from gptj_triton.engine.gpu.matrix import MOST_ROWS, choose_tiling, linear
from gptj_triton.engine.gpu.quantize import dequantize, quantize_rows
from gptj_triton.engine.gpu.weights import Matrix

# int8: up to here the weights are read once for each MOST_ROWS rows, as writing them in 16 bits takes longer.
MOST_WIDENED_ROWS = 3 * MOST_ROWS


@dataclass(frozen=True)
class Rows:
    """Activations [B, K]: `values`, times `scales` [B] float32 if they are float8."""

    values: Tensor
    scales: Tensor | None = None

    @staticmethod
    def empty(shape: torch.Size, matrix: Matrix, dtype: torch.dtype) -> Rows:
        """Room for `shape` [B, K] to be multiplied with `matrix`; `dtype` is the model's."""
        device = matrix.values.device
        if matrix.dtype != FLOAT8:
            return Rows(torch.empty(shape, dtype=dtype, device=device))
        return Rows(torch.empty(shape, dtype=FLOAT8, device=device), torch.empty(shape[0], device=device))

    def select(self, indices: Tensor) -> Rows:
        """The rows at `indices`, int64."""
        if self.scales is None:
            return Rows(self.values[indices])
        return Rows(self.values.view(torch.uint8)[indices].view(FLOAT8), self.scales[indices])


def float8_rows(x: Tensor, gelu: bool = False) -> Rows:
    """`x` [B, K], or its GELU, in float8."""
    values, scales = torch.empty_like(x, dtype=FLOAT8), torch.empty(len(x), device=x.device)
    quantize_rows(x, values, scales, gelu)
    return Rows(values, scales)


def product_into(out: Tensor, x: Rows, weight: Matrix, bias: Tensor | None) -> None:
    """`x @ weight + bias` to `out` [parts, B, N], where all memory has its place already."""
    rows = len(x.values)
    if rows <= MOST_ROWS:
        linear(x.values, weight.values.T, bias, out, x_scales=x.scales, scales=weight.scales)
    elif weight.dtype == torch.int8 and rows <= MOST_WIDENED_ROWS:
        tiling = choose_tiling(MOST_ROWS, False, weight.dtype)
        for start in range(0, rows, MOST_ROWS):
            part = slice(start, start + MOST_ROWS)
            linear(x.values[part], weight.values.T, bias, out[:, part], tiling, scales=weight.scales)
    elif weight.dtype == FLOAT8:
        float8_product(x, weight, bias, out[0])
    elif out.dtype == x.values.dtype and weight.scales is None:
        if bias is None:
            torch.mm(x.values, weight.values, out=out[0])
        else:
            torch.addmm(bias, x.values, weight.values, out=out[0])
    else:
        out[0].copy_(product(x, weight, bias))


def float8_product(x: Rows, weight: Matrix, bias: Tensor | None, out: Tensor) -> None:
    """`x @ weight + bias` to `out` [B, N] float16, with cuBLAS."""
    assert x.scales is not None and weight.scales is not None
    torch._scaled_mm(
        x.values,
        weight.values,
        scale_a=x.scales[:, None],
        scale_b=weight.scales[None],
        bias=bias,
        out_dtype=out.dtype,
        use_fast_accum=True,
        out=out,
    )


def product(x: Rows, weight: Matrix, bias: Tensor | None) -> Tensor:
    """`x @ weight + bias` as a new tensor [B, N], for many rows."""
    if weight.dtype == FLOAT8:
        out = torch.empty(len(x.values), weight.shape[1], dtype=torch.float16, device=x.values.device)
        float8_product(x, weight, bias, out)
        return out
    values = _widened(weight, x.values.dtype)
    return x.values @ values if bias is None else torch.addmm(bias, x.values, values)


def block_update(normed: Rows, in_weight: Matrix, in_bias: Tensor, attention: Tensor, out_weight: Matrix) -> Tensor:
    """What attention [B, A] and MLP of a block add to the residual [B, H], without bias and in parts, for many rows.

    `normed` [B, H] times `in_weight` [H, F] plus `in_bias` goes through GELU (the tanh form); `out_weight` [A + F, H]
    follows. The result [parts, B, H] is to be added up.
    """
    split = attention.shape[1]
    if in_weight.dtype != FLOAT8:
        inner = torch._addmm_activation(in_bias, normed.values, _widened(in_weight, in_bias.dtype), use_gelu=True)
        matrix = _widened(out_weight, in_bias.dtype)
        return torch.addmm(attention @ matrix[:split], inner, matrix[split:])[None]
    inner = product(normed, in_weight, in_bias)
    update = torch.empty(2, len(inner), out_weight.shape[1], dtype=inner.dtype, device=inner.device)
    float8_product(float8_rows(attention), out_weight.rows(0, split), None, update[0])
    float8_product(float8_rows(inner, gelu=True), out_weight.rows(split), None, update[1])
    return update


def _widened(weight: Matrix, dtype: torch.dtype) -> Tensor:
    """The matrix [K, N] itself, or an int8 one as a new one of type `dtype`."""
    return weight.values if weight.scales is None else dequantize(weight.values.T, weight.scales, dtype).T
