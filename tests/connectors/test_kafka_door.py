"""Every broker is dialled through the door, also those that a cluster advertises; and none can cost more than so much.

Sockets are counted at the door, and from outside: by a listener that must not be reached, and in the system's own list
of connections. Each has its control.
"""

import asyncio
import random
import socket
import ssl
import struct
import time
from collections.abc import Awaitable, Callable
from ipaddress import ip_network
from pathlib import Path

import pytest
import trustme
from aiokafka.protocol.admin import ApiVersionResponse_v0, SaslAuthenticateResponse_v0, SaslHandShakeResponse_v1

from connectors.egress import Egress, open_socket
from connectors.http.door import Address
from connectors.kafka.cluster import MAX_LEADERS
from tests.connectors.kafkas import deliver, delivery, sink
from tests.connectors.receiver import Peer, Receiver
from tests.contract.farsides.kafka import KafkaFarSide

ONLY_THE_FIRST = (ip_network("127.0.0.1/32"),)
ELSEWHERE = "127.0.0.2"  # forbidden where only the first is allowed; everything arrives there all the same


class Counting:
    def __init__(self) -> None:
        self.dialled: list[str] = []

    def __call__(self, address: Address, port: int) -> socket.socket:
        self.dialled.append(str(address))
        return open_socket(address, port)


def connections_to(host: str, port: int) -> int:
    """As the system has them, whoever opened them, whatever became of them since."""
    there = f"{struct.unpack('<I', socket.inet_aton(host))[0]:08X}:{port:04X}"
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return sum(line.split()[2] == there for line in lines)


@pytest.mark.parametrize("allowed", [False, True])
async def test_a_broker_that_is_advertised_at_a_forbidden_address_is_never_dialled(
    far: KafkaFarSide, allowed: bool
) -> None:
    counting = Counting()
    blocked: list[object] = []
    allow = (*ONLY_THE_FIRST, ip_network(f"{ELSEWHERE}/32")) if allowed else ONLY_THE_FIRST
    egress = Egress(allow, connect=counting, on_blocked=blocked.append)
    arrived = 0

    def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal arrived
        arrived += 1

    forbidden = await asyncio.start_server(serve, ELSEWHERE, 0)
    port = forbidden.sockets[0].getsockname()[1]
    far.brokers = [(7, ELSEWHERE, port)]
    connector = sink(egress, far.options(), far.secrets())
    (outcome,) = await deliver(connector, delivery(1))
    steps = await connector.check()
    seen = connections_to(ELSEWHERE, port)
    if allowed:  # the control: it is seen in all three ways
        assert arrived > 0 and seen > 0 and ELSEWHERE in counting.dialled
    else:
        assert (outcome.verdict, outcome.fault, outcome.code) == ("reject", "destination", "egress_blocked")
        assert (arrived, seen) == (0, 0)
        assert set(counting.dialled) == {"127.0.0.1"}
        assert len(blocked) >= 2
        assert (steps[-1].name, steps[-1].ok) == ("brokers", False)
        assert ELSEWHERE in steps[-1].detail
    await connector.close()
    egress.close()
    forbidden.close()


@pytest.mark.parametrize("host", ["10.0.0.1", "169.254.169.254", "[::ffff:127.0.0.2]", "0x7f000002", "inner.example"])
async def test_a_bootstrap_broker_is_judged_where_it_is_dialled(far: KafkaFarSide, host: str) -> None:
    counting = Counting()
    egress = Egress(ONLY_THE_FIRST, connect=counting, lookup=lambda name: ["10.0.0.7"])
    connector = sink(egress, far.options(), far.secrets(), bootstrap=f"{host}:{far.port}")
    (outcome,) = await deliver(connector, delivery(1))
    assert (outcome.verdict, outcome.code) == ("reject", "egress_blocked")
    assert counting.dialled == []
    await connector.close()
    egress.close()


async def test_clear_text_goes_only_to_what_is_allowed(far: KafkaFarSide) -> None:
    counting = Counting()
    egress = Egress(ONLY_THE_FIRST, connect=counting)
    connector = sink(egress, far.options(), far.secrets(), bootstrap="93.184.215.14:9092")
    (outcome,) = await deliver(connector, delivery(1))
    assert (outcome.verdict, outcome.code) == ("reject", "egress_blocked")
    assert counting.dialled == []
    await connector.close()
    egress.close()


async def test_of_several_brokers_the_first_that_answers_will_do(far: KafkaFarSide, egress: Egress) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        bootstrap = f"127.0.0.1:{nobody.getsockname()[1]},127.0.0.1:{far.port}"
        connector = sink(egress, far.options(), far.secrets(), bootstrap=bootstrap)
        assert [one.verdict for one in await deliver(connector, delivery(1))] == ["delivered"]
        await connector.close()


# ---------------------------------------------------------------- TLS


