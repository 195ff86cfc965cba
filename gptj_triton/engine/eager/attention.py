"""Attention over the paged KV cache in plain torch operations. Knows layers by number, and nothing of weights.

A token's result does not depend on what else is in the step, bit for bit on a CPU in float32. Three choices give that,
each held by tests: every matrix product has two rows or more and its right operand row-major, for which the CPU's GEMM
adds the products of a row in the same order whatever the other sizes are; masked positions add exact zeros; and the sum
over the context is cut at fixed positions, because a long one would otherwise be cut where its length says. Sequences
that decode there read the pages in place, as sums of weighted rows that are added in the order of those products.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional

from gptj_triton.engine.eager.batch import AttentionGroup, Batch, PageVectors
from gptj_triton.engine.kv_cache import PAGE_SIZE, KVCache

CONTEXT_CUT = 256  # positions summed at a time


def attend(cache: KVCache, layer: int, batch: Batch, query: Tensor) -> Tensor:
    """Attention of `query` [T, heads, head_size] over each sequence's own context; returns the same shape."""
    results = [_attend_group(cache, layer, group, query[group.rows]) for group in batch.groups]
    return results[0] if len(results) == 1 else torch.cat(results)


def _attend_group(cache: KVCache, layer: int, group: AttentionGroup, query: Tensor) -> Tensor:
    if group.vectors is not None:
        return _attend_in_place(cache, layer, group, group.vectors, query)
    _, heads, head_size = query.shape
    sequences, num_pages = group.num_sequences, group.num_pages
    tokens = query.shape[0] // sequences
    if tokens == 1:
        query = query.repeat_interleave(2, dim=0)  # a product of one row adds in another order than one of many
    query = query.view(sequences, -1, heads, head_size).transpose(1, 2)  # [S, heads, M, head_size]

    keys = cache.keys[layer].flatten(0, 1).index_select(0, group.head_pages)
    values = cache.values[layer].flatten(0, 1).index_select(0, group.head_pages)
    keys = keys.view(sequences, heads, num_pages, head_size, PAGE_SIZE)
    values = values.view(sequences, heads, num_pages * PAGE_SIZE, head_size)

    scores = torch.matmul(query[:, :, None], keys)  # [S, heads, P, M, PAGE_SIZE]
    scores = scores.transpose(2, 3).flatten(3).float() * head_size**-0.5
    weights = torch.softmax(scores + group.mask, dim=-1).to(values.dtype)  # [S, heads, M, C]
    result = _weighted_sum(weights, values)  # [S, heads, M, head_size]
    return result[:, :, :tokens].transpose(1, 2).reshape(-1, heads, head_size)


def _attend_in_place(cache: KVCache, layer: int, group: AttentionGroup, vectors: PageVectors, query: Tensor) -> Tensor:
    """One token each, on a CPU in float32: the same sums, bit for bit, without a copy of the pages."""
    sequences, heads, head_size = query.shape
    context = group.num_pages * PAGE_SIZE
    of_rows = query[:, :, None].expand(-1, -1, group.num_pages, -1)
    scores = _weighted_rows(cache.keys[layer].view(-1, PAGE_SIZE), vectors.keys, of_rows, head_size, head_size)
    scores = scores.view(sequences, heads, 1, context) * head_size**-0.5
    weights = torch.softmax(scores + group.mask, dim=-1)
    values = cache.values[layer].view(-1, head_size)
    parts = _weighted_rows(values, vectors.values, weights, context, CONTEXT_CUT)
    return functools.reduce(torch.add, parts.view(sequences, heads, -1, head_size).unbind(2))


def _weighted_rows(table: Tensor, rows: Tensor, weights: Tensor, span: int, cut: int) -> Tensor:
    """Sums of `rows` of `table` [R, N], each times its weight, one after another: of every `span` of them, `cut` at a
    time; returns [sums, N].
    """
    starts = _sum_starts(len(rows), span, cut)
    return functional.embedding_bag(rows, table, starts, mode="sum", per_sample_weights=weights.reshape(-1))


@functools.lru_cache(maxsize=16)
def _sum_starts(count: int, span: int, cut: int) -> Tensor:
    """int32: where each sum of `_weighted_rows` begins among `count` rows; the same in all layers of a step."""
    spans, cuts = (torch.arange(0, end, by, dtype=torch.int32) for end, by in ((count, span), (span, cut)))
    return (spans[:, None] + cuts).flatten()


def _weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    """`weights @ values`, the sum over the context taken CONTEXT_CUT positions at a time."""
    parts = zip(weights.split(CONTEXT_CUT, dim=-1), values.split(CONTEXT_CUT, dim=-2), strict=True)
    first, *others = (torch.matmul(weight, value) for weight, value in parts)
    for part in others:
        first += part
    return first
