"""What becomes of a parked delivery once it is due: opened, checked against the ledger, and into its lane again.

The waiting itself is `streams/pump.py`'s. Here a record is read for what it says of itself, and every way in which it
can no longer be delivered ends it: by a dead letter, by `dlq.unrouted` with its own bytes, or by a counted drop.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import Final

import msgspec
import structlog
from msgspec.structs import replace

from config.vault import Unsealable
from routing.policy import tier_for
from schemas.attempt import PURPOSE_DELIVERY
from schemas.delivery import Delivery
from schemas.event import correlation_id, from_canonical
from schemas.ids import TenantRef, Vendor
from schemas.topics import Topics
from schemas.wire import Manifest, Parked, parked_headers, read_parked, unread_of
from streams.compiled import Tenants, Unknowns
from streams.flight import Flight
from streams.lanes import Lanes
from streams.ledger import GO_ON, STALE, WAS_DONE, Ledger
from streams.metrics import Metrics
from streams.outbox import Letter
from streams.pump import Due
from streams.settle import Settle, nothing

log = structlog.get_logger()

LONGEST_WAIT_MS: Final = 300_000  # of a record that this release does not read, between two looks at it
SAY_EVERY_S: Final = 10.0


class Retries:
    """Takes what the pump hands over: `due` what may be delivered now, `move` what has to wait in another tier."""

    def __init__(
        self,
        tenants: Tenants,
        lanes: Lanes,
        settle: Settle,
        ledger: Ledger,
        metrics: Metrics,
        topics: Topics,
        tiers_s: tuple[float, ...],
        max_unknown_bytes: int,
    ) -> None:
        self._tenants = tenants
        self._lanes = lanes
        self._settle = settle
        self._ledger = ledger
        self._metrics = metrics
        self._topics = topics
        self._tiers_ms = tuple(int(tier * 1000) for tier in tiers_s)
        self._unknown: Unknowns[Due] = Unknowns(tenants, self._asked, max_unknown_bytes)
        self._said_unread_at = float("-inf")

    @property
    def held_bytes(self) -> int:
        """Of records that wait for the registry."""
        return self._unknown.held_bytes

    async def due(self, records: Sequence[Due]) -> None:
        """Admits what is due, once there is room for it in memory.

        Returns when all of it is in a lane, parked again, ended, or waits for the registry.
        """
        await self._lanes.room.wait()
        await self._unknown.room()
        await self._admit(records, asked=False)

    async def _asked(self, records: Sequence[Due]) -> None:
        await self._admit(records, asked=True)

    async def _admit(self, records: Sequence[Due], *, asked: bool) -> None:
        now_ms = time.time() * 1000
        flights: list[Flight] = []
        for due in records:
            self._metrics.lateness.observe(max(0.0, (now_ms - due.due_ms) / 1000))
            flight = self._open(due, asked=asked)
            if flight is not None:
                flights.append(flight)
        if not flights:
            return
        keys = [flight.ledger_key for flight in flights]
        answers = await self._ledger.ask((), (), keys, [flight.delivery.hop for flight in flights])
        for place, flight in enumerate(flights):
            answer = GO_ON if answers is None else answers.deliveries[place]
            self._lanes.came_back(flight.lane)
            if answer == WAS_DONE:
                self._lanes.hold(flight)
                self._settle.recovered(flight)
            elif answer == STALE:
                self._lanes.hold(flight)
                self._settle.stale(flight)
            elif now_ms > flight.delivery.first_failed_ms + flight.lane.record.retry.max_age_s * 1000:
                self._lanes.hold(flight)
                self._settle.dead(flight, "expired", "", "older than max_age")
            else:
                self._lanes.admit(flight, time.monotonic())
        self._lanes.note_room()
        self._lanes.pump()

    def _open(self, due: Due, *, asked: bool) -> Flight | None:
        """The delivery inside; None where there is none, or where the registry has to be asked first."""
        value = due.record.value
        parked = read_parked(due.record.headers)
        if parked is None or value is None:
            self._not_ours(due)
            return None
        if parked.manifest is not None:
            self._back_to_stage(due, parked, parked.manifest, asked=asked)
            return None
        tenant = self._tenants.get(parked.tenant)
        lane = tenant.lane(parked.destination) if tenant is not None else None
        if (tenant is None or lane is None) and not asked:
            self._unknown.add(due, due.size)
            return None
        if tenant is None:
            self._unrouted(due, "unknown_tenant", "no such tenant")
            return None
        if due.record.topic != self._topics.retry(tenant.ref.vendor, tenant.tag):
            self._unrouted(due, "wrong_topic", "a record of this tenant does not belong to this topic")
            return None
        try:
            event = from_canonical(tenant.vault.open(PURPOSE_DELIVERY, parked.destination, parked.delivery, value))
        except Unsealable as fault:
            if fault.code == "shredded":
                tenant.dropped("shredded")
                due.source.settled((due.offset,))
            elif fault.code == "unknown_key" and not asked:
                self._unknown.add(due, due.size)
            else:
                self._unrouted(due, "unsealable", "does not open for this tenant, destination and delivery")
            return None
        except msgspec.DecodeError:  # sealed by a version that knows fields that this one does not
            self._unrouted(due, "malformed", "holds an event that this version cannot read")
            return None
        delivery = Delivery(
            tenant=tenant.ref,
            destination=parked.destination,
            id=parked.delivery,
            event=event,
            origin=parked.origin,
            appended_ms=due.record.timestamp,
            size=len(value),
            correlation=correlation_id(event),
            trigger="replay" if parked.replay else "retry",
            attempt=parked.attempt,
            hop=parked.hop,
            parks=parked.parks,
            first_failed_ms=parked.first_failed_ms,
            replay=parked.replay,
        )
        key = delivery.id + delivery.replay
        lane = lane or tenant.grave(parked.destination)
        return Flight(delivery, lane, due.source, due.offset, key, tenant.space + key, len(value))

    def _back_to_stage(self, due: Due, parked: Parked, manifest: Manifest, *, asked: bool) -> None:
        """A batch is delivered by who owns its partition of the stage, and by nobody else: there its manifest goes."""
        record = due.record
        tenant = self._tenants.get(parked.tenant)
        if tenant is None and not asked:
            self._unknown.add(due, due.size)
        elif tenant is None:
            self._unrouted(due, "unknown_tenant", "no such tenant")
        elif record.topic != self._topics.retry(tenant.ref.vendor, tenant.tag):
            self._unrouted(due, "wrong_topic", "a record of this tenant does not belong to this topic")
        else:
            stage = self._topics.stage(tenant.ref.vendor, tenant.tag)
            letter = Letter(stage, record.key, record.value, record.headers, nothing, manifest.partition)
            self._settle.relay(letter, due.source, due.offset, partial(self._is_alive, parked.tenant))

    def _not_ours(self, due: Due) -> None:
        """What cannot be read. Of another release: written again as it is, for a worker that reads it (ADR 0016).

        Nothing of such a record is judged here, so that it can neither be lost nor end. It is looked at again after as
        long as it is late already, so the last one that reads it may be gone for days, at 12 writes an hour.
        """
        record = due.record
        tenant = unread_of(record.headers)
        if tenant is None:
            self._unrouted(due, "malformed", "not a record of ours: a header is missing or wrong")
            return
        late_ms = int(time.time() * 1000) - due.due_ms
        tier = tier_for(-late_ms if late_ms < 0 else min(late_ms, LONGEST_WAIT_MS), self._tiers_ms)
        letter = Letter(record.topic, record.key, record.value, record.headers, nothing, tier)
        self._settle.relay(letter, due.source, due.offset, partial(self._is_alive, tenant))
        self._metrics.unread_records += 1
        now = time.monotonic()
        if now - self._said_unread_at > SAY_EVERY_S:
            self._said_unread_at = now
            written = dict(record.headers)["hg-v"].decode()
            log.warning("unread_record", topic=record.topic, version=written, all=self._metrics.unread_records)

    def _unrouted(self, due: Due, reason: str, detail: str) -> None:
        record = due.record
        vendor = Vendor(record.topic.removeprefix(self._topics.prefix + ".").partition(".")[0])
        log.warning("retry_record_unrouted", topic=record.topic, reason=reason)
        self._settle.unrouted(
            vendor,
            record.key,
            record.value or b"",
            record.headers,
            origin=f"{record.topic}/{record.partition}/{record.offset}",
            reason=reason,
            detail=detail,
            source=due.source,
            offset=due.offset,
        )

    async def move(self, records: Sequence[Due]) -> None:
        """Sends what must wait longer than memory allows on to the tier of what is left of its wait."""
        await self._lanes.room.wait()
        now_ms = int(time.time() * 1000)
        for due in records:
            parked = read_parked(due.record.headers)
            if parked is None or due.record.value is None:
                self._not_ours(due)
                continue
            headers = parked_headers(replace(parked, hop=parked.hop + 1))
            tier = tier_for(parked.not_before_ms - now_ms, self._tiers_ms)
            letter = Letter(due.record.topic, due.record.key, due.record.value, headers, nothing, tier)
            self._settle.relay(letter, due.source, due.offset, partial(self._is_alive, parked.tenant))

    def _is_alive(self, tenant: TenantRef) -> bool:
        found = self._tenants.get(tenant)
        return found is None or found.state == "active"
