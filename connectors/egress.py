"""The one door out: which addresses may be dialled, how names become addresses, and the only socket factory.

Every address is judged where it is dialled, never where it was written: a literal in any spelling, a name, a mapped
address and a name that changes between look-ups all end at `Egress.dial`, which also judges what may go in clear text.
How a protocol speaks over the socket is left to the clients (`connectors/http/`); `Egress.http` is the HTTP client of
this door.
"""

import asyncio
import functools
import ipaddress
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import Final, Protocol, TypeAlias, TypeVar, cast

from msgspec import Struct

from config.settings import BigQuerySettings
from connectors.http.client import HttpClient
from connectors.http.door import Address, Blocked, Names, literal
from schemas.ids import TenantRef

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

# IANA's special-purpose registries plus multicast and reserved space (tests/vectors/egress.json). Not
# `ipaddress.is_global`: it calls several of these global, and changes with Python's version.
BLOCKED_V4: Final = tuple(
    ipaddress.IPv4Network(block)
    for block in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
    )
)
BLOCKED_V6: Final = tuple(
    ipaddress.IPv6Network(block)
    for block in (
        "::/96",
        "::ffff:0:0/96",
        "64:ff9b::/96",
        "64:ff9b:1::/48",
        "100::/64",
        "2001::/23",
        "2001:db8::/32",
        "2002::/16",
        "3fff::/20",
        "5f00::/16",
        "fc00::/7",
        "fe80::/10",
        "fec0::/10",
        "ff00::/8",
    )
)

LOOKUP_TIMEOUT_S: Final = 5.0
FOUND_FOR_S: Final = 30.0
MISSING_FOR_S: Final = 3.0
MAX_CACHED_NAMES: Final = 20_000
MAX_LOOKUP_THREADS: Final = 32
# A name server that hangs holds a thread for as long as the system's resolver tries (some 10 s): a tenant gets few of
# them, so that its slow names delay its own look-ups first.
MAX_LOOKUPS_PER_TENANT: Final = 3
MAX_ADDRESSES: Final = 8
CLEAR_TEXT: Final = "http is refused: use https (only addresses in HEADGATE_EGRESS_ALLOW may go without TLS)"


class Ruling(Enum):
    """What the guard says of an address: `OPEN` to TLS, `ALLOWED` by `EGRESS_ALLOW` (clear text too), or `BLOCKED`."""

    OPEN = "open"
    ALLOWED = "allowed"
    BLOCKED = "blocked"


LookUp: TypeAlias = Callable[[str], Sequence[str]]
OpenSocket: TypeAlias = Callable[[Address, int], socket.socket]
Found: TypeAlias = Callable[[Names], None]


def system_lookup(host: str) -> Sequence[str]:
    """The system's resolver. Blocks; raises OSError or UnicodeError."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


def open_socket(address: Address, port: int) -> socket.socket:
    """A non-blocking TCP socket whose connection to `address` has begun. Raises OSError."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    made = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        made.connect((str(address), port))
    except BlockingIOError:
        return made
    except OSError:
        made.close()
        raise
    return made


class Closable(Protocol):
    def close(self) -> None: ...


Kept = TypeVar("Kept", bound=Closable)


class _Asked(Struct):
    """A question under way: the timer of its deadline, and who waits for it."""

    late: asyncio.TimerHandle
    waiters: list[Found]


class _Threads:
    """Runs blocking look-ups on few daemon threads, with a share for each tenant."""

    def __init__(self, lookup: LookUp) -> None:
        self._lookup = lookup
        self._jobs: queue.SimpleQueue[tuple[str, Callable[[Names], None]]] = queue.SimpleQueue()
        self._threads = 0
        self._busy = 0
        self._running: dict[TenantRef, int] = {}
        self._waiting: dict[TenantRef, deque[tuple[str, Found]]] = {}

    def run(self, tenant: TenantRef, host: str, done: Found) -> None:
        """Calls `done` from the running loop once the look-up has ended, however long that takes."""
        if self._running.get(tenant, 0) >= MAX_LOOKUPS_PER_TENANT:
            self._waiting.setdefault(tenant, deque()).append((host, done))
            return
        self._start(tenant, host, done)

    def _start(self, tenant: TenantRef, host: str, done: Found) -> None:
        loop = asyncio.get_running_loop()
        self._running[tenant] = self._running.get(tenant, 0) + 1
        self._busy += 1

        def ended(names: Names) -> None:
            try:
                loop.call_soon_threadsafe(self._ended, tenant, names, done)
            except RuntimeError:
                pass  # the loop has closed: nobody waits any more

        self._jobs.put((host, ended))
        if self._busy > self._threads and self._threads < MAX_LOOKUP_THREADS:
            self._threads += 1
            # daemon: a name server that hangs must not hold up the end of the process
            threading.Thread(target=self._work, name=f"lookup-{self._threads}", daemon=True).start()

    def _ended(self, tenant: TenantRef, names: Names, done: Found) -> None:
        self._busy -= 1
        left = self._running[tenant] - 1
        if left:
            self._running[tenant] = left
        else:
            del self._running[tenant]
        waiting = self._waiting.get(tenant)
        if waiting is not None:
            host, waiter = waiting.popleft()
            if not waiting:
                del self._waiting[tenant]
            self._start(tenant, host, waiter)
        done(names)

    def _work(self) -> None:
        while True:
            host, ended = self._jobs.get()
            ended(self._ask(host))

    def _ask(self, host: str) -> Names:
        try:
            texts = self._lookup(host)
            addresses = tuple(dict.fromkeys(ipaddress.ip_address(text.partition("%")[0]) for text in texts))
        except (OSError, UnicodeError, ValueError) as fault:
            return Names((), f"the name does not resolve: {getattr(fault, 'strerror', None) or 'not a host name'}")
        if not addresses:
            return Names((), "the name has no address")
        return Names(addresses[:MAX_ADDRESSES])


