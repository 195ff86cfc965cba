"""Asks the server for text, whole or as it comes: the command line `client.py PROMPT` and the class `Client`.

Three ways in: Triton's `generate` endpoint (JSON), and `infer` over HTTP or gRPC (tensors). Streams come by
`generate_stream` or gRPC, from a model of their own. `FIELDS` is the one list of what a request may carry; options,
JSON and tensors are all made from it. Knows nothing of defaults and ranges: only the fields that were given are sent,
and the server judges them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import queue
import re
import sys
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from types import TracebackType
from typing import Any

import numpy as np
import requests
from tritonclient.utils import InferenceServerException, triton_to_np_dtype
from urllib3.exceptions import ReadTimeoutError

MODEL = "ensemble"
STREAMING_MODEL = "ensemble_stream"
INTERRUPTED = 130  # the exit status that shells give a program ended by Ctrl-C
DEFAULT_URLS = {"generate": "localhost:8000", "http": "localhost:8000", "grpc": "localhost:8001"}
PYTHON_TYPES = {"BYTES": str, "INT32": int, "UINT64": int, "FP32": float, "BOOL": bool}


@dataclass(frozen=True)
class Field:
    """An input of `ensemble`: [1] a row, or [-1] where it is a list (`many`)."""

    name: str
    datatype: str  # as Triton spells it on the wire
    help: str
    many: bool = False

    @property
    def python_type(self) -> type:
        return PYTHON_TYPES[self.datatype]


TEXT_INPUT = Field("text_input", "BYTES", "the prompt")
FIELDS = (
    Field("max_tokens", "INT32", "most new tokens"),
    Field("min_tokens", "INT32", "fewest new tokens"),
    Field("temperature", "FP32", "below 1 is safer, above 1 is wilder, 0 is greedy"),
    Field("top_k", "INT32", "sample from the k likeliest tokens"),
    Field("top_p", "FP32", "sample from the likeliest tokens that hold this share of the probability"),
    Field("repetition_penalty", "FP32", "above 1 makes tokens that were used less likely"),
    Field("presence_penalty", "FP32", "taken once from the logit of each token that was used"),
    Field("frequency_penalty", "FP32", "taken from a token's logit for each time it was used"),
    Field("length_penalty", "FP32", "beams: score / length^penalty"),
    Field("seed", "UINT64", "the same seed draws the same tokens"),
    Field("random_seed", "UINT64", "another name of seed"),
    Field("beam_width", "INT32", "beams kept in beam search"),
    Field("num_return_sequences", "INT32", "texts returned for the prompt"),
    Field("bad_words", "BYTES", "words never to be written", many=True),
    Field("stop_words", "BYTES", "words at which the text is cut", many=True),
    Field("end_id", "INT32", "token id that ends the text"),
    Field("pad_id", "INT32", "token id that fills short rows"),
    Field("return_log_probs", "BOOL", "return the log probabilities of the new tokens"),
    Field("exclude_input_in_output", "BOOL", "return the new text alone"),
    Field("return_num_input_tokens", "BOOL", "return the number of tokens of the prompt"),
    Field("return_num_output_tokens", "BOOL", "return the number of new tokens"),
)


class ClientError(Exception):
    """What can go wrong, in one line each.

    ClientError
    ├── InvalidFieldError      refused before sending: unknown name, or a value that its type cannot carry
    ├── ConnectionFailedError  no server at the URL, or the connection broke
    ├── NoAnswerInTimeError    the timeout passed
    └── ServerError            the server answered with an error; `status` is its HTTP or gRPC status, "" if a
                               stream gives none
    """


class InvalidFieldError(ClientError):
    pass


class ConnectionFailedError(ClientError):
    pass


class NoAnswerInTimeError(ClientError):
    pass


class ServerError(ClientError):
    def __init__(self, message: str, status: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Answer:
    """The answer to one prompt. Lists have an entry for each returned sequence; what was not asked for is empty (None).

    In a batch, rows of `output_log_probs` are as long as the batch's longest answer. In a stream `text` is what is new,
    `finish_reason` has empty strings and the numbers of tokens are empty until the last piece; the rest is so far.
    """

    text: list[str]
    finish_reason: list[str]
    sequence_length: list[int]  # prompt and new tokens
    num_input_tokens: int | None
    num_output_tokens: list[int]
    cum_log_probs: list[float]  # natural logarithms
    output_log_probs: list[list[float]]


class Client:
    """A connection to one server, for one thread. Close it, or use it in a `with` statement.

    `url` is HOST:PORT, `protocol` one of generate, http, grpc; `timeout` (seconds) is for connecting and for an
    answer, or each piece of one. Raises InvalidFieldError for other protocols and URLs.
    """

    def __init__(self, url: str | None = None, protocol: str = "generate", timeout: float = 300.0) -> None:
        if protocol not in DEFAULT_URLS:
            raise InvalidFieldError(f"protocol {protocol!r}: give one of {', '.join(DEFAULT_URLS)}")
        url = host_and_port(url or DEFAULT_URLS[protocol])
        door = _GenerateDoor if protocol == "generate" else _InferDoor
        self._protocol = protocol
        self._door: _GenerateDoor | _InferDoor = door(url, protocol, timeout)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._door.close()

    def generate(self, prompt: str, **fields: Any) -> Answer:
        """Asks for one prompt. `fields` are those of `FIELDS`; a `many` field takes a list of strings.

        Raises ClientError's subclasses."""
        return self._door.ask([prompt], checked(fields))[0]

    def stream(self, prompt: str, **fields: Any) -> Generator[Answer, None, None]:
        """Asks for one prompt, by `generate` or `grpc`, and yields the answer in pieces as they come.

        Closing the generator ends the request on the server. Raises ClientError's subclasses."""
        if self._protocol == "http":
            raise InvalidFieldError("protocol http cannot stream: use generate or grpc")
        return self._door.stream(prompt, checked(fields))

    def generate_batch(self, prompts: list[str], **fields: Any) -> list[Answer]:
        """Asks for all prompts in one request, by `http` or `grpc`. Each field holds for every prompt.

        Raises ClientError's subclasses."""
        if isinstance(self._door, _GenerateDoor):
            raise InvalidFieldError("protocol generate takes one prompt a request: use http or grpc for batches")
        return self._door.ask(prompts, checked(fields))


