"""A local inbox for webhooks: the far side of the demo, of tests and of the benchmarks.

Owns an HTTP/1.1 server on loopback that does what its scripts say (answer, fail, hang, reset, throttle, ...) and
remembers what arrived: ids, signatures, attempts, connections, duplicates. It checks signatures by its own reading of
Standard Webhooks 1.0, shared with nothing that signs. Deliberate breaches of HTTP (garbled answers, endless headers)
are not its job.

Inside a test: `async with Inbox() as inbox: ...`. As a process of its own, which outlives any worker: `python -m
dev.inbox --port 0` prints `port=<n>` and is spoken to over `/_inbox/...` (`RemoteInbox`). With `--count-only` it
neither checks nor keeps requests, so that a benchmark measures the sender.
"""

import argparse
import asyncio
import binascii
import hashlib
import hmac
import http.client
import os
import signal
import socket
import ssl
import struct
import subprocess
import sys
import time
from base64 import b64decode
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, TypeVar, assert_never, cast
from urllib.parse import parse_qs, urlsplit

import httptools
import msgspec
from msgspec import Struct

CONTROL: Final = "/_inbox/"
TOLERANCE_S: Final = 300
"""How old or new a timestamp may be: Standard Webhooks, verification."""
BACKLOG: Final = 4096
START_TIMEOUT_S: Final = 20.0
CONTROL_TIMEOUT_S: Final = 60.0
CLOSE_TIMEOUT_S: Final = 5.0
MAX_RECORDS: Final = 1_000_000
LINGER_0: Final = struct.pack("ii", 1, 0)


# What a path does with a request


class Ok(Struct, frozen=True, tag_field="mode", tag="ok"):
    """Accept; any 2xx status."""

    status: int = 200
    body: str = ""


ACCEPT: Final = Ok()


class Refuse(Struct, frozen=True, tag_field="mode", tag="refuse"):
    """Answer a status that is no success, such as 400, 403, 410, 500."""

    status: int = 403
    body: str = ""


class Hang(Struct, frozen=True, tag_field="mode", tag="hang"):
    """Read the request and never answer; the connection stays open."""


class Reset(Struct, frozen=True, tag_field="mode", tag="reset"):
    """Read the request, then reset the connection (RST)."""


class Throttle(Struct, frozen=True, tag_field="mode", tag="throttle"):
    """Answer `status` with `Retry-After: <retry_after>` (seconds, or an HTTP date)."""

    retry_after: str
    status: int = 429


class Slow(Struct, frozen=True, tag_field="mode", tag="slow"):
    """Accept after a while."""

    delay_s: float
    status: int = 200


class Redirect(Struct, frozen=True, tag_field="mode", tag="redirect"):
    location: str
    status: int = 302


Step = Ok | Refuse | Hang | Reset | Throttle | Slow | Redirect
Per = Literal["delivery", "path"]


class Steps(Struct, frozen=True, tag_field="mode", tag="steps"):
    """The k-th request meets step k, all later ones the last step; counted by webhook-id or for the path as a whole."""

    steps: tuple[Step, ...]
    per: Per = "delivery"


Script = Step | Steps


def fail_first(times: int, then: Step = ACCEPT, *, status: int = 503, per: Per = "delivery") -> Steps:
    """Fail `times` times, then go well."""
    return Steps((*(Refuse(status) for _ in range(times)), then), per)


# What a path remembers


class Received(Struct, frozen=True, gc=False):
    """One request. `status` is what it was answered, 0 for nothing. `signature_ok` is None where no secret is known."""

    path: str
    webhook_id: str
    timestamp: str
    signature_ok: bool | None
    attempt: int
    arrived_at_ms: float
    connection: int
    status: int
    body: bytes
    headers: tuple[tuple[str, str], ...]


class PathStats(Struct, frozen=True):
    """`accepted` counts different webhook-ids that were answered 2xx, `duplicates` later 2xx answers to the same."""

    requests: int
    accepted: int
    duplicates: int
    bad_signatures: int
    connections: int


