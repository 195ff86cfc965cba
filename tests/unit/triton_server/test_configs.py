"""The committed configs agree with the table of fields, with one another and with FasterTransformer's contract."""

from __future__ import annotations

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from gptj_triton.fields import BY_NAME
from gptj_triton.project import REPOSITORY
from gptj_triton.triton.configs import make_configs

STEPS = ("preprocessing", "fastertransformer", "postprocessing")
ENSEMBLES = ("ensemble", "ensemble_stream")


def config(model: str) -> model_config_pb2.ModelConfig:
    return text_format.Parse((REPOSITORY / model / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def signature(tensor: model_config_pb2.ModelInput) -> tuple[str, list[int]]:
    return model_config_pb2.DataType.Name(tensor.data_type).removeprefix("TYPE_"), list(tensor.dims)


def rows_in_dims(model: str) -> list[int]:
    """What a tensor's dims begin with: [-1] for the rows where Triton does not count them, else nothing."""
    return [] if config(model).max_batch_size else [-1]


def test_the_committed_configs_are_what_make_configs_writes() -> None:
    committed = {path.parent.name: path.read_text() for path in REPOSITORY.glob("*/config.pbtxt")}
    assert committed == make_configs()


@pytest.mark.parametrize("model", ["preprocessing", *ENSEMBLES])
def test_the_inputs_are_the_fields_of_the_table_and_all_optional(model: str) -> None:
    inputs = {tensor.name: tensor for tensor in config(model).input}
    assert set(inputs) == set(BY_NAME)
    rows = rows_in_dims(model)
    for name, field in BY_NAME.items():
        dims = [*rows, -1 if field.many else 1]
        assert signature(inputs[name]) == (field.dtype.replace("BYTES", "STRING"), dims), name
        assert inputs[name].optional, name


@pytest.mark.parametrize("name", ENSEMBLES)
def test_every_wire_of_an_ensemble_fits_both_its_ends(name: str) -> None:
    ensemble = config(name)
    wires = {tensor.name: signature(tensor) for tensor in ensemble.input}
    for step in ensemble.ensemble_scheduling.step:
        model, rows = config(step.model_name), len(rows_in_dims(step.model_name))
        inputs = {tensor.name: tensor for tensor in model.input}
        outputs = {tensor.name: (signature(tensor)[0], signature(tensor)[1][rows:]) for tensor in model.output}
        for name, wire in step.input_map.items():
            datatype, dims = signature(inputs[name])
            assert wires[wire][0] == datatype, (step.model_name, name)
            fits = [have == want or want == -1 for have, want in zip(wires[wire][1], dims[rows:], strict=True)]
            assert all(fits), (step.model_name, name)
        missing = {name for name, tensor in inputs.items() if not tensor.optional} - set(step.input_map)
        assert not missing, (step.model_name, missing)
        wires.update({wire: outputs[name] for name, wire in step.output_map.items()})
    for tensor in ensemble.output:
        assert wires[tensor.name] == signature(tensor), tensor.name


@pytest.mark.parametrize("name", ENSEMBLES)
def test_no_output_of_an_ensemble_is_read_by_a_step(name: str) -> None:
    """Triton cannot give such an output alone."""
    ensemble = config(name)
    read = {wire for step in ensemble.ensemble_scheduling.step for wire in step.input_map.values()}
    assert not {tensor.name for tensor in ensemble.output} & read


def test_both_ensembles_have_the_same_fields_and_outputs() -> None:
    whole, stream = map(config, ENSEMBLES)
    assert list(whole.input) == list(stream.input)
    assert list(whole.output) == list(stream.output)


def test_all_that_a_step_behind_the_streaming_model_reads_comes_out_of_it() -> None:
    first, frontend, last = config("ensemble_stream").ensemble_scheduling.step
    assert set(last.input_map.values()) <= set(frontend.output_map.values())
    assert set(last.input_map) == {tensor.name for tensor in config("postprocessing").input}
    outputs = {tensor.name for tensor in config("fastertransformer_stream").output}
    assert set(frontend.output_map) == outputs - {"finish_reason"}  # `ending` says it, or an error
    assert set(first.input_map) == set(BY_NAME) - {"stream"}


def test_the_streaming_model_has_all_that_the_other_has() -> None:
    whole, stream = config("fastertransformer"), config("fastertransformer_stream")
    for mine, others in ((stream.input, whole.input), (stream.output, whole.output)):
        tensors = {tensor.name: tensor for tensor in mine}
        assert all(tensors[tensor.name] == tensor for tensor in others)


@pytest.mark.parametrize("model", [*STEPS, "fastertransformer_stream", *ENSEMBLES])
def test_every_model_takes_as_many_rows_and_batches_nothing_by_itself(model: str) -> None:
    parsed = config(model)
    assert parsed.name == model
    assert parsed.max_batch_size == (0 if model == "preprocessing" else 128)
    assert not parsed.HasField("dynamic_batching")
    assert parsed.model_transaction_policy.decoupled == (model == "fastertransformer_stream")


def test_fastertransformer_keeps_nvidias_inputs_and_outputs() -> None:
    parsed = config("fastertransformer")
    inputs = {tensor.name: tensor for tensor in parsed.input}
    scalars = {
        "UINT32": "start_id end_id input_lengths runtime_top_k beam_width prompt_learning_task_name_ids "
        "top_p_reset_ids",
        "FP32": "runtime_top_p beam_search_diversity_rate temperature len_penalty repetition_penalty top_p_decay "
        "top_p_min",
        "UINT64": "random_seed",
        "BOOL": "is_return_log_probs",
    }
    for datatype, names in scalars.items():
        for name in names.split():
            assert signature(inputs[name]) == (datatype, [1]), name
            assert inputs[name].HasField("reshape"), name
            assert not inputs[name].reshape.shape, name
    assert signature(inputs["input_ids"]) == signature(inputs["request_output_len"]) == ("UINT32", [-1])
    assert signature(inputs["bad_words_list"]) == signature(inputs["stop_words_list"]) == ("INT32", [2, -1])
    required = {name for name, tensor in inputs.items() if not tensor.optional}
    assert required == {"input_ids", "input_lengths", "request_output_len"}
    assert {tensor.name: signature(tensor) for tensor in parsed.output} == {
        "output_ids": ("UINT32", [-1, -1]),
        "sequence_length": ("UINT32", [-1]),
        "cum_log_probs": ("FP32", [-1]),
        "output_log_probs": ("FP32", [-1, -1]),
        "finish_reason": ("STRING", [-1]),
    }