def host_and_port(url: str) -> str:
    """`url` without http://, which may stand before it. Raises InvalidFieldError for another scheme."""
    url = url.removeprefix("http://").rstrip("/")
    if "://" in url:
        raise InvalidFieldError(f"url {url!r}: give HOST:PORT")
    return url


def checked(fields: dict[str, Any]) -> dict[Field, Any]:
    """Pairs each value with its `Field`. Raises InvalidFieldError: unknown name, or a value its type cannot carry."""
    known = {field.name: field for field in FIELDS}
    if unknown := sorted(set(fields) - set(known)):
        raise InvalidFieldError(f"unknown field {', '.join(unknown)}: give some of {', '.join(known)}")
    for name, value in fields.items():
        if known[name].many and not isinstance(value, (list, tuple)):
            raise InvalidFieldError(f"{name}: {value!r} is not a list of strings")
        for item in value if known[name].many else [value]:
            _check_value(known[name], item)
    return {known[name]: value for name, value in fields.items()}


def _check_value(field: Field, value: Any) -> None:
    accepted = (float, int) if field.python_type is float else field.python_type
    if not isinstance(value, accepted) or (isinstance(value, bool) and field.python_type is not bool):
        raise InvalidFieldError(f"{field.name}: {value!r} is not of type {field.python_type.__name__}")
    if field.python_type is int:
        limits = np.iinfo(triton_to_np_dtype(field.datatype))
        if not limits.min <= value <= limits.max:
            raise InvalidFieldError(f"{field.name}: {value} is outside {limits.min} to {limits.max} ({field.datatype})")
    if field.python_type is str:
        encoded(field, value)