class Stats(Struct, frozen=True):
    """Of the whole inbox. With `--count-only`, `accepted` counts different webhook-ids and `paths` is empty."""

    requests: int
    accepted: int
    connections: int
    open: int
    paths: dict[str, PathStats] = {}


class Arrival(Struct, frozen=True, array_like=True):
    """Of `--count-only --arrivals`: which event's request began to arrive when (Unix time)."""

    event: str
    at_ms: float


class Order(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Of `POST /_inbox/script`. What is left out stays as it was."""

    path: str
    script: Script | None = None
    secrets: tuple[str, ...] | None = None


class InboxError(Exception):
    """The inbox did not start, or did not see in time what was waited for."""


def signature_ok(
    secrets: Sequence[str], webhook_id: str, timestamp: str, body: bytes, signature: str, now_s: float
) -> bool:
    """Standard Webhooks 1.0: any `v1` entry under any of the secrets holds, and the timestamp is within 5 minutes."""
    if not timestamp.isdecimal() or abs(now_s - int(timestamp)) > TOLERANCE_S or not webhook_id:
        return False
    content = b"%b.%b.%b" % (webhook_id.encode(), timestamp.encode(), body)
    for secret in secrets:
        key = b64decode(secret.removeprefix("whsec_"))
        want = b"v1," + binascii.b2a_base64(hmac.digest(key, content, hashlib.sha256), newline=False)
        if any(hmac.compare_digest(want, entry.encode()) for entry in signature.split(" ")):
            return True
    return False


class _Path:
    def __init__(self) -> None:
        self.script: Script = Ok()
        self.secrets: tuple[str, ...] = ()
        self.received: deque[Received] = deque(maxlen=MAX_RECORDS)
        self.requests = 0
        self.duplicates = 0
        self.bad_signatures = 0
        self.accepted: set[str] = set()
        self.connections: set[int] = set()
        self.tries: dict[str, int] = {}

    def next_step(self, webhook_id: str) -> Step:
        script = self.script
        if not isinstance(script, Steps):
            return script
        key = webhook_id if script.per == "delivery" else ""
        made = self.tries.get(key, 0)
        self.tries[key] = made + 1
        return script.steps[min(made, len(script.steps) - 1)]

    def stats(self) -> PathStats:
        return PathStats(self.requests, len(self.accepted), self.duplicates, self.bad_signatures, len(self.connections))


class Inbox:
    """The inbox within this process, on the running loop. Paths come into being when they are first named."""

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: ssl.SSLContext | None = None,
        keep_bodies: bool = True,
        on_request: Callable[[Received], None] = lambda request: None,
    ) -> None:
        self.host = host
        self.port = port
        self.requests = 0
        self.connections = 0
        self._tls = tls
        self._keep_bodies = keep_bodies
        self._on_request = on_request
        self._paths: dict[str, _Path] = {}
        self._open: set[_Connection] = set()
        self._waiting: list[tuple[str, int, bool, asyncio.Future[None]]] = []
        self._server: asyncio.Server | None = None

    @classmethod
    async def start(
        cls, *, host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None, keep_bodies: bool = True
    ) -> "Inbox":
        """A listening inbox; the caller closes it."""
        inbox = cls(host=host, port=port, tls=tls, keep_bodies=keep_bodies)
        await inbox.__aenter__()
        return inbox

    async def __aenter__(self) -> "Inbox":
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: _Connection(self), self.host, self.port, ssl=self._tls, backlog=BACKLOG
        )
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop listening and cut what is open."""
        if self._server is None:
            return
        self._server.close()
        self.cut()
        await asyncio.wait_for(self._server.wait_closed(), CLOSE_TIMEOUT_S)
        self._server = None

    def url(self, path: str) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self._tls else 'http'}://{host}:{self.port}{path}"

    def script(self, path: str, script: Script | None = None, *, secrets: Sequence[str] | None = None) -> None:
        """Say what a path does from now on, and by which `whsec_` secrets its signatures are checked.

        A new script counts its steps from the start.
        """
        state = self._path(path)
        if script is not None:
            state.script = script
            state.tries.clear()
        if secrets is not None:
            state.secrets = tuple(secrets)

    def received(self, path: str) -> list[Received]:
        """Every request of the path in the order of arrival."""
        return list(self._path(path).received)

    def take(self, path: str) -> list[Received]:
        """What the path received since the last take, and forget it; counts and ids stay."""
        state = self._path(path)
        taken = list(state.received)
        state.received.clear()
        return taken

    def accepted(self, path: str) -> frozenset[str]:
        """The webhook-ids that were answered 2xx."""
        return frozenset(self._path(path).accepted)

    def stats(self) -> Stats:
        paths = {path: state.stats() for path, state in self._paths.items()}
        return Stats(
            self.requests, sum(path.accepted for path in paths.values()), self.connections, len(self._open), paths
        )

    async def wait_for(
        self, path: str, count: int, timeout_s: float = 10.0, *, what: Literal["accepted", "requests"] = "accepted"
    ) -> list[Received]:
        """What the path received, once `count` different ids were accepted (or `count` requests made).

        Raises InboxError, with what was there, when that does not come about in time.
        """
        all_requests = what == "requests"
        if self._reached(path, all_requests) < count:
            come: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            entry = (path, count, all_requests, come)
            self._waiting.append(entry)
            try:
                await asyncio.wait_for(come, timeout_s)
            except TimeoutError:
                raise InboxError(
                    f"{path}: {self._reached(path, all_requests)} of {count} {what} after {timeout_s} s; {self.stats()}"
                ) from None
            finally:
                self._waiting.remove(entry)
        return self.received(path)

    def cut(self) -> None:
        """Close every open connection, as a restarted server would."""
        for connection in list(self._open):
            connection.abort()

    def clear(self) -> None:
        """Forget what arrived; scripts and secrets stay and count from the start."""
        for path, state in list(self._paths.items()):
            fresh = self._paths[path] = _Path()
            fresh.script, fresh.secrets = state.script, state.secrets
        self.requests = 0

    def _path(self, path: str) -> _Path:
        state = self._paths.get(path)
        if state is None:
            state = self._paths[path] = _Path()
        return state

    def _reached(self, path: str, all_requests: bool) -> int:
        state = self._path(path)
        return state.requests if all_requests else len(state.accepted)

    def _arrived(self, request: "_Request", connection: int) -> Step:
        """Take a request down and say what it meets."""
        state = self._path(request.path)
        headers = dict(request.headers)
        webhook_id = headers.get("webhook-id", "")
        checked: bool | None = None
        if state.secrets:
            checked = signature_ok(
                state.secrets,
                webhook_id,
                headers.get("webhook-timestamp", ""),
                request.body,
                headers.get("webhook-signature", ""),
                time.time(),
            )
        step = state.next_step(webhook_id)
        status = 0 if isinstance(step, Hang | Reset) else step.status
        attempt = headers.get("headgate-attempt", "")
        received = Received(
            path=request.path,
            webhook_id=webhook_id,
            timestamp=headers.get("webhook-timestamp", ""),
            signature_ok=checked,
            attempt=int(attempt) if attempt.isdecimal() else 0,
            arrived_at_ms=request.at_ms,
            connection=connection,
            status=status,
            body=request.body if self._keep_bodies else b"",
            headers=tuple(request.headers),
        )
        state.received.append(received)
        self._on_request(received)
        self.requests += 1
        state.requests += 1
        state.connections.add(connection)
        if checked is False:
            state.bad_signatures += 1
        if 200 <= status < 300:
            if webhook_id in state.accepted:
                state.duplicates += 1
            else:
                state.accepted.add(webhook_id)
        for path, count, all_requests, come in self._waiting:
            if path == request.path and not come.done() and self._reached(path, all_requests) >= count:
                come.set_result(None)
        return step

    def _control(self, request: "_Request") -> tuple[int, bytes]:
        target = urlsplit(request.path)
        match request.method, target.path.removeprefix(CONTROL):
            case "GET", "stats":
                return 200, msgspec.json.encode(self.stats())
            case "GET", "received":
                asked = parse_qs(target.query)
                after = int(asked.get("after", ["0"])[0])
                return 200, msgspec.json.encode(self.received(asked.get("path", [""])[0])[after:])
            case "POST", "take":
                asked = parse_qs(target.query)
                return 200, msgspec.json.encode(self.take(asked.get("path", [""])[0]))
            case "POST", "script":
                try:
                    order = msgspec.json.decode(request.body, type=Order)
                except msgspec.DecodeError as fault:
                    return 400, str(fault).encode()
                self.script(order.path, order.script, secrets=order.secrets)
                return 200, b"{}"
            case "POST", "clear":
                self.clear()
                return 200, b"{}"
            case _:
                return 404, b"GET stats | received?path=P&after=N, POST script | take?path=P | clear"


