"""The network as Runtime allows it: where endpoints are, and, where it is closed, a guard before every connection.

`enforce` turns every library's offline switch and hangs an audit hook (PEP 578) on this process, which cannot be taken
off again: name look-ups and connections of Python's sockets that leave loopback, the store, Runtime.endpoint_url and
Runtime.allowed_hosts raise before a byte is sent. What connects without Python's sockets (Ray's own processes, uvloop,
extensions in C or Rust) is not seen by it: a firewall is the second lock, and the offline switches are for those.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import sys
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

from pipeline.errors import UserError
from pipeline.runtime import Runtime
from pipeline.study import ModelName

GROQ_URL = "https://api.groq.com/openai/v1"

OFFLINE: Mapping[str, str] = {
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_XET": "1", "DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "ANONYMIZED_TELEMETRY": "False", "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1", "RAY_USAGE_STATS_ENABLED": "0", "WANDB_MODE": "offline", "WANDB_DISABLED": "true", "COMET_MODE": "disabled",
    "MLFLOW_DISABLE_TELEMETRY": "true", "GRADIO_ANALYTICS_ENABLED": "False", "AWS_EC2_METADATA_DISABLED": "true", "TRITON_DISABLE_TELEMETRY": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1", "OTEL_SDK_DISABLED": "true",
}  # fmt: skip
"""Switches by which the libraries of a study, and those that often come with them, stay off the network. Some of them
are read at import only, so they are set before anything else is imported."""

_LOOPBACK = {"localhost", "ip6-localhost", "ip6-loopback", "0.0.0.0", "::"}
_guard: _Guard | None = None


class NetworkClosedError(UserError, PermissionError):
    """Something wanted to leave the allowed network. A PermissionError too, as from a firewall, for libraries that have a way to go on."""


def address_of(model: ModelName, runtime: Runtime) -> str:
    """The base address of the endpoint that the model is behind. Raises UserError where Runtime names none."""
    if model.provider == "groq":
        return GROQ_URL
    if runtime.endpoint_url is None:
        raise UserError(f"{model}: where is it? Set DATADOSE_ENDPOINT_URL to its address up to and with the version, e.g. http://127.0.0.1:8000/v1")
    return runtime.endpoint_url


def allowed(model: ModelName, runtime: Runtime) -> bool:
    """Whether the model's endpoint may be reached. The one that Runtime names may; one that only a study names must be in allowed_hosts."""
    return runtime.network == "open" or _Guard(_hosts(runtime)).knows(urlsplit(address_of(model, runtime)).hostname or "")


def enforce(runtime: Runtime) -> None:
    """Close this process's network where Runtime says so. Once closed it stays closed; a later call may only add hosts."""
    global _guard
    if runtime.network == "open":
        return
    os.environ.update(OFFLINE)
    if _guard is None:
        _guard = _Guard(_hosts(runtime))
        _guard.install()
    else:
        _guard.add(_hosts(runtime))


def worker_hook(runtime: Runtime) -> Any:
    """What Ray runs first in every worker process (worker_process_setup_hook); None where the network is open."""
    if runtime.network == "open":
        return None

    def close_network() -> None:
        enforce(runtime)

    return close_network


def _hosts(runtime: Runtime) -> tuple[str, ...]:
    hosts = list(runtime.allowed_hosts)
    if runtime.endpoint_url is not None:
        hosts.append(urlsplit(runtime.endpoint_url).hostname or "")
    if runtime.store.startswith("s3://"):
        from pipeline.artifacts import S3Store

        hosts += S3Store(runtime.store).hosts
    return tuple(hosts)


class _Guard:
    """What may be reached: names, networks, and the addresses that an allowed name was last found to have."""

    def __init__(self, hosts: Iterable[str]) -> None:
        self._names = {socket.gethostname().lower()}
        self._networks = [ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128")]
        self._addresses: set[str] = set()
        self.add(hosts)

    def add(self, hosts: Iterable[str]) -> None:
        for host in hosts:
            try:
                self._networks.append(ipaddress.ip_network(host, strict=False))
            except ValueError:
                self._names.add(host.rstrip(".").lower())

    def knows(self, host: str) -> bool:
        name = host.rstrip(".").lower()
        if name in _LOOPBACK or name in self._names or name in self._addresses:
            return True
        try:
            address: Any = ipaddress.ip_address(name.partition("%")[0])
        except ValueError:
            return False
        address = getattr(address, "ipv4_mapped", None) or address
        return any(address in network for network in self._networks)

    def install(self) -> None:
        look_up = socket.getaddrinfo

        def remembering(host: Any, *args: Any, **kwargs: Any) -> Any:
            found = look_up(host, *args, **kwargs)  # the hook has let the name through
            if host is not None:
                self._addresses.update(str(item[4][0]) for item in found)
            return found

        socket.getaddrinfo = remembering
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
            self._check(arguments[0])
        elif event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
            connection, address = arguments[0], arguments[1]
            if address is not None and connection.family in (socket.AF_INET, socket.AF_INET6):
                self._check(address[0])

    def _check(self, host: Any) -> None:
        if not host:
            return
        name = ""
        with contextlib.suppress(UnicodeDecodeError):
            name = host.decode("ascii") if isinstance(host, (bytes, bytearray)) else str(host)
        if not self.knows(name):
            raise NetworkClosedError(
                f"{name or host!r} is outside the closed network (DATADOSE_NETWORK=closed), and nothing was sent there; "
                "if it may be reached, add it to DATADOSE_ALLOWED_HOSTS"
            )
