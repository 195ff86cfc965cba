"""The registry of model families, by the `model_type` of config.json. A family is a module here and an entry below."""

from __future__ import annotations

from gptj_triton.checkpoint.families.codegen import CODEGEN
from gptj_triton.checkpoint.families.gptj import GPTJ

FAMILIES = {family.model_type: family for family in (GPTJ, CODEGEN)}
