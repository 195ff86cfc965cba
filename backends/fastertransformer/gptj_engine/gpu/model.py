"""GPT-J on one GPU: a decode step is one CUDA graph for each number of rows, prompts are computed beside it.

Takes the same plans as `sharded_model`, which is the reference: rows with one new token decode, all others are packed
chunks of prompts. Knows no sequences. H is the hidden size, A that of all heads, F the inner size, V the vocabulary.
"""

from __future__ import annotations

import bisect
import itertools
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gptj_engine.attention import PAGE_SIZE, KVCache
from gptj_engine.batch import GroupPlan, StepPlan
from gptj_engine.config import EngineConfig, ModelConfig
from gptj_engine.gpu.decode_attention import decode_attention, decode_workspace_size
from gptj_engine.gpu.matrix import MOST_ROWS, choose_tiling, linear
from gptj_engine.gpu.prefill_attention import (
    prefill_attention,
    prefill_launch,
    query_blocks,
    rotate_and_write,
)
from gptj_engine.gpu.residual import add_norm, embed
from gptj_engine.model_rank import choose_data_type, memory_left
from gptj_engine.tensor_table import DTYPES
from gptj_engine.transformer import rotary_table
from gptj_engine.weights import load_weights

BUCKETS = (
    1,
    2,
    4,
    8,
    16,
    24,
    32,
    48,
    64,
    96,
    128,
    160,
    192,
    224,
    256,
    320,
    384,
    448,
    512,
)  # rows that a graph is captured for

log = logging.getLogger("gptj_engine")


@dataclass(frozen=True)
class Buffers:
    """What the decode step of one bucket of B rows reads and writes, always in the same place.

    `tokens`, `positions` [B] and `tables` [B, P] are views of `inputs`, int32, which the host fills: a token is an id,
    or -1 - i for `sampled[i]`; a row that is not used has position -1.
    """

    inputs: Tensor
    tokens: Tensor
    positions: Tensor
    tables: Tensor
    residual: Tensor  # [B, H] float32
    normed: Tensor  # [B, H]
    projected: Tensor  # [B, 3A + F]
    activations: Tensor  # [B, A + F]
    update: Tensor  # [parts, B, H]
    logits: Tensor  # [B, V] float32


