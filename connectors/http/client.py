"""The HTTP/1.1 client: who waits for what, which connection carries a request, and when it has taken too long.

Plain non-blocking sockets lie in one private epoll that the event loop watches as a single descriptor; a request costs
no task, no future and no timer (ADR 0005). `connection.py` speaks the protocol; `Door` decides what may be dialled.
A connection belongs to one target for its whole life: nothing is ever shared between destinations or tenants.
"""

import asyncio
import errno
import functools
import select
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Final, TypeVar

from msgspec import Struct

from connectors.http.answer import MAX_EXCERPT_BYTES, Answer, Fault, Step
from connectors.http.connection import Connection
from connectors.http.door import Address, Blocked, Door, Names
from connectors.http.place import Place
from connectors.http.tls import Identity, client_context
from schemas.ids import TenantRef

try:
    _VERSION = version("headgate")
except PackageNotFoundError:  # run from a source tree that was not installed
    _VERSION = "dev"
USER_AGENT: Final = f"Headgate/{_VERSION}"
TICK_S: Final = 0.1
IDLE_S: Final = 60.0
# One address of several may take this long to connect before the next is tried.
ADDRESS_S: Final = 3.0
EVENTS_PER_POLL: Final = 256
# Idle connections that make room at once when descriptors run out.
ROOM: Final = 16
OUT_OF_RESOURCES: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL})

_LATE: Final[Mapping[Step, str]] = {
    "resolve": "the name was not resolved in time",
    "connect": "the connection was not made in time",
    "tls": "the TLS handshake did not end in time",
    "answer": "no complete answer in time",
}

Done = Callable[[Answer], None]
Waiting = TypeVar("Waiting")


class Exchange(Struct, eq=False):
    """One request from `post` until `done` is called. `message` is kept as long: a stale connection costs a resend.

    It is in `deadlines` for just as long. A Struct because one is made for each request, and that takes half the time.
    """

    target: "Target"
    message: bytes
    done: Done
    deadlines: "dict[Exchange, float]"
    connection: Connection | None = None
    addresses: tuple[Address, ...] = ()
    fault: Fault = ""
    detail: str = ""
    step: Step = "answer"

    @property
    def over(self) -> bool:
        return self not in self.deadlines


class Target:
    """One destination of one tenant: where its requests go, and the connections that wait for the next one."""

    __slots__ = (
        "_client",
        "_context",
        "_identity",
        "closed",
        "connections",
        "drained",
        "excerpt_bytes",
        "head",
        "idle",
        "keeps_head",
        "open",
        "place",
        "tenant",
    )

    def __init__(
        self,
        client: "HttpClient",
        tenant: TenantRef,
        place: Place,
        identity: Identity | None,
        excerpt_bytes: int = MAX_EXCERPT_BYTES,
        keeps_head: bool = False,
    ) -> None:
        self.tenant = tenant
        self.place = place
        self.excerpt_bytes = excerpt_bytes
        self.keeps_head = keeps_head
        self.closed = False
        self.idle: list[Connection] = []
        self.open = 0  # exchanges under way
        self.connections = 0
        self._client = client
        self._identity = identity
        self._context: ssl.SSLContext | None = None
        self.drained: asyncio.Future[None] | None = None
        # the request line and the host: what every message to this place begins with
        self.head = f"POST {place.path} HTTP/1.1\r\nhost: {place.authority}\r\n".encode("ascii")

    def post(self, message: bytes, timeout_s: float, done: Done) -> None:
        """Begins a POST. `message` is the whole request: `head`, the other header lines with content-length, the body.

        `done` is called exactly once, from the event loop, never from inside `post`, within `timeout_s` and a tick.
        """
        self._client.begin(self, message, timeout_s, done)

    def send(self, message: bytes, timeout_s: float, done: Done) -> None:
        """As `post`, of a request with any method and path; of HEAD only where the target keeps heads.

        A stale connection costs a resend, so the far side must bear the same request twice.
        """
        self._client.begin(self, message, timeout_s, done)

    def probe(self, timeout_s: float, done: Done) -> None:
        """Resolves, connects and shakes hands on a connection of its own, sends nothing, and closes it.

        The answer has status 0; without a fault all steps went well, else `step` names the one that did not.
        """
        self._client.begin(self, b"", timeout_s, done)

    def tls_context(self) -> ssl.SSLContext:
        """Raises ssl.SSLError where the client certificate cannot be used."""
        if self._identity is None:
            return self._client.shared_context
        if self._context is None:
            self._context = client_context(self._client.ca_file, self._identity)
        return self._context

    def forget_context(self) -> None:
        """A context with an own certificate holds authorities and keys: it goes with its last connection."""
        self._context = None

    async def close(self) -> None:
        """Ends the idle connections, and waits for what is under way. Twice is fine."""
        self.closed = True
        while self.idle:
            self.idle[-1].close()
        if self.open:
            if self.drained is None:
                self.drained = asyncio.get_running_loop().create_future()
            await asyncio.shield(self.drained)

    def emptied(self) -> None:
        """Nothing is under way any more."""
        if self.drained is not None and not self.drained.done():
            self.drained.set_result(None)


