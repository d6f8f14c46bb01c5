"""What a record to a Kafka destination costs, from memory to the broker's answer, beside aiokafka's own producer.

`python -m bench.kafka_sink`: the embedded broker, 1 KB events, lz4, acks=all, idempotent. Counted is the CPU of this
process alone. Both make the same records; they take turns.
"""

import argparse
import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable
from ipaddress import ip_network
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Final

import uvloop
from aiokafka import AIOKafkaProducer
from confluent_kafka.admin import AdminClient, NewTopic
from msgspec import Raw

from connectors.body import body
from connectors.contract import Batch
from connectors.egress import Egress
from connectors.kafka.connector import connect
from connectors.kafka.encode import MAX_BATCH_BYTES, headers
from connectors.kafka.options import Options, Secrets
from connectors.kafka.producer import LINGER_S
from dev import stack
from schemas.delivery import Delivery
from schemas.event import Event
from schemas.ids import DeliveryId, DestinationId, ExternalId, TenantRef, Vendor
from schemas.outcome import Outcome

ACME: Final = TenantRef(Vendor("default"), ExternalId("acme"))
SINK: Final = DestinationId("sink")
TOPIC: Final = "orders"
PARTITIONS: Final = 12
IN_FLIGHT: Final = 4096


def deliveries(count: int) -> tuple[Delivery, ...]:
    payload = Raw(b'{"text":"' + bytes(range(97, 123)) * 35 + b'"}')
    return tuple(
        Delivery(
            ACME,
            SINK,
            DeliveryId(f"dlv_{number:026}"),
            Event("invoice.paid", payload, f"evt_{number}", "2026-11-21T09:30:00Z", "acme", 1, "", "", f"inv_{number}"),
            "t/0/0",
            0,
            1024,
        )
        for number in range(count)
    )


async def by_start(bootstrap: str, every: tuple[Delivery, ...]) -> float:
    """As a lane does: no future for a delivery, the next one when one has ended."""
    egress = Egress([ip_network("127.0.0.0/8")])
    connector = connect(ACME, SINK, Options(bootstrap=bootstrap, topic=TOPIC, tls=False), Secrets(), egress)
    over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    waiting = iter(every)
    left = len(every)

    def done(outcome: Outcome) -> None:
        nonlocal left
        assert outcome.verdict == "delivered", outcome
        left -= 1
        if not left:
            over.set_result(None)
        elif (following := next(waiting, None)) is not None:
            connector.start(following, 0, done)

    await connector.deliver(Batch(ACME, SINK, 0, None, every[:1]))
    begun = _cpu_s()
    for _ in range(IN_FLIGHT):
        connector.start(next(waiting), 0, done)
    await over
    spent = _cpu_s() - begun
    await connector.close()
    egress.close()
    return spent


async def by_deliver(bootstrap: str, every: tuple[Delivery, ...]) -> float:
    """Through `deliver`, with a future for each."""
    egress = Egress([ip_network("127.0.0.0/8")])
    connector = connect(ACME, SINK, Options(bootstrap=bootstrap, topic=TOPIC, tls=False), Secrets(), egress)
    await connector.deliver(Batch(ACME, SINK, 0, None, every[:1]))
    begun = _cpu_s()
    for at in range(0, len(every), IN_FLIGHT):
        outcomes = await connector.deliver(Batch(ACME, SINK, 0, None, every[at : at + IN_FLIGHT]))
        assert {outcome.verdict for outcome in outcomes.values()} == {"delivered"}
    spent = _cpu_s() - begun
    await connector.close()
    egress.close()
    return spent


async def by_aiokafka(bootstrap: str, every: tuple[Delivery, ...]) -> float:
    """aiokafka's `send`, awaited, and then the future that it gives."""
    producer = AIOKafkaProducer(
        bootstrap_servers=bootstrap,
        acks="all",
        enable_idempotence=True,
        compression_type="lz4",
        linger_ms=LINGER_S * 1000,
        max_batch_size=MAX_BATCH_BYTES,
        max_request_size=4 * MAX_BATCH_BYTES,
    )
    await producer.start()
    await producer.send_and_wait(TOPIC, b"{}", b"k")
    begun = _cpu_s()
    for at in range(0, len(every), IN_FLIGHT):
        sent = [
            await producer.send(TOPIC, body(one.event), one.event.aggregateId.encode(), headers=headers(one))
            for one in every[at : at + IN_FLIGHT]
        ]
        await asyncio.gather(*sent)
    spent = _cpu_s() - begun
    await producer.stop()
    return spent


def _cpu_s() -> float:
    spent = getrusage(RUSAGE_SELF)
    return spent.ru_utime + spent.ru_stime


Way = Callable[[str, tuple[Delivery, ...]], Awaitable[float]]
WAYS: Final[dict[str, Way]] = {"start": by_start, "deliver": by_deliver, "aiokafka send": by_aiokafka}


async def measure(bootstrap: str, count: int, rounds: int) -> None:
    every = deliveries(count)
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(rounds):
        for name, way in WAYS.items():
            found[name].append(count / await way(bootstrap, every))
    middle = {name: sorted(speeds)[len(speeds) // 2] for name, speeds in found.items()}
    for name, speed in middle.items():
        ratio = speed / middle["aiokafka send"]
        print(f"{name}: {speed:,.0f} records per CPU-second, {1e6 / speed:.1f} us each, {ratio:.2f} x aiokafka's send")


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__)
    parse.add_argument("-n", type=int, default=50_000, help="records a round")
    parse.add_argument("--rounds", type=int, default=3)
    given = parse.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "dev"
        bootstrap = stack.up(home).settings()["HEADGATE_KAFKA_BOOTSTRAP"]
        try:
            admin = AdminClient({"bootstrap.servers": bootstrap})
            admin.create_topics([NewTopic(TOPIC, PARTITIONS, 1)])[TOPIC].result()
            time.sleep(1.0)  # its leaders
            uvloop.run(measure(bootstrap, given.n, given.rounds))
        finally:
            stack.down(home)


if __name__ == "__main__":
    main()
