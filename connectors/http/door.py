"""What an HTTP client needs of the one door out: addresses as hosts spell them, look-ups, and the dial."""

import ipaddress
import socket
from collections.abc import Callable
from typing import Protocol, TypeAlias

from msgspec import Struct

from schemas.ids import TenantRef

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address


class Blocked(Exception):
    """The guard refused an address; no socket was made for it."""


class Names(Struct, frozen=True, gc=False):
    """What a look-up found: `addresses` in the resolver's order, or why there are none."""

    addresses: tuple[Address, ...]
    problem: str = ""


class Door(Protocol):
    def look_up(self, tenant: TenantRef, host: str, done: Callable[[Names], None]) -> Names | None:
        """The addresses at once where they are known, else None, and `done` is called later from the loop."""
        ...

    def dial(self, tenant: TenantRef, address: Address, port: int, *, tls: bool) -> socket.socket:
        """A non-blocking socket whose connection has begun. Raises Blocked or OSError."""
        ...


def literal(host: str) -> Address | None:
    """The address that `host` spells, in any spelling the system's resolver takes for one; None for a name.

    Version 4 follows `inet_aton`: `2130706433`, `0x7f000001`, `0177.0.0.1` and `127.1` are all 127.0.0.1. A v6 zone is
    dropped: link-local addresses are blocked with or without one.
    """
    if ":" in host:
        try:
            return ipaddress.IPv6Address(host.partition("%")[0])
        except ValueError:
            return None
    # inet_aton ignores what follows white space; a host with white space is no host
    if not host or not host[0].isdigit() or not host.isascii() or any(c.isspace() for c in host):
        return None
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host))
    except OSError:
        return None