class HttpClient:
    """All connections of a process, on one event loop. Made by `Egress.http`."""

    def __init__(
        self,
        door: Door,
        loop: asyncio.AbstractEventLoop,
        *,
        clock: Callable[[], float] = time.monotonic,
        ca_file: str | None = None,
        max_idle_connections: int = 1024,
    ) -> None:
        self.clock = clock
        self.ca_file = ca_file
        self.opened = 0  # connections since the start, for the reuse ratio
        self._door = door
        self._loop = loop
        self._max_idle = max_idle_connections
        self._epoll = select.epoll()
        self._connections: dict[int, Connection] = {}
        # each in the order of its times, because what comes last expires last
        self._idle: dict[Connection, float] = {}
        self._connecting: dict[Connection, float] = {}
        self._deadlines: dict[float, dict[Exchange, float]] = {}  # one dict for each timeout
        self._polling = False
        self._polled_at = 0.0
        self._grave: list[socket.socket] = []
        self._ticking: asyncio.TimerHandle | None = None
        self._closed = False
        loop.add_reader(self._epoll.fileno(), self._ready)

    @functools.cached_property
    def shared_context(self) -> ssl.SSLContext:
        return client_context(self.ca_file)

    @property
    def connections(self) -> int:
        """Connections open now, idle ones included."""
        return len(self._connections)

    def target(
        self,
        tenant: TenantRef,
        place: Place,
        identity: Identity | None = None,
        excerpt_bytes: int = MAX_EXCERPT_BYTES,
        keeps_head: bool = False,
    ) -> Target:
        """`excerpt_bytes` is how much of an answer's body is kept; beyond `MAX_ANSWER_BYTES` nothing is read."""
        return Target(self, tenant, place, identity, excerpt_bytes, keeps_head)

    def close(self) -> None:
        """Ends every connection; what is under way ends with the fault `closed`."""
        if self._closed:
            return
        self._closed = True
        for deadlines in list(self._deadlines.values()):
            for exchange in list(deadlines):
                self._abort(exchange, "closed", "the worker is stopping")
        for connection in list(self._connections.values()):
            connection.close()
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()
        if self._ticking is not None:
            self._ticking.cancel()

    # ------------------------------------------------------------------ exchanges

    def begin(self, target: Target, message: bytes, timeout_s: float, done: Done) -> None:
        deadlines = self._deadlines.get(timeout_s)
        if deadlines is None:
            deadlines = self._deadlines[timeout_s] = {}
        exchange = Exchange(target, message, done, deadlines)
        deadlines[exchange] = self.clock() + timeout_s
        target.open += 1
        if self._ticking is None and not self._closed:
            self._ticking = self._loop.call_later(TICK_S, self._tick)
        if target.idle and message:  # so neither the target nor the client is closed
            connection = target.idle.pop()
            del self._idle[connection]
            connection.carry(exchange)
        elif target.closed or self._closed:
            self._fail(exchange, "closed", "the destination is closed", "resolve")
        else:
            self.connect(exchange)

    def finish(self, exchange: Exchange, answer: Answer) -> None:
        """From the event loop only: calls `done`."""
        if exchange.deadlines.pop(exchange, None) is None:  # it is over already
            return
        target = exchange.target
        target.open -= 1
        if not target.open and target.drained is not None:
            target.emptied()
        done = exchange.done
        done(answer)

    def _fail(self, exchange: Exchange, fault: Fault, detail: str, step: Step) -> None:
        """Ends an exchange that has no connection; never at once, because `post` may still be on the stack."""
        exchange.connection = None
        self._loop.call_soon(self.finish, exchange, Answer(0, fault, detail, step=step))

    def _abort(self, exchange: Exchange, fault: Fault, detail: str) -> None:
        if exchange.over:
            return
        connection, step = exchange.connection, exchange.step
        if connection is not None:
            connection.exchange = None
            connection.close()
        self.finish(exchange, Answer(0, fault, detail, step=step))

    # ------------------------------------------------------------------ dialling

    def connect(self, exchange: Exchange) -> None:
        """Finds the addresses and dials the first that may be dialled; later ones follow when it cannot be reached."""
        exchange.step = "resolve"
        target = exchange.target
        names = self._door.look_up(target.tenant, target.place.host, functools.partial(self._found, exchange))
        if names is not None:
            self._found(exchange, names)

    def _found(self, exchange: Exchange, names: Names) -> None:
        if exchange.over:
            return
        if names.problem:
            self._fail(exchange, "dns", names.problem, "resolve")
            return
        exchange.step = "connect"
        exchange.addresses = names.addresses
        self._dial(exchange)

    def _dial(self, exchange: Exchange) -> None:
        if exchange.over:
            return
        target = exchange.target
        place = target.place
        while exchange.addresses:
            address = exchange.addresses[0]
            try:
                made = self._door.dial(target.tenant, address, place.port, tls=place.tls)
            except Blocked as fault:
                if not exchange.fault:
                    exchange.fault, exchange.detail = "egress_blocked", str(fault)
            except OSError as fault:
                if fault.errno in OUT_OF_RESOURCES:
                    if self._idle:
                        self._make_room(exchange)
                        return
                    self._fail(exchange, "no_resources", fault.strerror or str(fault), "connect")
                    return
                self._unreachable(exchange, fault.errno or 0)
            else:
                exchange.addresses = exchange.addresses[1:]
                self._adopt(exchange, made)
                return
            exchange.addresses = exchange.addresses[1:]
        self._fail(exchange, exchange.fault or "unreachable", exchange.detail, "connect")

    def _make_room(self, exchange: Exchange) -> None:
        """The process has no descriptor or port left: gives up the oldest idle connections, then dials again.

        Later, because inside a poll a socket is closed only at its end.
        """
        for _ in range(min(ROOM, len(self._idle))):
            next(iter(self._idle)).close()
        self._loop.call_soon(self._dial, exchange)

    def _adopt(self, exchange: Exchange, made: socket.socket) -> None:
        connection = Connection(self, exchange, made)
        self.opened += 1
        exchange.target.connections += 1
        self._connections[connection.fd] = connection
        self._epoll.register(connection.fd, select.EPOLLIN | select.EPOLLOUT)
        if exchange.addresses:
            self._connecting[connection] = self.clock() + ADDRESS_S

    @staticmethod
    def _unreachable(exchange: Exchange, number: int) -> None:
        refused = number == errno.ECONNREFUSED
        exchange.fault = "connect_refused" if refused else "unreachable"
        exchange.detail = "the connection was refused" if refused else "the address cannot be reached"

    def connected(self, connection: Connection) -> None:
        self._connecting.pop(connection, None)

    def not_connected(self, connection: Connection, exchange: Exchange, number: int) -> None:
        """`connection` could not be made: `number` is the errno."""
        connection.exchange = None
        connection.close()
        exchange.connection = None
        self._unreachable(exchange, number)
        self._dial(exchange)

    # ------------------------------------------------------------------ connections

    def watch(self, connection: Connection, *, writable: bool) -> None:
        self._epoll.modify(connection.fd, select.EPOLLIN | select.EPOLLOUT if writable else select.EPOLLIN)

    def keep(self, connection: Connection) -> None:
        """`connection` has nothing to do: the next request of its target finds it, for a while."""
        connection.target.idle.append(connection)
        idle = self._idle
        idle[connection] = self._polled_at
        if len(idle) > self._max_idle:
            next(iter(idle)).close()

    def release(self, connection: Connection, made: socket.socket) -> None:
        """Forgets a connection and closes its socket.

        Inside a poll the socket is closed at the end: else a new connection could get its number, and then an event
        that was meant for the old one.
        """
        del self._connections[connection.fd]
        try:
            self._epoll.unregister(connection.fd)
        except OSError:
            pass  # a TLS socket that failed while it was made has closed the descriptor itself
        self._connecting.pop(connection, None)
        target = connection.target
        if self._idle.pop(connection, None) is not None:
            target.idle.remove(connection)
        target.connections -= 1
        if not target.connections:
            target.forget_context()
        if self._polling:
            self._grave.append(made)
        else:
            made.close()

    def _ready(self) -> None:
        connections = self._connections
        self._polling = True
        self._polled_at = self.clock()  # once for all connections that become idle in this round
        try:
            for fd, mask in self._epoll.poll(0, EVENTS_PER_POLL):
                connection = connections.get(fd)
                if connection is not None:
                    event = connection.event
                    event(mask)
        finally:
            self._polling = False
            while self._grave:
                self._grave.pop().close()

    # ------------------------------------------------------------------ time

    def _tick(self) -> None:
        self._ticking = None
        try:
            self._expire(self.clock())
        finally:
            if not self._closed and (self._connections or any(self._deadlines.values())):
                self._ticking = self._loop.call_later(TICK_S, self._tick)

    def _expire(self, now: float) -> None:
        for deadlines in list(self._deadlines.values()):  # `done` may begin a request with a new timeout
            for exchange in _due(deadlines, now):
                self._abort(exchange, "timeout", _LATE[exchange.step])
        for connection in _due(self._connecting, now):
            waiting = connection.exchange
            assert waiting is not None
            self.not_connected(connection, waiting, errno.ETIMEDOUT)
        for connection in _due(self._idle, now - IDLE_S):
            connection.close()


def _due(times: dict[Waiting, float], now: float) -> list[Waiting]:
    """Those whose time has come. `times` is in their order, so what is not due yet is not looked at."""
    due = []
    for waiting, at_s in times.items():
        if at_s > now:
            break
        due.append(waiting)
    return due
