"""deploy/kserve: the objects are as KServe's models have them, and fit each other and the server."""

from __future__ import annotations

import re

import jsonschema
import pytest

from gptj_triton.engine.metrics import METRICS, PREFIX
from gptj_triton.serving.options import Options, read_options
from tests.manifests import (
    KSERVE,
    RELEASES,
    STOP_SECONDS,
    Object,
    allowed,
    one,
    pod_of,
    quantity,
    read_manifests,
    render,
    server_of,
)
from tests.unit.deploy.kserve_schema import check

FILES = sorted(KSERVE.glob("*.yaml"))
HTTP_PORT = 8080  # where KServe sends HTTP to a container that names no port
SERVICES = ("inference-service.yaml", "inference-service-knative.yaml")


def read(name: str) -> Object:
    [found] = read_manifests(KSERVE / name)
    return found


@pytest.fixture
def runtime() -> Object:
    spec: Object = read("serving-runtime.yaml")["spec"]
    return spec


def container_of(runtime: Object) -> Object:
    [container] = runtime["containers"]
    return dict(container)


def options_of(runtime: Object) -> Options:
    return read_options(["--host=0.0.0.0", *container_of(runtime)["args"]])


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_objects_are_as_kserve_has_them(path: object, release: str) -> None:
    for each in read_manifests(KSERVE / str(path)):
        check(each, release)


def test_an_unknown_field_is_noticed() -> None:
    for change in ("storageURI", "nodename"):
        service = read("inference-service.yaml")
        service["spec"]["predictor"]["model"][change] = "x"
        with pytest.raises(jsonschema.ValidationError, match=change):
            check(service, RELEASES[0])
    service = read("inference-service.yaml")
    service["spec"]["predictor"]["tolerations"][0]["operators"] = "Exists"  # of Kubernetes' own
    with pytest.raises(jsonschema.ValidationError, match="operators"):
        check(service, RELEASES[0])


def test_the_container_is_one_that_kserve_finds(runtime: Object) -> None:
    container, options = container_of(runtime), options_of(runtime)
    assert container["name"] == "kserve-container"
    assert "ports" not in container, "Knative allows one, and gRPC takes its place where it is wanted"
    assert options.http_port == HTTP_PORT and options.model == "/mnt/models"
    asked = {
        kind: (container[f"{kind}Probe"]["httpGet"]["path"], container[f"{kind}Probe"]["httpGet"]["port"])
        for kind in ("startup", "readiness", "liveness")
    }
    ready, live = ("/v2/health/ready", HTTP_PORT), ("/v2/health/live", HTTP_PORT)
    assert asked == {"startup": ready, "readiness": ready, "liveness": live}
    assert allowed(container["startupProbe"]) >= options.start_timeout
    assert runtime["annotations"]["prometheus.kserve.io/port"] == str(options.metrics_port)


def test_the_container_is_run_as_in_deploy_kubernetes(runtime: Object) -> None:
    container = container_of(runtime)
    there = render("gpu")
    assert container["image"] == server_of(there)["image"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        numbers = ("periodSeconds", "timeoutSeconds", "failureThreshold")
        assert [container[probe][each] for each in numbers] == [server_of(there)[probe][each] for each in numbers]
    expected = {**server_of(there)["securityContext"], "runAsNonRoot": True, "runAsUser": 1000}
    assert container["securityContext"] == {**expected, "seccompProfile": {"type": "RuntimeDefault"}}
    volumes = [each for each in pod_of(there)["volumes"] if "emptyDir" in each]
    assert runtime["volumes"] == volumes
    assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in volumes}


@pytest.mark.parametrize("name", SERVICES)
def test_an_inference_service_names_the_runtime_and_a_format_that_it_has(name: str, runtime: Object) -> None:
    model = read(name)["spec"]["predictor"]["model"]
    assert model["runtime"] == read("serving-runtime.yaml")["metadata"]["name"]
    formats = [(each["name"], each["version"]) for each in runtime["supportedModelFormats"]]
    assert (model["modelFormat"]["name"], model["modelFormat"]["version"]) in formats
    assert model["protocolVersion"] in runtime["protocolVersions"]
    assert quantity(model["resources"]["limits"]["nvidia.com/gpu"]) == options_of(runtime).tensor_para_size
    [fetch] = one(render("gpu"), "Job", "gptj-weights")["spec"]["template"]["spec"]["containers"]
    target = next(each["value"] for each in fetch["env"] if each["name"] == "TARGET")
    assert model["storageUri"] == f"pvc://gptj-models/{target.removeprefix('/models/')}"


def test_the_deployment_s_pods_have_the_time_to_drain(runtime: Object) -> None:
    predictor = read("inference-service.yaml")["spec"]["predictor"]
    leave = predictor["model"]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert predictor["terminationGracePeriodSeconds"] >= leave + options_of(runtime).drain_timeout + STOP_SECONDS


def test_keda_gets_the_queries_and_thresholds_that_kserve_allows() -> None:
    """As its webhook reads them: validateScalingKedaCompExtension in pkg/apis/serving/v1beta1."""
    service = read("inference-service.yaml")
    annotations = service["metadata"]["annotations"]
    assert annotations["serving.kserve.io/deploymentMode"] == "Standard"
    assert annotations["serving.kserve.io/autoscalerClass"] == "keda"
    predictor = service["spec"]["predictor"]
    assert not predictor.keys() & {"scaleMetric", "scaleTarget"}
    found = {}
    for metric in predictor["autoScaling"]["metrics"]:
        assert metric["type"] == "External" and metric["external"]["metric"]["backend"] == "prometheus"
        assert metric["external"]["target"]["type"] == "Value", "the only one whose `value` is read"
        [name] = re.findall(rf"\b{PREFIX}(\w+)", metric["external"]["metric"]["query"])
        assert METRICS[name].kind == "gauge"
        assert f'pod=~"{service["metadata"]["name"]}-predictor-.*"' in metric["external"]["metric"]["query"]
        found[PREFIX + name] = metric["external"]["target"]["value"]
    keda = one(render("gpu", ["autoscaling-keda"]), "ScaledObject")
    thresholds = [each["metadata"]["threshold"] for each in keda["spec"]["triggers"]]
    assert list(found.values()) == thresholds


def test_knative_is_asked_for_nothing_that_it_refuses(runtime: Object) -> None:
    service = read("inference-service-knative.yaml")
    assert service["metadata"]["annotations"]["serving.kserve.io/deploymentMode"] == "Knative"
    predictor = service["spec"]["predictor"]
    assert predictor["scaleMetric"] == "concurrency"
    # Fields that its Revision does not have, or has a meaning of its own for.
    refused = {"lifecycle", "terminationGracePeriodSeconds", "deploymentStrategy", "autoScaling"}
    assert not refused & (predictor.keys() | predictor["model"].keys() | runtime.keys() | container_of(runtime).keys())
