"""How a delivery ends here: its attempt record, what replaces it, the ledger, and then its source's acknowledgement.

Owns the order of these writes, which is what "nothing lost" rests on:

1. what replaces the delivery (retry record or dead letter), acknowledged by the broker;
2. its attempt record, acknowledged by the broker;
3. the ledger (the hop whose successor is acknowledged; `done` as soon as it was delivered), best effort;
4. the source, whose offset may be committed from then on.

A crash between two steps redelivers the source; the ledger, or the same attempt id, makes the repeat harmless. Works in
batches: one gathers while the broker answers for the one before.
"""

import asyncio
import contextlib
import random
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import structlog
from msgspec.structs import replace

from config.vault import Unsealable
from routing.policy import Again, Dead, Finished, next_step, park_until, tier_for
from schemas.attempt import (
    PURPOSE_ATTEMPT,
    PURPOSE_DELIVERY,
    AttemptRecord,
    SealedAnswer,
    attempt_aad_item,
    encode_answer,
    encode_record,
    listed,
)
from schemas.control import ControlKey, DisabledRecord, encode_control
from schemas.delivery import Delivery
from schemas.event import canonical, rfc3339
from schemas.ids import DeliveryId, EventId, Vendor, attempt_digest, base32, base32_many
from schemas.staged import staged_headers
from schemas.topics import Topics, delivery_key
from schemas.wire import Parked, parked_headers, unrouted_headers
from streams.batch import Dead as Buried
from streams.batch import StagedBatch
from streams.flight import Fan, Flight, Source
from streams.lanes import Lane
from streams.ledger import DONE, Ledger
from streams.metrics import Histogram, Metrics, bump
from streams.outbox import Letter, Outbox, RawHeaders

log = structlog.get_logger()

GATHER_S: Final = 0.01
# Ends of which the ledger is told, so that a copy is stale. Of what comes by ingress the stage drops copies itself.
MOVED: Final = ("again", "dead", "staged")
BATCH_RECORD_DELIVERIES: Final = 20_000  # that one record lists: some 640 KB of 1 MiB
RECOVERED: Final = ("delivered", "recovered")
MISSING_TOPIC_WAIT_S: Final = 5.0
SAY_AGAIN_S: Final = 1.0
# A parked delivery is held three times until the broker has it: as it came, sealed, and in the producer's queue. So
# while more than this is unacknowledged nothing more is sealed: a lane may park as a whole, however much it holds.
SEALED_AHEAD_BYTES: Final = 16 * 2**20


def nothing(_letter: Letter, _found: bool) -> None:
    """Before a letter's `done` is set."""


