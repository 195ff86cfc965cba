"""A pod's one container, run as its specification says by runc, which container engines use themselves: its user, no
rights, a read-only root, the default filter of system calls, its volumes and its memory; processes and a network of its
own. The root is put together from this machine's directories, since there is no image. Needs root."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gptj_triton.bench.debian_programs import debian_program
from gptj_triton.project import PROJECT
from tests.manifests import Object, quantity

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc")
CAPABILITIES = ("bounding", "effective", "inheritable", "permitted", "ambient")
NAMESPACES = ("pid", "mount", "ipc", "uts", "network")
IMAGE_PROJECT = "/opt/gptj-triton"  # where the image has what is PROJECT here


@dataclass
class Pod:
    """One container that runs."""

    folder: Path
    process: subprocess.Popen[bytes]
    runc: tuple[str, ...]
    name: str

    @property
    def pid(self) -> int:
        """The process in the container whose number there is 1."""
        return int((self.folder / "pid").read_text())

    @property
    def log(self) -> str:
        return (self.folder / "stderr").read_text(errors="replace")

    def curl_command(self, url: str, *options: str) -> list[str]:
        """curl in the container's network."""
        return ["nsenter", f"--target={self.pid}", "--net", "curl", "--silent", *options, url]

    def status(self, container: Object, probe: str) -> int:
        """What an HTTP probe of the container gets, as the kubelet asks; 0 where nothing answers in time."""
        asked = container[probe]
        ports = {each["name"]: each["containerPort"] for each in container["ports"]}
        url = f"http://127.0.0.1:{ports[asked['httpGet']['port']]}{asked['httpGet']['path']}"
        options = ["--output", "/dev/null", "--write-out", "%{http_code}", "--max-time", str(asked["timeoutSeconds"])]
        return int(subprocess.run(self.curl_command(url, *options), capture_output=True).stdout or 0)

    def wait_for(self, container: Object, probe: str, status: int = 200, seconds: float = 100) -> None:
        deadline = time.monotonic() + seconds
        while not (self.folder / "pid").exists() or self.status(container, probe) != status:
            if self.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(
                    f"no {probe} with {status}; exit status {self.process.poll()}, log ends:\n{self.log[-3000:]}"
                )
            time.sleep(0.1)

    def processes(self) -> dict[int, tuple[str, str]]:
        """Name and state (`Z` is a zombie) of the container's processes, by their numbers outside."""
        listed = subprocess.run([*self.runc, "ps", "--format=json", self.name], capture_output=True, check=True).stdout
        found = {}
        for pid in json.loads(listed):
            name, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")
            found[pid] = (name, rest.split()[0])
        return found

    def stop(self) -> int:
        """SIGTERM to the first process, as the kubelet sends it; the exit status."""
        subprocess.run([*self.runc, "kill", self.name, "TERM"], check=True)
        return self.process.wait(60)

    def close(self) -> None:
        if self.process.poll() is None:
            subprocess.run([*self.runc, "kill", self.name, "KILL"], check=False)
            self.process.wait(10)


def start(folder: Path, pod: Object, secrets: Mapping[str, Mapping[str, str]]) -> Pod:
    """Starts the only container of a pod. `secrets` has the files of each secret that it mounts."""
    runc = (str(debian_program("runc").path), f"--root={folder / 'state'}")
    (folder / "root").mkdir()
    name = f"gptj-test-{os.getpid()}-{folder.name}"
    (folder / "config.json").write_text(json.dumps(configuration(folder, name, pod, secrets)))
    command = [*runc, "run", f"--bundle={folder}", f"--pid-file={folder / 'pid'}", name]
    with (folder / "stdout").open("wb") as stdout, (folder / "stderr").open("wb") as stderr:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)
    return Pod(folder, process, runc, name)


