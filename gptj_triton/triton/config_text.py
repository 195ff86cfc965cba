"""Parts of a config.pbtxt as lines of text. Knows Triton's format, but no model."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from typing import NamedTuple

WIDTH = 120


class Declaration(NamedTuple):
    """An input or output of a model, [rows, *dims]; `dtype` is as on the wire. With `scalar` the model is given [rows]
    instead of [rows, 1].
    """

    name: str
    dtype: str
    dims: tuple[int, ...]
    optional: bool = False
    scalar: bool = False

    def __str__(self) -> str:
        dtype = "STRING" if self.dtype == "BYTES" else self.dtype
        parts = [f'name: "{self.name}"', f"data_type: TYPE_{dtype}", f"dims: [ {', '.join(map(str, self.dims))} ]"]
        if self.scalar:
            parts.append("reshape: { shape: [ ] }")
        if self.optional:
            parts.append("optional: true")
        return f"{{ {'  '.join(parts)} }}"


def comment(text: str) -> list[str]:
    """`text`, broken into lines."""
    return textwrap.wrap(text, WIDTH, initial_indent="# ", subsequent_indent="# ")


def block(kind: str, declarations: Iterable[Declaration], about: str = "") -> list[str]:
    """A list of inputs or outputs (`kind`), with a comment above it, and an empty line behind it."""
    return [*comment(about), f"{kind} [", ",\n".join(f"  {each}" for each in declarations), "]", ""]


def parameter(name: str, value: str) -> str:
    return f'parameters {{ key: "{name}"  value: {{ string_value: "{value}" }} }}'


def step(model: str, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> str:
    """A step of an ensemble; `inputs` and `outputs` are the ensemble's tensors by the model's names."""
    maps = [f'      input_map  {{ key: "{key}"  value: "{value}" }}' for key, value in inputs.items()]
    maps += [f'      output_map {{ key: "{key}"  value: "{value}" }}' for key, value in outputs.items()]
    return "\n".join(["    {", f'      model_name: "{model}"', "      model_version: -1", *maps, "    }"])