async def test_a_certificate_of_another_authority_is_refused(far: KafkaFarSide, authority: trustme.CA) -> None:
    """The own authority takes the place of the system's."""
    stranger = trustme.CA()

    async def script(peer: Peer) -> None:
        await peer.gone()

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost", "127.0.0.1").configure_cert(context)
    async with Receiver(script, tls=context) as broker:
        egress = Egress(ONLY_THE_FIRST)
        place = f"127.0.0.1:{broker.port}"
        for ca, code in ((stranger, "tls"), (authority, "timeout")):
            pem = ca.cert_pem.bytes().decode()
            connector = sink(egress, far.options(), far.secrets(), bootstrap=place, tls=True, ca=pem, timeout="2s")
            (outcome,) = await deliver(connector, delivery(1))
            assert (outcome.verdict, outcome.code) == ("retry", code)
            await connector.close()
        egress.close()


# ---------------------------------------------------------------- hostile brokers


def frame(correlation: int, body: bytes) -> bytes:
    return struct.pack(">ii", len(body) + 4, correlation) + body


async def asked(peer: Peer) -> int:
    """The correlation id of the next request."""
    (size,) = struct.unpack(">i", await peer.reader.readexactly(4))
    return int(struct.unpack_from(">i", await peer.reader.readexactly(size), 4)[0])


VERSIONS = ApiVersionResponse_v0(0, [(0, 7, 7), (3, 4, 4), (17, 1, 1), (36, 0, 0)]).encode()


async def endless(peer: Peer) -> None:
    await peer.send(struct.pack(">i", 2**31 - 1))
    while True:
        await peer.send(b"\0" * 65536)


async def negative(peer: Peer) -> None:
    await peer.send(struct.pack(">i", -5))
    await peer.gone()


async def hard_login(peer: Peer) -> None:
    """A SCRAM login that would hash for hours."""
    await peer.send(frame(await asked(peer), VERSIONS))
    await peer.send(frame(await asked(peer), SaslHandShakeResponse_v1(0, ["SCRAM-SHA-512"]).encode()))
    (size,) = struct.unpack(">i", await peer.reader.readexactly(4))
    request = await peer.reader.readexactly(size)
    nonce = request.rpartition(b"r=")[2]
    first = b"r=%bx,s=c2FsdA==,i=2000000000" % nonce
    correlation = int(struct.unpack_from(">i", request, 4)[0])
    await peer.send(frame(correlation, SaslAuthenticateResponse_v0(0, None, first).encode()))
    await peer.gone()


async def null_lists(peer: Peer) -> None:
    await peer.send(frame(await asked(peer), b"\0\0\xff\xff\xff\xff"))
    await peer.gone()


async def other_versions(peer: Peer) -> None:
    await peer.send(frame(await asked(peer), ApiVersionResponse_v0(0, [(0, 99, 99), (3, 99, 99)]).encode()))
    await peer.gone()


async def old_versions(peer: Peer) -> None:
    await peer.send(frame(await asked(peer), ApiVersionResponse_v0(0, [(0, 0, 2), (3, 0, 4)]).encode()))
    await peer.gone()


Script = Callable[[Peer], Awaitable[None]]


@pytest.mark.parametrize(
    ("script", "code"),
    [
        (endless, "protocol"),
        (negative, "protocol"),
        (hard_login, "protocol"),
        (null_lists, "protocol"),
        (other_versions, "incompatible"),
        (old_versions, "incompatible"),
    ],
)
async def test_a_hostile_broker_costs_a_bounded_amount_of_time(
    far: KafkaFarSide, egress: Egress, script: Script, code: str
) -> None:
    async with Receiver(script) as broker:
        place = f"127.0.0.1:{broker.port}"
        connector = sink(egress, far.options(), far.secrets(), bootstrap=place, sasl="scram-sha-512")
        started = time.monotonic()
        (outcome,) = await deliver(connector, delivery(1))
        assert (outcome.fault, outcome.code) == ("destination", code)
        assert time.monotonic() - started < 4
        await connector.close()


async def test_a_cluster_that_lists_more_brokers_than_any_has_is_not_dialled(far: KafkaFarSide, egress: Egress) -> None:
    far.brokers = [(number, "127.0.0.1", 40_000 + number) for number in range(MAX_LEADERS + 1)]
    connector = sink(egress, far.options(), far.secrets())
    (outcome,) = await deliver(connector, delivery(1))
    assert (outcome.verdict, outcome.code) == ("reject", "incompatible")
    assert str(MAX_LEADERS) in outcome.detail
    await connector.close()


async def test_random_answers_raise_nothing(
    far: KafkaFarSide, egress: Egress, caplog: pytest.LogCaptureFixture
) -> None:
    dice = random.Random(7)

    async def script(peer: Peer) -> None:
        for _ in range(dice.randrange(3)):
            await peer.send(frame(await asked(peer), VERSIONS))
        correlation = await asked(peer)
        junk = dice.randbytes(dice.randrange(200))
        await peer.send(frame(correlation, junk) if dice.random() < 0.8 else junk)
        if dice.random() < 0.5:
            peer.close()
        else:
            await asyncio.sleep(0.05)
            peer.reset()

    problems: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: problems.append(context))
    async with Receiver(script) as broker:
        for number in range(150):
            connector = sink(egress, far.options(), far.secrets(), bootstrap=f"127.0.0.1:{broker.port}")
            (outcome,) = await deliver(connector, delivery(number))
            assert outcome.verdict in ("retry", "reject")
            assert outcome.fault == "destination"
            await connector.close()
    assert problems == []
    assert "Unexpected exception" not in caplog.text