def encoded(field: Field, text: str) -> bytes:
    """`text` in UTF-8. Raises InvalidFieldError for lone surrogates, which stand for bytes of other encodings."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidFieldError(f"{field.name}: not valid UTF-8 at character {error.start}") from None


def tensor(field: Field, value: Any, rows: int) -> np.ndarray[Any, Any]:
    """`value` for every row: [rows, 1], or [rows, len(value)] for a list."""
    values = list(value) if field.many else [value]
    if field.python_type is str:
        values = [encoded(field, text) for text in values]
    return np.array([values] * rows, dtype=triton_to_np_dtype(field.datatype))


class _GenerateDoor:
    """POST /v2/models/ensemble/generate, and /v2/models/ensemble_stream/generate_stream."""

    def __init__(self, url: str, protocol: str, timeout: float) -> None:
        self._url, self._timeout = url, timeout
        self._session = requests.Session()

    def close(self) -> None:
        self._session.close()

    def ask(self, prompts: list[str], fields: dict[Field, Any]) -> list[Answer]:
        with self._errors_translated():
            response = self._post(f"{MODEL}/generate", prompts[0], fields)
            try:
                answer = response.json()
            except requests.exceptions.JSONDecodeError:
                status = str(response.status_code)
                raise ServerError(f"HTTP {status} without JSON: {response.text[:200]!r}", status) from None
        if "error" in answer or not response.ok:
            raise ServerError(one_line(str(answer.get("error", answer))), str(response.status_code))
        return [self._answer(answer)]

    def stream(self, prompt: str, fields: dict[Field, Any]) -> Generator[Answer, None, None]:
        with self._errors_translated(), self._post(f"{STREAMING_MODEL}/generate_stream", prompt, fields) as response:
            # Server-sent events, each a line `data: JSON`; leaving the block closes the connection.
            for line in response.iter_lines():
                if not line:
                    continue
                answer = self._event(line, "" if response.ok else str(response.status_code))
                yield self._answer(answer)

    def _post(self, path: str, prompt: str, fields: dict[Field, Any]) -> requests.Response:
        """The response to a request; of a stream only its head has been read."""
        encoded(TEXT_INPUT, prompt)
        body = {TEXT_INPUT.name: prompt} | {field.name: value for field, value in fields.items()}
        url, stream = f"http://{self._url}/v2/models/{path}", path.endswith("_stream")
        return self._session.post(url, json=body, timeout=self._timeout, stream=stream)

    @contextlib.contextmanager
    def _errors_translated(self) -> Iterator[None]:
        """Turns exceptions of `requests` into ours."""
        try:
            yield
        except requests.exceptions.InvalidJSONError:
            raise InvalidFieldError("JSON has no NaN and no infinity: use protocol http or grpc") from None
        except requests.exceptions.RequestException as error:
            # Between two pieces of a stream, requests calls it a broken connection.
            pause = any(isinstance(cause, ReadTimeoutError) for cause in error.args)
            if pause or isinstance(error, requests.exceptions.Timeout):
                raise NoAnswerInTimeError(f"no answer from {self._url} in {self._timeout:g} s") from None
            raise ConnectionFailedError(f"cannot reach {self._url}: {reason(error)}") from None

    @staticmethod
    def _event(line: bytes, status: str) -> dict[str, Any]:
        """The answer in one line of a stream. Raises ServerError for an error, or what is no event."""
        try:
            answer: dict[str, Any] = json.loads(line.removeprefix(b"data:"))
        except ValueError:
            raise ServerError(f"no event of a stream: {line[:200]!r}", status) from None
        if "error" in answer:
            raise ServerError(one_line(str(answer["error"])), status)
        return answer

    @staticmethod
    def _answer(values: dict[str, Any]) -> Answer:
        answer = {name: value if isinstance(value, list) else [value] for name, value in values.items()}
        log_probs, sequences = answer["output_log_probs"], len(answer["text_output"])
        new = len(log_probs) // sequences if sequences else 0  # the endpoint flattens [sequences, new]
        return Answer(
            text=answer["text_output"],
            finish_reason=answer["finish_reason"],
            sequence_length=answer["sequence_length"],
            num_input_tokens=next(iter(answer["num_input_tokens"]), None),
            num_output_tokens=answer["num_output_tokens"],
            cum_log_probs=answer["cum_log_probs"],
            output_log_probs=[log_probs[i * new : (i + 1) * new] for i in range(sequences)] if new else [],
        )


class _InferDoor:
    """tritonclient's `infer`, whose HTTP and gRPC halves are alike but for where the timeout goes."""

    def __init__(self, url: str, protocol: str, timeout: float) -> None:
        self._url, self._timeout = url, timeout
        self._triton = importlib.import_module(f"tritonclient.{protocol}")
        grpc = protocol == "grpc"
        self._infer_options = {"client_timeout": timeout} if grpc else {}
        options = {} if grpc else {"connection_timeout": timeout, "network_timeout": timeout}
        self._client = self._triton.InferenceServerClient(url, **options)

    def close(self) -> None:
        self._client.close()

    def ask(self, prompts: list[str], fields: dict[Field, Any]) -> list[Answer]:
        try:
            result = self._client.infer(MODEL, self._inputs(prompts, fields), **self._infer_options)
        except InferenceServerException as error:
            raise self._translated(error) from None
        except TimeoutError:
            raise NoAnswerInTimeError(f"no answer from {self._url} in {self._timeout:g} s") from None
        except (OSError, HTTPException) as error:
            raise ConnectionFailedError(f"cannot reach {self._url}: {reason(error)}") from None
        return [self._answer(result, row) for row in range(len(prompts))]

    def stream(self, prompt: str, fields: dict[Field, Any]) -> Generator[Answer, None, None]:
        inputs = self._inputs([prompt], fields)
        arrived: queue.SimpleQueue[tuple[Any, InferenceServerException | None]] = queue.SimpleQueue()
        self._client.start_stream(lambda result, error: arrived.put((result, error)))
        last = False
        try:
            # It refuses where the connection has failed already; why, is said by what arrives.
            with contextlib.suppress(InferenceServerException):
                self._client.async_stream_infer(STREAMING_MODEL, inputs, enable_empty_final_response=True)
            while not last:
                result, error = arrived.get(timeout=self._timeout)
                if error is not None:
                    raise self._translated(error) from None
                response = result.get_response()
                last = response.parameters["triton_final_response"].bool_param
                if response.outputs:
                    yield self._answer(result, 0)
        except queue.Empty:
            raise NoAnswerInTimeError(f"no answer from {self._url} in {self._timeout:g} s") from None
        finally:
            self._client.stop_stream(cancel_requests=not last)

    def _inputs(self, prompts: list[str], fields: dict[Field, Any]) -> list[Any]:
        texts = np.array([[encoded(TEXT_INPUT, prompt)] for prompt in prompts], dtype=object)
        tensors = {TEXT_INPUT: texts} | {field: tensor(field, value, len(prompts)) for field, value in fields.items()}
        inputs = []
        for field, array in tensors.items():
            inputs.append(self._triton.InferInput(field.name, list(array.shape), field.datatype))
            inputs[-1].set_data_from_numpy(array)
        return inputs

    def _translated(self, error: InferenceServerException) -> ClientError:
        message, status = one_line(error.message()), error.status() or ""
        if status == "StatusCode.DEADLINE_EXCEEDED":
            return NoAnswerInTimeError(f"no answer from {self._url} in {self._timeout:g} s")
        if status == "StatusCode.UNAVAILABLE" and not self._live():  # the server's own refusals look the same
            return ConnectionFailedError(f"cannot reach {self._url}: {message.rsplit(': ', 1)[-1]}")
        return ServerError(message, status.removeprefix("StatusCode."))

    def _live(self) -> bool:
        try:
            return bool(self._client.is_server_live(client_timeout=5.0))
        except InferenceServerException:
            return False

    @staticmethod
    def _answer(result: Any, row: int) -> Answer:
        def values(name: str) -> list[Any]:
            found: list[Any] = result.as_numpy(name)[row].tolist()
            return found

        return Answer(
            text=[text.decode(errors="replace") for text in values("text_output")],
            finish_reason=[text.decode() for text in values("finish_reason")],
            sequence_length=values("sequence_length"),
            num_input_tokens=next(iter(values("num_input_tokens")), None),
            num_output_tokens=values("num_output_tokens"),
            cum_log_probs=values("cum_log_probs"),
            output_log_probs=[log_probs for log_probs in values("output_log_probs") if log_probs],
        )


