"""GPT-J's checkpoints. Source: transformers, configuration_gptj.py and modeling_gptj.py."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from gptj_triton.checkpoint.families.family import ConfigKey, ModelFamily

if TYPE_CHECKING:
    from torch import Tensor


def _query_key_value(tensor: Tensor) -> dict[str, tuple[Tensor, ...]]:
    return {f"attn.{kind}_proj.weight": (tensor[:, index].T,) for index, kind in enumerate("qkv")}


GPTJ = ModelFamily(
    name="GPT-J",
    model_type="gptj",
    architecture="GPTJForCausalLM",
    config_keys={
        "vocab_size": ConfigKey("vocab_size"),
        "context_length": ConfigKey("n_positions", minimum=2),
        "hidden_size": ConfigKey("n_embd"),
        "inner_size": ConfigKey("n_inner", default=lambda config: 4 * config["hidden_size"]),
        "num_layers": ConfigKey("n_layer"),
        "num_heads": ConfigKey("n_head"),
        "rotary_dim": ConfigKey(
            "rotary_dim", minimum=2, default=lambda config: config["hidden_size"] // config["num_heads"]
        ),
        "layer_norm_eps": ConfigKey("layer_norm_epsilon", minimum=0, kind=float, default=lambda config: 1e-5),
        "start_id": ConfigKey("bos_token_id", minimum=0, default=lambda config: 0),  # nothing is computed with it
    },
    fixed_keys={"activation_function": "gelu_new"},
    outer_names={
        "wte": "transformer.wte.weight",
        "final_layernorm.weight": "transformer.ln_f.weight",
        "final_layernorm.bias": "transformer.ln_f.bias",
        "lm_head.weight": "lm_head.weight",
        "lm_head.bias": "lm_head.bias",
    },
    layer_names={
        "input_layernorm.weight": "ln_1.weight",
        "input_layernorm.bias": "ln_1.bias",
        "attention.dense.weight": "attn.out_proj.weight",
        "mlp.dense_h_to_4h.weight": "mlp.fc_in.weight",
        "mlp.dense_h_to_4h.bias": "mlp.fc_in.bias",
        "mlp.dense_4h_to_h.weight": "mlp.fc_out.weight",
        "mlp.dense_4h_to_h.bias": "mlp.fc_out.bias",
    },
    query_key_value=_query_key_value,
    legacy_buffers=re.compile(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias|embed_positions|rotary_emb\.inv_freq)"),
)
