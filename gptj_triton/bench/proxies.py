"""nginx and HAProxy with the files of deploy/proxy, before servers of this machine: the files go to a directory of
their own, with what an operator sets in them. Starts nothing, and knows nothing of requests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gptj_triton.bench.debian_programs import debian_program
from gptj_triton.install.programs import run
from gptj_triton.project import PROJECT

DEPLOY = PROJECT / "deploy" / "proxy"
PROXIES = ("nginx", "haproxy")
SERVERS = 3  # as many as the files have


@dataclass(frozen=True)
class Behind:
    """HOST:PORT of a server behind the proxy: HTTP and metrics."""

    http: str
    metrics: str


@dataclass(frozen=True)
class Proxy:
    """How to start one, as an ordinary user, in the foreground; SIGTERM ends it."""

    command: list[str]
    environment: dict[str, str]
    address: str  # HOST:PORT for clients, TLS
    inside: str  # HOST:PORT of metrics
    certificate: Path  # of 127.0.0.1, signed by itself
    log: Path  # a line of JSON for each request; what else it says goes to stderr, and HAProxy's lines to stdout


def prepare(
    name: str,
    servers: Sequence[Behind],
    ports: Sequence[int],
    keys: Mapping[str, str],
    folder: Path,
    *,
    server_key: str = "none",
    rate: int = 20,
    connections: int = 64,
) -> Proxy:
    """`nginx` or `haproxy` before three servers, with five `ports` that are free: clients', inside, and the hops'.

    `keys` are those of clients, by name; `rate` is requests of a key in a second, `connections` those of an address.
    """
    if len(servers) != SERVERS:
        raise ValueError(f"{len(servers)} servers; the files have {SERVERS}")
    for file in DEPLOY.iterdir():
        if file.name.startswith(name):
            shutil.copy(file, folder)
    _make_certificate(folder)
    made = _nginx if name == "nginx" else _haproxy
    return made(servers, [f"127.0.0.1:{port}" for port in ports], keys, folder, server_key, rate, connections)


def _make_certificate(folder: Path) -> None:
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "30"]
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    key, certificate = folder / "tls.key", folder / "tls.crt"
    run("openssl", "req", "-x509", *kind, *subject, "-keyout", key, "-out", certificate)
    (folder / "tls.pem").write_text(certificate.read_text() + key.read_text())


def _haproxy(
    servers: Sequence[Behind],
    addresses: Sequence[str],
    keys: Mapping[str, str],
    folder: Path,
    server_key: str,
    rate: int,
    connections: int,
) -> Proxy:
    (folder / "haproxy-keys.map").write_text("".join(f"{key} {name}\n" for name, key in keys.items()))
    program = debian_program("haproxy")
    settings = {
        "GPTJ_LISTEN": addresses[0],
        "GPTJ_LISTEN_INSIDE": addresses[1],
        "GPTJ_SERVER_KEY": server_key,
        "GPTJ_HOPS": f"gptj-{addresses[0]}-",
        "GPTJ_RATE": str(10 * rate),
        "GPTJ_CONNECTIONS": str(connections),
    }
    for number, server in enumerate(servers, 1):
        settings |= {f"GPTJ_SERVER_{number}": server.http, f"GPTJ_METRICS_{number}": server.metrics}
    command = [str(program.path), "-db", "-f", str(folder / "haproxy.cfg")]
    environment = {**program.environment, **settings}
    return Proxy(command, environment, addresses[0], addresses[1], folder / "tls.crt", folder / "log")


def _nginx(
    servers: Sequence[Behind],
    addresses: Sequence[str],
    keys: Mapping[str, str],
    folder: Path,
    server_key: str,
    rate: int,
    connections: int,
) -> Proxy:
    (folder / "nginx-keys.conf").write_text("".join(f'"~^Bearer \\Q{key}\\E$" {name};\n' for name, key in keys.items()))
    program = debian_program("nginx")
    (folder / "modules").symlink_to(program.root / "usr/lib/nginx/modules")
    # Debian's nginx has these in /var, where only root may write.
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"{kind}_temp_path {folder}/{kind}; " for kind in kinds)
    changes = {
        "http {": f"http {{ {temporary}",
        "listen 8443": f"listen {addresses[0]}",
        "listen 127.0.0.1:8404": f"listen {addresses[1]}",
        "/var/log/nginx/gptj.log": str(folder / "log"),
        "rate=20r/s": f"rate={rate}r/s",
        "burst=200": f"burst={10 * rate}",
        "addresses 64": f"addresses {connections}",
        "{ default none; }": f'{{ default "{server_key}"; }}',
        "worker_processes auto": "worker_processes 2",
    }
    for number, server in enumerate(servers):
        port = addresses[2 + number].rpartition(":")[2]
        changes |= {
            f"127.0.0.1:80{number}0;": f"{server.http};",
            f"127.0.0.1:80{number}2/metrics": f"{server.metrics}/metrics",
            f"127.0.0.1:848{number + 1}": addresses[2 + number],
            f" 848{number + 1} triton": f" {port} triton",
        }
    config = folder / "nginx.conf"
    text = config.read_text()
    for old, new in changes.items():
        if old not in text:
            raise ValueError(f"{config.name} has no {old!r}")
        text = text.replace(old, new)
    config.write_text(text)
    command = [str(program.path), "-p", str(folder), "-c", str(config), "-e", "stderr"]
    # Workers of root's nginx are another user's, who cannot reach a directory of root.
    user = "" if os.getuid() else "user root; "
    command += ["-g", f"{user}pid {folder}/pid; daemon off;"]
    return Proxy(command, program.environment, addresses[0], addresses[1], folder / "tls.crt", folder / "log")
