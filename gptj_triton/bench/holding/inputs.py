"""Any input, for `fuzz.py`: valid and invalid requests for every model over both protocols, as hypothesis draws them,
and by name those that it would never find. Sends nothing."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from gptj_triton.fields import BY_TENSOR, FIELDS, Field

ENSEMBLES = ("ensemble", "ensemble_stream")
FRONTENDS = ("fastertransformer", "fastertransformer_stream")
TYPES = {"BYTES": np.object_, "FP32": np.float32, "BOOL": np.bool_, "UINT64": np.uint64, "UINT32": np.uint32}
TYPES |= {"INT32": np.int32, "INT64": np.int64}
MOST_TOKENS = 8  # what a valid input asks for, so that many are sent


HANGS = 10.0  # seconds after which an input hangs
# Triton 2.51 compares each key of `generate` that is no input with all others: no option of its bounds that.
MANY_KEYS, MANY_KEYS_PATIENCE = 60_000, 60.0


@dataclass(frozen=True)
class HttpInput:
    """A request over HTTP: bytes to a path below /v2/."""

    path: str
    body: bytes
    headers: Mapping[str, str]
    chunk_bytes: int = 0  # sent in chunks of so many, unless 0
    patience: float = HANGS

    def __str__(self) -> str:
        return f"POST /v2/{self.path} {dict(self.headers)} {len(self.body)} bytes {self.body[:300]!r}"


@dataclass(frozen=True)
class Tensor:
    """An input of a gRPC request as it is sent: nothing of it need fit."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    raw: bytes


@dataclass(frozen=True)
class GrpcInput:
    """A ModelInfer, or ModelStreamInfer for a model that streams."""

    model: str
    tensors: tuple[Tensor, ...]
    parameters: Mapping[str, str | int | bool]

    def __str__(self) -> str:
        tensors = [f"{each.name} {each.datatype} {list(each.shape)} {each.raw[:40]!r}" for each in self.tensors]
        return f"gRPC {self.model} {'; '.join(tensors)} {dict(self.parameters)}"


AnyInput = HttpInput | GrpcInput

