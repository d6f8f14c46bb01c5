"""One partition of the stage, without a broker: what its reader keeps, and which manifest of a batch counts."""

import asyncio
from collections.abc import Sequence
from typing import Any, cast

import pytest
from msgspec import Raw, Struct

from connectors.contract import NotOwned
from routing.batches import Limits
from schemas.control import DestinationRecord
from schemas.delivery import Delivery
from schemas.ids import DeliveryId, DestinationId, EventId, ExternalId, Tag, TenantRef, Vendor
from schemas.staged import (
    BatchRecord,
    CursorRecord,
    Place,
    decode_cursor,
    encode_cursor,
    limits_header,
    staged_headers,
)
from schemas.topics import Topics, delivery_key
from schemas.wire import Parked, parked_headers
from streams.batch import Record, StagedBatch
from streams.cursor import Kept
from streams.flight import Flight
from streams.lanes import Lanes, LaneSettings
from streams.slots import Slot
from streams.stage import NO_EVENT, Stage

ACME = TenantRef(Vendor("default"), ExternalId("acme"))
BUCKET = DestinationId("bucket")
OF = delivery_key(ACME, BUCKET)
TOPICS = Topics()
TOPIC = TOPICS.stage(ACME.vendor, Tag("acme"))
LOG = "cluster/1"
PAIRS = Limits(60_000, 2, 2**20)


class Message(Struct):
    """As confluent's consumer gives it."""

    at: int
    named: bytes | None
    of_headers: list[tuple[str, bytes]]
    held: bytes | None = b"sealed"
    appended_ms: int = 1000

    def error(self) -> None:
        return None

    def topic(self) -> str:
        return TOPIC

    def partition(self) -> int:
        return 0

    def offset(self) -> int:
        return self.at

    def key(self) -> bytes | None:
        return self.named

    def value(self) -> bytes | None:
        return self.held

    def headers(self) -> list[tuple[str, bytes]]:
        return self.of_headers

    def timestamp(self) -> tuple[int, int]:
        return 2, self.appended_ms


class Tenant:
    """Acme, with a destination that takes whatever it is asked for."""

    ref = ACME
    space = "acme:"
    tag = Tag("acme")

    def __init__(self) -> None:
        self.drops: list[str] = []
        self.record = DestinationRecord(id=BUCKET, type="s3", version=1, options=Raw(b"{}"))

    def lane(self, destination: DestinationId) -> object:
        return self

    def dropped(self, reason: str) -> None:
        self.drops.append(reason)


class Worker:
    """What a stage is given of one: its tenants, and lanes that take note of what is admitted."""

    def __init__(self) -> None:
        self.tenant = Tenant()
        self.flights: list[Flight] = []
        self.known = True

    def get(self, ref: TenantRef) -> Tenant | None:
        return self.tenant if ref == ACME and self.known else None

    async def ask(self) -> None:
        await asyncio.Event().wait()  # the control plane is away

    def came_back(self, lane: object) -> None:
        pass

    def admit(self, flight: Flight, now: float) -> None:
        self.flights.append(flight)


class Reader:
    """A stage with one slot, which begins with what an earlier one has kept."""

    def __init__(self, kept: Kept | None = None, log: str = LOG) -> None:
        self.worker = Worker()
        stands_in = cast(Any, self.worker)
        self.stage = Stage(
            kafka={},
            group="stage",
            patterns=[],
            topics=TOPICS,
            tenants=stands_in,
            lanes=stands_in,
            settle=stands_in,
            outbox=stands_in,
            on_fatal=lambda fault: None,
            worker="w0",
            instance_id=None,
            max_record_bytes=2**20,
            max_bytes=2**20,
            commit_interval_s=0.2,
        )
        self.slot = Slot(self.stage, TOPIC, 0, ACME.vendor)
        self.slot.take_over(kept or Kept({}, {}), log)
        self.stage._slots[TOPIC, 0] = self.slot

    def reads(self, *messages: Message) -> list[Flight]:
        """The batches that this sends on their way."""
        before = len(self.worker.flights)
        for message in messages:
            self.stage._take(message)
        return self.worker.flights[before:]

    def kept(self) -> Kept:
        """What the cursor topic holds, once this is written."""
        cursors = {of: self.slot.cursor(of) for of, way in self.slot.ways.items() if way.last >= 0}
        return Kept(
            {of: cast(CursorRecord, decode_cursor(encode_cursor(record))) for of, record in cursors.items()},
            {key: cast(Any, decode_cursor(encode_cursor(record))) for key, record in self.slot.batches.items()},
        )