def configuration(folder: Path, name: str, pod: Object, secrets: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """What runc reads: https://github.com/opencontainers/runtime-spec/blob/main/config.md."""
    [container] = pod["containers"]
    user, own = pod["securityContext"], container["securityContext"]
    assert own["capabilities"] == {"drop": ["ALL"]} and user["seccompProfile"] == {"type": "RuntimeDefault"}
    entry_point, environment = image()
    environment |= {each["name"]: each["value"] for each in container.get("env", ())}
    volumes = {each["name"]: each for each in pod["volumes"]}
    mounts = [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=65536k"]},
    ]
    for mount in container["volumeMounts"]:
        volume = volumes[mount["name"]]
        if "emptyDir" in volume:
            # A kubelet gives a volume to fsGroup, with the bit by which new files get the group too.
            size = int(quantity(volume["emptyDir"]["sizeLimit"]))
            options = ["nosuid", "nodev", "mode=2777", f"gid={user['fsGroup']}", f"size={size}"]
            mounts.append({"destination": mount["mountPath"], "type": "tmpfs", "source": "tmpfs", "options": options})
        else:
            source = write_secret(folder / mount["name"], volume["secret"], secrets, user["fsGroup"])
            mounts.append(bind(source, mount["mountPath"]))
    mounts += [bind(Path(path), path) for path in SYSTEM if os.path.exists(path)]
    mounts += [bind(Path(path), path) for path in dict.fromkeys((sys.base_prefix, str(PROJECT))) if path != "/usr"]
    return {
        "ociVersion": "1.0.2",
        "root": {"path": "root", "readonly": own["readOnlyRootFilesystem"]},
        "process": {
            "user": {"uid": user["runAsUser"], "gid": user["runAsGroup"], "additionalGids": [user["fsGroup"]]},
            "args": [*entry_point, *container["args"]],
            "env": [f"{key}={value}" for key, value in environment.items()],
            "cwd": "/",
            "capabilities": {each: [] for each in CAPABILITIES},
            "noNewPrivileges": not own["allowPrivilegeEscalation"],
        },
        "mounts": mounts,
        "linux": {
            "namespaces": [{"type": each} for each in NAMESPACES],
            "cgroupsPath": f"/{name}",
            "resources": {"memory": {"limit": int(quantity(container["resources"]["limits"]["memory"]))}},
            "seccomp": default_filter(),
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/scsi"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    }


def image() -> tuple[list[str], dict[str, str]]:
    """Entry point and environment of deploy/Containerfile, with this project in the place of its own."""
    text = (PROJECT / "deploy" / "Containerfile").read_text()
    [entry_point] = re.findall(r"^ENTRYPOINT (.*)$", text, re.M)
    [environment] = re.findall(r"^ENV (.*)$", text, re.M)
    words: list[str] = json.loads(entry_point.replace(IMAGE_PROJECT, str(PROJECT)))
    return words, {"PATH": "/usr/local/bin:/usr/bin:/bin", **dict(each.split("=", 1) for each in environment.split())}


def bind(source: Path, destination: str) -> dict[str, Any]:
    return {"destination": destination, "type": "bind", "source": str(source), "options": ["rbind", "ro"]}


def write_secret(folder: Path, secret: Object, secrets: Mapping[str, Mapping[str, str]], group: int) -> Path:
    """A secret's files as a kubelet lays them: links to links, so that all change at once."""
    data = folder / "..2026_01_01"
    data.mkdir(parents=True)
    (folder / "..data").symlink_to(data.name)
    for name, text in secrets[secret["secretName"]].items():
        (data / name).write_text(text)
        os.chown(data / name, 0, group)
        (data / name).chmod(secret["defaultMode"])
        (folder / name).symlink_to(f"..data/{name}")
    return folder


def default_filter() -> dict[str, Any]:
    """The system calls that container engines allow to a container without rights (RuntimeDefault), for runc."""
    profile = json.loads(debian_program("seccomp.json").path.read_text())
    assert platform.machine() == "x86_64"
    calls = []
    for rule in profile["syscalls"]:
        only, never = rule.get("includes", {}), rule.get("excludes", {})
        if only.get("caps") or "amd64" not in only.get("arches", ["amd64"]) or "amd64" in never.get("arches", []):
            continue
        calls.append({key: rule[key] for key in ("names", "action", "args", "errnoRet") if rule.get(key) is not None})
    return {
        "defaultAction": profile["defaultAction"],
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": calls,
    }


def can_run() -> bool:
    return os.geteuid() == 0 and shutil.which("nsenter") is not None
