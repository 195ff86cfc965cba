# /// script
# dependencies = ["aiperf==0.13.0"]
# ///
"""AIPerf, endpoint type `template`: `generate` and `generate_stream`."""

from __future__ import annotations

import json
from typing import Any

from asked import MAX_TOKENS, TOKENIZER, end, measure, read_arguments

ARGUMENTS = read_arguments()
BODY = f'{{"text_input": {{{{ text|tojson }}}}, "max_tokens": {MAX_TOKENS}, "stream": %s}}'


def command(model: str, endpoint: str, body: str, *options: str) -> list[str]:
    fields = json.dumps({"payload_template": body, "response_field": "text_output"})
    made = ["aiperf", "profile", "--model", model, "--url", f"http://{ARGUMENTS.http}", "--endpoint-type=template"]
    made += [f"--endpoint=/v2/models/{model}/{endpoint}", f"--extra-inputs={fields}", f"--tokenizer={TOKENIZER}"]
    return [*made, "--isl=16", "--request-count=4", "--concurrency=2", "--ui=none", *options]


def requests(report: Any) -> float:
    return float(report["request_count"]["avg"])


whole = command(ARGUMENTS.model, "generate", BODY % "false")
measure("`/generate`", whole, "profile_export_aiperf.json", requests)
streamed = command(ARGUMENTS.streaming_model, "generate_stream", BODY % "true", "--streaming")
measure("`/generate_stream`", streamed, "profile_export_aiperf.json", requests)
end()
