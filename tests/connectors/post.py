"""A door that lets loopback through, and posts through it."""

import asyncio
from ipaddress import ip_network

from connectors.egress import Egress
from connectors.http.answer import Answer
from connectors.http.client import Target
from connectors.http.place import parse_url
from connectors.http.tls import Identity
from schemas.ids import ExternalId, TenantRef, Vendor

ACME = TenantRef(Vendor("default"), ExternalId("acme"))
LOOPBACK = (ip_network("127.0.0.0/8"), ip_network("::1/128"))
HEADERS = b"content-type: application/json\r\n"


class Clock:
    """A clock that a test sets forward."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def aim(egress: Egress, url: str, *, tenant: TenantRef = ACME, identity: Identity | None = None) -> Target:
    return egress.http.target(tenant, parse_url(url), identity)


def begin(target: Target, body: bytes = b"{}", timeout_s: float = 5.0) -> "asyncio.Future[Answer]":
    """Fails where `done` is called twice or from inside `post`."""
    waiter: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
    inside = True

    def done(answer: Answer) -> None:
        assert not inside
        waiter.set_result(answer)

    target.post(b"%b%bcontent-length: %d\r\n\r\n%b" % (target.head, HEADERS, len(body), body), timeout_s, done)
    inside = False
    return waiter


async def post(target: Target, body: bytes = b"{}", timeout_s: float = 5.0) -> Answer:
    return await begin(target, body, timeout_s)
