"""Whatever a far side answers, a request ends once, with a status or a fault, after a bounded number of bytes.

A million answers go through the connection over a socket that is a list of pieces; thousands go over real ones
(`test_http_hostile.py`).
"""

import select
from collections import Counter
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Final

import pytest

from connectors.http.answer import MAX_ANSWER_BYTES, MAX_EXCERPT_BYTES, Answer
from connectors.http.client import Exchange, Target
from connectors.http.connection import READ_BYTES, Connection
from connectors.http.place import parse_url
from connectors.webhook.classify import CODES, MAX_RETRY_AFTER_S, classify
from tests.connectors.post import ACME
from tests.mutate import TOKENS, mutated

AT_MS: Final = 1_795_000_000_000
MESSAGE: Final = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}"
OK: Final = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
CORPUS: Final = [
    OK,
    b"HTTP/1.1 204 No Content\r\ndate: Wed, 25 Nov 2026 01:00:00 GMT\r\nconnection: keep-alive\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n5;x=y\r\ndefgh\r\n0\r\nx-trailer: 1\r\n\r\n",
    b"HTTP/1.1 429 Too Many\r\nretry-after: 5\r\ncontent-length: 0\r\n\r\n",
    b"HTTP/1.1 503 -\r\nRetry-After: Wed, 25 Nov 2026 01:00:00 GMT\r\nconnection: close\r\n\r\nbusy",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n" + OK,
    b"HTTP/1.0 200 OK\r\n\r\n" + b"until closed " * 600,
    b"HTTP/1.1 302 Found\r\nlocation: http://169.254.169.254/\r\ncontent-length: 0\r\n\r\n",
    b"HTTP/1.1 410 Gone\r\nset-cookie: a=b\r\nset-cookie: c=d\r\ncontent-length: 0\r\n\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n\x81\x00",
    b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 22\r\n\r\n\x1f\x8b\x08" + bytes(19),
    OK + OK,
]
HEADERS: Final = (
    *(b"content-length: 5", b"content-length: 18446744073709551616", b"content-length: -1", b"ffffffffff"),
    *(b"transfer-encoding: chunked", b"transfer-encoding: gzip, chunked", b"connection: close", b"connection: upgrade"),
    *(b"retry-after: 1e9", b"retry-after: " + b"9" * 400, b"retry-after: Thu, 99 Foo 99999 99:99:99 GMT"),
    *(b"retry-after: Wed, 25 Nov 2026 01:00:00 +9999", b"retry-after: \xd9\xa1", b"upgrade: h2c", b"HTTP/2.0 200"),
    *(b"x:\r\n y", b"\r\n\r\n", b"HTTP/1.1 999", b"0\r\n\r\n", b"x" * 20_000, b"y" * 70_000, OK),
)


class Pieces:
    """A socket that has come to hold these pieces, then ends or breaks; counts what is read."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.breaks = False
        self.read = 0

    def fileno(self) -> int:
        return 99

    def getsockopt(self, *_: int) -> int:
        return 0

    def send(self, data: bytes) -> int:
        return len(data)

    def recv(self, most: int) -> bytes:
        if not self.pieces:
            if self.breaks:
                raise ConnectionResetError
            return b""
        piece = self.pieces.pop(0)
        if len(piece) > most:
            self.pieces.insert(0, piece[most:])
            piece = piece[:most]
        self.read += len(piece)
        return piece


class Waits:
    """What a connection asks of its client, taken down."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.kept = self.closed = self.again = False

    def finish(self, _exchange: Exchange, answer: Answer) -> None:
        self.answers.append(answer)

    def keep(self, _connection: Connection) -> None:
        self.kept = True

    def release(self, *_: Any) -> None:
        self.closed = True

    def connect(self, _exchange: Exchange) -> None:
        self.again = True

    def connected(self, _connection: Connection) -> None: ...

    def watch(self, _connection: Connection, *, writable: bool) -> None: ...


def cut(dice: Random, data: bytes) -> list[bytes]:
    """As it might arrive: whole, in two, or byte by byte."""
    roll = dice.random()
    if roll < 0.5 or len(data) < 2:
        return [data] if data else []
    if roll < 0.95:
        at = dice.randrange(1, len(data))
        return [data[:at], data[at:]]
    return [data[n : n + 1] for n in range(min(len(data), 300))]


def asked(made: Connection, waits: Waits, socket: Pieces, pieces: list[bytes], breaks: bool) -> Answer | None:
    """The end of one request that these pieces answer; None if it would be sent again."""
    socket.pieces, socket.breaks, socket.read = pieces, breaks, 0
    waits.answers.clear()
    waits.kept = False
    while not waits.answers and not waits.again:
        made.event(select.EPOLLIN)
    assert len(waits.answers) + waits.again == 1
    assert waits.kept or waits.closed
    return waits.answers[0] if waits.answers else None


def checked(answer: Answer, read: int) -> str:
    """What it counts for; asserts that it is bounded and makes sense."""
    assert (answer.status == 0) == (answer.fault != "")
    assert answer.fault in ("", "protocol", "reset", "headers_too_large")
    assert read <= MAX_ANSWER_BYTES + READ_BYTES
    assert len(answer.excerpt) <= MAX_EXCERPT_BYTES
    assert len(answer.retry_after) <= 200
    outcome = classify(answer, AT_MS, frozenset((404, 999)))
    assert outcome.code in CODES
    assert 0 <= outcome.retry_after_s <= MAX_RETRY_AFTER_S
    return answer.fault or f"{answer.status // 100}xx"


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("count", [10_000, pytest.param(1_000_000, marks=pytest.mark.chaos("fuzz"))])
def test_whatever_is_answered_ends_the_request_once(count: int, report: Callable[[str], None]) -> None:
    dice = Random(count)
    tokens: Sequence[bytes] = (*HEADERS, *TOKENS)
    ends: Counter[str] = Counter()
    waits, made, socket = Waits(), None, Pieces()
    target = Target(waits, ACME, parse_url("http://127.0.0.1:9/"), None)  # type: ignore[arg-type]
    for number in range(count):
        data = mutated(dice, CORPUS, tokens) if dice.random() < 0.9 else dice.choice(CORPUS)
        exchange = Exchange(target, MESSAGE, lambda _: None, {})
        if made is None:
            waits, socket = Waits(), Pieces()
            made = Connection(waits, exchange, socket)  # type: ignore[arg-type]
            made.event(select.EPOLLOUT)
        else:
            made.carry(exchange)
        try:
            answer = asked(made, waits, socket, cut(dice, data), dice.random() < 0.1)
            ends[checked(answer, socket.read) if answer else "again"] += 1
        except Exception as fault:
            raise AssertionError(f"seed {count}, input {number}: {data[:500]!r}") from fault
        if waits.closed or waits.again:
            made = None
    report(f"{count:,} answers (seed {count}), none unhandled: {dict(ends)}")
    # the control: of all kinds
    kinds = ("2xx", "3xx", "4xx", "5xx", "protocol", "reset", "headers_too_large")
    assert min(ends[kind] for kind in kinds) > count / 1000
