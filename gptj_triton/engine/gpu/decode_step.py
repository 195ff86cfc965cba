"""The decode step, one new token a sequence: a CUDA graph for each of some numbers of rows.

Takes plans, knows no sequences. H is the hidden size, A that of all heads, F the inner size, V the vocabulary.
"""

from __future__ import annotations

import bisect
import logging
import math
import time
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from gptj_triton.engine.device import FLOAT8
from gptj_triton.engine.gpu.beam_rows import BeamRows, beam_inputs, beam_inputs_size
from gptj_triton.engine.gpu.decode_attention import decode_attention, decode_workspace_size
from gptj_triton.engine.gpu.graphs import GpuParts, capture
from gptj_triton.engine.gpu.kv_cache import GpuKVCache
from gptj_triton.engine.gpu.matrix import MOST_ROWS, choose_tiling
from gptj_triton.engine.gpu.products import Rows, product_into
from gptj_triton.engine.gpu.quantize import quantize_rows
from gptj_triton.engine.gpu.residual import add_norm, embed
from gptj_triton.engine.gpu.transfer import fill, fill_page_tables
from gptj_triton.engine.gpu.weights import Matrix
from gptj_triton.engine.step_plan import GroupPlan, StepPlan

# Rows that a graph is captured for.
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
PROGRESS_SECONDS = 2.0

log = logging.getLogger("gptj_triton")


@dataclass(frozen=True)
class Buffers:
    """What the step of one bucket of B rows reads and writes, always in the same place.

    `tokens`, `positions` [B] and `tables` [B, P] are views of `inputs`, int32, which the host fills: a token is an id,
    or -1 - i for `sampled[i]`; a row that is not used has position -1. `beams` are read by steps with searches alone.
    """

    inputs: Tensor
    tokens: Tensor
    positions: Tensor
    tables: Tensor
    beams: BeamRows
    residual: Tensor  # [B, H] float32
    normed: Rows  # [B, H]
    projected: Tensor  # [B, 3A + F]
    activations: Tensor  # [B, A + F]
    last: Rows  # [B, A + F]: the activations as the layer's last product needs them
    last_normed: Rows  # [B, H]
    update: Tensor  # [parts, B, H]
    logits: Tensor  # [B, V] float32


