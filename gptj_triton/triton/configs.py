"""The configurations of the models, made from the table of request fields and written by `make configs`.

The committed files are what is served. The order of tensors in a file is that of the table, and has no meaning.
"""

from __future__ import annotations

from gptj_triton.fields import BY_NAME, FIELDS, Field, Origin, Tensor
from gptj_triton.limits import DEFAULTS, FRONTEND, POSTPROCESSING, PREPROCESSING, limits_of
from gptj_triton.triton.config_text import Declaration, block, comment, parameter, step

CHECKPOINT = "fastertransformer/1/storyteller"
ONE_PROCESS = "instance_group [ { count: 1  kind: KIND_CPU } ]"
UNDERSCORES = (
    "Names with a leading underscore travel between the steps; all others are the request's fields and the answer's "
    "outputs. A field that a request leaves out costs nothing on its way."
)
REASONS = """This project's own: "stop", "length", "timeout" or "cancelled" for each sequence"""

TENSORS = [field.tensor for field in FIELDS if field.tensor is not None]
# Preprocessing makes these where an ensemble asks for them, and only then.
FOR_NVIDIA, FOR_STREAMING_ENSEMBLE = "stop_words_list", "stream"
MADE = [tensor.name for tensor in TENSORS if tensor.made and tensor.name != FOR_NVIDIA]
POSTPROCESSING_FIELDS = {
    name: field.tensor.name for name, field in BY_NAME.items() if field.postprocessing and field.tensor
}

OUTPUT_IDS = Declaration("output_ids", "UINT32", (-1, -1))
SEQUENCE_LENGTH = Declaration("sequence_length", "UINT32", (-1,))
LOG_PROBS = [Declaration("cum_log_probs", "FP32", (-1,)), Declaration("output_log_probs", "FP32", (-1, -1))]
FINISH_REASON = Declaration("finish_reason", "BYTES", (-1,))
ENDING = FINISH_REASON._replace(name="ending")
STREAM_OUTPUTS = [Declaration("previous_length", "UINT32", (-1,)), Declaration("cancel_handle", "BYTES", (-1,))]
PROMPT_OUTPUTS = [Declaration("input_lengths", "UINT32", (1,)), Declaration("end_id", "UINT32", (1,))]
END_IDS = Declaration("end_ids", "INT32", (-1,))
TEXT_OUTPUT = Declaration("text_output", "BYTES", (-1,))
COUNTS = [Declaration("num_input_tokens", "INT32", (-1,)), Declaration("num_output_tokens", "INT32", (-1,))]
TEXT_OUTPUTS = [TEXT_OUTPUT, FINISH_REASON, SEQUENCE_LENGTH, *COUNTS]


def make_configs() -> dict[str, str]:
    """The text of every model's config.pbtxt, by the model's name."""
    lines = {
        "preprocessing": preprocessing(),
        "fastertransformer": frontend(streaming=False),
        "fastertransformer_stream": frontend(streaming=True),
        "postprocessing": postprocessing(),
        "ensemble": ensemble(streaming=False),
        "ensemble_stream": ensemble(streaming=True),
    }
    return {name: "\n".join(each) + "\n" for name, each in lines.items()}


def preprocessing() -> list[str]:
    """Every field of a request in, tensors out."""
    made = [_with_rows(_carried(tensor)) for tensor in TENSORS if tensor.name in MADE]
    for_nvidia = [_with_rows(_carried(tensor)) for tensor in TENSORS if tensor.name == FOR_NVIDIA]
    for_streaming = [_with_rows(_carried(tensor)) for tensor in TENSORS if tensor.name == FOR_STREAMING_ENSEMBLE]
    return [
        *comment(
            "Text to tokens. Takes every field of a request, also those it only checks, so that an error names the "
            "user's own field. All inputs are optional: Triton answers a missing required input of an ensemble with "
            '"unexpected deadlock", this step in words. Rows are a dimension like any other (max_batch_size 0): where '
            "Triton counts them, it refuses a request without any input before this step can say what is missing."
        ),
        *_head("preprocessing", 'backend: "python"', most_rows=0),
        *block("input", (_with_rows(_field(field)) for field in BY_NAME.values())),
        *block("output", made),
        *block(
            "output",
            for_nvidia,
            "Only for NVIDIA's library, which knows stop words as tokens alone; built when an ensemble asks for it.",
        ),
        *block(
            "output",
            for_streaming,
            "Only for the ensemble of serve.py --streaming-ensemble: the field, false where a request has none. Where "
            "no ensemble asks for it, true is refused.",
        ),
        ONE_PROCESS,
        "",
        *comment("A directory with tokenizer.json and config.json; a relative path starts at the model repository."),
        parameter("tokenizer_dir", CHECKPOINT),
        *_limits(PREPROCESSING),
    ]


