"""Where a server is: HOST:PORT, checked, and whether that is this machine."""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit

from gptj_triton.client.errors import InvalidFieldError


def host_and_port(url: str) -> str:
    """`url` without http://, which may stand before it. Raises InvalidFieldError for all but HOST:PORT."""
    scheme, _, address = url.strip().rpartition("://")
    address = address.rstrip("/")
    if scheme.lower() == "https":
        raise InvalidFieldError(f"url {url!r}: the client speaks no TLS: give HOST:PORT of a server without it")
    if scheme.lower() not in ("", "http") or not _is_host_and_port(address):
        brackets = (
            " with the IPv6 address in brackets, [::1]:8000" if address.count(":") > 1 and "@" not in address else ""
        )
        raise InvalidFieldError(f"url {url!r}: give HOST:PORT{brackets}")
    return address


def _is_host_and_port(address: str) -> bool:
    try:
        parts = urlsplit(f"//{address}")
        host, port = parts.hostname or "", parts.port  # 0 to 65535, or a ValueError
        host.encode("idna")  # a ValueError for a label that is empty or too long
    except ValueError:
        return False
    bare = address.startswith("[") or address.count(":") == 1
    return bool(host and port and bare) and parts.netloc == address and "@" not in address and host.split() == [host]


def is_this_machine(address: str) -> bool:
    """Whether HOST:PORT is localhost, a loopback address (127.0.0.0/8, ::1), or 0.0.0.0 or ::, which lead there too."""
    host = (urlsplit(f"//{address}").hostname or "").rstrip(".")
    if host == "localhost" or host.endswith(".localhost"):  # RFC 6761, section 6.3
        return True
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        try:
            found = ipaddress.ip_address(socket.inet_aton(host))  # 127.1, as the system reads it
        except OSError:
            return False
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped:
        found = found.ipv4_mapped
    return found.is_loopback or found.is_unspecified