class _Request:
    """What the parser has seen of one request."""

    __slots__ = ("at_ms", "body", "headers", "method", "path")

    def __init__(self) -> None:
        self.at_ms = time.time() * 1000
        self.path = ""
        self.method = ""
        self.headers: list[tuple[str, str]] = []
        self.body = b""


class _Connection(asyncio.Protocol):
    """One connection. Requests are answered one after the other; pipelining is not spoken."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self._parser = httptools.HttpRequestParser(self)
        self._request = _Request()
        self._transport: asyncio.Transport | None = None
        self._number = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are not subclasses of it
        self._inbox.connections += 1
        self._number = self._inbox.connections
        self._inbox._open.add(self)

    def connection_lost(self, fault: Exception | None) -> None:
        self._transport = None
        self._inbox._open.discard(self)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.abort()

    # httptools calls these

    def on_message_begin(self) -> None:
        self._request = _Request()

    def on_url(self, url: bytes) -> None:
        self._request.path += url.decode("latin-1")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._request.headers.append((name.decode("latin-1").lower(), value.decode("latin-1")))

    def on_body(self, body: bytes) -> None:
        self._request.body += body

    def on_message_complete(self) -> None:
        request = self._request
        request.method = self._parser.get_method().decode()
        if request.path.startswith(CONTROL):
            self._answer(*self._inbox._control(request))
            return
        step = self._inbox._arrived(request, self._number)
        match step:
            case Ok(status=status, body=text) | Refuse(status=status, body=text):
                self._answer(status, text.encode())
            case Hang():
                pass
            case Reset():
                self._reset()
            case Throttle(retry_after=retry_after, status=status):
                self._answer(status, b"", b"retry-after: %b\r\n" % retry_after.encode())
            case Slow(delay_s=delay_s, status=status):
                asyncio.get_running_loop().call_later(delay_s, self._answer, status, b"")
            case Redirect(location=location, status=status):
                self._answer(status, b"", b"location: %b\r\n" % location.encode())
            case _:
                assert_never(step)

    def _answer(self, status: int, body: bytes, headers: bytes = b"") -> None:
        transport = self._transport
        if transport is None:
            return
        reason = http.client.responses.get(status, "-").encode()
        transport.write(
            b"HTTP/1.1 %d %b\r\n%bcontent-length: %d\r\n\r\n%b" % (status, reason, headers, len(body), body)
        )
        if not self._parser.should_keep_alive():
            transport.close()

    def _reset(self) -> None:
        if self._transport is not None:
            sock: socket.socket = self._transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
            self._transport.abort()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()


# Counting only: the cheapest receiver that still tells ids apart


class _Tally:
    def __init__(self, arrivals: bool) -> None:
        self.requests = 0
        self.connections = 0
        self.open = 0
        self.ids: set[bytes] = set()
        self.arrivals: list[Arrival] | None = [] if arrivals else None

    def control(self, method: str, path: str) -> bytes:
        match method, path.removeprefix(CONTROL):
            case "GET", "stats":
                return msgspec.json.encode(Stats(self.requests, len(self.ids), self.connections, self.open))
            case "GET", "arrivals":
                return msgspec.json.encode(self.arrivals or [])
            case "POST", "clear":
                self.requests = 0
                self.connections = self.open
                self.ids.clear()
                if self.arrivals:
                    self.arrivals.clear()
                return b"{}"
            case _:
                return b""


class _Counting(asyncio.Protocol):
    """Answers 200 to whole requests. Ids are looked for in the first packet, where every client of ours puts them."""

    OK: Final = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"
    ID: Final = b"webhook-id: "
    EVENT: Final = b'\r\n\r\n{"id":"'

    def __init__(self, tally: _Tally) -> None:
        self._tally = tally
        self._url = b""
        self._parser = httptools.HttpRequestParser(self)
        self._feed = self._parser.feed_data
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are not subclasses of it
        self._tally.connections += 1
        self._tally.open += 1

    def connection_lost(self, fault: Exception | None) -> None:
        self._transport = None
        self._tally.open -= 1

    def data_received(self, data: bytes) -> None:
        tally = self._tally
        at = data.find(self.ID)
        if at > 0:
            tally.ids.add(data[at + 12 : data.find(b"\r", at)])
            if tally.arrivals is not None and (at := data.find(self.EVENT)) > 0:
                at += len(self.EVENT)
                tally.arrivals.append(Arrival(data[at : data.find(b'"', at)].decode(), time.time() * 1000))
        try:
            self._feed(data)
        except httptools.HttpParserError:
            if self._transport is not None:
                self._transport.abort()

    def on_url(self, url: bytes) -> None:
        self._url = url

    def on_message_complete(self) -> None:
        if self._transport is None:
            return
        if self._url.startswith(CONTROL.encode()):
            body = self._tally.control(self._parser.get_method().decode(), self._url.decode())
            self._transport.write(
                b"HTTP/1.1 %d -\r\ncontent-length: %d\r\n\r\n%b" % (200 if body else 404, len(body), body)
            )
            return
        self._tally.requests += 1
        self._transport.write(self.OK)


# A process of its own, and how to speak to it

Answer = TypeVar("Answer")


class RemoteInbox:
    """An inbox that runs as a process of its own, started by `spawn`. Calls block; use as a context manager."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, tls: ssl.SSLContext | None = None) -> None:
        self.process = process
        self.port = port
        self._tls = tls
        self._link: http.client.HTTPConnection | None = None

    @classmethod
    def spawn(
        cls,
        *,
        port: int = 0,
        count_only: bool = False,
        arrivals: bool = False,
        keep_bodies: bool = True,
        cert: Path | None = None,
        key: Path | None = None,
        trust: ssl.SSLContext | None = None,
    ) -> "RemoteInbox":
        """Start the process and wait until it listens. `cert`, `key` and `trust` (for our calls) make it speak TLS."""
        command = [sys.executable, "-m", "dev.inbox", "--port", str(port), "--until-eof"]
        command += ["--count-only"] if count_only else []
        command += ["--arrivals"] if arrivals else []
        command += [] if keep_bodies else ["--no-bodies"]
        command += ["--cert", str(cert), "--key", str(key)] if cert and key else []
        # a session of its own: Ctrl-C at the terminal is for whoever started it, who then ends it in order
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, cwd=_root()
        )
        assert process.stdout is not None
        line = process.stdout.readline().decode()
        if not line.startswith("port="):
            process.kill()
            raise InboxError(f"the inbox did not start (exit code {process.wait(START_TIMEOUT_S)})")
        return cls(process, int(line.removeprefix("port=")), trust)

    def __enter__(self) -> "RemoteInbox":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._link is not None:
            self._link.close()
        self.process.terminate()
        try:
            self.process.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(CLOSE_TIMEOUT_S)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def url(self, path: str) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}{path}"

    def stats(self) -> Stats:
        return self._call("GET", "stats", Stats)

    def received(self, path: str, after: int = 0) -> list[Received]:
        return self._call("GET", f"received?path={path}&after={after}", list[Received])

    def take(self, path: str) -> list[Received]:
        """What the path received since the last take, which the inbox then forgets."""
        return self._call("POST", f"take?path={path}", list[Received])

    def arrivals(self) -> list[Arrival]:
        return self._call("GET", "arrivals", list[Arrival])

    def script(self, path: str, script: Script | None = None, *, secrets: Sequence[str] | None = None) -> None:
        order = Order(path, script, None if secrets is None else tuple(secrets))
        self._call("POST", "script", dict[str, str], msgspec.json.encode(order))

    def clear(self) -> None:
        self._call("POST", "clear", dict[str, str])

    def _call(self, method: str, what: str, answer: type[Answer], body: bytes = b"") -> Answer:
        if self._link is None:
            self._link = (
                http.client.HTTPSConnection("127.0.0.1", self.port, timeout=CONTROL_TIMEOUT_S, context=self._tls)
                if self._tls
                else http.client.HTTPConnection("127.0.0.1", self.port, timeout=CONTROL_TIMEOUT_S)
            )
        self._link.request(method, CONTROL + what, body)
        response = self._link.getresponse()
        content = response.read()
        if response.status != 200:
            raise InboxError(f"{method} {CONTROL}{what}: {response.status} {content.decode(errors='replace')}")
        return msgspec.json.decode(content, type=answer)


