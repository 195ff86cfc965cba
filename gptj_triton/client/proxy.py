"""The proxy between client and server that the environment names. Knows the rules, and sends nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass
from urllib.parse import urlsplit

from requests.utils import get_environ_proxies, select_proxy, should_bypass_proxies

from gptj_triton.client.address import is_this_machine

# Of several variables the first that is set counts. For http:// `requests` reads these, by urllib.request.getproxies:
HTTP_VARIABLES = ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")
# gRPC reads these (https://github.com/grpc/grpc/blob/master/doc/environment_variables.md), and NO_PROXY is added:
GRPC_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
GRPC_EXCEPTIONS = ("no_grpc_proxy", "no_proxy", "NO_PROXY")


@dataclass(frozen=True)
class Proxy:
    """A proxy, and the environment variable that names it."""

    variable: str
    url: str  # with user and password, where it has them

    def __str__(self) -> str:
        scheme, _, rest = self.url.rpartition("://")
        return f"the proxy {scheme or 'http'}://{rest.rpartition('@')[2]} ({self.variable})"


def http_proxy(address: str) -> Proxy | None:
    """The proxy that `requests` takes on the way to HOST:PORT; none to this machine."""
    if is_this_machine(address):
        return None
    url = select_proxy(f"http://{address}", get_environ_proxies(f"http://{address}"))
    return Proxy(_first(HTTP_VARIABLES, url), url) if url else None


def grpc_proxy(address: str) -> Proxy | None:
    """The proxy for gRPC on the way to HOST:PORT, an http:// one, for gRPC takes no others; none to this machine."""
    variable = _first(GRPC_VARIABLES)
    url = os.environ.get(variable, "").strip()
    exceptions = os.environ.get(_first(GRPC_EXCEPTIONS), "")
    if not url or is_this_machine(address) or should_bypass_proxies(f"http://{address}", exceptions):
        return None
    if "://" not in url:
        url = f"http://{url}"  # as curl and `requests` take it
    return Proxy(variable, url) if url.startswith("http://") and urlsplit(url).hostname else None


def through(address: str, proxy: Proxy | None) -> str:
    """The way to HOST:PORT, for errors."""
    return f"{address} through {proxy}" if proxy else address


def _first(variables: tuple[str, ...], value: str | None = None) -> str:
    """The first of the variables that is set, to `value` if given; the empty string if none is."""
    return next((name for name in variables if name in os.environ and value in (None, os.environ[name])), "")
