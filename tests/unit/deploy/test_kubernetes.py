"""deploy/kubernetes: the objects that kubectl makes of it are valid, and fit each other and the server."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.prometheus_operator.v1 import PodMonitor

from gptj_triton.engine.metrics import METRICS, PREFIX
from gptj_triton.project import PROJECT
from gptj_triton.serving.options import Options, read_options
from tests.manifests import (
    KUBERNETES,
    RELEASES,
    STOP_SECONDS,
    Object,
    allowed,
    of_kind,
    one,
    pod_of,
    pod_templates,
    quantity,
    render,
    rendered,
    server_of,
)

# What users may choose: an overlay as it is, or with components.
VARIANTS = {
    "cpu": ("cpu", ()),
    "gpu": ("gpu", ()),
    "cpu with prometheus-adapter": ("cpu", ("autoscaling-hpa", "pod-monitor")),
    "gpu with KEDA": ("gpu", ("autoscaling-keda", "pod-monitor", "gateway")),
    "cpu with a volume": ("cpu", ("weights",)),
}
CRDS = {"ScaledObject": ScaledObject, "PodMonitor": PodMonitor}
UNCHECKED = {"HTTPRoute"}  # of which PyPI has no schema


@pytest.fixture(params=VARIANTS, ids=lambda name: name.replace(" ", "-"))
def objects(request: pytest.FixtureRequest) -> list[Object]:
    return render(*VARIANTS[request.param])


def options_of(objects: list[Object]) -> Options:
    return read_options(["--host=0.0.0.0", *server_of(objects)["args"]])


def containers(objects: list[Object]) -> Iterator[tuple[Object, Object]]:
    """Each pod's specification, and each of its containers."""
    for template in pod_templates(objects):
        for container in [*template["spec"].get("initContainers", ()), *template["spec"]["containers"]]:
            yield template["spec"], container


def test_every_component_and_overlay_is_in_a_variant() -> None:
    chosen = {name for _, components in VARIANTS.values() for name in components} | {"api-keys"}  # in both overlays
    assert chosen == {each.name for each in (KUBERNETES / "components").iterdir()}
    assert {overlay for overlay, _ in VARIANTS.values()} == {each.name for each in (KUBERNETES / "overlays").iterdir()}


@pytest.mark.parametrize("release", RELEASES)
def test_kubernetes_own_objects_are_as_its_schema_has_them(objects: list[Object], release: str) -> None:
    for each in objects:
        if each["kind"] not in CRDS.keys() | UNCHECKED:
            kubernetes_validate.validate(each, release, strict=True)


def test_an_unknown_field_is_noticed(objects: list[Object]) -> None:
    deployment = one(objects, "Deployment")
    deployment["spec"]["template"]["spec"]["containers"][0]["imagePullpolicy"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError, match="imagePullpolicy"):
        kubernetes_validate.validate(deployment, RELEASES[0], strict=True)


def test_objects_of_others_are_as_their_models_have_them(objects: list[Object]) -> None:
    for each in objects:
        if each["kind"] in CRDS:
            model = CRDS[each["kind"]].model_validate(each)
            # A field that the model does not know would be missing.
            assert model.model_dump(by_alias=True, exclude_unset=True, mode="json") == each