def _root() -> Path:
    """The folder that `python -m dev.inbox` is found from."""
    return Path(__file__).resolve().parent.parent


def _show(request: Received) -> None:
    body = request.body.decode("utf-8", "backslashreplace")
    print(
        f"{request.path} {request.status or 'no answer'} attempt {request.attempt} {request.webhook_id} {body}",
        flush=True,
    )


async def _serve(options: argparse.Namespace) -> None:
    tls: ssl.SSLContext | None = None
    if options.cert:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(options.cert, options.key)
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, ended.set)
    if options.until_eof:
        # whoever started us holds the other end, and never writes: readable means gone, however it ended
        loop.add_reader(sys.stdin.fileno(), ended.set)
    if options.count_only:
        tally = _Tally(options.arrivals)
        server = await loop.create_server(
            lambda: _Counting(tally), options.host, options.port, ssl=tls, backlog=BACKLOG
        )
        print(f"port={server.sockets[0].getsockname()[1]}", flush=True)
        await ended.wait()
        return
    on_request = _show if options.show else lambda request: None
    async with Inbox(
        host=options.host, port=options.port, tls=tls, keep_bodies=not options.no_bodies, on_request=on_request
    ) as inbox:
        for path, script in options.script:
            inbox.script(path, script)
        print(f"port={inbox.port}", flush=True)
        await ended.wait()


