"""The route agent: from a fetched record to the lanes, in rounds.

Owns decoding, deduplication, matching and redaction, and what becomes of records that cannot be routed. A round takes
all partition batches that wait through every step at once, with one Redis call, and never awaits a destination (design,
section 3). Nothing raises out of the agent: what surprises us goes to `dlq.unrouted` too.
"""

import asyncio
import time
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from hashlib import blake2b
from typing import Final, cast

import structlog
from msgspec import Struct, structs

from routing.match import Matching
from schemas.attempt import PURPOSE_EVENT, EventRecord, encode_record
from schemas.avro.reader import MAGIC, schema_id
from schemas.delivery import Delivery
from schemas.event import Event, Problem, canonical, correlation_id, decode_event, rfc3339
from schemas.ids import DeliveryId, Vendor, base32_many, default_event_id
from schemas.staged import Place
from schemas.upcast import Upcasters
from schemas.wire import read_origin
from streams.compiled import CompiledTenant, Tenants, Unknowns
from streams.fetching import FetchedRecord
from streams.flight import Fan, Flight, Shared
from streams.lanes import Lanes
from streams.ledger import GO_ON, STALE, WAS_DONE, Ledger
from streams.metrics import Metrics, bump
from streams.outbox import RawHeaders
from streams.schemas import SchemaRegistry, Schemas
from streams.settle import Settle
from streams.transport import Consumer, Fetch, Record, TopicPartition

log = structlog.get_logger()

ROUND_RECORDS: Final = 600
ROUND_BYTES: Final = 4 * 2**20
AVRO_S: Final = 0.1  # that a round may read Avro
MOST_RECORDS: Final = 2 * ROUND_RECORDS  # waiting for their round, of all partitions
MOST_BYTES: Final = ROUND_BYTES
NONE: Final[frozenset[tuple[str, int]]] = frozenset()


class Lot(Struct, gc=False):
    """The records of one fetch of one partition, on their way through a round.

    `place`, `position` and `origin` are what a record's default event id, its position in the dedupe and its `origin`
    begin with; its offset ends them. `read_from` is where it was read, `read_at` its offset there where that is another
    than its own (of a replayed record).
    """

    vendor: Vendor
    fan: Fan
    records: Sequence[Record]
    size: int  # bytes of their values
    place: str
    position: str
    origin: str
    tenants: Mapping[bytes, CompiledTenant]  # of the vendor, by record key; kept up to date
    read_from: TopicPartition
    read_at: int = -1


class _Routed(Struct, gc=False):
    """One event of a round, between decoding and the answers of Redis."""

    tenant: CompiledTenant
    event: Event
    lot: Lot
    record: Record
    matching: Matching
    size: int  # of the event as JSON


class _Round(Struct, gc=False):
    """What a round has decoded so far.

    `avro`: what part of a round its Avro records have taken up, since a few bytes can stand for a megabyte of JSON, and
    for half a second of reading even where they are refused. A round of `ROUND_BYTES` or `AVRO_S` is whole.
    """

    routed: list[_Routed]
    digests: list[bytes]
    avro: float = 0.0


