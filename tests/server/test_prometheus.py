"""What a real Prometheus reads of a real server: what was sent is what is counted, the dashboard asks for nothing else,
and no alert is wrong about a server that is well.

Prometheus and its exporter are Debian's."""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from gptj_triton.bench.debian_programs import debian_program
from gptj_triton.client import Client, ServerError
from gptj_triton.engine.metrics import METRICS, PREFIX
from gptj_triton.project import PROJECT
from tests.manifests import KSERVE, KUBERNETES, one, read_manifests, render
from tests.server.conftest import CLOSE, Server, free_ports, wait_until

PROMPT = "Once upon a time"
PROMPT_TOKENS = 4
DASHBOARD = PROJECT / "deploy" / "grafana.json"
ALERTS = PROJECT / "deploy" / "prometheus" / "rules.yml"
BLACKBOX = PROJECT / "deploy" / "prometheus" / "blackbox.yml"
VARIABLES = {"$__rate_interval": "1m", "$instance": ".*"}


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus that scrapes one server."""

    url: str

    def ask(self, path: str, **parameters: str) -> Any:
        answer = requests.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=10).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Its series, each with `metric` (labels) and `value`."""
        found: list[dict[str, Any]] = self.ask("query", query=expression)["result"]
        return found

    def value(self, expression: str) -> float:
        """The value of an expression that has one series; 0 without any."""
        found = self.query(expression)
        assert len(found) <= 1, found
        return float(found[0]["value"][1]) if found else 0.0

    def by(self, label: str, expression: str) -> dict[str, float]:
        """What is not 0 of an expression, by the values of a label."""
        values = {each["metric"][label]: float(each["value"][1]) for each in self.query(expression)}
        return {name: value for name, value in values.items() if value}


@pytest.fixture(scope="module")
def prometheus(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    folder = tmp_path_factory.mktemp("prometheus")
    program = debian_program("prometheus")
    job = {"job_name": "gptj", "static_configs": [{"targets": [server.metrics_url]}]}
    often = {"scrape_interval": "500ms", "evaluation_interval": "1s"}
    config = folder / "prometheus.yml"
    config.write_text(json.dumps({"global": often, "rule_files": [str(ALERTS)], "scrape_configs": [job]}))
    address = f"127.0.0.1:{free_ports(1)[0]}"
    command = [str(program.path), f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, f"--web.listen-address={address}"], stdout=log, stderr=log, env=program.environment
        )
    try:
        started = Prometheus(f"http://{address}")

        def scrapes() -> bool:
            assert process.poll() is None, (folder / "log").read_text()
            try:
                return started.value("count(gptj_num_requests_max)") == 1
            except requests.RequestException:  # it is starting
                return False

        wait_until(scrapes, "scrape")
        yield started
    finally:
        process.terminate()
        process.wait()


class Sent:
    """Sends requests, and notes how each ended."""

    def __init__(self, server: Server) -> None:
        self._url = server.http_url
        self._client = Client(server.http_url)
        self._batches = Client(server.grpc_url, protocol="grpc")
        self.reasons: Counter[str] = Counter()
        self.new_tokens = self.sequences = self.refused = 0

    def whole(self, **fields: Any) -> None:
        answer = self._client.generate(PROMPT, **fields)
        self._note(answer.finish_reason, answer.sequence_length)

    def stream(self, **fields: Any) -> None:
        *_, answer = self._client.stream(PROMPT, **fields)
        self._note(answer.finish_reason, answer.sequence_length)

    def timed_out(self, **fields: Any) -> None:
        url = f"http://{self._url}/v2/models/ensemble/generate"
        answer = requests.post(url, json={"text_input": PROMPT, **fields}, headers=CLOSE, timeout=60).json()
        self._note([answer["finish_reason"]], [answer["sequence_length"]])

    def batch(self, rows: int, **fields: Any) -> None:
        answers = self._batches.generate_batch([PROMPT] * rows, **fields)
        for answer in answers:
            self._note(answer.finish_reason, answer.sequence_length)
        self.reasons["length"] -= rows - 1  # one request, whatever it has of rows

    def wrong(self, **fields: Any) -> None:
        with pytest.raises(ServerError):
            self._client.generate(PROMPT, **fields)
        self.refused += 1

    def _note(self, reasons: list[str], lengths: list[int]) -> None:
        self.reasons[reasons[0]] += 1
        self.sequences += len(lengths)
        self.new_tokens += sum(length - PROMPT_TOKENS for length in lengths)


