"""Runs the clients of this folder against this project's server, `make clients`: each in the environment that it names,
with Triton's two models for whole answers and for streams, and with one for both. Prints a table in Markdown.

A text must be the one that this project's own client gets. Ends with status 1 when something that should work does not,
or something that should not work does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from asked import MAX_TOKENS, PROMPT, PROMPTS, STOP_WORD, Told

from gptj_triton.bench.local_server import LocalServer, ServerFailedError, local_server
from gptj_triton.bench.perf_analyzer import find_perf_analyzer
from gptj_triton.client import MODEL, STREAMING_MODEL, Client

FOLDER = Path(__file__).resolve().parent
ENVIRONMENTS = FOLDER.parents[1] / "build" / "clients-env"
AS_OF = "2026-11-20"  # what a client needs besides is the newest of that day
SCRIPTS = {path.stem.removeprefix("ask_"): path for path in sorted(FOLDER.glob("ask_*.py"))}
# The columns of the table: options of serve.py, and the models to ask for whole answers and for streams.
SERVERS = {
    "`make serve`": ([], (MODEL, STREAMING_MODEL)),
    "with `--streaming-ensemble`": (["--streaming-ensemble"], (MODEL, MODEL)),
}


@dataclass(frozen=True)
class Verdict:
    """What one call came to. `good`: as it should. `note`: why it fails, known or not; empty where it works."""

    client: str
    way: str
    check: str
    good: bool
    note: str = ""


def label(script: Path) -> str:
    """`kserve 0.21.0`: the first package that a script's header (PEP 723) names; a program of another's, with that."""
    found = re.search(r'^# dependencies = \["([\w.-]+)(?:\[[\w,]+\])?==([\w.]+)"', script.read_text(), re.M)
    if found is None:
        raise ValueError(f'{script}: its header has no line `# dependencies = ["NAME==VERSION"]`')
    client, package = script.stem.removeprefix("ask_"), " ".join(found.groups())
    return package if client.replace("_", "-") in package else f"{client} of {package}"


def expected_answers(server: LocalServer) -> dict[str, str | list[str]]:
    """What each check should bring, by this project's own client; for an error, words that are in it."""
    with Client(server.http, "http") as client:
        whole = client.generate(PROMPT, max_tokens=MAX_TOKENS).text[0]
        several = [answer.text[0] for answer in client.generate_batch(PROMPTS, max_tokens=MAX_TOKENS)]
        stopped = client.generate(PROMPT, max_tokens=MAX_TOKENS, stop_words=[STOP_WORD]).text[0]
    return {
        "whole": whole,
        "streamed": whole,
        "several prompts": several,
        "stop words": stopped,
        "measured": "4 requests",
    }


def is_right(told: Told, expected: Mapping[str, str | list[str]]) -> bool:
    if told.check != "all but the last piece":
        return told.got == expected[told.check]
    got, whole = str(told.got), str(expected["whole"])
    return whole.startswith(got) and len(got) > len(whole) / 2  # of the pieces each may hold several tokens


def judge(client: str, told: Told, expected: Mapping[str, str | list[str]]) -> Verdict:
    """Whether what was told is right, or fails in the way that is known."""
    error, note = " ".join(told.error.split()), ""
    if told.check == "error":
        right = "max_tokens" in error or "400" in error
        note = "" if right else f"no error that names the field: {error or told.got!r}"
    elif error:
        note = error
    elif not is_right(told, expected):
        note = f"got {told.got!r} instead of {expected.get(told.check, expected['whole'])!r}"
    elif told.check == "streamed" and (told.pieces or 0) < 2:
        note = f"came in {told.pieces} piece"
    if not told.refused:
        return Verdict(client, told.way, told.check, not note, note)
    if told.refused.lower() in error.lower():
        return Verdict(client, told.way, told.check, True, told.why)
    return Verdict(client, told.way, told.check, False, note or f"works now, though it should not: {told.why}")


def run(name: str, server: LocalServer, models: tuple[str, str], environment: Mapping[str, str]) -> list[Told]:
    """What one script told; in the end that it failed, if it did."""
    uv = [str(ENVIRONMENTS / "bin" / "uv"), "run", "--quiet", "--no-project", f"--python={sys.executable}"]
    command = [*uv, f"--exclude-newer={AS_OF}", str(SCRIPTS[name]), server.http, server.grpc, *models]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    told = [Told(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith('{"way": ')]
    if done.returncode or not told:
        told.append(Told("the script", "start", error=f"status {done.returncode}: {done.stderr[-1000:]}"))
    return told


def table(columns: Mapping[str, Iterable[Verdict]]) -> list[str]:
    """Lines of Markdown: a row for each client and way, a column for each server."""
    cells: dict[tuple[str, str], dict[str, list[Verdict]]] = {}
    for column, verdicts in columns.items():
        for verdict in verdicts:
            cells.setdefault((verdict.client, verdict.way), {}).setdefault(column, []).append(verdict)
    lines = [f"| client | way | {' | '.join(columns)} |", f"| --- | --- |{' --- |' * len(columns)}"]
    for (client, way), row in cells.items():
        lines.append(f"| {client} | {way} | {' | '.join(cell(row.get(column, [])) for column in columns)} |")
    return lines


def cell(verdicts: list[Verdict]) -> str:
    """What works, and each reason why something does not."""
    parts = [", ".join(verdict.check for verdict in verdicts if not verdict.note)]
    parts += [
        f"no: {verdict.note}" if verdict.good else f"FAILS: {verdict.check}: {verdict.note}"
        for verdict in verdicts
        if verdict.note
    ]
    return "; ".join(part for part in dict.fromkeys(parts) if part).replace("|", "\\|")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Runs clients of others against this server, and prints a table.")
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help=f"some of {', '.join(SCRIPTS)}; default: all")
    names = parser.parse_args(arguments).clients or list(SCRIPTS)
    if unknown := sorted(set(names) - set(SCRIPTS)):
        parser.error(f"no client {', '.join(unknown)}: give some of {', '.join(SCRIPTS)}")
    columns: dict[str, list[Verdict]] = {}
    expected: dict[str, str | list[str]] = {}
    with contextlib.ExitStack() as stack:
        analyzer = stack.enter_context(find_perf_analyzer())  # where its libraries are, and no proxy to here
        environment = analyzer.environment | {
            "UV_CACHE_DIR": str(ENVIRONMENTS / "cache"),
            "UV_PYTHON_DOWNLOADS": "never",
        }
        for column, (options, models) in SERVERS.items():
            columns[column] = []
            try:
                with local_server(options) as server:
                    expected = expected or expected_answers(server)
                    for name in names:
                        print(f"{column}: {name}", file=sys.stderr, flush=True)
                        told = run(name, server, models, environment)
                        columns[column] += [judge(label(SCRIPTS[name]), each, expected) for each in told]
            except ServerFailedError as error:
                print(f"run_clients.py: {error}", file=sys.stderr)
                return 1
    print(*table(columns), sep="\n")
    return int(not all(verdict.good for verdicts in columns.values() for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
