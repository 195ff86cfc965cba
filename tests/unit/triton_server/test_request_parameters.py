"""A parameter that is like a field is refused with the field's name; all others are let through."""

from __future__ import annotations

import re

import pytest

from gptj_triton.errors import InvalidRequestError
from gptj_triton.fields import BY_NAME, BY_TENSOR
from gptj_triton.limits import RequestLimits
from gptj_triton.triton.request_fields import FieldError
from gptj_triton.triton.request_parameters import NAMES, check_parameters, read_parameters


def check(*names: str) -> list[str]:
    return check_parameters(dict.fromkeys(names, 1))


def test_a_name_for_other_servers_means_one_field() -> None:
    others = [other for field in BY_NAME.values() for other in field.elsewhere]
    assert len(set(others)) == len(others)
    assert set(others).isdisjoint(BY_NAME)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        # misspelt
        ("max_token", "max_tokens"),
        ("max_tokns", "max_tokens"),
        ("maxx_tokens", "max_tokens"),
        ("temprature", "temperature"),
        ("tmeperature", "temperature"),
        ("repitition_penalty", "repetition_penalty"),
        ("presense_penalty", "presence_penalty"),
        ("freqency_penalty", "frequency_penalty"),
        ("seeds", "seed"),
        ("sed", "seed"),
        ("streams", "stream"),
        ("bad_word", "bad_words"),
        ("end_ids", "end_id"),
        ("min_lenght", "min_length"),
        ("return_logprobs", "return_log_probs"),
        # written in another way
        ("TEMPERATURE", "temperature"),
        ("MAX_TOKENS", "max_tokens"),
        ("maxTokens", "max_tokens"),
        ("MaxTokens", "max_tokens"),
        ("max-tokens", "max_tokens"),
        ("Max Tokens", "max_tokens"),
        ("maxTokns", "max_tokens"),
        ("top-p", "top_p"),
        ("topP", "top_p"),
        ("topk", "top_k"),
        ("minP", "min_p"),
        ("stopwords", "stop_words"),
        (" seed ", "seed"),
        # of other servers
        ("max_new_tokens", "max_tokens"),
        ("maxOutputTokens", "max_tokens"),
        ("max_length", "max_tokens"),
        ("max_len", "max_tokens"),
        ("min_len", "min_tokens"),
        ("num_beams", "beam_width"),
        ("stop", "stop_words"),
        ("stopSequences", "stop_words"),
        ("prompt", "text_input"),
        ("inputs", "text_input"),
        ("inputText", "text_input"),
        ("n", "num_return_sequences"),
        ("N", "num_return_sequences"),
        ("logprobs", "return_log_probs"),
        ("eos_token_id", "end_id"),
        ("repeat_penalty", "repetition_penalty"),
        ("Streaming", "stream"),
        # of the engine's tensors
        ("request_output_len", "max_tokens"),
        ("runtime_top_k", "top_k"),
        ("input_ids", "text_input"),
        ("stop_words_list", "stop_words_list"),
    ],
)
def test_a_name_like_a_field_is_refused_with_the_field(name: str, nearest: str) -> None:
    hint = f" (did you mean {nearest}?)" if nearest in BY_NAME else ""
    with pytest.raises(FieldError, match=re.escape(f"unknown field {name!r}{hint}; the fields are text_input, max_to")):
        check("team", name)


@pytest.mark.parametrize("name", [name for name in BY_TENSOR if name not in BY_NAME])
def test_every_tensor_of_the_engine_is_refused(name: str) -> None:
    with pytest.raises(FieldError, match=f"unknown field '{name}'"):
        check(name)


@pytest.mark.parametrize("name", NAMES)
def test_every_known_name_is_refused_however_it_is_written(name: str) -> None:
    camel = name.title().replace("_", "")
    for written in (name.upper(), name.replace("_", "-"), camel, camel[:1].lower() + camel[1:], f"{name}_"):
        if written not in BY_NAME:
            with pytest.raises(FieldError, match="did you mean"):
                check(written)


OF_NO_FIELD = """
    team user user_id tenant project model model_name session_id conversation_id trace_id span_id parent_id pid
    request_id x-request-id X-Request-ID x_request_id correlation_id traceparent tracestate baggage b3 x-b3-traceid
    Host Accept Accept-Encoding Accept-Language Authorization Connection Content-Length Content-Type Cookie Origin
    Referer User-Agent Via X-Forwarded-For X-Forwarded-Proto X-Real-IP Transfer-Encoding Upgrade Keep-Alive Pragma
    Cache-Control Forwarded Date TE inference-header-content-length endpoint-load-metrics-format grpc-timeout
    content_type headers_only cost_centre tier paid plan region env environment stage step topic tags label labels
    metadata comment note name version feature flag debug dry_run experiment variant cohort weight level score rank
    send_id ad_id bad_id template format language lang locale country currency timezone deadline ttl retry retries
    max_retries attempt test_run benchmark client source target context cache_salt lora api_key token access_token
    seen need feed steal team_id min max end begin limit offset page size width length penalty tokens words sequences
    output text_output sequence_length finish_reason zzz x y é 名前 _ -
"""


@pytest.mark.parametrize("name", OF_NO_FIELD.split())
def test_a_name_like_no_field_is_let_through(name: str) -> None:
    assert check(name) == [repr(name)]


def test_a_long_name_is_cut() -> None:
    [name] = check("x" * 1_000_000)
    assert len(name) < 70
    assert check("") == ["''"]


def test_the_parameters_that_triton_reserves_are_its_own() -> None:
    reserved = "id timeout priority sequence_id sequence_start sequence_end headers binary_data_output triton_anything"
    assert check(*reserved.split()) == []


@pytest.mark.parametrize("value", [-1, 1.5, "soon", True, None, [5]])
def test_a_timeout_that_is_no_number_of_microseconds_is_refused(value: object) -> None:
    message = f"timeout is {value!r}; it must be a whole number of microseconds, 0 for no limit"
    with pytest.raises(FieldError, match=re.escape(message)):
        check_parameters({"timeout": value})
    check_parameters({"timeout": 0})


def test_a_field_sent_as_a_request_parameter_is_refused_and_not_dropped() -> None:
    with pytest.raises(FieldError, match="max_tokens came as a request parameter; it must be sent as an input tensor"):
        check_parameters({"max_tokens": 3})


def test_so_many_parameters_are_read_and_no_more() -> None:
    limits = RequestLimits(max_parameters=2, max_parameter_bytes=20)
    assert read_parameters("", limits) == {}
    assert read_parameters('{"a":1,"b":2}', limits) == {"a": 1, "b": 2}
    with pytest.raises(InvalidRequestError, match=r"is 3, allowed: 0 to 2 \(limit max_parameters\)"):
        read_parameters('{"a":1,"b":2,"c":3}', limits)
    with pytest.raises(InvalidRequestError, match=r"is 21, allowed: 0 to 20 \(limit max_parameter_bytes\)"):
        read_parameters('{"a":"' + "x" * 13 + '"}', limits)
