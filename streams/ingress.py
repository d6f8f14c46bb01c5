"""The route agent: from a fetched record to the lanes, in rounds.

Owns decoding, deduplication, matching and redaction, and what becomes of records that cannot be routed. A round takes
all partition batches that wait through every step at once, with one Redis call, and never awaits a destination (design,
section 3). Nothing raises out of the agent: what surprises us goes to `dlq.unrouted` too.
"""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from functools import partial
from hashlib import blake2b
from typing import Final

import structlog
from msgspec import Struct

from routing.match import Matching
from schemas.attempt import PURPOSE_EVENT, EventRecord, encode_record
from schemas.delivery import Delivery
from schemas.event import Event, Problem, canonical, correlation_id, decode_event
from schemas.ids import DeliveryId, Vendor, base32_many, default_event_id
from streams.compiled import CompiledTenant, Tenants, Unknowns
from streams.flight import Fan, Flight, Shared
from streams.lanes import Lanes
from streams.ledger import Ledger
from streams.metrics import Metrics, bump
from streams.outbox import RawHeaders
from streams.settle import Clock, Settle
from streams.transport import Consumer, Fetch, Record

log = structlog.get_logger()

ROUND_RECORDS: Final = 300
ROUND_BYTES: Final = 4 * 2**20
NEW: Final = ord("1")
STALE: Final = ord("s")
DONE: Final = ord("d")


class Lot(Struct, gc=False):
    """The records of one fetch of one partition, on their way through a round."""

    vendor: Vendor
    topic: str
    topic_id8: str
    partition: int
    fan: Fan
    records: Sequence[Record]
    size: int  # bytes of their values


class _Routed(Struct, gc=False):
    """One event of a round, between decoding and the answers of Redis."""

    tenant: CompiledTenant
    event: Event
    lot: Lot
    offset: int
    appended_ms: int
    size: int
    matching: Matching