def test_what_was_sent_is_what_prometheus_counts(server: Server, prometheus: Prometheus) -> None:
    sums = {
        name: f"sum({PREFIX}{name})"
        for name in (
            "generation_tokens_total",
            "prompt_tokens_total",
            "request_failed_total",
            "time_to_first_token_seconds_count",
            "e2e_request_latency_seconds_count",
        )
    }
    reasons = f"sum by (finished_reason) ({PREFIX}request_success_total)"
    refusals = f'sum by (reason) ({PREFIX}request_refused_total{{reason="invalid"}})'
    gaps = f"sum({PREFIX}inter_token_latency_seconds_count)"
    gaps_before = prometheus.value(gaps)
    before = {name: prometheus.value(expression) for name, expression in sums.items()}
    reasons_before = prometheus.by("finished_reason", reasons)
    refused_before = prometheus.by("reason", refusals)

    sent = Sent(server)
    for length in (1, 2, 5, 9):
        sent.whole(max_tokens=length)
        sent.stream(max_tokens=length)
    sent.whole(max_tokens=30, stop_words=["king"])
    sent.timed_out(max_tokens=900, min_tokens=900, timeout=300_000)
    sent.batch(3, max_tokens=4)
    for tokens in (0, -1, 10**6):
        sent.wrong(max_tokens=tokens)

    def counted() -> tuple[dict[str, float], Counter[str], Counter[str]]:
        """What has been counted since the test began: sums, answers by reason, refusals by reason."""
        return (
            {name: prometheus.value(expression) - before[name] for name, expression in sums.items()},
            Counter(prometheus.by("finished_reason", reasons)) - Counter(reasons_before),
            Counter(prometheus.by("reason", refusals)) - Counter(refused_before),
        )

    assert sent.reasons["timeout"] == sent.reasons["stop"] == 1
    expected = {
        "generation_tokens_total": sent.new_tokens,
        "prompt_tokens_total": sent.sequences * PROMPT_TOKENS,
        "request_failed_total": 0,
        "time_to_first_token_seconds_count": sent.sequences,
        "e2e_request_latency_seconds_count": sent.sequences - sent.reasons["timeout"],
    }
    as_sent = expected, sent.reasons, Counter(invalid=sent.refused)
    try:
        wait_until(lambda: counted() == as_sent, "agreement", 10)
    except AssertionError:
        assert counted() == as_sent  # says where
        raise
    # The tokens of a long answer come in more than one report, each of which observes a bounded number of times.
    assert 0 < prometheus.value(gaps) - gaps_before <= sent.new_tokens - sent.sequences


def test_what_the_engine_counts_has_one_series(prometheus: Prometheus) -> None:
    for name in ("num_requests_running", "generation_tokens_total", "step_time_seconds_count", "kv_cache_pages"):
        assert prometheus.value(f"count({PREFIX}{name})") == 1, name


def test_prometheus_knows_each_metric_by_its_kind(prometheus: Prometheus) -> None:
    known = prometheus.ask("metadata")
    for name, metric in METRICS.items():
        assert {each["type"] for each in known[PREFIX + name]} == {metric.kind}, name


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return [panel for panel in found if panel["type"] != "row"]


def expressions() -> list[str]:
    found = [target["expr"] for panel in panels() for target in panel["targets"]]
    for variable, value in VARIABLES.items():
        found = [expression.replace(variable, value) for expression in found]
    return found


def test_each_query_of_the_dashboard_answers_with_data(server: Server, prometheus: Prometheus) -> None:
    sent = Sent(server)
    sent.whole(max_tokens=5)  # whatever ran before
    sent.stream(max_tokens=5)
    sent.wrong(max_tokens=0)
    assert all("$" not in expression for expression in expressions()), "a variable that is not known here"

    def silent() -> list[str]:
        """A histogram's quantile is a number only where something was observed within the rate's minute."""
        found = {expression: prometheus.query(expression) for expression in expressions()}
        return [expression for expression, series in found.items() if all(each["value"][1] == "NaN" for each in series)]

    try:
        wait_until(lambda: not silent(), "data", 20)
    except AssertionError:
        assert silent() == []  # says where
        raise


