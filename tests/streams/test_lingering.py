"""A kind that waits for more to send together does not wait for what its lane cannot start."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from msgspec import Raw

from config.registry import Destination
from connectors.contract import Direct
from connectors.egress import Egress
from connectors.kafka.producer import LINGER_S
from schemas.control import DestinationRecord, LimitSpec
from streams.flight import Flight
from streams.lanes import Lane, Lanes, LaneSettings
from streams.metrics import Metrics
from tests.connectors.kafkas import delivery, sink
from tests.contract.farsides.kafka import KafkaFarSide


class Ends:
    """What lanes ask of settling, where all is well."""

    leaving_bytes = 0

    def __init__(self) -> None:
        self.ended_flights: list[Flight] = []

    def ended(self, flight: Flight) -> None:
        self.ended_flights.append(flight)


@pytest.fixture
async def far() -> AsyncIterator[KafkaFarSide]:
    made = KafkaFarSide()
    await made.start()
    yield made
    await made.stop()


async def rounds_s(far: KafkaFarSide, count: int, in_flight: int, connector: Any) -> float:
    metrics = Metrics(tenant_label="tag", type_label=False, version="")
    egress = Egress(far.allow)
    lanes = Lanes(LaneSettings(512, 1 << 28, 1 << 26), egress, metrics)
    ends = Ends()
    lanes.start(cast(Any, ends))
    record = DestinationRecord("sink", "kafka", 1, Raw(b"{}"), limits=LimitSpec(in_flight))
    lane = Lane(cast(Any, None), Destination(record, False), metrics.meter(delivery().tenant, "acme", "kafka"))
    lane.connector = cast(Direct, connector)
    lane.seat.last_was_fast = True
    started = time.monotonic()
    for number in range(count):
        one = delivery(number)
        lanes.admit(Flight(one, lane, cast(Any, None), number, one.id, one.id, 100), started)
    lanes.pump()
    async with asyncio.timeout(60):
        while len(ends.ended_flights) < count:  # noqa: ASYNC110 - what is waited for has no event to set
            await asyncio.sleep(0.005)
    await lanes.close()
    egress.close()
    return time.monotonic() - started


class Patient:
    """The control: the same connector, deaf to its lane's hint."""

    def __init__(self, connector: Any) -> None:
        self.batching = connector.batching
        self.start = connector.start
        self.close = connector.close

    def hurry(self) -> None:
        pass


async def test_a_lane_at_its_cap_sends_what_it_has(far: KafkaFarSide) -> None:
    egress = Egress(far.allow)
    waiting_s = await rounds_s(far, 200, 10, Patient(sink(egress, far.options(), far.secrets())))
    assert waiting_s > 19 * LINGER_S
    hurried_s = await rounds_s(far, 200, 10, sink(egress, far.options(), far.secrets()))
    assert hurried_s < waiting_s / 2
    assert len(far.stored) == 400
    egress.close()