def _scripted(text: str) -> tuple[str, Script]:
    """`PATH=JSON` of the command line."""
    path, _, script = text.partition("=")
    try:
        return path, msgspec.json.decode(script, type=Script)
    except msgspec.DecodeError as fault:
        raise argparse.ArgumentTypeError(f"{text!r} is not PATH=JSON of a script: {fault}") from None


def main(arguments: Sequence[str] | None = None) -> None:
    import uvloop

    parser = argparse.ArgumentParser(prog="python -m dev.inbox", description="A local inbox for webhooks.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one; `port=<n>` is printed (default 0)")
    parser.add_argument("--count-only", action="store_true", help="answer 200 to all and count; check and keep nothing")
    parser.add_argument("--arrivals", action="store_true", help="with --count-only: keep each event's time of arrival")
    parser.add_argument("--no-bodies", action="store_true", help="do not keep the bodies")
    parser.add_argument("--show", action="store_true", help="print each request as it comes")
    parser.add_argument("--until-eof", action="store_true", help="end when stdin does")
    parser.add_argument("--cert", help="speak TLS with this certificate chain (PEM)")
    parser.add_argument("--key", help="its key (PEM)")
    parser.add_argument(
        "--script",
        action="append",
        type=_scripted,
        default=[],
        metavar="PATH=JSON",
        help="""what a path does, such as '/a={"mode":"refuse","status":410}'; more with POST /_inbox/script""",
    )
    options = parser.parse_args(arguments)
    if bool(options.cert) != bool(options.key):
        parser.error("--cert and --key go together")
    try:
        uvloop.run(_serve(options))
    except OSError as fault:
        if "attempting to bind" not in str(fault):
            raise
        why = os.strerror(fault.errno or 0).lower()
        print(
            f"Error: --port {options.port}: cannot listen there ({why}); give another port, or 0 for one that is free",
            file=sys.stderr,
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