def autoscalers_queries() -> Iterator[str]:
    """What KEDA, KServe and prometheus-adapter ask Prometheus for."""
    for trigger in one(render("cpu", ["autoscaling-keda"]), "ScaledObject")["spec"]["triggers"]:
        yield trigger["metadata"]["query"]
    [service] = read_manifests(KSERVE / "inference-service.yaml")
    for metric in service["spec"]["predictor"]["autoScaling"]["metrics"]:
        yield metric["external"]["metric"]["query"]
    [values] = read_manifests(KUBERNETES / "components" / "autoscaling-hpa" / "prometheus-adapter.yaml")
    [rule] = values["rules"]["custom"]
    for metric in one(render("cpu", ["autoscaling-hpa"]), "HorizontalPodAutoscaler")["spec"]["metrics"]:
        query = rule["metricsQuery"].replace("<<.Series>>", metric["pods"]["metric"]["name"])
        yield query.replace("<<.LabelMatchers>>", 'pod="a"').replace("<<.GroupBy>>", "pod")


def test_what_autoscalers_ask_for_is_there(prometheus: Prometheus) -> None:
    for query in autoscalers_queries():
        assert prometheus.query(query) == [], "labels of a cluster"
        assert len(prometheus.query(re.sub(r"\{.*?\}", "", query))) == 1, query


def test_no_rule_fails_and_no_alert_waits_to_fire_at_a_server_that_is_well(prometheus: Prometheus) -> None:
    def rules() -> list[dict[str, Any]]:
        return [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]

    wait_until(lambda: all(rule["health"] != "unknown" for rule in rules()), "evaluation")
    assert [rule for rule in rules() if rule["health"] != "ok"] == []
    of_the_machine = {"GptjMachineMemory", "GptjMemoryGrows"}  # other programs use it, too

    def waiting() -> set[str]:
        return {rule["name"] for rule in rules() if rule.get("state", "inactive") != "inactive"}

    wait_until(lambda: waiting() <= of_the_machine, "rest of the alerts")  # some wait before the first scrape
    assert prometheus.value("gptj:servers_ready:ratio") == 1


def test_the_model_that_alerts_take_for_ready_is_there_with_the_labels_that_they_join(prometheus: Prometheus) -> None:
    assert (
        len(prometheus.query('gptj_num_requests_max and on (job, instance) nv_inference_count{model="engine_ready"}'))
        == 1
    )


def test_the_exporter_s_module_sends_a_real_request(server: Server, tmp_path: Path) -> None:
    program, address = debian_program("prometheus-blackbox-exporter"), f"127.0.0.1:{free_ports(1)[0]}"
    command = [str(program.path), f"--config.file={BLACKBOX}", f"--web.listen-address={address}"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=program.environment)

    def succeeds(target: str) -> bool | None:
        """What it says of a target; None while it does not listen."""
        query = {"module": "gptj_answers", "target": target}
        try:
            answer = requests.get(f"http://{address}/probe", params=query, timeout=15).text
        except requests.ConnectionError:
            return None
        return re.search(r"^probe_success 1$", answer, re.M) is not None

    models = f"http://{server.http_url}/v2/models"
    try:
        wait_until(lambda: succeeds(f"{models}/ensemble/generate") is not None, "the exporter")
        assert succeeds(f"{models}/ensemble/generate")
        assert not succeeds(f"{models}/no-such-model/generate")
        assert not succeeds(f"{models}/ensemble/ready")
    finally:
        process.terminate()
        process.wait()


def test_the_dashboard_shows_what_is_counted(prometheus: Prometheus) -> None:
    asked = set(re.findall(rf"\b{PREFIX}(\w+)", " ".join(expressions())))
    asked = {name.removesuffix("_bucket") for name in asked}
    # The same, by other names: sums and parts of what is shown.
    left_out = {"num_requests_active", "num_requests_prefilling", "kv_cache_free_pages", "kv_cache_page_tokens"}
    assert asked == METRICS.keys() - left_out


def test_the_dashboard_s_panels_have_what_grafana_needs_and_do_not_overlap() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    assert dashboard["title"] and dashboard["uid"] and dashboard["schemaVersion"] >= 36
    variables = {each["name"] for each in dashboard["templating"]["list"]}
    assert variables == {"datasource", "instance"}
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["type"] in {"timeseries", "stat"} and panel["description"]
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
        references = [target["refId"] for target in panel["targets"]]
        assert len(references) == len(set(references))
