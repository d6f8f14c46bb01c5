"""Bucket and role are dialled through the door alone, and clear text goes only to what is allowed.

Sockets are counted at the door, and from outside: by a listener that must not be reached, and in the system's own list
of connections. Each has its control.
"""

import asyncio
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Sequence
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
import trustme

from connectors.egress import Egress, open_socket
from connectors.http.door import Address
from tests.connectors.receiver import Peer, Receiver
from tests.connectors.s3s import deliver, delivery, sink
from tests.contract.farsides.s3 import EXTERNAL_ID, ROLE, S3FarSide

ONLY_THE_FIRST = (ip_network("127.0.0.1/32"),)
LISTENS = "0A"
ELSEWHERE = "127.0.0.2"  # forbidden where only the first is allowed; everything arrives there all the same


class Counting:
    def __init__(self) -> None:
        self.dialled: list[str] = []

    def __call__(self, address: Address, port: int) -> socket.socket:
        self.dialled.append(str(address))
        return open_socket(address, port)


class Listener:
    """Must not be reached, where it is forbidden."""

    def __init__(self) -> None:
        self.arrived = 0
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.arrived += 1
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(b"HTTP/1.1 503 x\r\ncontent-length: 0\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    @property
    def connections(self) -> int:
        """As the system has them, whoever opened them, whatever became of them since."""
        there = f"{struct.unpack('<I', socket.inet_aton(ELSEWHERE))[0]:08X}:{self.port:04X}"
        lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
        return sum(there in line.split()[1:3] and line.split()[3] != LISTENS for line in lines)


@pytest.fixture
async def forbidden() -> AsyncIterator[Listener]:
    listener = Listener()
    server = await asyncio.start_server(listener.serve, ELSEWHERE, 0)
    listener.port = server.sockets[0].getsockname()[1]
    yield listener
    server.close()


def resolved(host: str) -> Sequence[str]:
    return [ELSEWHERE]


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("host", [ELSEWHERE, "inner.example"])
@pytest.mark.parametrize("asked", ["endpoint", "sts_endpoint"])
async def test_an_endpoint_at_a_forbidden_address_is_never_dialled(
    store: S3FarSide, forbidden: Listener, allowed: bool, host: str, asked: str
) -> None:
    counting = Counting()
    blocked: list[object] = []
    allow = (*ONLY_THE_FIRST, ip_network(f"{ELSEWHERE}/32")) if allowed else ONLY_THE_FIRST
    egress = Egress(allow, connect=counting, lookup=resolved, on_blocked=blocked.append)
    options: dict[str, Any] = {**store.options(), asked: f"http://{host}:{forbidden.port}"}
    if asked == "sts_endpoint":
        options |= {"role": ROLE, "external_id": EXTERNAL_ID}
    connector = sink(egress, options, store.secrets())
    (outcome,) = await deliver(connector, delivery())
    steps = await connector.check()
    seen = forbidden.connections
    if allowed:  # the control: it is seen in all three ways
        assert forbidden.arrived > 0 and seen > 0 and ELSEWHERE in counting.dialled
    else:
        assert (outcome.verdict, outcome.fault, outcome.code) == ("reject", "destination", "egress_blocked")
        assert (forbidden.arrived, seen, counting.dialled) == (0, 0, [])
        assert len(blocked) == 2
        assert (steps[-1].name, steps[-1].ok) == ("connect", False)
        assert ELSEWHERE in steps[-1].detail
    await connector.close()
    egress.close()


@pytest.mark.parametrize("path_style", [False, True])
async def test_a_bucket_s_own_host_is_judged_by_what_its_name_resolves_to(
    store: S3FarSide, forbidden: Listener, path_style: bool
) -> None:
    """That of AWS too, which no option names: whoever answers for its name cannot lead anywhere."""
    counting = Counting()
    asked: list[str] = []

    def lookup(host: str) -> Sequence[str]:
        asked.append(host)
        return ["169.254.169.254", "10.0.0.1", ELSEWHERE]

    egress = Egress(ONLY_THE_FIRST, connect=counting, lookup=lookup)
    connector = sink(egress, {"bucket": "acme", "region": "eu-west-1", "path_style": path_style}, store.secrets())
    (outcome,) = await deliver(connector, delivery())
    assert (outcome.verdict, outcome.code) == ("reject", "egress_blocked")
    assert counting.dialled == []
    assert asked == ["s3.eu-west-1.amazonaws.com" if path_style else "acme.s3.eu-west-1.amazonaws.com"]
    await connector.close()
    egress.close()


@pytest.mark.parametrize("host", ["10.0.0.1", "169.254.169.254", "[::ffff:127.0.0.2]", "0x7f000002", "2130706434"])
async def test_an_address_is_judged_in_every_spelling(store: S3FarSide, host: str) -> None:
    counting = Counting()
    egress = Egress(ONLY_THE_FIRST, connect=counting)
    connector = sink(egress, {**store.options(), "endpoint": f"https://{host}"}, store.secrets())
    (outcome,) = await deliver(connector, delivery())
    assert (outcome.verdict, outcome.code) == ("reject", "egress_blocked")
    assert counting.dialled == []
    await connector.close()
    egress.close()


async def test_clear_text_goes_only_to_what_is_allowed(store: S3FarSide) -> None:
    counting = Counting()
    egress = Egress(ONLY_THE_FIRST, connect=counting)
    connector = sink(egress, {**store.options(), "endpoint": "http://93.184.215.14"}, store.secrets())
    (outcome,) = await deliver(connector, delivery())
    assert (outcome.verdict, outcome.code) == ("reject", "egress_blocked")
    assert counting.dialled == []
    await connector.close()
    egress.close()


async def test_a_certificate_of_another_authority_is_refused_and_nothing_is_sent(
    store: S3FarSide, authority_file: Path
) -> None:
    sent = 0

    async def script(peer: Peer) -> None:
        nonlocal sent
        sent += len(await peer.reader.read(100))

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    async with Receiver(script, tls=context) as stranger:
        egress = Egress(ONLY_THE_FIRST, ca_file=str(authority_file))
        options = {**store.options(), "endpoint": f"https://127.0.0.1:{stranger.port}"}
        connector = sink(egress, options, store.secrets())
        (outcome,) = await deliver(connector, delivery())
        assert (outcome.verdict, outcome.code, sent) == ("retry", "tls", 0)
        steps = await connector.check()
        assert (steps[-1].name, steps[-1].ok) == ("connect", False)
        await connector.close()
        egress.close()


@pytest.mark.parametrize(
    ("lookup", "code"),
    [
        (lambda host: [], "dns"),
        (lambda host: ["127.0.0.1"], "connect_refused"),
    ],
)
async def test_what_never_went_out_is_told_apart_and_is_not_in_doubt(store: S3FarSide, lookup: Any, code: str) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        door = Egress(ONLY_THE_FIRST, lookup=lookup)
        connector = sink(door, {**store.options(), "endpoint": f"http://inner.example:{port}"}, store.secrets())
        (outcome,) = await deliver(connector, delivery())
        assert (outcome.verdict, outcome.fault, outcome.code) == ("retry", "destination", code)
        await connector.close()
        door.close()
