"""Far sides that mean harm, or are broken (scoreboard R8): bounded time, bounded memory, nothing raised."""

import asyncio
import gzip
import random
import tracemalloc
from collections.abc import Callable

import pytest

from connectors.egress import Egress
from connectors.http.answer import MAX_ANSWER_BYTES, MAX_EXCERPT_BYTES, MAX_HEAD_BYTES
from tests.connectors.post import aim, begin, post
from tests.connectors.receiver import OK, Peer, Receiver, answering
from tests.connectors.until import until

# What the system's own socket buffers may take on loopback, beyond what the client reads.
BUFFERS_BYTES = 16 * 1024 * 1024


class Flood:
    """A script that sends `head`, then `piece` until nobody takes it or `most` bytes have gone; counts the bytes."""

    def __init__(self, head: bytes, piece: bytes, most: int = 1_000_000_000) -> None:
        self.head = head
        self.piece = piece
        self.most = most
        self.sent = 0

    async def __call__(self, peer: Peer) -> None:
        await peer.request()
        await peer.send(self.head)
        while self.sent < self.most:
            await peer.send(self.piece)
            self.sent += len(self.piece)


async def _memory_of_one_post(egress: Egress, flood: Flood) -> tuple[str, int, int]:
    async with Receiver(flood) as receiver:
        target = aim(egress, f"http://127.0.0.1:{receiver.port}/")
        tracemalloc.start()
        try:
            answer = await post(target)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert egress.http.connections == 0
        assert len(answer.excerpt) <= MAX_EXCERPT_BYTES
        return answer.fault, answer.status, peak


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\n", b"x" * 65536),
        (b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 65536),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", b"10000\r\n" + b"x" * 65536 + b"\r\n"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", b"1\r\nx\r\n" * 10000),
    ],
    ids=["length", "until closed", "chunked", "tiny chunks"],
)
async def test_a_gigabyte_of_answer_is_cut_off_and_the_status_counts(egress: Egress, head: bytes, piece: bytes) -> None:
    flood = Flood(head, piece)
    fault, status, peak = await _memory_of_one_post(egress, flood)
    assert (fault, status) == ("", 200)
    assert flood.sent < BUFFERS_BYTES
    assert peak < 4_000_000


async def test_a_client_without_a_cap_takes_far_more() -> None:
    """The control of the floods here: what stops them is the client's cap, not the far side."""
    flood = Flood(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 65536, most=4 * BUFFERS_BYTES)
    async with Receiver(flood) as receiver:
        reader, writer = await asyncio.open_connection("127.0.0.1", receiver.port)
        writer.write(b"POST / HTTP/1.1\r\ncontent-length: 0\r\n\r\n")
        while await reader.read(1 << 20):
            pass
        writer.close()
    assert flood.sent >= 4 * BUFFERS_BYTES