def postprocessing() -> list[str]:
    """Tokens in, text out."""
    optional = [each._replace(optional=True) for each in (END_IDS, FINISH_REASON, *STREAM_OUTPUTS)]
    return [
        *comment(
            "Tokens to text. finish_reason and the request's fields are optional, so the step also serves a backend "
            "that returns FasterTransformer's outputs alone. A response of a stream brings previous_length (tokens "
            "that earlier responses had) and now and then cancel_handle (how to end the request when the client has "
            "left). text_output and finish_reason have one value a row where a row has one sequence. sequence_length "
            "is handed on: Triton answers a request for an output of an ensemble that is also the input of a step "
            'with "unexpected deadlock".'
        ),
        *_head("postprocessing", 'backend: "python"'),
        *block(
            "input",
            [
                OUTPUT_IDS,
                SEQUENCE_LENGTH,
                *PROMPT_OUTPUTS,
                *optional,
                *(_field(BY_NAME[name]) for name in POSTPROCESSING_FIELDS),
            ],
        ),
        *block("output", TEXT_OUTPUTS),
        *comment(
            "Pieces of a stream keep their order in one instance; more need "
            "dynamic_batching { preserve_ordering: true }."
        ),
        ONE_PROCESS,
        "",
        *comment("A directory with tokenizer.json; a relative path starts at the model repository."),
        parameter("tokenizer_dir", CHECKPOINT),
        *_limits(POSTPROCESSING),
    ]


def frontend(streaming: bool) -> list[str]:
    """A frontend of the engine, behind FasterTransformer's contract; it answers once, or in a stream."""
    name, other = "fastertransformer", "fastertransformer_stream"
    about = (
        "GPT-J behind FasterTransformer's contract: names, types and shapes are those of NVIDIA's "
        "fastertransformer_backend (all_models/gptj/fastertransformer). What this project adds is in blocks of its "
        "own; NVIDIA's library does not know those tensors, and the launcher leaves them out when it is used."
    )
    if streaming:
        name, other = other, name
        about = (
            "The streaming frontend of the engine. It has the inputs and outputs of fastertransformer and more: a "
            "response carries all tokens so far, as FasterTransformer's do when decoupled. What else postprocessing "
            "needs in ensemble_stream passes through this model, because Triton lets a step behind a decoupled one "
            "take its tensors from that one alone."
        )
    inputs = {origin: [_input(tensor) for tensor in TENSORS if tensor.origin is origin] for origin in Origin}
    lines = [
        *comment(about),
        *_head(
            name, 'backend: "fastertransformer"', f"model_transaction_policy {{ decoupled: {str(streaming).lower()} }}"
        ),
        *block("input", inputs[Origin.NVIDIA]),
        *block(
            "input",
            inputs[Origin.UNDECLARED],
            "Known to FasterTransformer's GPT-J, but not declared in NVIDIA's config.",
        ),
        *block(
            "input",
            inputs[Origin.OURS],
            "This project's own; stop_strings are matched on the bytes of the new text.",
        ),
    ]
    if streaming:
        lines += block(
            "input",
            inputs[Origin.STREAMING],
            "Of this model alone. stream false asks for one response with everything; the others only pass through.",
        )
    lines += block("output", [OUTPUT_IDS, SEQUENCE_LENGTH, *LOG_PROBS])
    lines += block(
        "output", [FINISH_REASON], REASONS + ("; empty for all until the last response." if streaming else ".")
    )
    if streaming:
        passed = [_carried(tensor) for tensor in TENSORS if tensor.name in POSTPROCESSING_FIELDS.values()]
        lines += block(
            "output",
            STREAM_OUTPUTS,
            "Of this model alone, for each sequence: the tokens, prompt included, that earlier responses carried; "
            "and, in some responses only, a handle by which postprocessing tells the engine that the client has left.",
        )
        lines += block(
            "output",
            [ENDING],
            "For an ensemble, which asks for it in place of finish_reason: the same, or an error that postprocessing "
            "is to send. So no error comes before the pieces of its stream, which Triton 2.51 would keep for ever.",
        )
        lines += block(
            "output",
            [*PROMPT_OUTPUTS, END_IDS, *passed],
            "Passed through: the first two always, end_ids where end_id does not say it, the others where the request "
            "has them.",
        )
    lines += [
        ONE_PROCESS,
        "",
        *comment("FasterTransformer's parameters. A relative model_checkpoint_path starts at the model repository."),
        parameter("tensor_para_size", "1"),
        parameter("pipeline_para_size", "1"),
        parameter("data_type", "fp32"),
        parameter("model_type", "GPT-J"),
        parameter("model_checkpoint_path", CHECKPOINT),
        parameter("enable_custom_all_reduce", "0"),
        parameter("int8_mode", "0"),
        "",
        *comment(f"Those of the engine must be equal in {other}: models with equal settings share one engine."),
        *comment(
            "This project's own: auto, cpu or cuda; auto or fp8; and the interpreter of the engine process, found on "
            "PATH."
        ),
        parameter("device", "auto"),
        parameter("kv_cache_data_type", "auto"),
        parameter("engine_python", "python3"),
        *comment(
            "For a checkpoint that does not say how many tokens its context holds, or has no tokenizer.json beside it."
        ),
        parameter("context_length", ""),
        parameter("tokenizer_dir", ""),
        *_limits(FRONTEND),
    ]
    if streaming:
        lines += [
            *comment(
                "The most pieces a second of all streams together; tokens that wait for the next piece of their stream "
                "travel together."
            ),
            parameter("stream_pieces_per_second", "1000"),
        ]
    return lines