class Egress:
    """The door. One for each process; `allow` are the networks of `HEADGATE_EGRESS_ALLOW`.

    `lookup` answers names from a thread; `connect` makes the sockets, after the guard has said yes; `on_blocked` is
    called for each dial or destination that was refused; `ca_file` replaces the system's certificate authorities;
    `bigquery` is a place that the operator chose, and no tenant: what is dialled there is not judged.
    """

    def __init__(
        self,
        allow: Iterable[Network] = (),
        *,
        lookup: LookUp = system_lookup,
        connect: OpenSocket = open_socket,
        clock: Callable[[], float] = time.monotonic,
        on_blocked: Callable[[TenantRef], None] | None = None,
        ca_file: str | None = None,
        max_idle_connections: int = 1024,
        lookup_timeout_s: float = LOOKUP_TIMEOUT_S,
        bigquery: BigQuerySettings | None = None,
    ) -> None:
        self._allow = tuple(allow)
        self._connect = connect
        self._clock = clock
        self._on_blocked = on_blocked
        self._threads = _Threads(lookup)
        self._known: dict[tuple[TenantRef, str], tuple[float, Names]] = {}
        self._asked: dict[tuple[TenantRef, str], _Asked] = {}
        self._looking: set[tuple[TenantRef, str]] = set()
        self._lookup_timeout_s = lookup_timeout_s
        self._max_idle_connections = max_idle_connections
        self._kept: dict[object, Closable] = {}
        self.ca_file = ca_file
        self.bigquery = bigquery or BigQuerySettings()

    @functools.cached_property
    def http(self) -> HttpClient:
        """The HTTP client behind this door. First use must be on the event loop that it is to live on."""
        return HttpClient(
            self,
            asyncio.get_running_loop(),
            clock=self._clock,
            ca_file=self.ca_file,
            max_idle_connections=self._max_idle_connections,
        )

    def keep(self, make: "Callable[[Egress], Kept]") -> Kept:
        """What the destinations of a kind share behind this door: made once, closed with it."""
        if make not in self._kept:
            self._kept[make] = make(self)
        return cast(Kept, self._kept[make])

    def close(self) -> None:
        """Ends every connection of this door's clients."""
        for kept in self._kept.values():
            kept.close()
        if "http" in self.__dict__:
            self.http.close()

    def rule(self, address: Address) -> Ruling:
        """A v4-mapped address is judged as the v4 address that would be dialled."""
        if address.version == 6:
            address = address.ipv4_mapped or address
        for network in self._allow:
            if address in network:
                return Ruling.ALLOWED
        blocks: Sequence[Network] = BLOCKED_V4 if address.version == 4 else BLOCKED_V6
        return Ruling.BLOCKED if any(address in block for block in blocks) else Ruling.OPEN

    def dial(self, tenant: TenantRef, address: Address, port: int, *, tls: bool) -> socket.socket:
        """A non-blocking socket whose connection has begun. The only place of the product that makes one for a tenant.

        Raises Blocked (no socket was made) or OSError.
        """
        objection = self._objection(address, tls)
        if objection:
            if self._on_blocked is not None:
                self._on_blocked(tenant)
            raise Blocked(objection)
        mapped = address.ipv4_mapped if address.version == 6 else None
        return self._connect(mapped or address, port)

    def _objection(self, address: Address, tls: bool) -> str:
        ruling = self.rule(address)
        if ruling is Ruling.BLOCKED:
            return f"the address {address} is not public; destinations must be reachable on the internet"
        return CLEAR_TEXT if ruling is Ruling.OPEN and not tls else ""

    def foreseen(self, host: str, *, tls: bool) -> str:
        """Why no dial of this host can succeed, where that is certain without a look-up; else empty."""
        address = literal(host)
        if address is not None:
            return self._objection(address, tls)
        return "" if tls or self._allow else CLEAR_TEXT

    def look_up(self, tenant: TenantRef, host: str, done: Found) -> Names | None:
        """The addresses of `host` where they are known, else None, and `done` is called within `lookup_timeout_s`.

        Known for 30 s, a failure for 3 s; equal questions of one tenant that are asked together are asked once.
        """
        spelled = literal(host)
        if spelled is not None:
            return Names((spelled,))
        key = (tenant, host)
        known = self._known.get(key)
        if known is not None:
            if known[0] > self._clock():
                return known[1]
            del self._known[key]
        asked = self._asked.get(key)
        if asked is not None:
            asked.waiters.append(done)
            return None
        problem = f"no answer from the name servers in {self._lookup_timeout_s:g} s"
        late = asyncio.get_running_loop().call_later(self._lookup_timeout_s, self._learn, key, Names((), problem))
        self._asked[key] = _Asked(late, [done])
        if key not in self._looking:  # else a look-up that missed its deadline still runs: its answer will do
            self._looking.add(key)
            self._threads.run(tenant, host, functools.partial(self._found, key))
        return None

    def _found(self, key: tuple[TenantRef, str], names: Names) -> None:
        self._looking.discard(key)
        self._learn(key, names)

    def _learn(self, key: tuple[TenantRef, str], names: Names) -> None:
        # an answer that comes after its deadline is still worth keeping: the next attempt finds it
        while len(self._known) >= MAX_CACHED_NAMES:
            del self._known[next(iter(self._known))]
        self._known.pop(key, None)
        self._known[key] = (self._clock() + (FOUND_FOR_S if names.addresses else MISSING_FOR_S), names)
        asked = self._asked.pop(key, None)
        if asked is not None:
            asked.late.cancel()
            for done in asked.waiters:
                done(names)
