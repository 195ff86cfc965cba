"""What a model family is: its keys of config.json, and how its Hugging Face tensors become those of the tensor table.

All families share one architecture: parallel blocks with one LayerNorm, and GPT-J's rotary embedding. Knows no files,
and does not import torch: the launcher reads configurations too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ConfigKey:
    """A key of config.json whose value is a number of `minimum` or more: a whole one unless `kind` is float.

    The key is required unless `default` is there: it makes the value for an absent key or null from the fields of
    `ModelConfig` that are listed before. With `first_of_list` the value may be a list of such numbers, whose first
    counts.
    """

    name: str
    minimum: int = 1
    kind: type[int] | type[float] = int
    default: Callable[[Mapping[str, Any]], float] | None = None
    first_of_list: bool = False


@dataclass(frozen=True)
class ModelFamily:
    """One kind of Hugging Face checkpoint. H is the hidden size.

    `config_keys` are by field of `ModelConfig`; `fixed_keys` are keys of config.json that allow one value only.
    `outer_names` and `layer_names` map names of the tensor table to Hugging Face's; those of layer N follow
    "transformer.h.N." there. `query_key_value` takes the table's tensor [H, 3, H] of that name and returns the tensors
    of a layer that it is stored as, in the form that `views` describes. `legacy_buffers` matches constants that older
    releases of transformers saved with the weights. The number of heads must be a multiple of `heads_multiple`.
    """

    name: str
    model_type: str
    architecture: str
    config_keys: Mapping[str, ConfigKey]
    fixed_keys: Mapping[str, str]
    outer_names: Mapping[str, str]
    layer_names: Mapping[str, str]
    query_key_value: Callable[[Tensor], dict[str, tuple[Tensor, ...]]]
    legacy_buffers: re.Pattern[str]
    heads_multiple: int = 1

    def views(self, name: str, tensor: Tensor) -> dict[str, tuple[Tensor, ...]]:
        """The Hugging Face tensors that make up the tensor `name` of the table, as views of `tensor`.

        Each Hugging Face tensor is its views one below the other, concatenated along axis 0. Its linear layers are
        [out, in].
        """
        if name in self.outer_names:
            return {self.outer_names[name]: (tensor,)}
        _, number, rest = name.split(".", 2)
        layer = f"transformer.h.{number}."
        if rest == "attention.query_key_value.weight":
            return {layer + stored: views for stored, views in self.query_key_value(tensor).items()}
        return {layer + self.layer_names[rest]: (tensor.T if tensor.ndim == 2 else tensor,)}


def joint_shape(views: tuple[Tensor, ...]) -> tuple[int, ...]:
    """The shape of the Hugging Face tensor that `views` make up."""
    return (sum(len(view) for view in views), *views[0].shape[1:])