def one_line(text: str) -> str:
    return " ".join(text.split())


def reason(error: Exception) -> str:
    """The operating system's words inside an error of a library, without the library's wrapping."""
    words = re.findall(r"\[Errno -?\d+\] ([\w ]+)", str(error))
    return words[-1] if words else one_line(str(error))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Asks the model for text.")
    parser.add_argument("prompt", metavar="PROMPT", help="the text to go on from, or - to read it from standard input")
    parser.add_argument("--protocol", choices=list(DEFAULT_URLS), default="generate", help="default: %(default)s")
    parser.add_argument("--url", metavar="HOST:PORT", help="default: localhost:8000, or localhost:8001 for grpc")
    parser.add_argument("--timeout", type=float, default=300.0, metavar="SECONDS", help="default: %(default)g")
    parser.add_argument("--stream", action="store_true", help="print the text as it comes; Ctrl-C ends the request")
    parser.add_argument("--json", action="store_true", help="print the whole answer as JSON, or each piece of a stream")
    group = parser.add_argument_group("fields of the request (what is not given is not sent)")
    for field in FIELDS:
        option = f"--{field.name.replace('_', '-')}"
        if field.python_type is bool:
            group.add_argument(option, action=argparse.BooleanOptionalAction, help=field.help)
        else:
            group.add_argument(
                option,
                type=field.python_type,
                action="append" if field.many else "store",
                metavar=field.python_type.__name__.upper(),
                help=f"{field.help} (may be given again)" if field.many else field.help,
            )
    return parser.parse_args(arguments)