def record(offset: int, place: Place | None = None) -> Message:
    delivery = Delivery(
        tenant=ACME,
        destination=BUCKET,
        id=DeliveryId(f"dlv_{offset}"),
        event=NO_EVENT,
        origin="",
        appended_ms=0,
        size=1,
    )
    limits = limits_header(PAIRS.window_ms, PAIRS.max_events, PAIRS.max_bytes)
    return Message(offset, OF, staged_headers(delivery, limits, place))


def ends(flight: Flight, end: str) -> Parked:
    """Settles a batch; what its manifest says, should it have one."""
    assert flight.batch is not None
    manifest = flight.batch.manifest()
    flight.end = end
    flight.source.settled([flight.offset, *[offset for _, offset in flight.joined or ()]])
    return Parked(
        tenant=ACME,
        destination=BUCKET,
        delivery=flight.delivery.id,
        event=EventId(""),
        event_type="",
        attempt=1,
        hop=1,
        parks=0,
        not_before_ms=0,
        origin="",
        error="",
        fault="",
        detail="",
        first_failed_ms=2**52,
        replay="",
        manifest=manifest,
    )


def due(offset: int, parked: Parked) -> Message:
    return Message(offset, OF, parked_headers(parked))


FIRST, SECOND = (record(0), record(1)), (record(2), record(3))


async def test_what_was_parked_before_a_batch_in_front_of_it_ended_is_delivered_by_its_manifest_after_a_crash() -> None:
    before = Reader()
    _, second = before.reads(*FIRST, *SECOND)
    parked = ends(second, "again")
    after = Reader(before.kept())
    assert [flight.offset for flight in after.reads(*FIRST, *SECOND)] == [0]  # and the second is not sent beside it
    (again,) = after.reads(due(4, parked))
    (last,) = after.reads(due(5, ends(again, "again")))
    ends(last, "delivered")
    assert not after.reads(due(6, parked))


async def test_what_was_noted_of_a_batch_is_kept_until_nobody_forms_it_again() -> None:
    before = Reader(Kept({}, {(OF, 2): BatchRecord(3, 2, LOG, noted=b"a stream")}))
    _, second = before.reads(*FIRST, *SECOND)
    ends(second, "delivered")
    after = Reader(before.kept())
    (first,) = after.reads(*FIRST, *SECOND)
    assert first.offset == 0
    ends(first, "delivered")
    assert after.slot.committable() == 4
    assert (after.kept().cursors[OF].last, after.kept().batches) == (3, {})


async def test_a_parked_batch_that_is_stored_before_the_one_in_front_of_it_is_not_sent_again() -> None:
    before = Reader()
    _, second = before.reads(*FIRST, *SECOND)
    parked = ends(second, "again")
    (again,) = before.reads(due(4, parked))
    ends(again, "delivered")
    after = Reader(before.kept())
    (first,) = after.reads(*FIRST, *SECOND, due(4, parked))
    assert first.offset == 0
    ends(first, "delivered")
    assert after.kept().batches == {}


async def test_a_second_manifest_of_a_turn_takes_nothing_from_the_one_that_is_under_way() -> None:
    reader = Reader()
    (first,) = reader.reads(*FIRST)
    parked = ends(first, "again")
    (again,) = reader.reads(due(2, parked), due(3, parked))
    assert reader.worker.tenant.drops == ["repeated"]
    reader.slot.batches[OF, 0] = BatchRecord(1, 2, LOG, 1, noted=b"a stream")  # as its attempt has noted
    parked = ends(again, "again")
    assert parked.manifest is not None
    assert reader.slot.batches[OF, 0] == BatchRecord(1, 2, LOG, parked.manifest.turn, noted=b"a stream")
    assert reader.slot.committable() == 4