def labels_match(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    wanted = selector.get("matchLabels", selector)
    assert wanted, "a selector without labels takes all pods"
    return bool(wanted.items() <= labels.items())


def test_every_selector_takes_the_pods_of_one_workload(objects: list[Object]) -> None:
    pods = {each["metadata"]["name"]: each["spec"]["template"] for each in of_kind(objects, "Deployment", "Job")}
    deployment = one(objects, "Deployment")["spec"]
    selectors = [
        deployment["selector"],
        *(each["labelSelector"] for each in deployment["template"]["spec"]["topologySpreadConstraints"]),
        *(each["spec"]["selector"] for each in of_kind(objects, "Service", "PodDisruptionBudget", "PodMonitor")),
    ]
    for selector in selectors:
        assert [name for name, pod in pods.items() if labels_match(selector, pod["metadata"]["labels"])] == [
            "gptj-triton"
        ]
    policies = {each["metadata"]["name"]: each["spec"]["podSelector"] for each in of_kind(objects, "NetworkPolicy")}
    for name, selector in policies.items():
        assert [pod for pod in pods if labels_match(selector, pods[pod]["metadata"]["labels"])] == [name]
    assert policies.keys() == pods.keys(), "each workload has a policy"


def test_every_port_is_one_that_the_server_listens_on(objects: list[Object]) -> None:
    options = options_of(objects)
    ports = {each["name"]: each["containerPort"] for each in server_of(objects)["ports"]}
    assert ports == {"http": options.http_port, "grpc": options.grpc_port, "metrics": options.metrics_port}
    services = [port for each in of_kind(objects, "Service") for port in each["spec"]["ports"]]
    assert services and all(ports[each["targetPort"]] == each["port"] for each in services)
    policy = one(objects, "NetworkPolicy")["spec"]["ingress"]
    assert [[port["port"] for port in rule["ports"]] for rule in policy] == [["http", "grpc"], ["metrics"]]
    for monitor in of_kind(objects, "PodMonitor"):
        assert [each["port"] for each in monitor["spec"]["podMetricsEndpoints"]] == ["metrics"]
    for route in of_kind(objects, "HTTPRoute"):
        [backend] = route["spec"]["rules"][0]["backendRefs"]
        assert {"name": backend["name"], "port": backend["port"]} == {"name": "gptj-triton", "port": options.http_port}


def test_the_probes_ask_what_the_operations_page_says(objects: list[Object]) -> None:
    server = server_of(objects)
    asked = {kind: server[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")}
    ready, live = {"path": "/v2/health/ready", "port": "http"}, {"path": "/v2/health/live", "port": "http"}
    assert asked == {"startup": ready, "readiness": ready, "liveness": live}
    assert allowed(server["startupProbe"]) >= options_of(objects).start_timeout
    assert allowed(server["startupProbe"]) < one(objects, "Deployment")["spec"]["progressDeadlineSeconds"]
    assert allowed(server["livenessProbe"]) == 60, "as the operations page says"
    assert allowed(server["readinessProbe"]) <= 5, "an engine is away for some 3 s"


def test_a_pod_has_the_time_to_leave_the_services_and_to_drain(objects: list[Object]) -> None:
    pod, options = pod_of(objects), options_of(objects)
    leave = server_of(objects)["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert leave >= 5
    assert pod["terminationGracePeriodSeconds"] >= leave + options.drain_timeout + STOP_SECONDS


def test_every_request_brings_a_key(objects: list[Object]) -> None:
    file = options_of(objects).api_key_file
    assert str(file) == "/run/secrets/gptj-triton/api-keys"
    mounts = {each["mountPath"]: each for each in server_of(objects)["volumeMounts"]}
    mount = mounts["/run/secrets/gptj-triton"]
    volume = next(each for each in pod_of(objects)["volumes"] if each["name"] == mount["name"])
    assert mount["readOnly"] and volume["secret"] == {"secretName": "gptj-api-keys", "defaultMode": 0o440}


def test_containers_have_no_rights(objects: list[Object]) -> None:
    for pod, container in containers(objects):
        shared, own = pod["securityContext"], container["securityContext"]
        assert shared["runAsNonRoot"] and shared["runAsUser"] == shared["runAsGroup"] == shared["fsGroup"] == 1000
        assert shared["seccompProfile"] == {"type": "RuntimeDefault"}
        assert own == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert pod["automountServiceAccountToken"] is False and pod["enableServiceLinks"] is False
        assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}
    assert one(objects, "ServiceAccount")["automountServiceAccountToken"] is False
    labels = one(objects, "Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_what_is_written_to_is_bounded(objects: list[Object]) -> None:
    for pod, container in containers(objects):
        volumes = {each["name"]: each for each in pod["volumes"]}
        writable = {each["mountPath"]: volumes[each["name"]] for each in container["volumeMounts"]}
        writable = {path: volume for path, volume in writable.items() if "emptyDir" in volume}
        assert all("sizeLimit" in volume["emptyDir"] for volume in writable.values())
    mounts = {each["mountPath"]: each["name"] for each in server_of(objects)["volumeMounts"]}
    volumes = {each["name"]: each for each in pod_of(objects)["volumes"]}
    assert "medium" not in volumes[mounts["/tmp"]]["emptyDir"]
    shared = volumes[mounts["/dev/shm"]]["emptyDir"]
    assert shared["medium"] == "Memory" and quantity(shared["sizeLimit"]) >= 2**30


def test_containers_ask_for_what_they_need(objects: list[Object]) -> None:
    for _, container in containers(objects):
        resources = container["resources"]
        assert resources["requests"].keys() == {"cpu", "memory"}
        assert quantity(resources["limits"]["memory"]) >= quantity(resources["requests"]["memory"])
        assert "cpu" not in resources["limits"], "a limit stops the engine in the middle of a step"
    options, limits = options_of(objects), server_of(objects)["resources"]["limits"]
    assert limits.get("nvidia.com/gpu", 0) == (options.tensor_para_size if options.device == "cuda" else 0)


def test_what_pods_refer_to_is_there(objects: list[Object]) -> None:
    names = {kind: {each["metadata"]["name"] for each in of_kind(objects, kind)} for kind in KINDS}
    for pod, container in containers(objects):
        assert pod["serviceAccountName"] in names["ServiceAccount"]
        volumes = {each["name"]: each for each in pod["volumes"]}
        assert {each["name"] for each in container["volumeMounts"]} <= volumes.keys()
        for volume in volumes.values():
            if "configMap" in volume:
                assert volume["configMap"]["name"] in names["ConfigMap"]
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in names["PersistentVolumeClaim"]
    for each in objects:
        assert each["metadata"].get("namespace", "gptj-triton") == "gptj-triton"
        assert each["metadata"]["labels"]["app.kubernetes.io/name"] == "gptj-triton"


KINDS = ("ServiceAccount", "ConfigMap", "PersistentVolumeClaim")


def test_the_weights_that_the_job_makes_are_those_that_the_server_reads() -> None:
    objects = render("gpu")
    [fetch] = one(objects, "Job", "gptj-weights")["spec"]["template"]["spec"]["containers"]
    target = next(each["value"] for each in fetch["env"] if each["name"] == "TARGET")
    [wait] = pod_of(objects)["initContainers"]
    assert options_of(objects).model == target and f"test -d {target};" in wait["command"][-1]
    for container in (fetch, wait, server_of(objects)):
        [mount] = [each for each in container["volumeMounts"] if each["name"] == "models"]
        assert target.startswith(f"{mount['mountPath']}/")
        assert mount.get("readOnly", False) == (container is not fetch)
    [script] = of_kind(objects, "ConfigMap")
    variables = set(re.findall(r"\$([A-Z_]+)", script["data"]["fetch-weights.sh"]))
    assert variables == {each["name"] for each in fetch["env"]}


def test_images_are_those_of_this_version(objects: list[Object]) -> None:
    [version] = re.findall(r'^version = "(.*)"', (PROJECT / "pyproject.toml").read_text(), re.M)
    kind = "-cpu" if options_of(objects).device == "cpu" else ""
    assert {container["image"] for _, container in containers(objects)} == {f"gptj-triton:{version}{kind}"}


def asked_metrics(text: str) -> set[str]:
    return set(re.findall(rf"\b{PREFIX}\w+", text))


def test_autoscalers_ask_for_what_is_counted_and_alike() -> None:
    hpa = one(render("cpu", ["autoscaling-hpa"]), "HorizontalPodAutoscaler")["spec"]
    keda = one(render("cpu", ["autoscaling-keda"]), "ScaledObject")["spec"]
    targets = {
        each["pods"]["metric"]["name"]: quantity(each["pods"]["target"]["averageValue"]) for each in hpa["metrics"]
    }
    assert f"{PREFIX}num_tokens_waiting" in targets
    assert targets.keys() <= {f"{PREFIX}{name}" for name, metric in METRICS.items() if metric.kind == "gauge"}
    thresholds = {}
    for trigger in keda["triggers"]:
        assert (trigger["type"], trigger["metricType"]) == ("prometheus", "AverageValue")
        [name] = asked_metrics(trigger["metadata"]["query"])
        thresholds[name] = float(trigger["metadata"]["threshold"])
    assert thresholds == targets
    assert (keda["minReplicaCount"], keda["maxReplicaCount"]) == (hpa["minReplicas"], hpa["maxReplicas"])
    assert keda["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == hpa["behavior"]
    assert keda["scaleTargetRef"] == hpa["scaleTargetRef"]
    assert hpa["behavior"]["scaleDown"]["stabilizationWindowSeconds"] >= 300


def test_prometheus_adapter_has_a_rule_for_what_the_autoscaler_asks() -> None:
    values = yaml.safe_load((KUBERNETES / "components" / "autoscaling-hpa" / "prometheus-adapter.yaml").read_text())
    [rule] = values["rules"]["custom"]
    [found] = re.findall(r'__name__=~"(.*?)"', rule["seriesQuery"])
    hpa = one(render("cpu", ["autoscaling-hpa"]), "HorizontalPodAutoscaler")["spec"]
    assert set(found.split("|")) == {each["pods"]["metric"]["name"] for each in hpa["metrics"]}


def test_only_an_autoscaler_says_how_many(objects: list[Object]) -> None:
    scaled = bool(of_kind(objects, "HorizontalPodAutoscaler", "ScaledObject"))
    deployment = one(objects, "Deployment")
    assert ("replicas" in deployment["spec"]) == (not scaled)
    for each in of_kind(objects, "HorizontalPodAutoscaler", "ScaledObject"):
        target = each["spec"]["scaleTargetRef"]
        assert {target[key] for key in ("apiVersion", "kind")} == {deployment["apiVersion"], deployment["kind"]}
        assert target["name"] == deployment["metadata"]["name"]


def test_an_overlay_as_the_documentation_has_it(tmp_path: Path) -> None:
    text = (PROJECT / "docs" / "deployment.md").read_text()
    [block] = re.findall(r"\n\n((?:    .*\n|\n)*    kind: Kustomization\n(?:    .*\n|\n)*)", text)
    (tmp_path / "kustomization.yaml").write_text(textwrap.dedent(block))
    (tmp_path / "gptj-triton").symlink_to(PROJECT)
    objects = rendered(tmp_path)
    server = server_of(objects)
    assert server["image"].startswith("YOUR_REGISTRY/gptj-triton:")
    options = options_of(objects)
    assert options.limit == [("max_request_tokens", 4096)] and options.api_key_file and options.device == "cuda"
    assert one(objects, "ScaledObject") and one(objects, "PodMonitor")
