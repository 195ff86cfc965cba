"""A JSON schema of KServe's objects, made of the models in its package. The package itself cannot be imported here: it
needs another protobuf than Triton's clients. Kubernetes' own objects inside are as kubernetes-validate has them."""

from __future__ import annotations

import ast
import functools
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate

from tests.manifests import Object
from tests.wheels import wheel

KSERVE_WHEEL = ("kserve", "0.21.0")
KUBERNETES_SCHEMAS = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"
SIMPLE: dict[str, Any] = {
    "str": {"type": "string"},
    "int": {"type": "integer"},
    "bool": {"type": "boolean"},
    "object": {},
    "V1beta1MetricQuantity": {"type": ["string", "integer"]},
}
# Where its generator writes a package into the name.
LONG_NAMES = {
    "K8sIoApiAppsV1DeploymentStrategy": "io.k8s.api.apps.v1.DeploymentStrategy",
    "K8sIoApiAutoscalingV2HorizontalPodAutoscalerBehavior": "io.k8s.api.autoscaling.v2.HorizontalPodAutoscalerBehavior",
    "V1ObjectMeta": "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta",
    "ResourceQuantity": "io.k8s.apimachinery.pkg.api.resource.Quantity",
}


def check(thing: Object, release: str) -> None:
    """Raises jsonschema.ValidationError where an object is not as KServe and a `release` of Kubernetes have it."""
    version = thing["apiVersion"].rpartition("/")[2].capitalize()
    jsonschema.Draft202012Validator(_schema(f"{version}{thing['kind']}", release)).validate(thing)


@functools.cache
def _schema(name: str, release: str) -> Any:
    kubernetes = json.loads((KUBERNETES_SCHEMAS / f"v{release}.0-local-strict" / "_definitions.json").read_text())
    return {"$ref": f"#/$defs/{name}", "$defs": {**kubernetes["$defs"], **_models()}}


@functools.cache
def _models() -> dict[str, Any]:
    with zipfile.ZipFile(wheel(*KSERVE_WHEEL)) as package:
        texts = [package.read(name).decode() for name in package.namelist() if name.startswith("kserve/models/v1")]
    classes = {
        node.name: (node, text) for text in texts for node in ast.parse(text).body if isinstance(node, ast.ClassDef)
    }
    return {name: _model(node, text, set(classes)) for name, (node, text) in classes.items()}


def _model(node: ast.ClassDef, text: str, known: set[str]) -> Any:
    tables = {
        each.targets[0].id: ast.literal_eval(each.value)
        for each in node.body
        if isinstance(each, ast.Assign) and isinstance(each.targets[0], ast.Name) and isinstance(each.value, ast.Dict)
    }
    keys = tables["attribute_map"]
    return {
        "type": "object",
        "properties": {keys[field]: _type(kind, known) for field, kind in tables["openapi_types"].items()},
        "required": [keys[field] for field in re.findall(r"Invalid value for `(\w+)`, must not be `None`", text)],
        "additionalProperties": False,
    }


def _type(kind: str, known: set[str]) -> Any:
    if kind in SIMPLE:
        return SIMPLE[kind]
    if items := re.fullmatch(r"list\[(.*)\]", kind):
        return {"type": "array", "items": _type(items[1], known)}
    if values := re.fullmatch(r"dict\(str, (.*)\)", kind):
        return {"type": "object", "additionalProperties": _type(values[1], known)}
    if kind in known:
        return {"$ref": f"#/$defs/{kind}"}
    return {"$ref": f"#/$defs/{LONG_NAMES.get(kind) or 'io.k8s.api.core.v1.' + kind.removeprefix('V1')}"}