class Settle:
    """Takes ended, parked and dead deliveries, and records that were routed nowhere; acknowledges their sources."""

    def __init__(
        self,
        outbox: Outbox,
        ledger: Ledger,
        metrics: Metrics,
        topics: Topics,
        *,
        tiers_s: tuple[float, ...],
        worker: str,
        released: Callable[[Sequence[Flight]], None],
    ) -> None:
        """`released` is told of flights once they are settled, before their sources are."""
        self._outbox = outbox
        self._ledger = ledger
        self._metrics = metrics
        self._topics = topics
        self._tiers_s = tiers_s
        self._tiers_ms = tuple(int(tier * 1000) for tier in tiers_s)
        self._worker = worker
        self._released = released
        self._loop = asyncio.get_running_loop()
        self._flights: list[Flight] = []
        self._delivered: list[str] = []  # ledger keys that Redis has not been told of
        self._delivered_count = 0  # ever
        self._told_count = 0
        self._telling: asyncio.Task[bool] | None = None
        self._records: list[tuple[Vendor, str, bytes, Source | None, int]] = []
        self._armed = False
        self._task: asyncio.Task[None] | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._open_letters = 0
        self._to_seal: deque[tuple[Flight, str, Parked | None, int]] = deque()
        self._burials: set[asyncio.Task[None]] = set()
        self._gathered_bytes = 0
        self._said_missing_at = float("-inf")
        self.missing_bytes = 0  # of records as they came whose topic is not there
        self.leaving_bytes = 0  # of deliveries that are being replaced: they go as fast as the broker takes them

    @property
    def held_bytes(self) -> int:
        """Of records that gather for the next batch. What is written already is the outbox's."""
        return self._gathered_bytes + self.missing_bytes

    # ---------------------------------------------------------------- what can happen to a delivery

    def ended(self, flight: Flight) -> None:
        """An attempt ended: `flight.outcome`, `duration_s` and `ended_ms` are set."""
        outcome = flight.outcome
        assert outcome is not None
        if flight.batch is not None and self._batch_ended(flight, flight.batch):
            return
        if outcome.verdict == "delivered":
            flight.end = "delivered"
            self._flights.append(flight)
            if not self._armed:
                self._arm()
            if not self._delivered and self._telling is None:
                self._loop.call_later(GATHER_S, self._tell)
            self._delivered.append(flight.ledger_key)
            self._delivered_count += 1
            return
        delivery = flight.delivery
        if delivery.first_failed_ms == 0:
            delivery.first_failed_ms = flight.ended_ms
        made = delivery.attempt if outcome.fault == "platform" else delivery.attempt + 1
        step = next_step(
            outcome, made, delivery.first_failed_ms, flight.lane.record.retry, flight.ended_ms, random.random()
        )
        match step:
            case Finished():  # only what was delivered finishes, and that returned above
                pass
            case Again(at_ms=at_ms):
                flight.next_ms = at_ms
                self._to_retry(flight, made, 0, at_ms, outcome.code, outcome.fault, outcome.detail)
            case Dead(code=code, detail=detail):
                self._to_dead_letters(flight, made, code, outcome.fault, detail or outcome.detail)
        if outcome.code == "gone" and flight.version == flight.lane.record.version:
            self._disable(flight)

    def _batch_ended(self, flight: Flight, batch: StagedBatch) -> bool:
        """Whether that is all that is to be done: of a batch that was delivered, but for what was refused of it."""
        outcome = flight.outcome
        assert outcome is not None
        if outcome.verdict != "delivered":
            return False
        flight.end = "delivered"
        if batch.refused:
            self._bury(flight, batch, flight.delivery.attempt + 1, Buried("", "", ""))
        else:
            self._flights.append(flight)
            self._arm()
        return True

    def stage(self, flight: Flight) -> None:
        """Into the stage topic, for a kind that is delivered in batches: from there it goes on."""
        flight.end = "staged"
        compiled = flight.lane.owner
        self._replace(flight, self._topics.stage(compiled.ref.vendor, compiled.tag), None, -1)

    def recovered(self, flight: Flight) -> None:
        """The ledger knows the delivery as done: its attempt record is written again, and the source acknowledged."""
        flight.end = "recovered"
        flight.ended_ms = int(time.time() * 1000)
        self._flights.append(flight)
        self._arm()

    def stale(self, flight: Flight) -> None:
        """A copy whose successor is acknowledged: nothing to write."""
        flight.end = "stale"
        self._flights.append(flight)
        self._arm()

    def park(self, flight: Flight, reason: str, own_until_ms: int = 0) -> None:
        """No room now: back to the retry topic, without costing an attempt.

        `own_until_ms` is when the reason ends by itself, 0 where nobody knows.
        """
        delivery = flight.delivery
        now_ms = int(time.time() * 1000)
        if delivery.first_failed_ms == 0:
            delivery.first_failed_ms = now_ms
        parks = delivery.parks + 1
        at_ms = park_until(parks, now_ms, own_until_ms, self._tiers_s)
        if at_ms > delivery.first_failed_ms + int(flight.lane.record.retry.max_age_s * 1000):
            self.dead(flight, "expired", "", f"waited longer than max_age; last for {reason}")
            return
        bump(flight.lane.meter.parked, reason)
        self._to_retry(flight, delivery.attempt, parks, at_ms, reason, "", "")

    def dead(self, flight: Flight, code: str, fault: str, detail: str) -> None:
        """A dead letter without an attempt: its destination is gone or disabled, or it has waited too long."""
        self._to_dead_letters(flight, flight.delivery.attempt, code, fault, detail)

    def routed(self, vendor: Vendor, tenant: str, record: bytes, source: Source | None, offset: int) -> None:
        """An event's own record. With a source, it settles that record too: the event goes nowhere."""
        self._records.append((vendor, tenant, record, source, offset))
        self._gathered_bytes += len(record)
        if not self._armed:
            self._arm()

    def unrouted(
        self,
        vendor: Vendor,
        key: bytes | None,
        value: bytes | None,
        headers: RawHeaders,
        *,
        origin: str,
        reason: str,
        detail: str,
        source: Source,
        offset: int,
    ) -> None:
        """The record as its producer wrote it, to `dlq.unrouted`, with the reason."""
        more = unrouted_headers(headers, vendor=vendor, origin=origin, reason=reason, detail=detail)
        self.relay(Letter(self._topics.unrouted(vendor), key, value, more, nothing), source, offset)

    def relay(self, letter: Letter, source: Source, offset: int, wanted: Callable[[], bool] = lambda: True) -> None:
        """Writes a record that replaces another as it is, and acknowledges that one's source then.

        Where its topic is missing somebody deleted it: nothing is acknowledged until it is back, or until what it
        belonged to is not `wanted` any more.
        """

        def done(letter: Letter, found: bool) -> None:
            if not found and wanted():
                self.missing_bytes += letter.size()
                self._loop.call_later(MISSING_TOPIC_WAIT_S, again, letter)
                self._topic_missing(letter)
                return
            self._letter_done()
            source.settled((offset,))

        def again(letter: Letter) -> None:
            self.missing_bytes -= letter.size()
            self._outbox.write(letter)

        letter.done = done
        self._open_letters += 1
        self._idle.clear()
        self._outbox.write(letter)

    # ---------------------------------------------------------------- what replaces a delivery

    def _replace(self, flight: Flight, topic: str, parked: Parked | None, partition: int) -> None:
        """Not `parked`: it is staged."""
        self._open_letters += 1
        self._idle.clear()
        self.leaving_bytes += flight.weight
        if self._to_seal or self._outbox.unacknowledged_letter_bytes > SEALED_AHEAD_BYTES:
            self._to_seal.append((flight, topic, parked, partition))
        else:
            self._seal(flight, topic, parked, partition)

    def _seal(self, flight: Flight, topic: str, parked: Parked | None, partition: int) -> None:
        delivery = flight.delivery
        vault = flight.lane.owner.newest().vault  # a lane whose destination is gone hears of no change
        batch = flight.batch
        plain = canonical(delivery.event) if batch is None else batch.digest.encode()
        try:
            value = vault.seal(PURPOSE_DELIVERY, delivery.destination, delivery.id, plain)
        except Unsealable as fault:
            if fault.code == "shredded":  # a marker says so: nothing of the tenant may be kept
                bump(flight.lane.meter.dropped, "shredded")
                flight.end = "dropped"
                self._loop.call_soon(self._written, flight)
            else:
                log.error("tenant_key_missing", vendor=delivery.tenant.vendor, topic=topic)
                self._loop.call_later(MISSING_TOPIC_WAIT_S, self._seal, flight, topic, parked, partition)
            return
        if parked is None:
            headers = staged_headers(delivery, flight.lane.limits, flight.place)
        else:
            headers = parked_headers(parked)
        if batch is not None:
            batch.parked()
        key = delivery_key(delivery.tenant, delivery.destination)
        letter = Letter(topic, key, value, headers, nothing, partition)
        letter.done = partial(self._replaced, flight)
        self._outbox.write(letter)

    def _replaced(self, flight: Flight, letter: Letter, found: bool) -> None:
        owner = flight.lane.owner.newest()
        if not found and owner.state == "active":
            # the topic of a living tenant is missing: somebody deleted it. Nothing is acknowledged until it is back
            self._loop.call_later(MISSING_TOPIC_WAIT_S, self._outbox.write, letter)
            self._topic_missing(letter)
            return
        if not found:
            bump(flight.lane.meter.dropped, "tenant_deleted")
        self._written(flight)

    def _topic_missing(self, letter: Letter) -> None:
        now = time.monotonic()
        if now - self._said_missing_at > SAY_AGAIN_S:
            self._said_missing_at = now
            log.error("topic_missing", topic=letter.topic)
        self._seal_more()  # it makes room for others until it is written again

    def _written(self, flight: Flight) -> None:
        self.leaving_bytes -= flight.weight
        self._flights.append(flight)
        self._letter_done()
        self._arm()

    def _letter_done(self) -> None:
        self._open_letters -= 1
        self._seal_more()
        self._note_idle()

    def _seal_more(self) -> None:
        while self._to_seal and self._outbox.unacknowledged_letter_bytes <= SEALED_AHEAD_BYTES:
            self._seal(*self._to_seal.popleft())

    def _parked(
        self, flight: Flight, attempt: int, parks: int, at_ms: int, error: str, fault: str, detail: str
    ) -> Parked:
        delivery = flight.delivery
        return Parked(
            tenant=delivery.tenant,
            destination=delivery.destination,
            delivery=delivery.id,
            event=EventId(delivery.event.eventId),
            event_type=delivery.event.eventType,
            attempt=attempt,
            hop=delivery.hop + 1,
            parks=parks,
            not_before_ms=at_ms,
            origin=delivery.origin,
            error=error,
            fault=fault,
            detail=detail,
            first_failed_ms=delivery.first_failed_ms,
            replay=delivery.replay,
            manifest=None if flight.batch is None else flight.batch.manifest(),
        )

    def _to_retry(
        self, flight: Flight, attempt: int, parks: int, at_ms: int, error: str, fault: str, detail: str
    ) -> None:
        flight.end = "again"
        flight.code = error
        compiled = flight.lane.owner
        parked = self._parked(flight, attempt, parks, at_ms, error, fault, detail)
        partition = tier_for(at_ms - int(time.time() * 1000), self._tiers_ms)
        self._replace(flight, self._topics.retry(compiled.ref.vendor, compiled.tag), parked, partition)

    def _to_dead_letters(self, flight: Flight, attempt: int, code: str, fault: str, detail: str) -> None:
        flight.end = "dead"
        flight.code = code
        delivery = flight.delivery
        if delivery.first_failed_ms == 0:
            delivery.first_failed_ms = int(time.time() * 1000)
        if flight.batch is not None:
            self._bury(flight, flight.batch, attempt, Buried(code, fault, detail))
            return
        compiled = flight.lane.owner
        parked = self._parked(flight, attempt, delivery.parks, 0, code, fault, detail)
        self._replace(flight, self._topics.dead_letters(compiled.ref.vendor, compiled.tag), parked, -1)

    def _bury(self, flight: Flight, batch: StagedBatch, attempt: int, dead: Buried) -> None:
        """Dead letters of a batch's deliveries, one each; it is settled once all of them are acknowledged."""
        self._open_letters += 1
        self._idle.clear()
        self.leaving_bytes += flight.weight
        task = self._loop.create_task(self._bury_each(flight, batch, attempt, dead))
        self._burials.add(task)
        task.add_done_callback(self._burial_ended)

    def _burial_ended(self, task: "asyncio.Task[None]") -> None:
        self._burials.discard(task)
        if not task.cancelled():
            task.result()  # a bug ends the worker, as in `_finished`

    async def _bury_each(self, flight: Flight, batch: StagedBatch, attempt: int, dead: Buried) -> None:
        owner = flight.lane.owner.newest()
        vendor = owner.ref.vendor
        opened = await batch.open(owner)
        buried = batch.buried(flight, opened, attempt, dead)
        key = delivery_key(flight.delivery.tenant, flight.delivery.destination)
        topic = self._topics.dead_letters(vendor, owner.tag)
        letters = [Letter(topic, key, value, parked_headers(parked), nothing) for parked, value in buried]
        stage = self._topics.stage(vendor, owner.tag)
        for record in opened.unsealable:
            headers = unrouted_headers(
                list(record.headers.items()),
                vendor=vendor,
                origin=f"{stage}/{batch.span.partition}/{record.offset}",
                reason="unsealable",
                detail="does not open for this tenant, destination and delivery",
            )
            letters.append(Letter(self._topics.unrouted(vendor), key, record.value, headers, nothing))
        if not letters:
            self._written(flight)
            return
        each = Fan(lambda _: self._written(flight))
        each.expect(0, len(letters))
        for letter in letters:
            while self._outbox.unacknowledged_letter_bytes > SEALED_AHEAD_BYTES:  # noqa: ASYNC110  # polled as all of it
                await asyncio.sleep(GATHER_S)
            self.relay(letter, each, 0, lambda: owner.newest().state == "active")

    def _disable(self, flight: Flight) -> None:
        """A 410: a record in `headgate.state`, which every worker's registry reads."""
        delivery = flight.delivery
        key = ControlKey("disabled", delivery.tenant.vendor, delivery.tenant.tenant, delivery.destination)
        record = DisabledRecord(flight.lane.record.version, flight.ended_ms, delivery.id)
        self._outbox.write(Letter(self._topics.state, key.encode(), encode_control(record), (), nothing))

    # ---------------------------------------------------------------- what Redis is told

    def _tell(self) -> None:
        """Of what was delivered Redis hears apart from the batches: were the worker killed while the broker answers for
        one, all that Redis has not heard of is sent again."""
        if self._telling is None and self._delivered:
            keys, self._delivered = self._delivered, []
            self._telling = self._loop.create_task(self._ledger.tell(keys, [DONE] * len(keys)))
            self._telling.add_done_callback(partial(self._told, len(keys)))

    def _told(self, count: int, task: "asyncio.Task[bool]") -> None:
        self._telling = None
        self._told_count += count
        if task.cancelled():
            return
        task.result()
        if self._delivered:
            self._loop.call_later(GATHER_S, self._tell)

    # ---------------------------------------------------------------- batches

    def _arm(self) -> None:
        if not self._armed:
            self._armed = True
            self._idle.clear()
            if self._task is None:
                self._loop.call_later(GATHER_S, self._begin)

    def _begin(self) -> None:
        self._armed = False
        flights, self._flights = self._flights, []
        records, self._records = self._records, []
        self._gathered_bytes = 0
        self._task = self._loop.create_task(self._write(flights, records))
        self._task.add_done_callback(self._finished)

    def _finished(self, task: "asyncio.Task[None]") -> None:
        self._task = None
        if task.cancelled():  # the worker has ended, with this unwritten
            return
        task.result()  # a bug here ends the worker: what a callback raises does (`app.py`)
        if self._armed:
            self._loop.call_later(GATHER_S, self._begin)
        else:
            self._note_idle()

    def _note_idle(self) -> None:
        if not self._open_letters and not self._armed and self._task is None:
            self._idle.set()

    async def idle(self) -> None:
        """Until everything taken in is settled."""
        await self._idle.wait()

    async def _write(self, flights: list[Flight], records: list[tuple[Vendor, str, bytes, Source | None, int]]) -> None:
        batches: dict[Vendor, tuple[list[str], list[bytes]]] = {}
        for vendor, tenant, record, _, _ in records:
            batch = batches.get(vendor)
            if batch is None:
                batch = batches[vendor] = ([], [])
            batch[0].append(tenant)
            batch[1].append(record)
        self._attempt_records(flights, batches)
        delivered = self._delivered_count  # those of this batch among them
        for vendor, (keys, values) in batches.items():
            await self._outbox.write_batch(self._topics.attempts(vendor), keys, values)
        while self._told_count < delivered:
            if self._telling is None:
                self._tell()
            assert self._telling is not None
            await asyncio.wait({self._telling})
        moved = [flight for flight in flights if flight.end in MOVED and flight.batch is None]
        if moved:
            hops = [str(flight.delivery.hop) for flight in moved]
            await self._ledger.tell([flight.ledger_key for flight in moved], hops)
        self._acknowledge(flights, records)

    def _attempt_records(self, flights: list[Flight], batches: dict[Vendor, tuple[list[str], list[bytes]]]) -> None:
        tried = [flight for flight in flights if flight.outcome is not None or flight.end == "recovered"]
        names = base32_many([_attempt_digest(flight.delivery) for flight in tried])
        texts: dict[int, str] = {}  # most of a batch shares a few milliseconds
        for flight, name in zip(tried, names, strict=True):
            delivery = flight.delivery
            lane = flight.lane
            outcome = flight.outcome
            event = delivery.event
            vendor, tenant = delivery.tenant.vendor, delivery.tenant.tenant
            at_ms = flight.ended_ms
            at = texts.get(at_ms)
            if at is None:
                at = texts[at_ms] = rfc3339(at_ms)
            record = AttemptRecord(
                "att_" + name,
                vendor,
                tenant,
                event.eventId,
                event.eventType,
                delivery.id,
                delivery.destination,
                lane.record.type,
                delivery.attempt + 1,
                delivery.trigger,
                at,
                int(flight.duration_s * 1e6) / 1000,
                "delivered" if outcome is None else outcome.verdict,
                "recovered" if outcome is None else outcome.code,
                delivery.origin,
                self._worker,
                delivery.route,
                "" if outcome is None else outcome.fault,
                0 if outcome is None else outcome.status,
                rfc3339(flight.next_ms) if flight.next_ms else "",
                delivery.correlation,
                lane.owner.config_version,
                "" if outcome is None else outcome.receipt,
            )
            if outcome is not None and (outcome.answer or outcome.detail):
                answer = encode_answer(SealedAnswer(outcome.answer, outcome.detail))
                item = attempt_aad_item(delivery.id, delivery.attempt + 1)
                with contextlib.suppress(Unsealable):  # without its key nobody may read it again
                    record.sealed = lane.owner.vault.seal(PURPOSE_ATTEMPT, delivery.destination, item, answer)
            batch = batches.get(vendor)
            if batch is None:
                batch = batches[vendor] = ([], [])
            for one in [record] if flight.batch is None else _of_batch(record, flight, flight.batch):
                batch[0].append(tenant)
                batch[1].append(encode_record(one))

    def _acknowledge(self, flights: list[Flight], records: list[tuple[Vendor, str, bytes, Source | None, int]]) -> None:
        now_ms = time.time() * 1000
        settled: defaultdict[Source, list[int]] = defaultdict(list)
        for flight in flights:
            self._count(flight, now_ms)
            settled[flight.source].append(flight.offset)
            if flight.joined is not None:
                for source, offset in flight.joined:
                    settled[source].append(offset)
        self._released(flights)
        for _, _, _, nowhere, offset in records:
            if nowhere is not None:
                settled[nowhere].append(offset)
        for source, offsets in settled.items():
            source.settled(offsets)

    def _count(self, flight: Flight, now_ms: float) -> None:
        """Once a delivery, after the broker has confirmed: a batch that is written again counts once."""
        if flight.batch is not None:
            self._count_batch(flight, flight.batch, now_ms)
            return
        meter = flight.lane.meter
        outcome = flight.outcome
        if outcome is not None:
            attempt = (outcome.verdict, outcome.fault, outcome.code)
            meter.attempts[attempt] = meter.attempts.get(attempt, 0) + 1
            meter.attempt_s.observe(flight.duration_s)
        match flight.end:
            case "delivered":
                end = ("delivered", "ok" if outcome is None else outcome.code)
            case "dead":
                end = ("dead", flight.code)
                bump(meter.dead, flight.code)
            case "recovered":
                meter.ends[RECOVERED] = meter.ends.get(RECOVERED, 0) + 1
                return
            case "stale":
                bump(meter.dropped, "stale")
                return
            case _:
                return
        meter.ends[end] = meter.ends.get(end, 0) + 1
        delivery = flight.delivery
        # of what came by the retry topic no record has the append time at ingress
        began_ms = delivery.appended_ms if delivery.trigger == "event" else delivery.first_failed_ms
        self._took(flight.lane, delivery, (now_ms - began_ms) / 1000)

    def _took(self, lane: Lane, delivery: Delivery, seconds: float) -> None:
        """One delivery has come to its end."""
        event_type = lane.owner.type_label(delivery.event.eventType)
        name = event_type if self._metrics.type_label else ""
        histogram = lane.meter.delivery_s.get(name)
        if histogram is None:
            histogram = lane.meter.delivery_s[name] = Histogram()
        histogram.observe(seconds)
        lane.owner.average(event_type).observe(seconds)

    def _count_batch(self, flight: Flight, batch: StagedBatch, now_ms: float) -> None:
        meter = flight.lane.meter
        outcome = flight.outcome
        if outcome is not None:
            attempt = (outcome.verdict, outcome.fault, outcome.code)
            meter.attempts[attempt] = meter.attempts.get(attempt, 0) + 1
            meter.attempt_s.observe(flight.duration_s)
        opened = batch.opened
        if flight.end not in ("delivered", "dead") or opened is None:
            return
        for delivery in opened.deliveries:
            refused = batch.refused.get(delivery.id)
            if refused is not None or flight.end == "dead":
                code = flight.code if refused is None else refused.code
                end = ("dead", code)
                bump(meter.dead, code)
            else:
                end = ("delivered", "ok" if outcome is None else outcome.code)
            meter.ends[end] = meter.ends.get(end, 0) + 1
            seconds = (now_ms - delivery.appended_ms) / 1000
            self._took(flight.lane, delivery, seconds)
        batch.opened = None