class Router:
    """Rounds over what the agent took. `take` waits only for room in this worker, never for a destination."""

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
    ) -> None:
        """`vendors` and `topic_ids` (first 8 hex digits) by ingress topic; `max_unknown_bytes` bounds what waits for
        the registry before others have to."""
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
        self._inbox: deque[Lot] = deque()
        self._waiting = 0
        self._waiting_bytes = 0
        self._clock = Clock()
        self._some = asyncio.Event()
        self._space = asyncio.Event()
        self._unknown: Unknowns[tuple[Lot, Record]] = Unknowns(tenants, self._asked, max_unknown_bytes)

    @property
    def held_bytes(self) -> int:
        """Of records that wait for the registry."""
        return self._unknown.held_bytes

    # ---------------------------------------------------------------- in

    async def take(self, fetch: Fetch) -> None:
        """One fetch of one partition. Returns when the next one may come."""
        source, records = fetch
        fan = Fan(partial(self._consumer.settled, source))
        topic = source.topic
        size = sum([len(record.value) for record in records if record.value is not None])
        lot = Lot(self._vendors[topic], topic, self._topic_ids[topic], source.partition, fan, records, size)
        self._inbox.append(lot)
        self._waiting += len(records)
        self._waiting_bytes += size
        self._some.set()
        while self._waiting > ROUND_RECORDS or self._waiting_bytes > ROUND_BYTES:
            self._space.clear()
            await self._space.wait()

    async def rounds(self) -> None:
        """Runs for ever; its owner cancels it."""
        while True:
            await self._some.wait()
            await self._lanes.room.wait()
            await self._unknown.room()
            lots: list[Lot] = []
            count = size = 0
            while self._inbox and count < ROUND_RECORDS and size < ROUND_BYTES:
                lot = self._inbox.popleft()
                lots.append(lot)
                count += len(lot.records)
                size += lot.size
            self._waiting -= count
            self._waiting_bytes -= size
            self._space.set()
            if not self._inbox:
                self._some.clear()
            await self._round([(lot, record) for lot in lots for record in lot.records], asked=False)
            del lots, lot  # or their records stay in memory until the next ones come

    async def _asked(self, records: Sequence[tuple[Lot, Record]]) -> None:
        await self._round(records, asked=True)

    # ---------------------------------------------------------------- one round

    async def _round(self, records: Sequence[tuple[Lot, Record]], *, asked: bool) -> None:
        routed: list[_Routed] = []
        digests: list[bytes] = []
        for lot, record in records:
            try:
                self._route(lot, record, routed, digests, asked)
            except Exception as fault:  # the poison guard: whatever a record provokes, it is kept and the rest go on
                log.error(
                    "poison", topic=lot.topic, partition=lot.partition, offset=record.offset, fault=type(fault).__name__
                )
                self._unrouted(lot, record, "malformed", f"could not be routed: {type(fault).__name__}")
        if not routed:
            return
        names = base32_many(digests)
        event_keys: list[str] = []
        positions: list[str] = []
        delivery_keys: list[str] = []
        at = 0
        for item in routed:
            space = item.tenant.space
            event_keys.append(f"{space}e{names[at]}")
            positions.append(f"{item.lot.topic_id8}-{item.lot.partition}-{item.offset}")
            at += 1
            for _ in item.matching.matched:
                delivery_keys.append(f"{space}dlv_{names[at]}")
                at += 1
        answers = await self._ledger.ask(event_keys, positions, delivery_keys, [0] * len(delivery_keys))
        clean = answers is None or answers.clean
        now = time.monotonic()
        at = first = 0
        for place, item in enumerate(routed):
            event_name = names[at]
            count = len(item.matching.matched)
            if not clean and answers is not None and answers.events[place] != NEW:
                bump(item.tenant.event_counts, "duplicate")
                item.lot.fan.settled((item.offset,))
            else:
                answered = b"" if clean or answers is None else answers.deliveries[first : first + count]
                self._dispatch(
                    item,
                    event_name,
                    names[at + 1 : at + 1 + count],
                    delivery_keys[first : first + count],
                    answered,
                    now,
                )
            at += 1 + count
            first += count
        self._lanes.note_room()
        self._lanes.pump()

    def _route(self, lot: Lot, record: Record, routed: list[_Routed], digests: list[bytes], asked: bool) -> None:
        """Decodes and matches one record; or ends it as unrouted, dropped or to be asked about."""
        key = record.key
        if key is None:
            return self._unrouted(
                lot, record, "key_missing", "the record has no key: it must be the customerExternalId"
            )
        tenant = self._tenants.of_vendor(lot.vendor).get(key)
        if tenant is None or tenant.state in ("removed", "deleted"):
            if not asked:
                self._unknown.add((lot, record), len(record.value or b""))
                return None
            return self._unrouted(lot, record, "unknown_tenant", "no tenant has this customerExternalId")
        if tenant.state == "deleting":
            bump(tenant.event_counts, "tenant_deleted")
            bump(self._metrics.meter(tenant.ref, tenant.tag, "").dropped, "tenant_deleted")
            lot.fan.settled((record.offset,))
            return None
        if not tenant.can_seal:  # nothing of it could be parked or logged
            if not asked:
                self._unknown.add((lot, record), len(record.value or b""))
                return None
            return self._unrouted(
                lot, record, "unsealable", "the tenant's data key is gone: apply it again for a new one"
            )
        value = record.value
        if value is None:
            return self._unrouted(lot, record, "malformed", "the record has no value")
        offset = record.offset
        position = default_event_id(lot.topic, lot.topic_id8, lot.partition, offset)
        event = decode_event(value, tenant.ref.tenant, position, record.timestamp, self._max_event_bytes)
        if isinstance(event, Problem):
            return self._unrouted(lot, record, event.code, event.detail)
        matching = tenant.table.match(event)
        event_type = event.eventType.encode()
        idempotency = event.idempotencyKey.encode()
        ident = b"%b%d:%b%d:%b" % (tenant.prefix, len(event_type), event_type, len(idempotency), idempotency)
        hashed = blake2b(ident, digest_size=16)
        digests.append(hashed.digest())
        for match in matching.matched:
            of_delivery = hashed.copy()
            name = match.destination
            of_delivery.update(b"%d:%b" % (len(name), name.encode()))
            digests.append(of_delivery.digest())
        routed.append(_Routed(tenant, event, lot, offset, record.timestamp, len(value), matching))
        return None

    def _dispatch(
        self,
        item: _Routed,
        event_name: str,
        names: Sequence[str],
        ledger_keys: Sequence[str],
        answers: bytes,
        now: float,
    ) -> None:
        tenant, event, lot, offset = item.tenant, item.event, item.lot, item.offset
        bump(tenant.event_counts, "routed" if names else "unmatched")
        origin = f"{lot.topic}/{lot.partition}/{offset}"
        hidden = item.matching.hidden
        shown = event if hidden is None else hidden.apply(event)
        correlation = correlation_id(shown)  # it goes unsealed into records and logs
        self._settle.routed(
            lot.vendor,
            tenant.ref.tenant,
            self._event_record(item, shown, event_name, names, origin, correlation),
            None if names else lot.fan,
            offset,
        )
        lot.fan.expect(offset, len(names))
        shared = Shared() if len(names) > 1 else None
        newest = tenant.newest()  # it may have changed while Redis was asked
        for place, match in enumerate(item.matching.matched):
            name = DeliveryId("dlv_" + names[place])
            lane = newest.lane(match.destination) or newest.grave(match.destination)
            delivery = Delivery(
                tenant.ref,
                match.destination,
                name,
                match.redaction.apply(event) if match.redaction is not None else event,
                origin,
                item.appended_ms,
                item.size,
                ",".join(match.routes),
                correlation,
            )
            flight = Flight(delivery, lane, lot.fan, offset, name, ledger_keys[place], item.size // len(names))
            if match.redaction is None:
                flight.shared = shared
            if answers and answers[place] == DONE:
                self._lanes.hold(flight)
                self._settle.recovered(flight)
            elif answers and answers[place] == STALE:
                self._lanes.hold(flight)
                self._settle.stale(flight)
            else:
                self._lanes.admit(flight, now)

    def _event_record(
        self, item: _Routed, event: Event, event_name: str, names: Sequence[str], origin: str, correlation: str
    ) -> bytes:
        tenant = item.tenant
        ident = "evt_" + event_name
        record = EventRecord(
            ident,
            tenant.ref.vendor,
            tenant.ref.tenant,
            event.eventId,
            event.eventType,
            self._clock.text(int(time.time() * 1000)),
            origin,
            self._worker,
            correlation,
            tenant.config_version,
            item.matching.verdicts,
            {match.destination: "dlv_" + name for match, name in zip(item.matching.matched, names, strict=True)},
        )
        if tenant.log_events:
            record.sealed = tenant.vault.seal(PURPOSE_EVENT, "", ident, canonical(event))
        return encode_record(record)

    # ---------------------------------------------------------------- what cannot be routed

    def _unrouted(self, lot: Lot, record: Record, reason: str, detail: str) -> None:
        bump(self._metrics.events(lot.vendor, ""), "unrouted")
        headers: RawHeaders = record.headers
        self._settle.unrouted(
            lot.vendor,
            record.key,
            record.value,
            headers,
            origin=f"{lot.topic}/{lot.partition}/{record.offset}",
            reason=reason,
            detail=detail,
            source=lot.fan,
            offset=record.offset,
        )
