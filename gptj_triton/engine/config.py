"""The settings of an engine, read once and frozen."""

from __future__ import annotations

import difflib
import logging
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

import msgspec

from gptj_triton.checkpoint.data_types import COMPUTE_TYPES, FP8, FP16, FP32
from gptj_triton.errors import ConfigError

DATA_TYPES = ("auto", *COMPUTE_TYPES, FP8)
KV_CACHE_DATA_TYPES = ("auto", FP8)
DEVICES = ("auto", "cpu", "cuda")
# Other names that people write for a data type.
DATA_TYPE_ALIASES = {each.torch_name: name for name, each in COMPUTE_TYPES.items()} | {"half": "fp16", "float": "fp32"}
IS_HALF = {"0": FP32.name, "1": FP16.name}  # how FasterTransformer's backend said it before version 1.2
NEAR_MISS = 0.8  # difflib's ratio from which an unknown name counts as a known one misspelt
WRONG_TYPE = re.compile(r"Expected `(?P<type>\w+)`.* - at `\$\.(?P<name>\w+)`")

log = logging.getLogger("gptj_triton")


def cpu_settings(ranks: int = 1) -> dict[str, str]:
    """How torch uses the processor in each of `ranks` processes, unless the environment says otherwise.

    One core is left to the server's processes, and a thread that waits for another does not spin: it would take the
    core from the one that it waits for. With several threads, a power of two of them and MKL's strict mode keep a row's
    result, bit for bit, from depending on how many rows there are (oneMKL, Conditional Numerical Reproducibility).
    """
    spare_cores = max(1, (len(os.sched_getaffinity(0)) - 1) // ranks)
    threads = 1 << (spare_cores.bit_length() - 1)
    strict = {"MKL_CBWR": "AUTO,STRICT"} if threads > 1 else {}
    return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"} | strict


class EngineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The settings of one engine: FasterTransformer's parameters of `config.pbtxt`, then this backend's own.

    `max_seq_len` is of FasterTransformer's backend before version 1.2: the context in tokens where neither the
    checkpoint nor `context_length` says it.

    `kv_cache_data_type` is that of K and V: "auto" is the type of the computation, "fp8" is float8 with a scale for
    each token and head. `kv_cache_gib` bounds the KV cache; 0 means 1 GiB on a CPU and all that is left on a GPU.
    `step_tokens` is the most tokens of prompts that one step computes, so that a long prompt does not stall running
    requests (0 means 256 on a CPU and 2048 on a GPU); `max_sequences` is the most sequences that run at once (0 means
    128 and 512).
    `max_waiting_requests` clients' requests may wait for their turn, of `max_waiting_tokens` tokens in all, prompts and
    what may come of them; further ones are refused.
    `context_length` in tokens and `tokenizer_dir` are for a checkpoint that does not say the one and lacks the other; 0
    and the empty string mean the checkpoint's own.

    An engine is ended, and started again, when a step takes longer than `step_timeout` seconds. A request under which
    it ended unexpectedly `refuse_after_deaths` times is refused. 0 switches either off.
    """

    model_checkpoint_path: str
    tensor_para_size: int = 1
    pipeline_para_size: int = 1
    data_type: str = "auto"
    model_type: str = "GPT-J"
    enable_custom_all_reduce: int = 0
    int8_mode: int = 0
    max_seq_len: int = 0
    kv_cache_data_type: str = "auto"
    device: str = "auto"
    engine_python: str = "python3"
    kv_cache_gib: float = 0.0
    step_tokens: int = 0
    max_sequences: int = 0
    max_waiting_requests: int = 4096
    max_waiting_tokens: int = 1 << 20
    context_length: int = 0
    tokenizer_dir: str = ""
    step_timeout: float = 60.0
    refuse_after_deaths: int = 2

    def __post_init__(self) -> None:
        only: dict[str, tuple[object, ...]] = {
            "pipeline_para_size": (1,),
            "data_type": DATA_TYPES,
            "model_type": ("GPT-J",),
            "enable_custom_all_reduce": (0,),
            "int8_mode": (0, 1),
            "kv_cache_data_type": KV_CACHE_DATA_TYPES,
            "device": DEVICES,
        }
        for name, allowed in only.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(f"parameter {name} is {value!r}, allowed: {', '.join(map(str, allowed))}")
        if self.int8_mode and self.data_type in ("fp32", FP8):
            raise ConfigError(f"parameter int8_mode is 1 and data_type {self.data_type!r}, allowed: auto, fp16 or bf16")
        least = {"tensor_para_size": 1, "kv_cache_gib": 0, "max_waiting_requests": 1, "max_waiting_tokens": 1}
        least |= {"step_timeout": 0, "refuse_after_deaths": 0}
        least |= dict.fromkeys(("step_tokens", "max_sequences", "context_length", "max_seq_len"), 0)
        for name, minimum in least.items():
            if not minimum <= getattr(self, name) < math.inf:
                raise ConfigError(f"parameter {name} is {getattr(self, name)}, allowed: {minimum} or more, and finite")

    def for_device(self, is_gpu: bool) -> EngineConfig:
        """The same with the sizes of a step, where they were left open, that suit a GPU or a CPU."""
        step_tokens, max_sequences = (2048, 512) if is_gpu else (256, 128)
        return msgspec.structs.replace(
            self, step_tokens=self.step_tokens or step_tokens, max_sequences=self.max_sequences or max_sequences
        )

    @property
    def checkpoint(self) -> Path:
        return Path(self.model_checkpoint_path)

    @property
    def tokenizer(self) -> Path:
        """Where `tokenizer.json` is looked for, as a checkpoint is."""
        return Path(self.tokenizer_dir or self.model_checkpoint_path)

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str], repository: Path) -> EngineConfig:
        """Build from the parameters of `config.pbtxt`, all strings; an empty value means the default.

        A relative path starts at `repository`. Names that older versions of FasterTransformer's backend had, and others
        that resemble none of these, are passed over with a warning. Raises ConfigError for a name that may be one of
        these misspelt, a value of the wrong type, one out of range, or a checkpoint that is not named.
        """
        given = {name: text.strip() for name, text in parameters.items() if text.strip() != ""}
        for name in ("model_checkpoint_path", "tokenizer_dir"):
            if name in given:
                given[name] = str(repository / given[name])
        _rewrite_spellings(given)
        unknown = [name for name in parameters if name not in cls.__struct_fields__ and name != "is_half"]
        for name in unknown:
            given.pop(name, None)
            if difflib.get_close_matches(name, cls.__struct_fields__, 1, NEAR_MISS):
                raise ConfigError(f"parameter {name} is unknown, known: {', '.join(cls.__struct_fields__)}")
        if unknown:
            log.warning("parameters that mean nothing here, and are passed over: %s", ", ".join(unknown))
        if "model_checkpoint_path" not in given:
            raise ConfigError("parameter model_checkpoint_path is missing, expected the directory of a checkpoint")
        try:
            return msgspec.convert(given, cls, strict=False)
        except msgspec.ValidationError as error:
            raise ConfigError(_in_words(error, given)) from None

    def to_json(self) -> str:
        return msgspec.json.encode(self).decode()

    @classmethod
    def from_json(cls, text: str) -> EngineConfig:
        return msgspec.json.decode(text, type=cls)


def _rewrite_spellings(given: dict[str, str]) -> None:
    """Replace the spellings of older versions, and those that people use, by those of EngineConfig."""
    if "model_type" in given and re.sub(r"[-_ ]", "", given["model_type"]).lower() == "gptj":
        given["model_type"] = "GPT-J"
    if "data_type" in given:
        name = given["data_type"].lower().removeprefix("type_")
        given["data_type"] = DATA_TYPE_ALIASES.get(name, name)
    is_half = given.pop("is_half", None)
    if is_half is not None and is_half not in IS_HALF:
        raise ConfigError(f"parameter is_half is {is_half!r}, allowed: {', '.join(IS_HALF)}")
    if is_half is not None:
        given.setdefault("data_type", IS_HALF[is_half])


def _in_words(error: msgspec.ValidationError, given: Mapping[str, str]) -> str:
    """What msgspec says of a wrong type, with the parameter's name and value."""
    found = WRONG_TYPE.match(str(error))
    if found is None:
        return str(error)
    return f"parameter {found['name']} is {given[found['name']]!r}, expected {found['type']}"
