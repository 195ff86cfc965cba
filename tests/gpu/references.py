"""What each kernel computes, in plain torch operations and float32. Knows nothing of how the kernels work."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from gptj_triton.engine.device import FLOAT8
from gptj_triton.engine.gpu.kv_cache import LayerCache
from gptj_triton.engine.rotary import rotate


def to_float8(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors along the last axis in float8, and the float32 scales that they must be multiplied by."""
    scales = (vectors.float().abs().amax(-1) / 448).clamp(min=1e-12)
    return (vectors.float() / scales[..., None]).to(FLOAT8), scales


def keys_of(cache: LayerCache) -> Tensor:
    """What is cached, float32 [pages, heads, PAGE, D]."""
    return cache.keys.float() if cache.key_scales is None else cache.keys.float() * cache.key_scales[..., None]


def values_of(cache: LayerCache) -> Tensor:
    """What is cached, float32 [pages, heads, PAGE, D]."""
    return cache.values.float() if cache.value_scales is None else cache.values.float() * cache.value_scales[..., None]


def write(cache: LayerCache, pages: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> None:
    """Cache K and V of N tokens, [N, heads, D] each, at int64 [N] `pages` and `slots`."""
    if cache.key_scales is not None and cache.value_scales is not None:
        (key, key_scales), (value, value_scales) = to_float8(key), to_float8(value)
        cache.key_scales[pages, :, slots], cache.value_scales[pages, :, slots] = key_scales, value_scales
    if key.element_size() == 1:  # torch cannot index float8
        cache.keys.view(torch.uint8)[pages, :, slots] = key.view(torch.uint8)
        cache.values.view(torch.uint8)[pages, :, slots] = value.view(torch.uint8)
    else:
        cache.keys[pages, :, slots] = key.to(cache.keys.dtype)
        cache.values[pages, :, slots] = value.to(cache.values.dtype)


def decode_attention_reference(
    projected: Tensor,
    cache: LayerCache,
    tables: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    activations: Tensor,
) -> None:
    """`decode_attention` in plain torch operations, computed in float32, a row at a time."""
    _, heads, page, head_size = cache.keys.shape
    attended = heads * head_size
    for row, position in enumerate(positions.tolist()):
        if position < 0:
            continue
        query, key, value = projected[row, : 3 * attended].to(torch.float32, copy=True).view(3, heads, head_size)
        rotations = torch.complex(cos[position], sin[position])
        rotate(query, rotations)
        rotate(key, rotations)
        last, slot = divmod(position, page)
        write(cache, tables[row, last : last + 1].long(), torch.tensor([slot]), key[None], value[None])
        result = attend_reference(query[:, None], cache, tables[row], position)
        activations[row, :attended] = result.flatten()
        activations[row, attended:] = functional.gelu(projected[row, 3 * attended :].float(), approximate="tanh")


def attend_reference(query: Tensor, cache: LayerCache, table: Tensor, start: int) -> Tensor:
    """Attention of consecutive tokens, the first at position `start`, over the pages of their sequence.

    `query` float32 [heads, M, D], rotated; `table` int32 [P]; returns float32 [heads, M, D].
    """
    _, _, page, head_size = cache.keys.shape
    end = start + query.shape[1]
    pages = table[: -(-end // page)].long()
    key = keys_of(cache)[pages].transpose(0, 1).flatten(1, 2)[:, :end]  # [heads, C, D]
    value = values_of(cache)[pages].transpose(0, 1).flatten(1, 2)[:, :end]
    scores = query @ key.transpose(1, 2) * head_size**-0.5  # [heads, M, C]
    hidden = torch.arange(end, device=query.device) > torch.arange(start, end, device=query.device)[:, None]
    return torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1) @ value


def rotate_and_write_reference(
    projected: Tensor,
    cache: LayerCache,
    pages: Tensor,
    slots: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> None:
    """`rotate_and_write` in plain torch operations."""
    _, heads, _, head_size = cache.keys.shape
    live = positions >= 0
    query_key_value = projected[live, : 3 * heads * head_size].unflatten(1, (3, heads, head_size))
    rotate(query_key_value[:, :2], torch.complex(cos, sin)[positions[live].long()][:, None, None])
    projected[live, : 3 * heads * head_size] = query_key_value.flatten(1)
    write(cache, pages[live].long(), slots[live].long(), query_key_value[:, 1], query_key_value[:, 2])


def prefill_attention_reference(
    projected: Tensor,
    cache: LayerCache,
    tables: Tensor,
    starts: Tensor,
    first_rows: Tensor,
    activations: Tensor,
) -> None:
    """`prefill_attention` in plain torch operations, computed in float32, a chunk at a time."""
    _, heads, _, head_size = cache.keys.shape
    bounds = first_rows.tolist()
    for chunk, start in enumerate(starts.tolist()):
        rows = slice(bounds[chunk], bounds[chunk + 1])
        query = projected[rows, : heads * head_size].float().unflatten(1, (heads, head_size)).transpose(0, 1)
        result = attend_reference(query, cache, tables[chunk], start)
        activations[rows, : heads * head_size] = result.transpose(0, 1).flatten(1).to(activations.dtype)


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias` in float32, [B, N]."""
    result = x.float() @ weight.float().T
    return result if bias is None else result + bias.float()


def embed_reference(tokens: Tensor, sampled: Tensor, embedding: Tensor) -> Tensor:
    """The same in torch operations, float32 [B, H]."""
    known = torch.where(tokens < 0, sampled[(-1 - tokens).clamp(min=0).long()], tokens)
    return embedding[known.long()].float()


def add_norm_reference(
    residual: Tensor, update: Tensor | None, bias: Tensor, weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The new residual and the normed rows, both float32 [B, H]."""
    if update is not None:
        residual = residual + bias.float() + update.float().sum(dim=0)
    return residual, functional.layer_norm(residual, residual.shape[1:], weight.float(), norm_bias.float(), eps)
