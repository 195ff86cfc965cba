"""The prefill step: chunks of many prompts packed without padding, as a CUDA graph where they have few tokens.

Takes plans, knows no sequences. L are the rows that are sampled from, V the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gptj_triton.engine.gpu.graphs import GpuParts, capture
from gptj_triton.engine.gpu.kv_cache import GpuKVCache
from gptj_triton.engine.gpu.prefill_attention import prefill_attention, prefill_launch, query_blocks, rotate_and_write
from gptj_triton.engine.gpu.prefill_batch import Chunks, PrefillBatch, PrefillShape, pack_prefill
from gptj_triton.engine.gpu.products import Rows, block_update, product
from gptj_triton.engine.gpu.residual import add_norm, embed
from gptj_triton.engine.gpu.transfer import fill, to_device
from gptj_triton.engine.step_plan import GroupPlan, StepPlan

# Where launching kernels one by one takes longer than computing: tokens, of fewer than BUCKET_CHUNKS chunks.
BUCKETS = (32, 64, 128, 256, 512)
BUCKET_CHUNKS = 16


@dataclass(frozen=True)
class PrefillGraph:
    """`numbers` are those of a `PrefillBatch`, which the host fills; `logits` [BUCKET_CHUNKS, V]."""

    graph: torch.cuda.CUDAGraph
    shape: PrefillShape
    numbers: Tensor
    logits: Tensor


class PrefillStep:
    """Until `capture`, kernels are launched one by one; afterwards where there are too many tokens or chunks."""

    def __init__(self, parts: GpuParts) -> None:
        self._parts = parts
        self._launch = prefill_launch(parts.dtype, parts.device)
        self._graphs: list[PrefillGraph] = []

    def capture(self, cache: GpuKVCache) -> None:
        """From now on, `run` runs graphs, over this cache."""
        self._graphs = []
        stream, graph = torch.cuda.Stream(self._parts.device), None
        for tokens in BUCKETS:
            blocks = tokens // self._launch.queries + BUCKET_CHUNKS  # of each chunk, one may not be full
            shape = PrefillShape(tokens, BUCKET_CHUNKS, BUCKET_CHUNKS, blocks, self._parts.table_width)
            numbers = torch.zeros(shape.size, dtype=torch.int32, device=self._parts.device)
            batch = PrefillBatch.split(numbers, shape)
            batch.positions.fill_(-1)
            graph, logits = capture(partial(self._compute, batch, cache), stream, graph)
            self._graphs.append(PrefillGraph(graph, shape, numbers, logits))

    def run(self, plan: StepPlan, groups: list[GroupPlan], last_rows: list[int], cache: GpuKVCache) -> Tensor:
        """Queue the step of `groups`, the last of the plan; `last_rows` count from their first token.

        Returns float32 logits [L, V], until the next step."""
        chunks, device = Chunks.of(groups), self._parts.device
        blocks = query_blocks(chunks.starts, chunks.first_rows, self._launch.queries)
        captured = self._graph_for(chunks)
        if captured:
            fill(captured.numbers, pack_prefill(plan, groups, chunks, blocks, last_rows, captured.shape))
            captured.graph.replay()
            return captured.logits[: len(last_rows)]
        width = self._parts.table_width
        shape = PrefillShape(chunks.num_tokens, len(chunks.starts), len(last_rows), len(blocks), width)
        numbers = to_device(pack_prefill(plan, groups, chunks, blocks, last_rows, shape), device)
        return self._compute(PrefillBatch.split(numbers, shape), cache)

    def _graph_for(self, chunks: Chunks) -> PrefillGraph | None:
        """The smallest graph with room for the chunks, and for one without tokens."""
        for one in self._graphs:
            if one.shape.tokens >= chunks.num_tokens and one.shape.chunks > len(chunks.starts):
                return one
        return None

    def _compute(self, batch: PrefillBatch[Tensor], cache: GpuKVCache) -> Tensor:
        """The logits [L, V] of chunks of batch."""
        parts, weights = self._parts, self._parts.weights
        eps, size = parts.model.layer_norm_eps, parts.model.hidden_size
        where = batch.pages, batch.slots, batch.positions
        chunks = batch.tables, batch.starts, batch.first_rows, batch.blocks
        residual = torch.empty(len(batch.tokens), size, device=parts.device)
        embed(batch.tokens, parts.sampled, weights.embedding, residual)
        update, bias = None, weights.norm_bias
        for number, layer in enumerate(weights.layers):
            own_cache = cache.layer(number)
            normed = Rows.empty(residual.shape, layer.in_weight, parts.dtype)
            norm = layer.norm_weight, layer.norm_bias
            add_norm(residual, update, bias, *norm, eps, normed.values, normed.scales)
            heads = product(normed, layer.in_weight.columns(0, 3 * size), layer.in_bias[: 3 * size])
            rotate_and_write(heads, own_cache, *where, parts.cos, parts.sin)
            attention = torch.empty_like(heads[:, :size])
            prefill_attention(heads, own_cache, *chunks, attention, self._launch)
            if layer is weights.layers[-1]:  # from here on, what leads to no logits is not wanted
                rows = batch.last_rows.long()
                residual, normed, attention = residual[rows], normed.select(rows), attention[rows]
            inner_weight = layer.in_weight.columns(3 * size)
            update = block_update(normed, inner_weight, layer.in_bias[3 * size :], attention, layer.out_weight)
            bias = layer.out_bias
        last_normed = torch.empty_like(residual, dtype=parts.dtype)
        add_norm(residual, update, bias, weights.norm_weight, weights.norm_bias, eps, last_normed)
        return torch.addmm(weights.head_bias, last_normed, weights.head_weight).float()
