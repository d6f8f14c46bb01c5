"""Headgate as it is measured: the real command in a process of its own, configured by the real `apply`."""

import json
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any, Final

import psutil

from bench import rig as bench
from bench.events import TENANTS, tenant_name
from bench.rig import PARTITIONS, POLL_S, BenchError, Certificates, Load, Measured, Rig
from cli.apply import Applied, apply_document
from config.settings import Settings
from dev.inbox import RemoteInbox

HEADGATE: Final = (sys.executable, "-m", "cli.main")
WORKER: Final = (*HEADGATE, "worker")
READY_TIMEOUT_S: Final = 60.0


def environ(rig: Rig, tls: Certificates | None = None, *, tenants: str = "own") -> dict[str, str]:
    """The settings of a worker and of `apply`. The receiver is on loopback, which the egress guard must be told."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("HEADGATE_")},
        **rig.stack.settings(),
        "HEADGATE_PREFIX": rig.prefix,
        "HEADGATE_INGRESS_PARTITIONS": str(PARTITIONS),
        "HEADGATE_DEFAULT_TOPICS": tenants,
        "HEADGATE_EGRESS_ALLOW": "127.0.0.0/8,::1/128",
        "HEADGATE_WORKER_ID": "bench-0",
        "HEADGATE_HTTP_PORT": str(free_port()),
        "TMPDIR": str(rig.folder),
        **({"SSL_CERT_FILE": str(tls.ca)} if tls else {}),
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tenant(name: str, url: str, *, destinations: int = 1, where: str = "") -> dict[str, Any]:
    """A tenant whose every event goes to its first destination; the others wait for a type that never comes."""
    ids = [f"hook-{number}" for number in range(destinations)]
    match = {"types": ["invoice.*"], **({"where": where} if where else {})}
    routes = [{"id": "all", "match": match, "to": ids[:1]}]
    if destinations > 1:
        routes.append({"id": "idle", "match": {"types": ["never.*"]}, "to": ids[1:]})
    return {
        "externalId": name,
        "destinations": [{"id": one, "type": "webhook", "options": {"url": f"{url}/{name}/{one}"}} for one in ids],
        "routes": routes,
    }


def apply(env: Mapping[str, str], tenants: Sequence[Mapping[str, Any]]) -> Applied:
    settings = Settings.load({name: value for name, value in env.items() if name.startswith("HEADGATE_")})
    return apply_document(settings, json.dumps({"tenants": list(tenants)}), "bench.yaml", env={})


def apply_load_tenants(env: Mapping[str, str], inbox: RemoteInbox) -> None:
    """The tenants of `bench.events`. Every other one has a filter that reads the payload and holds for all events."""
    url = inbox.url("")
    apply(
        env,
        [
            tenant(tenant_name(number), url, where="payload.total > 1 && payload.country == 'CH'" if number % 2 else "")
            for number in range(TENANTS)
        ],
    )


def run(rig: Rig, load: Load, inbox: RemoteInbox, env: Mapping[str, str], command: Sequence[str] = WORKER) -> Measured:
    """One run over the events of `load`, which are all that the group has not committed."""
    return bench.contest("headgate", command, rig, inbox, load.count, env)


def until_ready(env: Mapping[str, str], pid: int) -> float:
    """Seconds until /readyz says yes."""
    began = time.monotonic()
    while not _ready(int(env["HEADGATE_HTTP_PORT"])):
        if time.monotonic() - began > READY_TIMEOUT_S:
            raise BenchError(f"the worker was not ready within {READY_TIMEOUT_S:.0f} s")
        if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            raise BenchError("the worker ended before it was ready")
        time.sleep(POLL_S)
    return time.monotonic() - began


def _ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError:
        return False
    except OSError:
        return False