texts = st.one_of(
    st.sampled_from(["Once upon a time", "The old king", "", " ", "\0", "😀", "a" * 3000, "\u202e\ufeff", "\\", '"']),
    st.text(max_size=40),
)
numbers = st.one_of(
    st.integers(-3, 70),
    st.sampled_from([2**31 - 1, 2**31, -(2**31), 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -1]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([1e-30, 1e30, 1e308, 0.5, -0.0]),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def value_of(field: Field) -> st.SearchStrategy[Any]:
    """Values that a field may have, for the most part."""
    if field.dtype == "BYTES":
        return st.lists(texts, max_size=3) if field.many else texts
    if field.dtype == "BOOL":
        return st.booleans()
    low = -2.0 if field.minimum is None else field.minimum
    high = min(70.0, 70.0 if field.maximum is None else field.maximum)
    return st.floats(low, high) if field.dtype == "FP32" else st.integers(int(low), int(high))


NAMED = {field.name: field for field in FIELDS if field.name}


@st.composite
def right_fields(draw: st.DrawFn) -> dict[str, Any]:
    """Fields that can be served together, in one row."""
    fields = {"text_input": draw(texts.filter(bool)), "max_tokens": draw(st.integers(1, MOST_TOKENS))}
    others: dict[str, st.SearchStrategy[Any]] = {
        "temperature": st.floats(0.0, 2.0),
        "top_k": st.integers(0, 50),
        "top_p": st.floats(0.0, 1.0),
        "repetition_penalty": st.floats(0.5, 2.0),
        "seed": st.integers(0, 2**64 - 1),
        draw(st.sampled_from(["beam_width", "num_return_sequences"])): st.integers(1, 3),
        "stop_words": texts,
        "return_log_probs": st.booleans(),
        "return_num_output_tokens": st.booleans(),
    }
    for name in draw(st.lists(st.sampled_from(list(others)), max_size=4, unique=True)):
        fields[name] = draw(others[name])
    return fields


@st.composite
def json_fields(draw: st.DrawFn) -> dict[str, Any]:
    """The JSON of `generate`: half of it right, in the other half values or keys that may not be."""
    fields = draw(right_fields())
    if draw(st.booleans()):
        return fields
    for name in draw(st.lists(st.sampled_from(sorted(NAMED)), max_size=3, unique=True)):
        fields[name] = draw(value_of(NAMED[name]) | anything)
    if draw(st.integers(0, 2)) == 0:
        key = draw(st.text(max_size=12) | st.sampled_from(["id", "timeout", "priority", "parameters"]))
        fields[key] = draw(anything)
    if draw(st.integers(0, 9)) == 0:
        del fields["text_input"]
    return fields


@st.composite
def generate_inputs(draw: st.DrawFn) -> HttpInput:
    model, ending = draw(st.sampled_from(DOORS * 3 + [(model, "generate") for model in [*REQUIRED, "none"]]))
    body = json.dumps(draw(json_fields())).encode()
    return HttpInput(f"models/{model}/{ending}", draw(damaged(body)), {}, draw(st.sampled_from([0, 0, 0, 1, 7])))


@st.composite
def damaged(draw: st.DrawFn, body: bytes) -> bytes:
    """A body as it is, or cut, or with some bytes changed."""
    kind = draw(st.sampled_from(["whole"] * 8 + ["cut", "changed", "noise"]))
    if kind == "cut":
        return body[: draw(st.integers(0, len(body)))]
    if kind == "changed" and body:
        place = draw(st.integers(0, len(body) - 1))
        return body[:place] + draw(st.binary(max_size=4)) + body[place + 1 :]
    return draw(st.binary(max_size=60)) if kind == "noise" else body


FIELD_TENSORS = {name: (field.dtype, 2) for name, field in NAMED.items()}
ENGINE_TENSORS = {
    name: (field.tensor.dtype, 1 + len(field.tensor.dims)) for name, field in BY_TENSOR.items() if field.tensor
}
# What the models take: name, type and the shape [rows, ...] of a right tensor.
MODELS: dict[str, dict[str, tuple[str, int]]] = {
    **dict.fromkeys((*ENSEMBLES, "preprocessing"), FIELD_TENSORS),
    **dict.fromkeys(FRONTENDS, ENGINE_TENSORS),
    "postprocessing": {
        "output_ids": ("UINT32", 3),
        "sequence_length": ("UINT32", 2),
        "input_lengths": ("UINT32", 2),
        "end_id": ("UINT32", 2),
        "end_ids": ("INT32", 2),
        "finish_reason": ("BYTES", 2),
        "previous_length": ("UINT32", 2),
        "cancel_handle": ("BYTES", 2),
        "stop_words": ("BYTES", 2),
    },
}
DOORS = [("ensemble", "generate"), ("ensemble", "generate_stream"), ("ensemble_stream", "generate_stream")]
REQUIRED = {
    **dict.fromkeys([*ENSEMBLES, "preprocessing"], ("text_input", "max_tokens")),
    **dict.fromkeys(FRONTENDS, ("input_ids", "input_lengths", "request_output_len")),
    "postprocessing": ("output_ids", "sequence_length", "input_lengths", "end_id"),
}


@st.composite
def arrays(draw: st.DrawFn, datatype: str, rank: int, rows: int) -> NDArray[Any]:
    """[rows, …] of small sizes with values that are mostly small."""
    shape = (rows, *(draw(st.sampled_from([1] * 9 + [2, 3, 0])) for _ in range(rank - 1)))
    size = int(np.prod(shape))
    if datatype == "BYTES":
        each = st.one_of(texts.map(lambda text: text.encode(errors="replace")), st.binary(max_size=12))
        made = np.empty(size, np.object_)
        made[:] = draw(st.lists(each, min_size=size, max_size=size))
        return made.reshape(shape)
    kind: Any = np.dtype(TYPES[datatype])
    if datatype == "BOOL":
        values: Any = st.booleans()
    elif datatype == "FP32":
        values = st.one_of(st.floats(0, 2, width=32), st.floats(width=32))
    else:
        limit = np.iinfo(kind)
        values = st.one_of(st.integers(0, MOST_TOKENS), st.integers(int(limit.min), int(limit.max)))
    small = draw(st.lists(values, min_size=size, max_size=size))
    return np.array(small, kind).reshape(shape)


@st.composite
def right_arrays(draw: st.DrawFn, model: str) -> dict[str, NDArray[Any]]:
    """Tensors that a model can serve."""
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    ids = st.lists(st.integers(1, 300), min_size=width, max_size=width)
    written = np.array([draw(ids) for _ in range(rows)], np.uint32)
    lengths = np.array([[draw(st.integers(1, width))] for _ in range(rows)], np.uint32)
    short = np.array([[draw(st.integers(1, MOST_TOKENS))] for _ in range(rows)], np.uint32)
    if model in FRONTENDS:
        return {"input_ids": written, "input_lengths": lengths, "request_output_len": short}
    if model == "postprocessing":
        full = np.full((rows, 1), width, np.uint32)
        ends = np.zeros((rows, 1), np.uint32)
        return {"output_ids": written[:, None], "sequence_length": full, "input_lengths": lengths, "end_id": ends}
    words = [[draw(texts.filter(bool)).encode(errors="replace")] for _ in range(rows)]
    return {"text_input": np.array(words, np.object_), "max_tokens": short.astype(np.int32)}


@st.composite
def tensor_inputs(draw: st.DrawFn) -> tuple[str, dict[str, NDArray[Any]], dict[str, str]]:
    """A model, and tensors by name with their types: the required ones nearly always, of the others some."""
    model = draw(st.sampled_from(sorted(MODELS)))
    known = MODELS[model]
    if draw(st.booleans()):
        made = draw(right_arrays(model))
        return model, made, {name: known[name][0] for name in made}
    others = draw(st.lists(st.sampled_from(sorted(known)), max_size=4))
    names = {name for name in REQUIRED[model] if draw(st.integers(0, 19))} | set(others)
    rows = draw(st.sampled_from([1, 1, 1, 2, 4, 0, 129]))
    types = {name: known[name][0] for name in sorted(names)}
    if names and draw(st.integers(0, 7)) == 0:
        types[draw(st.sampled_from(sorted(names)))] = draw(st.sampled_from(sorted(TYPES)))
    return model, {name: draw(arrays(types[name], known[name][1], rows)) for name in types}, types


def raw_bytes(array: NDArray[Any]) -> bytes:
    """As Triton's binary extension has them."""
    if array.dtype == np.object_:
        return b"".join(len(each).to_bytes(4, "little") + each for each in array.ravel().tolist())
    return array.tobytes()


@st.composite
def grpc_inputs(draw: st.DrawFn) -> GrpcInput:
    model, made, types = draw(tensor_inputs())
    tensors = []
    for name, array in made.items():
        shape, raw = array.shape, raw_bytes(array)
        wrong = draw(st.integers(0, 39))
        if wrong == 0:
            shape = tuple(draw(st.lists(st.sampled_from([0, 1, -1, 2**31, 2**32, 2**62, 2**63 - 1]), max_size=4)))
        elif wrong == 1:
            raw = draw(st.binary(max_size=20))
        tensors.append(Tensor(name, types[name], shape, raw))
    values = st.dictionaries(
        st.sampled_from(["timeout", "x", "max_tokens"]), st.integers(-1, 2**62) | texts, max_size=1
    )
    parameters = draw(values) if draw(st.integers(0, 7)) == 0 else {}
    return GrpcInput(model, tuple(tensors), parameters)


@st.composite
def infer_inputs(draw: st.DrawFn) -> HttpInput:
    model, made, types = draw(tensor_inputs())
    inputs = []
    for name, array in made.items():
        data = array.tolist()
        if types[name] == "BYTES":
            data = [each.decode("latin-1") for each in array.ravel().tolist()]
        inputs.append({"name": name, "datatype": types[name], "shape": list(array.shape), "data": data})
    request: dict[str, Any] = {"inputs": inputs}
    if inputs and draw(st.integers(0, 7)) == 0:
        key = draw(st.sampled_from(["name", "datatype", "shape", "data", "parameters"]))
        draw(st.sampled_from(inputs))[key] = draw(anything)
    if draw(st.integers(0, 9)) == 0:
        request[draw(st.sampled_from(["outputs", "parameters", "id", "inputs"]))] = draw(anything)
    try:
        body = json.dumps(request, allow_nan=False).encode()
    except ValueError:
        body = json.dumps(request).encode()  # NaN, which is no JSON
    return HttpInput(f"models/{model}/infer", draw(damaged(body)), {})


any_input: st.SearchStrategy[AnyInput] = st.one_of(generate_inputs(), infer_inputs(), grpc_inputs())


def named_inputs(keys: int = MANY_KEYS) -> dict[str, AnyInput]:
    """Those that chance does not find. Triton compares each of so many keys with all before."""
    form = {"Content-Type": "application/x-www-form-urlencoded"}  # as curl says by itself
    found: dict[str, AnyInput] = {}
    many_keys = {f"k{number}": number for number in range(keys)}
    for path in ("models/ensemble/generate", "models/ensemble/infer", "models/ensemble_stream/generate_stream"):
        text = json.dumps({"text_input": "a" * 4_300_000}).encode()
        bomb = zlib.compress(b'{"text_input": "' + b"a" * (64 << 20) + b'"}', 9)
        found |= {
            f"{path}: 4.3 MB": HttpInput(path, text, {}),
            f"{path}: 4.3 MB as a form": HttpInput(path, text, form),
            f"{path}: nested lists": HttpInput(path, b'{"a":' + b"[" * 110_000, {}),
            f"{path}: nested objects": HttpInput(path, b'{"a":' * 110_000, {}),
            f"{path}: chunks of a byte": HttpInput(path, b" " * 550_000, {}, chunk_bytes=1),
            f"{path}: deflate bomb": HttpInput(path, bomb, {"Content-Encoding": "deflate"}),
            f"{path}: gzip that is none": HttpInput(path, b"{}", {"Content-Encoding": "gzip"}),
            f"{path}: many keys": HttpInput(path, json.dumps(many_keys).encode(), {}, patience=MANY_KEYS_PATIENCE),
            f"{path}: wrong header length": HttpInput(path, b"{}", {"Inference-Header-Content-Length": "9999999999"}),
            f"{path}: negative header length": HttpInput(path, b"{}", {"Inference-Header-Content-Length": "-1"}),
        }
    outputs = [{"name": "text_output", "parameters": {"classification": 3}}]
    inputs = [{"name": "text_input", "datatype": "BYTES", "shape": [1, 1], "data": ["Once"]}]
    classification = json.dumps({"inputs": inputs, "outputs": outputs}).encode()
    found["classification"] = HttpInput("models/ensemble/infer", classification, {})
    one = np.array([[1]], np.uint32)
    huge = ((1, 2**62 + 4), (1, 2**62), (2**31, 2**31), (1, 2**63 - 1), (2**62, 4))
    for model, required in REQUIRED.items():
        first, *rest = required
        datatype, rank = MODELS[model][first]
        others = tuple(Tensor(name, MODELS[model][name][0], (1, 1), one.tobytes()) for name in rest)
        for shape in huge:
            full = (1,) * (rank - len(shape)) + shape
            for raw in (b"", bytes(16)):
                name = f"{model}: {first} {list(full)} with {len(raw)} bytes"
                found[name] = GrpcInput(model, (Tensor(first, datatype, full, raw), *others), {})
    return found


def large_inputs() -> list[AnyInput]:
    """Bodies that do not fit in a small shared memory."""
    found: list[AnyInput] = []
    for size in (8 << 20, 40 << 20, 80 << 20):
        text = b"a" * size
        found.append(HttpInput("models/ensemble/generate", b'{"text_input": "' + text + b'"}', {}))
        tensor = Tensor("text_input", "BYTES", (1, 1), size.to_bytes(4, "little") + text)
        found += [GrpcInput(model, (tensor,), {}) for model in ("preprocessing", "ensemble")]
    return found