class DecodeStep:
    """For up to `most_rows` rows. Until `capture`, kernels are launched one by one."""

    def __init__(self, parts: GpuParts, most_rows: int) -> None:
        self._parts = parts
        self._buckets = [rows for rows in BUCKETS if rows < most_rows] + [most_rows]
        self._memory: dict[str, Tensor] = {}
        self._buffers = {rows: self._make_buffers(rows) for rows in reversed(self._buckets)}
        model = parts.model
        workspace = max(decode_workspace_size(rows, model.num_heads, model.head_size) for rows in self._buckets)
        self._workspace = torch.empty(workspace, device=parts.device)
        self._graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}  # with searches, and without

    def capture(self, cache: GpuKVCache) -> None:
        """From now on, `run` runs graphs, over this cache."""
        self._graphs = {}
        stream = torch.cuda.Stream(self._parts.device)
        graph, reported = None, time.monotonic()
        for done, (rows, buffers) in enumerate(self._buffers.items()):
            buffers.beams.inputs.fill_(-1)
            if time.monotonic() - reported > PROGRESS_SECONDS:
                reported = time.monotonic()
                log.info("compiling kernels, once for this GPU: %d of %d batch sizes done", done, len(self._buckets))
            buffers.positions.fill_(-1)
            buffers.tokens.zero_()
            for with_searches in (False, True) if rows > 1 else (False,):
                compute = partial(self._compute, buffers, cache, with_searches)
                graph, _ = capture(compute, stream, graph)
                self._graphs[rows, with_searches] = graph

    def run(self, plan: StepPlan, groups: list[GroupPlan], cache: GpuKVCache) -> Tensor:
        """Queue the step of `groups`, the first of the plan; returns float32 logits [rows, V] until the next step."""
        count = sum(len(group.starts) for group in groups)
        rows = self._buckets[bisect.bisect_left(self._buckets, count)]
        buffers, width = self._buffers[rows], self._parts.table_width
        inputs = np.zeros(rows * (2 + width), np.int32)
        inputs[:count] = plan.token_ids[:count]
        inputs[rows : rows + count] = plan.positions[:count]
        inputs[rows + count : 2 * rows] = -1
        fill_page_tables(inputs[2 * rows :].reshape(rows, width), groups)
        fill(buffers.inputs, inputs)
        with_searches = len(plan.searches) > 0
        if with_searches:
            fill(buffers.beams.inputs, beam_inputs(plan.searches, rows))
        if (rows, with_searches) in self._graphs:
            self._graphs[rows, with_searches].replay()
        else:
            self._compute(buffers, cache, with_searches)
        return buffers.logits[:count]

    def _compute(self, buffers: Buffers, cache: GpuKVCache, with_searches: bool) -> None:
        """The step of a bucket, from its inputs to its logits."""
        parts, weights, eps = self._parts, self._parts.weights, self._parts.model.layer_norm_eps
        embed(buffers.tokens, parts.sampled, weights.embedding, buffers.residual)
        update, bias = None, weights.norm_bias
        for number, layer in enumerate(weights.layers):
            normed, norm = buffers.normed, (layer.norm_weight, layer.norm_bias)
            add_norm(buffers.residual, update, bias, *norm, eps, normed.values, normed.scales)
            product_into(buffers.projected[None], normed, layer.in_weight, layer.in_bias)
            decode_attention(
                buffers.projected,
                cache.layer(number),
                buffers.tables,
                buffers.positions,
                parts.cos,
                parts.sin,
                buffers.activations,
                self._workspace,
                buffers.beams if with_searches else None,
            )
            if buffers.last.scales is not None:
                quantize_rows(buffers.activations, buffers.last.values, buffers.last.scales)
            product_into(buffers.update, buffers.last, layer.out_weight, None)
            update, bias = buffers.update, layer.out_bias
        normed, norm = buffers.last_normed, (weights.norm_weight, weights.norm_bias)
        add_norm(buffers.residual, update, bias, *norm, eps, normed.values)
        product_into(buffers.logits[None], normed, Matrix(weights.head_weight), weights.head_bias)

    def _make_buffers(self, rows: int) -> Buffers:
        model, width, dtype = self._parts.model, self._parts.table_width, self._parts.dtype
        hidden, inner = model.hidden_size, model.inner_size
        matrix_dtype = self._parts.weights.layers[0].in_weight.dtype
        splits = choose_tiling(rows, True, matrix_dtype).splits if rows <= MOST_ROWS else 1

        def shared(name: str, *shape: int, dtype: torch.dtype = dtype) -> Tensor:
            """Zeros at first. Buckets share memory, as only one runs at a time; a later one rarely needs more."""
            size = math.prod(shape) * dtype.itemsize
            if name not in self._memory or len(self._memory[name]) < size:
                self._memory[name] = torch.zeros(size, dtype=torch.uint8, device=self._parts.device)
            return self._memory[name][:size].view(dtype).view(shape)

        activations = shared("activations", rows, hidden + inner)  # what dead rows hold is finite
        normed = last_normed = Rows(shared("normed", rows, hidden))
        last = Rows(activations)
        if matrix_dtype == FLOAT8:
            scales = shared("scales", 2, rows, dtype=torch.float32)
            normed = Rows(shared("normed in float8", rows, hidden, dtype=FLOAT8), scales[0])
            last = Rows(shared("activations in float8", rows, hidden + inner, dtype=FLOAT8), scales[1])
        inputs = shared("inputs", rows * (2 + width), dtype=torch.int32)
        return Buffers(
            inputs=inputs,
            tokens=inputs[:rows],
            positions=inputs[rows : 2 * rows],
            tables=inputs[2 * rows :].view(rows, width),
            beams=BeamRows(
                shared("inputs of beams", beam_inputs_size(rows), dtype=torch.int32), self._parts.cache_indirection
            ),
            residual=shared("residual", rows, hidden, dtype=torch.float32),
            normed=normed,
            projected=shared("projected", rows, 3 * hidden + inner),
            activations=activations,
            last=last,
            last_normed=last_normed,
            update=shared("update", splits, rows, hidden, dtype=torch.float32 if rows <= MOST_ROWS else dtype),
            logits=shared("logits", rows, model.vocab_size, dtype=torch.float32),
        )