def given_fields(options: argparse.Namespace) -> dict[str, Any]:
    return {field.name: value for field in FIELDS if (value := getattr(options, field.name)) is not None}


def read_prompt(prompt: str) -> str:
    """`prompt`, or for `-` standard input without the newline that ends it."""
    if prompt != "-":
        return prompt
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InvalidFieldError(f"{TEXT_INPUT.name}: not valid UTF-8 at byte {error.start}") from None


def print_answer(client: Client, options: argparse.Namespace) -> None:
    answer = client.generate(read_prompt(options.prompt), **given_fields(options))
    print(as_json(answer) if options.json else "\n".join(answer.text))


def print_stream(client: Client, options: argparse.Namespace) -> None:
    """Prints each piece as it comes. Raises ClientError's subclasses, also when text has been printed already."""
    fields = given_fields(options)
    if fields.get("num_return_sequences", 1) > 1 and not options.json:
        raise InvalidFieldError("num_return_sequences: --stream prints one text; with --json it prints all")
    begun = False
    try:
        with contextlib.closing(client.stream(read_prompt(options.prompt), **fields)) as pieces:
            for piece in pieces:
                begun = begun or not options.json
                print(as_json(piece) if options.json else piece.text[0], end="\n" if options.json else "", flush=True)
    finally:
        if begun:
            print()


def as_json(answer: Answer) -> str:
    return json.dumps(dataclasses.asdict(answer), ensure_ascii=False)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        with Client(options.url, options.protocol, options.timeout) as client:
            (print_stream if options.stream else print_answer)(client, options)
    except ClientError as error:
        print(f"client.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it flushes at exit
        return 1
    return 0
