"""CodeGen's checkpoints: GPT-J's architecture and names, with queries, values and keys fused in one matrix.

The matrix has MP_NUM blocks of rows, one for each quarter of the heads. A block has the heads' queries, then their
values, then their keys. Source: transformers, modeling_codegen.py, CodeGenAttention.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from gptj_triton.checkpoint.families.family import ConfigKey
from gptj_triton.checkpoint.families.gptj import GPTJ

if TYPE_CHECKING:
    from torch import Tensor

MP_NUM = 4  # modeling_codegen.py's name: the cores over which the authors' training code split the heads


def _query_key_value(tensor: Tensor) -> dict[str, tuple[Tensor, ...]]:
    query, key, value = (tensor[:, index].T.chunk(MP_NUM) for index in range(3))
    blocks = zip(query, value, key, strict=True)
    return {"attn.qkv_proj.weight": tuple(part for block in blocks for part in block)}


CODEGEN = replace(
    GPTJ,
    name="CodeGen",
    model_type="codegen",
    architecture="CodeGenForCausalLM",
    # transformers has no meaning for null.
    config_keys={**GPTJ.config_keys, "rotary_dim": ConfigKey("rotary_dim", minimum=2)},
    heads_multiple=MP_NUM,
    query_key_value=_query_key_value,
    legacy_buffers=re.compile(r"(transformer\.)?h\.\d+\.attn\.(causal_mask|bias|masked_bias|embed_positions)"),
)