class Router:
    """Rounds over what the agent took. They wait only for room in this worker, never for a destination."""

    def __init__(
        self,
        consumer: Consumer,
        tenants: Tenants,
        lanes: Lanes,
        settle: Settle,
        ledger: Ledger,
        metrics: Metrics,
        *,
        vendors: dict[str, Vendor],
        topic_ids: dict[str, str],
        max_event_bytes: int,
        worker: str,
        max_unknown_bytes: int,
        upcasters: Upcasters,
        schema_registry: SchemaRegistry | None,
    ) -> None:
        """`vendors` and `topic_ids` (first 8 hex digits) by ingress topic; `max_unknown_bytes` bounds what waits for
        the tenant registry, and what waits for the schema registry, before others have to."""
        self._consumer = consumer
        self._tenants = tenants
        self._lanes = lanes
        self._settle = settle
        self._ledger = ledger
        self._metrics = metrics
        self._vendors = vendors
        self._topic_ids = topic_ids
        self._max_event_bytes = max_event_bytes
        self._worker = worker
        self._decode = upcasters.decode if upcasters else decode_event  # without any, JSON pays nothing for them
        self._inbox: dict[tuple[str, int], deque[Lot]] = {}  # by partition; the first has its turn
        self._waiting = 0
        self._waiting_bytes = 0
        self._some = asyncio.Event()
        self._unknown: Unknowns[tuple[Lot, Record]] = Unknowns(tenants, self._asked, max_unknown_bytes)
        self._schemas: Schemas[tuple[Lot, Record]] = Schemas(schema_registry, self._schema_told, max_unknown_bytes)

    @property
    def held_bytes(self) -> int:
        """Of records that wait for a registry."""
        return self._unknown.held_bytes + self._schemas.held_bytes

    async def close(self) -> None:
        await self._schemas.close()

    # ---------------------------------------------------------------- in

    def take(self, fetch: Fetch) -> None:
        """One fetch of one partition, for one of the next rounds. `full` says of which no more should come."""
        source, records = fetch
        fan = Fan(partial(self._consumer.settled, source))
        topic = source.topic
        size = sum([len(record.value) for record in records if record.value is not None])
        vendor, topic_id8, partition = self._vendors[topic], self._topic_ids[topic], source.partition
        lot = Lot(
            vendor,
            fan,
            records,
            size,
            place=default_event_id(topic, topic_id8, partition, ""),
            position=f"{topic_id8}-{partition}-",
            origin=f"{topic}/{partition}/",
            tenants=self._tenants.of_vendor(vendor),
            read_from=TopicPartition(topic, partition),
        )
        self._inbox.setdefault((topic, partition), deque()).append(lot)
        self._waiting += len(records)
        self._waiting_bytes += size
        self._some.set()

    def full(self) -> frozenset[tuple[str, int]]:
        """The partitions of which no more is to be fetched now.

        One that floods holds what one round takes; the others come in meanwhile, and have their turn in the next.
        """
        if not self._inbox:
            return NONE
        if self._waiting >= MOST_RECORDS or self._waiting_bytes >= MOST_BYTES:
            return frozenset(self._inbox)
        return frozenset(at for at, lots in self._inbox.items() if len(lots) > 1)

    async def rounds(self) -> None:
        """Runs for ever; its owner cancels it."""
        while True:
            await self._some.wait()
            await self._lanes.room.wait()
            await self._unknown.room()
            await self._schemas.room()
            lots: list[Lot] = []
            count = size = 0
            for at in tuple(self._inbox):  # each has its turn once: a round of one that floods ends soon
                if count >= ROUND_RECORDS or size >= ROUND_BYTES:
                    break
                of_partition = self._inbox.pop(at)
                lot = of_partition.popleft()
                if of_partition:
                    self._inbox[at] = of_partition  # behind the others
                lots.append(lot)
                count += len(lot.records)
                size += lot.size
            self._waiting -= count
            self._waiting_bytes -= size
            if not self._inbox:
                self._some.clear()
            await self._round([(lot, record) for lot in lots for record in lot.records], asked=False)
            del lots, lot  # or their records stay in memory until the next ones come

    async def _asked(self, records: Sequence[tuple[Lot, Record]]) -> None:
        await self._lanes.room.wait()
        await self._round(records, asked=True)

    async def _schema_told(self, records: Sequence[tuple[Lot, Record]], problem: Problem | None) -> None:
        if problem is None:
            await self._lanes.room.wait()
            await self._round(records, asked=False)
            return
        for lot, record in records:
            self._unrouted_avro(lot, record, problem)

    # ---------------------------------------------------------------- one round

    async def _round(self, records: Sequence[tuple[Lot, Record]], *, asked: bool) -> None:
        decoded = _Round([], [])
        for lot, record in records:
            try:
                if record.headers:
                    lot, record = self._where_it_was(lot, record)
                self._route(lot, record, decoded, asked)
            except Exception as fault:  # the poison guard: whatever a record provokes, it is kept and the rest go on
                log.error("poison", origin=f"{lot.origin}{record.offset}", fault=type(fault).__name__)
                self._unrouted(lot, record, "malformed", f"could not be routed: {type(fault).__name__}")
            if decoded.avro > 1.0:
                if decoded.routed:
                    await self._admit(decoded)
                await asyncio.sleep(0)  # all else in this process has its turn, though there be room at once
                await self._lanes.room.wait()
                decoded = _Round([], [])
        if decoded.routed:
            await self._admit(decoded)

    async def _admit(self, decoded: _Round) -> None:
        """From events to deliveries: asks the ledger about all of them at once, and gives each lane its own."""
        routed = decoded.routed
        names = base32_many(decoded.digests)
        event_keys: list[str] = []
        positions: list[str] = []
        delivery_keys: list[str] = []
        at = 0
        for item in routed:
            space = item.tenant.space
            event_keys.append(f"{space}e{names[at]}")
            positions.append(f"{item.lot.position}{item.record.offset}")
            at += 1
            for _ in item.matching.matched:
                delivery_keys.append(f"{space}dlv_{names[at]}")
                at += 1
        answers = await self._ledger.ask(event_keys, positions, delivery_keys, [0] * len(delivery_keys))
        clean = answers is None or answers.clean
        now = time.monotonic()
        now_text = rfc3339(int(time.time() * 1000))
        at = first = 0
        for place, item in enumerate(routed):
            count = len(item.matching.matched)
            if not clean and answers is not None and answers.events[place] != GO_ON:
                bump(item.tenant.event_counts, "duplicate")
                item.lot.fan.settled((item.record.offset,))
            else:
                told = b"" if clean or answers is None else answers.deliveries[first : first + count]
                self._dispatch(
                    item, names[at : at + 1 + count], delivery_keys[first : first + count], told, now, now_text
                )
            at += 1 + count
            first += count
        self._lanes.note_room()
        self._lanes.pump()

    def _where_it_was(self, lot: Lot, record: Record) -> tuple[Lot, Record]:
        """A replayed record takes its first position: in its default event id, in the dedupe and as its origin.

        Only a position in the same topic counts: what else a producer may write there says nothing.
        """
        origin = read_origin(record.headers, record.topic)
        if origin is None:
            return lot, record
        partition, offset = origin
        topic, topic_id8 = record.topic, self._topic_ids[record.topic]
        own = lot.fan, record.offset
        headers = tuple([header for header in record.headers if header[0] != "hg-origin"])
        returned = FetchedRecord(topic, partition, offset, record.timestamp, record.key, record.value, headers)
        alone = structs.replace(
            lot,
            fan=Fan(lambda _: own[0].settled((own[1],))),
            records=(returned,),
            place=default_event_id(topic, topic_id8, partition, ""),
            position=f"{topic_id8}-{partition}-",
            origin=f"{topic}/{partition}/",
            read_at=record.offset,
        )
        return alone, cast(Record, returned)

    def _route(self, lot: Lot, record: Record, decoded: _Round, asked: bool) -> None:
        """Decodes and matches one record; or ends it as unrouted, dropped or to be asked about."""
        tenant = lot.tenants.get(record.key)  # type: ignore[arg-type]  # no tenant has the key None
        value = record.value
        if tenant is None or value is None or not tenant.routes_events:
            return self._not_routable(lot, record, tenant, asked)
        event = self._decode(
            value, tenant.ref.tenant, lot.place, record.offset, record.timestamp, self._max_event_bytes
        )
        size = len(value)
        if isinstance(event, Problem):
            if not value or value[0] != MAGIC:  # no JSON begins with it: so only here it is looked for Avro
                return self._unrouted(lot, record, event.code, event.detail)
            text = self._read_avro(lot, record, value, decoded)
            if text is None:
                return None
            size = len(text)
            event = self._decode(
                text, tenant.ref.tenant, lot.place, record.offset, record.timestamp, self._max_event_bytes
            )
            if isinstance(event, Problem):
                return self._unrouted(lot, record, event.code, event.detail)
        matching = tenant.table.match(event)
        event_type = event.eventType.encode()
        idempotency = event.idempotencyKey.encode()
        ident = b"%b%d:%b%d:%b" % (tenant.prefix, len(event_type), event_type, len(idempotency), idempotency)
        hashed = blake2b(ident, digest_size=16)
        digests = decoded.digests
        digests.append(hashed.digest())
        for match in matching.matched:
            of_delivery = hashed.copy()
            of_delivery.update(match.destination_part)
            digests.append(of_delivery.digest())
        decoded.routed.append(_Routed(tenant, event, lot, record, matching, size))
        return None

    def _read_avro(self, lot: Lot, record: Record, value: bytes, decoded: _Round) -> bytes | None:
        """The JSON of an Avro record; None for one that is unrouted, or waits for its schema."""
        number = schema_id(value)
        if number is None:
            detail = "neither JSON nor Avro in the Confluent wire format: a zero byte, 4 bytes of schema id, the record"
            self._unrouted(lot, record, "malformed", detail)
            return None
        found = self._schemas.find(number)
        if found is None:
            self._schemas.wait(number, (lot, record), len(value))
            return None
        if isinstance(found, Problem):
            self._unrouted_avro(lot, record, found)
            return None
        began = time.monotonic()
        text = found(value, self._max_event_bytes)
        decoded.avro += (time.monotonic() - began) / AVRO_S
        if isinstance(text, Problem):
            self._unrouted_avro(lot, record, text)
            return None
        decoded.avro += len(text) / ROUND_BYTES
        return text

    def _not_routable(self, lot: Lot, record: Record, tenant: CompiledTenant | None, asked: bool) -> None:
        """What has no tenant that its events can be routed for now, or nothing to be routed."""
        if record.key is None:
            detail = "the record has no key: it must be the customerExternalId"
            self._unrouted(lot, record, "key_missing", detail)
        elif tenant is None or tenant.state in ("removed", "deleted"):
            if asked:
                self._unrouted(lot, record, "unknown_tenant", "no tenant has this customerExternalId")
            else:
                self._unknown.add((lot, record), len(record.value or b""))
        elif tenant.state == "deleting":
            bump(tenant.event_counts, "tenant_deleted")
            bump(self._metrics.meter(tenant.ref, tenant.tag, "").dropped, "tenant_deleted")
            lot.fan.settled((record.offset,))
        elif not tenant.can_seal:  # nothing of it could be parked or logged
            if asked:
                detail = "the tenant's data key is gone: apply it again for a new one"
                self._unrouted(lot, record, "unsealable", detail)
            else:
                self._unknown.add((lot, record), len(record.value or b""))
        else:
            self._unrouted(lot, record, "malformed", "the record has no value")

    def _dispatch(
        self,
        item: _Routed,
        names: Sequence[str],
        ledger_keys: Sequence[str],
        answers: bytes,
        now: float,
        now_text: str,
    ) -> None:
        """Writes the event's own record, and hands its deliveries to their lanes.

        `names`: the event's, then its deliveries'. `answers`: the ledger's for each, empty where all may go on.
        """
        tenant, event, lot, record, matching = item.tenant, item.event, item.lot, item.record, item.matching
        matched = matching.matched
        count = len(matched)
        offset = record.offset
        bump(tenant.event_counts, "routed" if matched else "unmatched")
        origin = f"{lot.origin}{offset}"
        shown = event if matching.hidden is None else matching.hidden.apply(event)
        correlation = correlation_id(shown)  # it goes unsealed into records and logs
        self._settle.routed(
            lot.vendor,
            tenant.ref.tenant,
            self._event_record(item, shown, names, origin, correlation, now_text),
            None if matched else lot.fan,
            offset,
        )
        shared = None
        if count > 1:
            lot.fan.expect(offset, count)
            shared = Shared()
        newest = tenant if tenant.successor is None else tenant.newest()  # it may have changed while Redis was asked
        size = item.size
        for place, match in enumerate(matched):
            name = DeliveryId("dlv_" + names[place + 1])
            delivery = Delivery(
                tenant.ref,
                match.destination,
                name,
                match.redaction.apply(event) if match.redaction is not None else event,
                origin,
                record.timestamp,
                size,
                match.route_ids,
                correlation,
            )
            flight = Flight(
                delivery,
                newest.lane(match.destination) or newest.grave(match.destination),
                lot.fan,
                offset,
                name,
                ledger_keys[place],
                size // count,
            )
            if match.redaction is None:
                flight.shared = shared
            if flight.lane.staged:
                flight.place = self._place(lot, offset)
            if answers and answers[place] == WAS_DONE:
                self._lanes.hold(flight)
                self._settle.recovered(flight)
            elif answers and answers[place] == STALE:
                self._lanes.hold(flight)
                self._settle.stale(flight)
            else:
                self._lanes.admit(flight, now)

    def _place(self, lot: Lot, offset: int) -> Place | None:
        read_from = lot.read_from
        floor = self._consumer.committed(read_from)
        if floor is None:
            return None
        name = f"{self._topic_ids[read_from.topic]}-{read_from.partition}"
        return Place(name, offset if lot.read_at < 0 else lot.read_at, floor)

    def _event_record(
        self, item: _Routed, event: Event, names: Sequence[str], origin: str, correlation: str, now_text: str
    ) -> bytes:
        tenant = item.tenant
        ref = tenant.ref
        ident = "evt_" + names[0]
        deliveries: dict[str, str] = {}
        for place, match in enumerate(item.matching.matched, 1):
            deliveries[match.destination] = "dlv_" + names[place]
        sealed = tenant.vault.seal(PURPOSE_EVENT, "", ident, canonical(event)) if tenant.log_events else None
        return encode_record(
            EventRecord(
                ident,
                ref.vendor,
                ref.tenant,
                event.eventId,
                event.eventType,
                now_text,
                origin,
                self._worker,
                correlation,
                tenant.config_version,
                item.matching.verdicts,
                deliveries,
                sealed,
            )
        )

    # ---------------------------------------------------------------- what cannot be routed

    def _unrouted_avro(self, lot: Lot, record: Record, problem: Problem) -> None:
        self._unrouted(lot, record, problem.code, f"schema {schema_id(record.value or b'')}: {problem.detail}")

    def _unrouted(self, lot: Lot, record: Record, reason: str, detail: str) -> None:
        bump(self._metrics.events(lot.vendor, ""), "unrouted")
        headers: RawHeaders = record.headers
        self._settle.unrouted(
            lot.vendor,
            record.key,
            record.value,
            headers,
            origin=f"{lot.origin}{record.offset}",
            reason=reason,
            detail=detail,
            source=lot.fan,
            offset=record.offset,
        )
