"""The step of prompts: chunks of many packed without padding, few tokens of them as a CUDA graph.

Takes plans, knows no sequences. L are the rows that are sampled from, V the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gptj_triton.engine.gpu.graphs import GpuParts, capture
from gptj_triton.engine.gpu.prefill_attention import prefill_attention, prefill_launch, query_blocks, rotate_and_write
from gptj_triton.engine.gpu.prompts import Prompts, PromptShape, chunk_rows, pack_prompts
from gptj_triton.engine.gpu.residual import add_norm, embed
from gptj_triton.engine.kv_cache import KVCache
from gptj_triton.engine.step_plan import GroupPlan, StepPlan

# Where launching kernels one by one takes longer than computing: tokens, of fewer than BUCKET_CHUNKS chunks.
BUCKETS = (32, 64, 128, 256, 512)
BUCKET_CHUNKS = 16


@dataclass(frozen=True)
class PromptGraph:
    """`numbers` are `Prompts`, which the host fills; `logits` [BUCKET_CHUNKS, V]."""

    graph: torch.cuda.CUDAGraph
    shape: PromptShape
    numbers: Tensor
    logits: Tensor


class PromptStep:
    """Until `capture`, kernels are launched one by one; afterwards where there are too many tokens or chunks."""

    def __init__(self, parts: GpuParts) -> None:
        self._parts = parts
        self._launch = prefill_launch(parts.dtype, parts.device)
        self._graphs: list[PromptGraph] = []

    def capture(self, cache: KVCache) -> None:
        """From now on, `run` runs graphs, over this cache."""
        self._graphs = []
        stream, graph = torch.cuda.Stream(self._parts.device), None
        for tokens in BUCKETS:
            blocks = tokens // self._launch.queries + BUCKET_CHUNKS  # of each chunk, one may not be full
            shape = PromptShape(tokens, BUCKET_CHUNKS, BUCKET_CHUNKS, blocks, self._parts.table_width)
            numbers = torch.zeros(shape.size, dtype=torch.int32, device=self._parts.device)
            prompts = Prompts.split(numbers, shape)
            prompts.positions.fill_(-1)
            graph, logits = capture(partial(self._compute, prompts, cache), stream, graph)
            self._graphs.append(PromptGraph(graph, shape, numbers, logits))

    def run(
        self, plan: StepPlan, groups: list[GroupPlan], first_row: int, last_rows: list[int], cache: KVCache
    ) -> Tensor:
        """Queue the step of `groups`, the last of the plan, from its row `first_row` on, where `last_rows` count from.

        Returns float32 logits [L, V], until the next step."""
        bounds = chunk_rows(groups)
        starts = [start for group in groups for start in group.starts]
        blocks = query_blocks(starts, bounds, self._launch.queries)
        fitting = (one for one in self._graphs if one.shape.tokens >= bounds[-1] and one.shape.chunks > len(starts))
        captured = next(fitting, None)
        if captured:
            numbers = pack_prompts(plan, groups, first_row, blocks, last_rows, captured.shape)
            captured.numbers.copy_(torch.from_numpy(numbers).pin_memory(), non_blocking=True)
            captured.graph.replay()
            return captured.logits[: len(last_rows)]
        shape = PromptShape(bounds[-1], len(starts), len(last_rows), len(blocks), self._parts.table_width)
        numbers = pack_prompts(plan, groups, first_row, blocks, last_rows, shape)
        return self._compute(Prompts.split(self._parts.to_device(numbers), shape), cache)

    def _compute(self, prompts: Prompts[Tensor], cache: KVCache) -> Tensor:
        """The logits [L, V] of chunks of prompts."""
        parts, weights = self._parts, self._parts.weights
        eps, size = parts.model.layer_norm_eps, parts.model.hidden_size
        where = prompts.pages, prompts.slots, prompts.positions
        chunks = prompts.tables, prompts.starts, prompts.first_rows, prompts.blocks
        residual = torch.empty(len(prompts.tokens), size, device=parts.device)
        embed(prompts.tokens, parts.sampled, weights.embedding, residual)
        update, bias = None, weights.norm_bias
        for number, layer in enumerate(weights.layers):
            keys, values = cache.keys[number], cache.values[number]
            normed = torch.empty_like(residual, dtype=parts.dtype)
            add_norm(residual, update, bias, layer.norm_weight, layer.norm_bias, eps, normed)
            heads = torch.addmm(layer.in_bias[: 3 * size], normed, layer.in_weight[:, : 3 * size])
            rotate_and_write(heads, keys, values, *where, parts.cos, parts.sin)
            attention = torch.empty_like(heads[:, :size])
            prefill_attention(heads, keys, values, *chunks, attention, self._launch)
            if layer is weights.layers[-1]:  # from here on, what leads to no logits is not wanted
                rows = prompts.last_rows.long()
                residual, normed, attention = residual[rows], normed[rows], attention[rows]
            in_weight, in_bias = layer.in_weight[:, 3 * size :], layer.in_bias[3 * size :]
            inner = torch._addmm_activation(in_bias, normed, in_weight, use_gelu=True)  # on a GPU it is the tanh form
            update = torch.addmm(attention @ layer.out_weight[:size], inner, layer.out_weight[size:])[None]
            bias = layer.out_bias
        add_norm(residual, update, bias, weights.norm_weight, weights.norm_bias, eps, normed)
        return torch.addmm(weights.head_bias, normed, weights.head_weight).float()