@pytest.mark.parametrize(
    "piece",
    [b"x: " + b"y" * 1000 + b"\r\n", b"x", b"HTTP/1.1 100 Continue\r\n\r\n"],
    ids=["lines", "one line", "interim"],
)
async def test_endless_headers_are_cut_off(egress: Egress, piece: bytes) -> None:
    start = b"" if piece.startswith(b"HTTP") else b"HTTP/1.1 200 OK\r\nx: "
    flood = Flood(start, piece * (1 + 65536 // len(piece)))
    fault, _, peak = await _memory_of_one_post(egress, flood)
    assert fault == "headers_too_large"
    assert flood.sent < BUFFERS_BYTES
    assert peak < 4_000_000


async def test_headers_just_under_the_cap_are_read(egress: Egress) -> None:
    filler = b"x" * (MAX_HEAD_BYTES - 100)
    async with answering(b"HTTP/1.1 200 OK\r\nx: %b\r\ncontent-length: 2\r\n\r\nok" % filler) as receiver:
        assert (await post(aim(egress, f"http://127.0.0.1:{receiver.port}/"))).excerpt == b"ok"


async def test_a_gzip_bomb_stays_packed(egress: Egress) -> None:
    bomb = gzip.compress(b"\0" * 40_000_000)
    assert len(bomb) < MAX_ANSWER_BYTES
    head = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(bomb)
    async with answering(head + bomb) as receiver:
        target = aim(egress, f"http://127.0.0.1:{receiver.port}/")
        tracemalloc.start()
        try:
            answer = await post(target)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert (answer.status, answer.excerpt) == (200, bomb[:MAX_EXCERPT_BYTES])
        assert peak < 4_000_000
        assert "accept-encoding" not in receiver.requests[0].headers


@pytest.mark.parametrize(
    ("start", "drip"),
    [(b"", b"\r\n"), (b"HTTP/1.1 200 OK\r\nx: ", b"y"), (b"HTTP/1.1 200 OK\r\ncontent-length: 9999\r\n\r\n", b"z")],
    ids=["before the status", "headers", "body"],
)
async def test_a_slow_loris_ends_at_the_total_timeout_and_delays_nobody(
    egress: Egress, start: bytes, drip: bytes
) -> None:
    """Each byte comes in time, the answer never does."""

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(start)
        while True:
            await peer.send(drip)
            await asyncio.sleep(0.02)

    async with Receiver(script) as slow, answering(OK) as receiver:
        hung = [begin(aim(egress, f"http://127.0.0.1:{slow.port}/"), timeout_s=0.5) for _ in range(100)]
        target = aim(egress, f"http://127.0.0.1:{receiver.port}/")
        for _ in range(50):
            assert (await post(target, timeout_s=3)).status == 200
        assert {(await one).fault for one in hung} == {"timeout"}
        await until(lambda: egress.http.connections == 1)


@pytest.mark.parametrize(
    "garbage",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"HTTP/1.1 200 OK\nContent-Length: 0\n\n",
        b"HTTP/1.1 20 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        b"\0" * 100,
        b"POST / HTTP/1.1\r\n\r\n",
    ],
)
async def test_what_is_not_http_is_a_fault_of_the_destination(egress: Egress, garbage: bytes) -> None:
    async with answering(garbage) as receiver:
        answer = await post(aim(egress, f"http://127.0.0.1:{receiver.port}/"), timeout_s=5)
        assert (answer.status, answer.fault) == (0, "protocol")


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("rounds", [40, pytest.param(1000, marks=pytest.mark.chaos("fuzz"))])
async def test_random_answers_over_real_sockets_harm_nothing(
    egress: Egress, rounds: int, report: Callable[[str], None]
) -> None:
    """Bytes at random and legal answers with bytes changed, cut into pieces; every request ends, and an honest far
    side beside them is served after each."""
    dice = random.Random(20261121)
    seeds = [
        OK,
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        b"HTTP/1.1 429 Slow\r\nretry-after: 5\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" + OK,
        b"HTTP/1.0 200 OK\r\n\r\nabc",
    ]

    async def script(peer: Peer) -> None:
        await peer.request()
        if dice.random() < 0.3:
            data = bytearray(dice.randbytes(dice.randrange(200)))
        else:
            data = bytearray(dice.choice(seeds))
            for _ in range(dice.randrange(1, 6)):
                at = dice.randrange(len(data))
                data[at : at + dice.randrange(3)] = dice.randbytes(dice.randrange(3))
        cut = dice.randrange(len(data) + 1)
        await peer.send(bytes(data[:cut]))
        await asyncio.sleep(0)
        await peer.send(bytes(data[cut:]))
        if dice.random() < 0.3:
            peer.reset()

    async with Receiver(script) as fuzz, answering(OK) as receiver:
        target = aim(egress, f"http://127.0.0.1:{fuzz.port}/")
        honest = aim(egress, f"http://127.0.0.1:{receiver.port}/")
        seen = set()
        for _ in range(rounds):
            for answer in await asyncio.gather(*[begin(target, timeout_s=5) for _ in range(50)]):
                assert (answer.status == 0) == (answer.fault != "")
                seen.add(answer.fault)
            assert (await post(honest)).status == 200
        report(f"{50 * rounds:,} answers, none unhandled")
        assert seen >= {"", "protocol", "reset"}
        await until(lambda: egress.http.connections == 1)
        assert receiver.connections == 1