class GpuModel:
    """One model on one GPU. Steps are queued; nothing waits for them but the copying of pages, which beams ask for."""

    def __init__(self, config: EngineConfig, model: ModelConfig, device: torch.device) -> None:
        """Load the weights; ConfigError when that cannot be done."""
        self.device = device
        self.dtype = DTYPES[choose_data_type(config.data_type, device)]
        self._model = model
        self._weights = load_weights(config.checkpoint, model, self.dtype, device)
        rotations = rotary_table(model, device)
        self._cos, self._sin = rotations.real.contiguous(), rotations.imag.contiguous()
        self._table_width = -(-model.context_length // (16 * PAGE_SIZE)) * 16  # kernels like round numbers
        self._buckets = [rows for rows in BUCKETS if rows < config.max_sequences] + [config.max_sequences]
        self._sampled = torch.zeros(2 * config.max_sequences, dtype=torch.int32, device=device)
        self._memory: dict[str, Tensor] = {}
        self._buffers = {rows: self._make_buffers(rows) for rows in reversed(self._buckets)}
        workspace = max(decode_workspace_size(rows, model.num_heads, model.head_size) for rows in self._buckets)
        self._workspace = torch.empty(workspace, device=device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._prompts = torch.cuda.Stream(device)
        self._cache = KVCache(model, 1, self.dtype, device)

    @property
    def page_bytes(self) -> int:
        """Memory that one page of the KV cache takes up."""
        return KVCache.page_bytes(self._model, self.dtype)

    def allocate(self, num_pages: int) -> None:
        """Make an empty KV cache of that size, and capture the decode step's graphs over it."""
        started = time.monotonic()
        self._cache = KVCache(self._model, num_pages, self.dtype, self.device)
        self._graphs = {}
        pool = None
        for rows in reversed(self._buckets):
            buffers = self._buffers[rows]
            buffers.positions.fill_(-1)
            buffers.tokens.zero_()
            self._decode(buffers)  # compiles what is not in Triton's cache yet
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._decode(buffers)
            pool = pool or graph.pool()
            self._graphs[rows] = graph
        log.info("%d decode graphs captured in %.1f s", len(self._graphs), time.monotonic() - started)

    @torch.inference_mode()
    def forward(self, plan: StepPlan) -> Tensor:
        """Queue a step; returns float32 logits [samples, V] of the plan's `last_rows`, until the next step."""
        self._cache.copy_pages(plan.copies)
        decoding = [group for group in plan.groups if group.num_tokens == 1]
        prefilling = [group for group in plan.groups if group.num_tokens > 1]
        num_decoding = sum(len(group.starts) for group in decoding)
        logits: list[Tensor] = []
        stream = torch.cuda.current_stream(self.device)
        self._prompts.wait_stream(stream)
        if decoding:
            rows = [row for row in plan.last_rows if row < num_decoding]
            found = self._run_decode(plan, decoding, num_decoding)
            logits.append(found if len(rows) == num_decoding else found[self._to_device(rows).long()])
        if prefilling:
            rows = [row - num_decoding for row in plan.last_rows if row >= num_decoding]
            with torch.cuda.stream(self._prompts):
                logits.append(self._prefill(plan, prefilling, num_decoding, rows))
            stream.wait_stream(self._prompts)
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def keep_sampled(self, tokens: Tensor) -> None:
        """Note the tokens that were sampled from the logits of this step, [samples], for plans that refer to them."""
        self._sampled[: len(tokens)] = tokens

    def measure(self, plan: StepPlan, use: Callable[[Tensor], object]) -> int:
        """Bytes of the GPU that are left when a step is computed and `use` made of its logits."""
        return memory_left(self.device, lambda: use(self.forward(plan)))

    def close(self) -> None:
        """There is no other process to end."""

    def _make_buffers(self, rows: int) -> Buffers:
        model = self._model
        hidden, inner, width = model.hidden_size, model.inner_size, self._table_width
        parts = choose_tiling(rows, True, self.dtype).splits if rows <= MOST_ROWS else 1

        def shared(name: str, *shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            """Zeros at first. Buckets share memory, as only one runs at a time and the largest is made first."""
            size = math.prod(shape) * dtype.itemsize
            if name not in self._memory or len(self._memory[name]) < size:
                self._memory[name] = torch.zeros(size, dtype=torch.uint8, device=self.device)
            return self._memory[name][:size].view(dtype).view(shape)

        inputs = shared("inputs", rows * (2 + width), dtype=torch.int32)
        return Buffers(
            inputs=inputs,
            tokens=inputs[:rows],
            positions=inputs[rows : 2 * rows],
            tables=inputs[2 * rows :].view(rows, width),
            residual=shared("residual", rows, hidden, dtype=torch.float32),
            normed=shared("normed", rows, hidden),
            projected=shared("projected", rows, 3 * hidden + inner),
            activations=shared("activations", rows, hidden + inner),  # what dead rows hold is finite
            update=shared("update", parts, rows, hidden, dtype=torch.float32 if rows <= MOST_ROWS else self.dtype),
            logits=shared("logits", rows, model.vocab_size, dtype=torch.float32),
        )

    def _run_decode(self, plan: StepPlan, groups: list[GroupPlan], count: int) -> Tensor:
        """Fill the bucket's inputs and run its graph; returns logits [count, V]."""
        rows = self._buckets[bisect.bisect_left(self._buckets, count)]
        buffers = self._buffers[rows]
        inputs = np.zeros(rows * (2 + self._table_width), np.int32)
        inputs[:count] = plan.token_ids[:count]
        inputs[rows : rows + count] = plan.positions[:count]
        inputs[rows + count : 2 * rows] = -1
        fill_tables(inputs[2 * rows :].reshape(rows, self._table_width), groups)
        buffers.inputs.copy_(torch.from_numpy(inputs).pin_memory(), non_blocking=True)
        if rows in self._graphs:
            self._graphs[rows].replay()
        else:
            self._decode(buffers)
        return buffers.logits[:count]

    @torch.inference_mode()
    def _decode(self, buffers: Buffers) -> None:
        """The decode step of a bucket, from its inputs to its logits."""
        weights, eps = self._weights, self._model.layer_norm_eps
        embed(buffers.tokens, self._sampled, weights.embedding, buffers.residual)
        update, bias = None, weights.norm_bias
        for number, layer in enumerate(weights.layers):
            add_norm(buffers.residual, update, bias, layer.norm_weight, layer.norm_bias, eps, buffers.normed)
            product(buffers.normed, layer.in_weight, layer.in_bias, buffers.projected[None])
            decode_attention(
                buffers.projected,
                self._cache.keys[number],
                self._cache.values[number],
                buffers.tables,
                buffers.positions,
                self._cos,
                self._sin,
                buffers.activations,
                self._workspace,
            )
            product(buffers.activations, layer.out_weight, None, buffers.update)
            update, bias = buffers.update, layer.out_bias
        add_norm(buffers.residual, update, bias, weights.norm_weight, weights.norm_bias, eps, buffers.normed)
        product(buffers.normed, weights.head_weight, weights.head_bias, buffers.logits[None])

    def _prefill(self, plan: StepPlan, groups: list[GroupPlan], first_row: int, last_rows: list[int]) -> Tensor:
        """Compute packed chunks of prompts; returns logits [last_rows, V]. T tokens, S chunks."""
        weights, eps, size = self._weights, self._model.layer_norm_eps, self._model.hidden_size
        starts = [start for group in groups for start in group.starts]
        sizes = [group.num_tokens for group in groups for _ in group.starts]
        first_rows = [0, *itertools.accumulate(sizes)]
        tables = np.zeros((len(starts), self._table_width), np.int32)
        fill_tables(tables, groups)
        launch = prefill_launch(self.dtype, self.device)
        blocks = self._to_device(query_blocks(starts, first_rows, launch.queries))
        chunks = self._to_device(tables), self._to_device(starts), self._to_device(first_rows)
        packed = self._to_device([plan.token_ids, plan.positions, plan.pages, plan.slots])[:, first_row:]
        tokens, positions, pages, slots = packed.contiguous().unbind(0)
        residual = torch.empty(len(tokens), self._model.hidden_size, device=self.device)
        embed(tokens, self._sampled, weights.embedding, residual)
        update, bias = None, weights.norm_bias
        for number, layer in enumerate(weights.layers):
            keys, values = self._cache.keys[number], self._cache.values[number]
            normed = torch.empty_like(residual, dtype=self.dtype)
            add_norm(residual, update, bias, layer.norm_weight, layer.norm_bias, eps, normed)
            heads = torch.addmm(layer.in_bias[: 3 * size], normed, layer.in_weight[:, : 3 * size])
            rotate_and_write(heads, keys, values, pages, slots, positions, self._cos, self._sin)
            attention = torch.empty_like(heads[:, :size])
            prefill_attention(heads, keys, values, *chunks, blocks, attention, launch)
            if layer is weights.layers[-1]:  # from here on, what leads to no logits is not wanted
                rows = self._to_device(last_rows).long()
                residual, normed, attention = residual[rows], normed[rows], attention[rows]
            in_weight, in_bias = layer.in_weight[:, 3 * size :], layer.in_bias[3 * size :]
            inner = torch._addmm_activation(in_bias, normed, in_weight, use_gelu=True)  # on a GPU it is the tanh form
            update = torch.addmm(attention @ layer.out_weight[:size], inner, layer.out_weight[size:])[None]
            bias = layer.out_bias
        add_norm(residual, update, bias, weights.norm_weight, weights.norm_bias, eps, normed)
        return torch.addmm(weights.head_bias, normed, weights.head_weight).float()

    def _to_device(self, numbers: object) -> Tensor:
        """Whole numbers as an int32 tensor on the GPU, without waiting for it."""
        return torch.as_tensor(numbers, dtype=torch.int32).pin_memory().to(self.device, non_blocking=True)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """`x @ weight + bias` to `out` [parts, B, N], by the kernel that suits B; `weight` is a view [K, N] of [N, K]."""
    if x.shape[0] <= MOST_ROWS:
        linear(x, weight.T, bias, out)
    elif out.dtype == x.dtype and bias is not None:
        torch.addmm(bias, x, weight, out=out[0])
    elif out.dtype == x.dtype:
        torch.mm(x, weight, out=out[0])
    else:
        assert bias is not None
        out[0].copy_(torch.addmm(bias, x, weight))


def fill_tables(tables: NDArray[np.int32], groups: list[GroupPlan]) -> None:
    """Write the page tables of all groups, sequence after sequence, into the first rows of `tables` [S, P]."""
    row = 0
    for group in groups:
        part = np.array(group.tables, np.int32)[:, : tables.shape[1]]
        tables[row : row + len(part), : part.shape[1]] = part
        row += len(part)
