# /// script
# dependencies = ["genai-perf==0.0.16", "tritonclient==2.51.0"]
# ///
"""GenAI-Perf, which measures streams over gRPC with the perf_analyzer of tritonclient's wheel."""

from __future__ import annotations

import os

from asked import MAX_TOKENS, TOKENIZER, end, measure, read_arguments

ARGUMENTS = read_arguments()
os.environ["HF_HUB_OFFLINE"] = "1"
command = ["genai-perf", "profile", "--model", ARGUMENTS.streaming_model, "--url", ARGUMENTS.grpc, "--streaming"]
command += ["--backend=tensorrtllm", f"--tokenizer={TOKENIZER}", f"--output-tokens-mean={MAX_TOKENS}"]
command += ["--synthetic-input-tokens-mean=16", "--request-count=4", "--concurrency=2"]
measure(
    "`--backend tensorrtllm --streaming`", command, "*_genai_perf.json", lambda report: report["request_count"]["avg"]
)
end()