def _attempt_digest(delivery: Delivery, part: int = 0) -> bytes:
    ident = f"{delivery.id}+{part}" if part else delivery.id
    return attempt_digest(DeliveryId(ident), delivery.attempt + 1, delivery.replay)


def _of_batch(record: AttemptRecord, flight: Flight, batch: StagedBatch) -> list[AttemptRecord]:
    """One record that lists the deliveries of a batch (more where they are many), and one of each that was refused."""
    records: list[AttemptRecord] = []
    ids = [listed(ident, replay) for ident, replay in batch.sent if ident not in batch.refused]
    for part, first in enumerate(range(0, len(ids), BATCH_RECORD_DELIVERIES)):
        ident = record.id if not part else "att_" + base32(_attempt_digest(flight.delivery, part))
        records.append(replace(record, id=ident, deliveries=ids[first : first + BATCH_RECORD_DELIVERIES]))
    for delivery in batch.opened.deliveries if batch.opened is not None and batch.refused else ():
        refused = batch.refused.get(delivery.id)
        if refused is not None:
            attempt = replace(flight.delivery, id=delivery.id, replay=delivery.replay)
            records.append(
                replace(
                    record,
                    id="att_" + base32(_attempt_digest(attempt)),
                    eventId=delivery.event.eventId,
                    eventType=delivery.event.eventType,
                    delivery=delivery.id,
                    origin=delivery.origin,
                    verdict=refused.verdict,
                    fault=refused.fault,
                    code=refused.code,
                    status=refused.status,
                    correlationId=delivery.correlation,
                    sealed=None,
                )
            )
    return records