def ensemble(streaming: bool) -> list[str]:
    """What users ask: the three steps, and which tensors go from one to another."""
    to_preprocessing = {name: name for name in BY_NAME}
    made = {name: f"_{name}" for name in MADE}
    to_frontend = made | {
        field.tensor.name: name
        for name, field in BY_NAME.items()
        if field.tensor and not field.tensor.made and (streaming or field.tensor.origin is not Origin.STREAMING)
    }
    from_frontend = {
        "output_ids": "_output_ids",
        "finish_reason": "_finish_reason",
        "sequence_length": "_sequence_length",
    }
    to_postprocessing = dict(from_frontend)
    from_frontend |= {each.name: each.name for each in LOG_PROBS}
    if streaming:
        name, frontend_name = "ensemble_stream", "fastertransformer_stream"
        about = (
            "Text in, text out, a piece at a time: preprocessing, fastertransformer_stream, postprocessing. Wiring "
            f"only. {UNDERSCORES} Triton refuses a step behind a decoupled one that takes tensors from elsewhere, so "
            "all that postprocessing reads comes out of fastertransformer_stream."
        )
        del to_preprocessing["stream"]
        # An error must not overtake the pieces of its stream, so it takes their way.
        from_frontend[ENDING.name] = from_frontend.pop("finish_reason")
        # A tensor is written once, so what passes through has another name behind the frontend.
        behind = {each.name: f"_{each.name}" for each in STREAM_OUTPUTS}
        behind |= {"input_lengths": "_prompt_lengths", "end_id": "_last_id", "end_ids": "_last_ids"}
        from_frontend |= behind | {tensor: f"_{tensor}" for tensor in POSTPROCESSING_FIELDS.values()}
        to_postprocessing |= behind | {field: f"_{tensor}" for field, tensor in POSTPROCESSING_FIELDS.items()}
    else:
        name, frontend_name = "ensemble", "fastertransformer"
        about = f"Text in, text out: preprocessing, fastertransformer, postprocessing. Wiring only. {UNDERSCORES}"
        to_postprocessing |= {each.name: f"_{each.name}" for each in (*PROMPT_OUTPUTS, END_IDS)}
        to_postprocessing |= {field: field for field in POSTPROCESSING_FIELDS}
    return [
        *comment(about),
        *_head(name, 'platform: "ensemble"'),
        *block("input", map(_field, BY_NAME.values())),
        *block("output", [*TEXT_OUTPUTS, *LOG_PROBS]),
        "ensemble_scheduling {",
        "  step [",
        ",\n".join(
            [
                step("preprocessing", to_preprocessing, made),
                step(frontend_name, to_frontend, from_frontend),
                step(
                    "postprocessing",
                    to_postprocessing,
                    {each.name: each.name for each in TEXT_OUTPUTS},
                ),
            ]
        ),
        "  ]",
        "}",
    ]


def _head(name: str, program: str, *more: str, most_rows: int = DEFAULTS.max_request_rows) -> list[str]:
    return [f'name: "{name}"', program, f"max_batch_size: {most_rows}", *more, ""]


def _limits(model: str) -> list[str]:
    """The parameters of the limits that a model keeps."""
    about = comment("The most that a request may hold; every model keeps these limits, as it can be asked directly.")
    return [*about, *(parameter(name, str(value)) for name, value in limits_of(model).items())]


def _field(field: Field) -> Declaration:
    """The ensemble's input."""
    return Declaration(str(field.name), field.dtype, (-1,) if field.many else (1,), optional=True)


def _with_rows(declaration: Declaration) -> Declaration:
    """The same tensor where Triton does not count rows, and `dims` must begin with them."""
    return declaration._replace(dims=(-1, *declaration.dims))


def _input(tensor: Tensor) -> Declaration:
    """The frontend's input."""
    if tensor.name == "request_output_len":  # NVIDIA declares any width, and no reshape
        return Declaration(tensor.name, tensor.dtype, (-1,))
    scalar = tensor.dims == (1,) and tensor.origin is not Origin.STREAMING
    return Declaration(tensor.name, tensor.dtype, tensor.dims, not tensor.required, scalar)


def _carried(tensor: Tensor) -> Declaration:
    """The output of a step that carries a tensor to the next one."""
    return Declaration(tensor.name, tensor.dtype, tensor.dims)
