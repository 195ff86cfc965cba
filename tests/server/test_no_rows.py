"""Requests of 0 rows, whose tensors Triton hands on without that dimension: they are refused by name."""

from __future__ import annotations

import grpc
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tests.server.conftest import Server

Tensors = dict[str, tuple[list[int], bytes]]  # shape and bytes; all of UINT32

BACKEND: Tensors = {
    "input_ids": ([0, 4], bytes(16)),
    "input_lengths": ([0, 1], b""),
    "request_output_len": ([0, 1], (2).to_bytes(4, "little")),
}
POSTPROCESSING: Tensors = {
    "output_ids": ([0, 1, 1], bytes(4)),
    **{name: ([0, 1], bytes(4)) for name in ("sequence_length", "input_lengths", "end_id")},
}


@pytest.mark.parametrize(
    ("model", "tensors"),
    [("fastertransformer", BACKEND), ("fastertransformer_stream", BACKEND), ("postprocessing", POSTPROCESSING)],
)
def test_a_request_of_no_rows_is_refused_by_name(server: Server, model: str, tensors: Tensors) -> None:
    request = service_pb2.ModelInferRequest(model_name=model)
    for name, (shape, raw) in tensors.items():
        request.inputs.add(name=name, datatype="UINT32", shape=shape)
        request.raw_input_contents.append(raw)
    first = next(iter(tensors))
    with grpc.insecure_channel(server.grpc_url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        if model.endswith("_stream"):
            error = next(stub.ModelStreamInfer(iter([request]), timeout=20)).error_message
        else:
            with pytest.raises(grpc.RpcError) as caught:
                stub.ModelInfer(request, timeout=20)
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            error = caught.value.details()
    assert f"{first} is of 0 rows, allowed: 1 or more" in error