async def test_two_manifests_that_come_before_their_batch_has_ended_hold_up_nothing_for_good() -> None:
    before = Reader()
    (first,) = before.reads(*FIRST)
    parked = ends(first, "again")  # and the worker dies before its cursor is written
    after = Reader()
    (first,) = after.reads(*FIRST, due(2, parked), due(3, parked))
    ends(first, "delivered")
    assert after.slot.committable() == 4


async def test_a_batch_that_joins_an_older_attempt_is_parked_at_its_own_turn() -> None:
    """The partition was another worker's meanwhile, which tried and parked the batch."""
    lanes = Lanes(LaneSettings(16, 2**28, 2**28), cast(Any, None), cast(Any, None))
    before = Reader()
    (attempt,) = before.reads(*FIRST)
    lanes.hold(attempt)
    elsewhere = Reader()
    (first,) = elsewhere.reads(*FIRST)
    parked = ends(first, "again")
    elsewhere.slot.batches[OF, 0] = BatchRecord(1, 2, LOG, 1, noted=b"a stream")
    before.slot.gone = True
    after = Reader(elsewhere.kept())
    (again,) = after.reads(due(2, parked))
    lanes.admit(again, 0.0)
    parked = ends(attempt, "again")
    after.slot.settled([again.offset])
    assert after.slot.batches[OF, 0].noted == b"a stream"
    assert len(after.reads(due(3, parked))) == 1


async def test_cursors_of_a_topic_that_was_made_anew_cover_nothing_of_the_new_one() -> None:
    before = Reader()
    first, second = before.reads(*FIRST, *SECOND)
    ends(first, "delivered")
    ends(second, "again")
    after = Reader(before.kept(), "cluster/2")
    assert [flight.offset for flight in after.reads(*FIRST, *SECOND)] == [0, 2]


async def test_what_waits_for_the_registry_counts_as_held() -> None:
    reader = Reader()
    reader.worker.known = False
    assert not reader.reads(*FIRST)
    assert reader.stage.held_bytes > 2000


class _Broken:
    """A partition whose range of the log cannot be read, for a reason that nobody has thought of."""

    async def note(self, batch: StagedBatch, noted: bytes) -> None:
        raise AssertionError

    async def read_again(self, batch: StagedBatch) -> Sequence[Record]:
        raise KeyError


async def test_a_note_that_a_rebalance_overtook_is_no_leave_to_send() -> None:
    reader = Reader()
    (flight,) = reader.reads(*FIRST)
    assert flight.batch is not None
    noting = asyncio.create_task(reader.slot.note(flight.batch, b"a stream"))
    await asyncio.sleep(0)
    reader.slot.gone = True
    reader.stage._slots.clear()
    await reader.stage._write_once()
    with pytest.raises(NotOwned):
        await asyncio.wait_for(noting, 5)


async def test_a_bug_around_an_attempt_of_a_batch_is_heard_of() -> None:
    heard: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: heard.set_result(context["exception"]))
    reader = Reader()
    (flight,) = reader.reads(*FIRST)
    span = flight.batch.span if flight.batch is not None else None
    assert span is not None
    flight.lane = cast(Any, Owned())
    batch = StagedBatch(cast(Any, _Broken()), OF, span, item=0, count=2, digest="", records=None)
    batch.start(cast(Any, None), flight, 0, lambda outcome: None)
    assert isinstance(await asyncio.wait_for(heard, 5), KeyError)


class Owned:
    """A lane, as far as an attempt asks it whose it is."""

    @property
    def owner(self) -> "Owned":
        return self

    def newest(self) -> Tenant:
        return Tenant()
