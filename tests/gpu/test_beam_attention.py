"""Attention of beams whose K and V lie in each other's pages, beside plain torch over the tokens of each beam."""

from __future__ import annotations

import random

import pytest
import torch
from attention_cases import PAGE, Layer, Shape, assert_cached, assert_near, copy_of, make_layer, needs_rounding
from references import keys_of, values_of, write
from torch import Tensor
from torch.nn import functional

from gptj_triton.engine.gpu.beam_rows import BeamRows, beam_inputs
from gptj_triton.engine.gpu.beam_state import MOST_BEAMS
from gptj_triton.engine.gpu.decode_attention import DecodeLaunch, decode_attention, decode_workspace_size
from gptj_triton.engine.rotary import rotate
from gptj_triton.engine.step_plan import SearchPlan

CONTEXT = 128  # of the table of owners


class Search:
    """`width` rows behind a prompt, with `generated` tokens each in each other's pages."""

    def __init__(self, width: int, prompt: int, generated: int) -> None:
        self.width, self.prompt, self.position = width, prompt, prompt + generated
        chance = random.Random(prompt)
        self.owners = [[chance.randrange(width) for _ in range(generated)] for _ in range(width)]


def share_prompts(layer: Layer, rows: list[int | Search]) -> Layer:
    """The layer with one set of pages for what is full of each prompt, and the rest of it copied."""
    tables, row = layer.tables.clone(), 0
    for each in rows:
        if isinstance(each, Search):
            full, rest = divmod(each.prompt, PAGE)
            for beam in range(1, each.width):
                tables[row + beam, :full] = tables[row, :full]
                if rest:
                    for tensor in layer.cache:
                        if tensor is not None:
                            raw = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
                            raw[tables[row + beam, full], :, :rest] = raw[tables[row, full], :, :rest]
        row += each.width if isinstance(each, Search) else 1
    return Layer(layer.cache, tables, layer.cos, layer.sin)


def reference(
    projected: Tensor, layer: Layer, positions: list[int], rows: list[int | Search], activations: Tensor
) -> None:
    """What each row attends to, token by token, in float32."""
    _, heads, _, head_size = layer.cache.keys.shape
    attended, row = heads * head_size, 0
    for each in rows:
        width = each.width if isinstance(each, Search) else 1
        queries = []
        for place in range(width):  # all write first: none sees another's new token
            position = positions[row + place]
            query, key, value = projected[row + place, : 3 * attended].float().clone().view(3, heads, head_size)
            rotations = torch.complex(layer.cos[position], layer.sin[position])
            rotate(query, rotations)
            rotate(key, rotations)
            last, slot = divmod(position, PAGE)
            page = layer.tables[row + place, last : last + 1].long()
            write(layer.cache, page, torch.tensor([slot]), key[None], value[None])
            queries.append(query)
        for place, query in enumerate(queries):
            position = positions[row + place]
            owners = [place] * (position + 1)
            if isinstance(each, Search):
                owners[each.prompt : position] = each.owners[place]
            pages = torch.tensor([int(layer.tables[row + who, at // PAGE]) for at, who in enumerate(owners)])
            slots = torch.arange(position + 1) % PAGE
            key = keys_of(layer.cache).cpu()[pages, :, slots].transpose(0, 1)  # [heads, C, D]
            value = values_of(layer.cache).cpu()[pages, :, slots].transpose(0, 1)
            scores = (key @ query.cpu()[:, :, None])[..., 0] * head_size**-0.5
            result = (torch.softmax(scores, dim=-1)[:, None] @ value).flatten()
            activations[row + place, :attended] = result.to(activations)
            inner = projected[row + place, 3 * attended :].float()
            activations[row + place, attended:] = functional.gelu(inner, approximate="tanh")
        row += width


def check(shape: Shape, rows: list[int | Search], device: torch.device, launch: DecodeLaunch | None = None) -> None:
    """Searches, and ordinary rows of so many tokens before the new one, against the reference."""
    torch.manual_seed(len(rows))
    positions: list[int] = []
    plans = []
    for number, each in enumerate(rows):
        if isinstance(each, Search):
            plans.append(SearchPlan(len(positions), each.width, number, each.prompt))
            positions += [each.position] * each.width
        else:
            positions.append(each)
    count = len(positions)
    layer = share_prompts(make_layer(shape, [position + 1 for position in positions], device), rows)
    projected = (2 * torch.randn(count, shape.columns)).to(device, shape.dtype)
    owners = torch.zeros(len(rows), MOST_BEAMS.value, CONTEXT, dtype=torch.uint8)
    for number, each in enumerate(rows):
        if isinstance(each, Search):
            owners[number, : each.width, : len(each.owners[0])] = torch.tensor(each.owners)
    beams = BeamRows(torch.from_numpy(beam_inputs(plans, count)).to(device), owners.to(device))
    found = torch.full((count, shape.attended + shape.inner), -7.0, dtype=shape.dtype, device=device)
    size = decode_workspace_size(count, shape.heads, shape.head_size, launch)
    workspace = torch.full((size,), float("nan"), device=device)
    where = torch.tensor(positions, dtype=torch.int32, device=device)
    expected_layer = Layer(copy_of(layer.cache), layer.tables, layer.cos, layer.sin)
    decode_attention(projected, layer.cache, layer.tables, where, layer.cos, layer.sin, found, workspace, beams, launch)
    expected = torch.full_like(found, -7.0)
    reference(projected, expected_layer, positions, rows, expected)
    assert_near(found, expected)
    assert_cached(layer.cache, expected_layer.cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("width", "prompt", "generated"), [(2, 1, 0), (4, 16, 0), (4, 40, 1), (3, 32, 17), (16, 47, 20), (4, 100, 40)]
)
def test_beams_see_what_they_continue(
    width: int, prompt: int, generated: int, dtype: torch.dtype, device: torch.device
) -> None:
    check(Shape(dtype=dtype), [Search(width, prompt, generated)], device)


def test_searches_and_other_rows_share_a_step(device: torch.device) -> None:
    rows: list[int | Search] = [5, Search(4, 33, 3), 0, 100, Search(2, 7, 30), Search(3, 64, 1), 16]
    check(Shape(dtype=torch.float16), rows, device, DecodeLaunch(programs=128))


@needs_rounding
def test_a_cache_in_float8(device: torch.device) -> None:
    rows: list[int | Search] = [5, Search(4, 33, 3), Search(2, 7, 30)]
    check(Shape(dtype=torch.float16, in_float8=True), rows, device, DecodeLaunch(programs=48))


@pytest.mark.parametrize(("head_size", "rotary_dim"), [(16, 4), (64, 64), (256, 64)])
def test_every_head_size(head_size: int, rotary_dim: int, device: torch.device) -> None:
    shape = Shape(heads=1, head_size=head_size, rotary_dim=rotary_dim, dtype=torch.float16)
    check(shape, [Search(4, 37, 5)], device)
