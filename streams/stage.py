"""The stage's reader: gathers what batching kinds are to be sent into batches, and keeps how far each has come.

Where a batch begins and ends is a function of the log alone (`routing/batches.py`): whoever reads it again forms the
same ones. What is stored or parked is kept by destination in the cursor topic (`streams/cursor.py`): a committed
offset alone could not say it, since destinations interleave. A batch that is due again comes back as its manifest, and
is read again from the log. Batches are delivered by the lanes, and end in `streams/settle.py`.

`Slot` (`streams/slots.py`) is one partition in one assignment; `Stage` is the consumer around them. All of it runs on
the event loop's thread, but for what blocks.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import blake2b
from typing import Any, Final

import confluent_kafka
import structlog
from confluent_kafka import KafkaError, KafkaException
from msgspec import Raw, Struct

from config.acls import stage_transactional_id
from config.kafka import KafkaFault
from config.provision import log_names
from connectors.contract import Span
from routing.batches import Closed, Limits
from schemas.delivery import Delivery
from schemas.event import Event
from schemas.ids import DeliveryId, DestinationId, TenantRef, Vendor, base32, digest, parts, unpercent
from schemas.staged import (
    LIMITS,
    MARK,
    SOURCE,
    cursor_key,
    encode_cursor,
    read_limits,
    tick_headers,
)
from schemas.topics import Topics
from schemas.wire import Parked, read_parked
from streams.batch import Record, StagedBatch
from streams.compiled import Tenants, Unknowns
from streams.cursor import CursorWriter, Entry, Kept, Refused, load, read_range
from streams.flight import Fan, Flight
from streams.lanes import Lanes
from streams.outbox import Letter, Outbox
from streams.settle import Settle, nothing
from streams.slots import BatchKey, ClosedBatch, Gathering, Slot

log = structlog.get_logger()

READ_AT_ONCE: Final = 300  # some 3 ms of the loop
IDLE_S: Final = 0.02
SESSION_MS: Final = 10_000
METADATA_MAX_AGE_MS: Final = 5000
QUEUED_KB: Final = 16 * 1024
FETCH_BYTES: Final = 1024 * 1024
TICK_MARGIN_MS: Final = 20
TICK_AGAIN_S: Final = 0.5
AGAIN_S: Final = 1.0
UNREAD_SIZE: Final = 1024  # of a batch whose records are not in memory
ROOM_SHARE: Final = 0.9  # of what open batches may hold, once that was too much
RECORD_OVERHEAD_BYTES: Final = 2000  # Python's objects for a record and its headers
TICK_EVERY_S: Final = 0.1
REFUSED_S: Final = 0.2
NO_SUCH_TOPIC: Final = frozenset({KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC})
BLOCKING: Final = 3  # threads that read cursors and ranges
NO_EVENT: Final = Event(eventType="", payload=Raw(b"null"))  # of a batch


class _Waiting(Struct, gc=False):
    slot: Slot
    batch: StagedBatch
    parked: Parked | None  # of its manifest
    size: int


class Stage:
    """The reader of all stage topics that match `patterns`, one member of `group`."""

    def __init__(
        self,
        *,
        kafka: Mapping[str, Any],
        group: str,
        patterns: Sequence[str],
        topics: Topics,
        tenants: Tenants,
        lanes: Lanes,
        settle: Settle,
        outbox: Outbox,
        on_fatal: Callable[[BaseException], None],
        worker: str,
        instance_id: str | None,
        max_record_bytes: int,
        max_bytes: int,
        commit_interval_s: float,
    ) -> None:
        """`max_bytes` bounds what open batches hold; closed ones are the lanes'."""
        self._kafka = kafka
        self._group = group
        self._patterns = list(patterns)
        self.topics = topics
        self._tenants = tenants
        self._lanes = lanes
        self._settle = settle
        self._outbox = outbox
        self._on_fatal = on_fatal
        self._instance_id = instance_id
        self._max_bytes = max_bytes
        self._commit_interval_s = commit_interval_s
        self._loop = asyncio.get_running_loop()
        self._threads = ThreadPoolExecutor(BLOCKING, "stage")
        self._writer_thread = ThreadPoolExecutor(1, "stage-cursor")
        self._writer = CursorWriter(kafka, stage_transactional_id(topics, worker), max_record_bytes)
        self._slots: dict[tuple[str, int], Slot] = {}
        self._limits: dict[bytes, Limits] = {}
        self._unknown: Unknowns[_Waiting] = Unknowns(tenants, self._asked, max_bytes)
        self._paused_by: set[str] = set()
        self._held = False
        self._consumer: Any = None
        self._tasks: list[asyncio.Task[None]] = []
        self._loads: set[asyncio.Task[None]] = set()
        self._wanted = asyncio.Event()  # something is to be written
        self._now = asyncio.Event()  # and at once
        self._ended: asyncio.Future[bool] = self._loop.create_future()  # of the next write
        self._ticked_at = 0.0
        self._drained = asyncio.Event()
        self._stopping = False
        self._gathered_bytes = 0

    # ---------------------------------------------------------------- for the worker

    def start(self) -> None:
        """Joins the group."""
        more = {} if self._instance_id is None else {"group.instance.id": self._instance_id}
        self._consumer = confluent_kafka.Consumer(
            {
                **self._kafka,
                **more,
                "group.id": self._group,
                "enable.auto.commit": False,
                "auto.offset.reset": "earliest",
                "isolation.level": "read_committed",
                "partition.assignment.strategy": "cooperative-sticky",
                "enable.partition.eof": True,
                "session.timeout.ms": SESSION_MS,
                "heartbeat.interval.ms": SESSION_MS // 4,
                "topic.metadata.refresh.interval.ms": METADATA_MAX_AGE_MS,
                "queued.max.messages.kbytes": QUEUED_KB,
                "fetch.message.max.bytes": FETCH_BYTES,
                "log_level": 2,
            }
        )
        self._consumer.subscribe(
            self._patterns, on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._revoked
        )
        for name, work in (("read", self._read), ("write", self._write)):
            task = self._loop.create_task(work(), name=f"stage: {name}")
            task.add_done_callback(self._task_ended)
            self._tasks.append(task)

    def _task_ended(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and not self._stopping:
            self._on_fatal(task.exception() or RuntimeError(f"{task.get_name()} ended"))

    def pause(self, reason: str) -> None:
        """Reads nothing more until each reason is taken back. Membership is kept."""
        self._paused_by.add(reason)

    def resume(self, reason: str) -> None:
        self._paused_by.discard(reason)

    @property
    def held_bytes(self) -> int:
        """Of open batches, and of closed ones that wait for the registry."""
        return self._gathered_bytes + self._unknown.held_bytes

    @property
    def unsettled(self) -> int:
        """Batches that are neither stored nor parked."""
        return sum([len(slot.items) for slot in self._slots.values()])

    async def drain(self, deadline_s: float) -> bool:
        """Reads nothing more, and waits for what is closed. What is open is left to who comes next."""
        self.pause("draining")
        until = self._loop.time() + deadline_s
        while self.unsettled and self._loop.time() < until:
            self._drained.clear()
            try:
                async with asyncio.timeout_at(until):
                    await self._drained.wait()
            except TimeoutError:
                break
        await self.written()
        return not self.unsettled

    async def close(self) -> None:
        self._stopping = True
        for task in [*self._tasks, *self._loads]:
            task.cancel()
        await asyncio.gather(*self._tasks, *self._loads, return_exceptions=True)
        if self._consumer is not None:
            await self._loop.run_in_executor(self._threads, self._consumer.close)
        self._writer.close()
        self._threads.shutdown(wait=False)
        self._writer_thread.shutdown(wait=False)

    # ---------------------------------------------------------------- assignment

    def _assigned(self, consumer: Any, partitions: list[Any]) -> None:
        consumer.incremental_assign(partitions)
        consumer.pause(partitions)
        slots: list[Slot] = []
        for at in partitions:
            vendor = Vendor(at.topic.removeprefix(self.topics.prefix + ".").partition(".")[0])
            slot = self._slots[at.topic, at.partition] = Slot(self, at.topic, at.partition, vendor)
            slots.append(slot)
        if slots:
            task = self._loop.create_task(self._load(slots), name="stage: load")
            self._loads.add(task)
            task.add_done_callback(self._loaded)

    def _loaded(self, task: "asyncio.Task[None]") -> None:
        self._loads.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._task_ended(task)

    def _revoked(self, consumer: Any, partitions: list[Any]) -> None:
        for at in partitions:
            slot = self._slots.pop((at.topic, at.partition), None)
            if slot is not None:
                slot.gone = True
                self._let_go(slot)
        consumer.incremental_unassign(partitions)
        self._drained.set()

    def _let_go(self, slot: Slot) -> None:
        for gathering in slot.gathering.values():
            if gathering.records is not None:
                self._gathered_bytes -= gathering.size
        slot.gathering.clear()

    async def _load(self, slots: list[Slot]) -> None:
        """The cursors to their ends; then reading begins."""
        while True:
            slots = [slot for slot in slots if not slot.gone]
            if not slots:
                return
            try:
                kept, names = await self._loop.run_in_executor(self._threads, self._look, slots)
            except (KafkaException, KafkaFault, OSError) as fault:
                log.warning("stage_waits", fault=str(fault)[:300])
                await asyncio.sleep(AGAIN_S)
                continue
            begun: list[Slot] = []
            for slot in slots:
                found = kept.get((slot.cursor_topic, slot.partition))
                if found is None or slot.topic not in names:
                    log.error("topic_missing", topic=slot.cursor_topic, remedy="headgate apply makes it")
                elif not slot.gone:
                    slot.take_over(found, names[slot.topic])
                    begun.append(slot)
            if not self._held:  # else all are resumed together
                self._consumer.resume([confluent_kafka.TopicPartition(slot.topic, slot.partition) for slot in begun])
            slots = [slot for slot in slots if slot not in begun]
            if slots:
                await asyncio.sleep(AGAIN_S)

    def _look(self, slots: list[Slot]) -> tuple[dict[tuple[str, int], Kept], dict[str, str]]:
        """Blocks."""
        names = log_names(self._kafka, sorted({slot.topic for slot in slots}))
        return load(self._kafka, [(slot.cursor_topic, slot.partition) for slot in slots]), names

    # ---------------------------------------------------------------- reading

    async def _read(self) -> None:
        consumer = self._consumer
        while True:
            hold = bool(self._paused_by) or not self._lanes.room.is_set() or self._unknown.held_bytes > self._max_bytes
            if hold != self._held:
                self._held = hold
                self._hold(hold)
            found: list[Any] = []
            message = consumer.poll(0)
            if message is not None:
                found = [message, *consumer.consume(READ_AT_ONCE, 0)]
                for message in found:
                    self._take(message)
                self._lanes.note_room()
                self._lanes.pump()
            self._tick()
            await asyncio.sleep(0 if found else IDLE_S)

    def _hold(self, hold: bool) -> None:
        at = [confluent_kafka.TopicPartition(slot.topic, slot.partition) for slot in self._slots.values() if slot.ready]
        if at:
            (self._consumer.pause if hold else self._consumer.resume)(at)

    def _take(self, message: Any) -> None:
        error = message.error()
        slot = self._slots.get((message.topic(), message.partition()))
        if error is not None:
            if error.code() == KafkaError._PARTITION_EOF:
                if slot is not None:
                    slot.behind = False
            elif error.fatal():
                raise KafkaException(error)
            elif error.code() not in NO_SUCH_TOPIC:  # of a pattern: none is there yet
                log.warning("stage_read_fault", fault=error.name())
            return
        if slot is None or not slot.ready:
            return
        offset = message.offset()
        _, at_ms = message.timestamp()
        if offset < slot.position:
            log.warning("log_restarted", topic=slot.topic, partition=slot.partition, was=slot.position, now=offset)
            raise RuntimeError(f"topic {slot.topic} was made anew under its name; the next start reads it as a new one")
        slot.position = offset + 1
        slot.behind = True
        for closed in slot.boundaries.pass_by(at_ms):
            self._close(slot, closed)
        headers = {name: value for name, value in message.headers() or () if value is not None}
        of = message.key()
        if MARK in headers:
            return
        if "hg-batch" in headers:
            self.manifest(slot, message)
            return
        limits = self._limits_of(headers)
        value = message.value()
        if of is None or value is None or limits is None:
            self._unreadable(slot, message)
            return
        place = headers.get(SOURCE)
        if not slot.boundaries.takes(of, offset):
            if place is not None:
                slot.learn(place)
            return
        way = slot.way(of)
        if place is not None and not slot.is_first(way, place, offset):
            gathering = slot.gathering.get(of)
            if gathering is not None:
                gathering.skip.append(offset)
            self._repeated(slot, of)
            return
        size = len(value) + RECORD_OVERHEAD_BYTES
        gathering = slot.gathering.get(of)
        if gathering is None:
            gathering = slot.gathering[of] = Gathering([], 0, [], blake2b(digest_size=16))
        gathering.digest.update(headers.get("hg-delivery", b""))
        if gathering.records is not None:
            gathering.records.append(Record(offset, headers, value))
            gathering.size += size
            self._gathered_bytes += size
        closed_now = slot.boundaries.take(of, offset, at_ms, len(value), limits)
        if closed_now is not None:
            self._close(slot, closed_now)
        elif self._gathered_bytes > self._max_bytes:
            self._make_room()

    def _limits_of(self, headers: Mapping[str, bytes]) -> Limits | None:
        text = headers.get(LIMITS, b"")
        found = self._limits.get(text)
        if found is None:
            try:
                found = self._limits[text] = Limits(*read_limits(text))
            except ValueError:
                return None
        return found

    def _repeated(self, slot: Slot, of: bytes) -> None:
        tenant = self._tenants.get(TenantRef(slot.vendor, unpercent(of.decode("utf-8", "replace").partition("/")[0])))
        if tenant is not None:
            tenant.dropped("repeated")

    def _make_room(self) -> None:
        """The open batches that hold most are read again once they are whole: some at once, since all are looked at."""
        held = [one for slot in self._slots.values() for one in slot.gathering.values() if one.records is not None]
        for gathering in sorted(held, key=lambda one: one.size, reverse=True):
            if self._gathered_bytes <= self._max_bytes * ROOM_SHARE:
                return
            self._gathered_bytes -= gathering.size
            gathering.records = None

    # ---------------------------------------------------------------- batches

    def _close(self, slot: Slot, closed: Closed[bytes]) -> None:
        of = closed.of
        gathering = slot.gathering.pop(of)
        if gathering.records is not None:
            self._gathered_bytes -= gathering.size
        known = slot.batches.get((of, closed.first))
        batch = StagedBatch(
            slot,
            of,
            Span(slot.log, slot.partition, closed.first, closed.last),
            item=closed.first,
            count=closed.count,
            digest=gathering.digest.hexdigest(),
            records=gathering.records,
            skip=[offset for offset in gathering.skip if offset < closed.last],
            unsure=known is not None and known.unsure,
            noted=b"" if known is None else known.noted,
        )
        way = slot.way(of)
        floors = {name: max(slot.floors.get(name, 0), way.floors.get(name, 0)) for name in way.seen}
        way.closed.append(ClosedBatch(batch, floors))
        if known is not None and (
            known.turn or known.over
        ):  # before one in front of it was: its manifest stands for it
            way.closed[-1].done = True
            slot.pass_by(way)
            self.changed()
            return
        slot.items[closed.first] = slot.active[of, closed.first] = batch
        size = closed.size + closed.count * RECORD_OVERHEAD_BYTES if gathering.records is not None else UNREAD_SIZE
        self._admit(_Waiting(slot, batch, None, size), asked=False)

    def manifest(self, slot: Slot, message: Any) -> None:
        """A parked batch is due again, unless another copy of this has come further."""
        of, offset = message.key() or b"", message.offset()
        parked = read_parked(message.headers() or ())
        manifest = None if parked is None else parked.manifest
        if manifest is None or message.value() is None:
            self._unreadable(slot, message)
            return
        key = of, manifest.first
        known = slot.batches.get(key)
        turn = 0 if known is None else known.turn
        if key in slot.active and turn < manifest.turn and key not in slot.early:
            slot.items[offset] = None
            slot.early[key] = message
            return
        current = (
            known is not None and not known.over and turn == manifest.turn and manifest.partition == slot.partition
        )
        if known is None or not current or key in slot.active:  # that one stands for all manifests of its turn
            self._repeated(slot, of)
            return
        batch = StagedBatch(
            slot,
            of,
            Span(slot.log, slot.partition, manifest.first, known.last),
            item=offset,
            count=known.count,
            digest=manifest.digest,
            records=None,
            skip=known.skip,
            turn=known.turn,
            unsure=known.unsure,
            noted=known.noted,
        )
        slot.items[offset] = slot.active[of, manifest.first] = batch
        self._admit(_Waiting(slot, batch, parked, UNREAD_SIZE), asked=False)

    async def _asked(self, waited: Sequence[_Waiting]) -> None:
        for one in waited:
            if not one.slot.gone:
                self._admit(one, asked=True)
        self._lanes.pump()

    def _admit(self, waiting: _Waiting, *, asked: bool) -> None:
        slot, batch, parked, size = waiting.slot, waiting.batch, waiting.parked, waiting.size
        tenant_text, _, name = batch.of.decode("utf-8", "replace").partition("/")
        destination = DestinationId(name)
        tenant = self._tenants.get(TenantRef(slot.vendor, unpercent(tenant_text)))
        lane = tenant.lane(destination) if tenant is not None else None
        if (tenant is None or lane is None) and not asked:
            self._unknown.add(waiting, size)
            return
        if tenant is None:
            self._end_alone(slot, batch)
            return
        ident = batch_id(tenant.ref, destination, batch.span)
        delivery = Delivery(
            tenant=tenant.ref,
            destination=destination,
            id=ident,
            event=NO_EVENT,
            origin=f"{slot.topic}/{slot.partition}/{batch.span.first}",
            appended_ms=int(time.time() * 1000),
            size=size,
        )
        lane = lane or tenant.grave(destination)
        flight = Flight(delivery, lane, slot, batch.item, ident, tenant.space + ident, size, batch=batch)
        batch.flying = flight
        if parked is not None:
            delivery.trigger = "retry"
            delivery.attempt, delivery.hop, delivery.parks = parked.attempt, batch.turn, parked.parks
            delivery.first_failed_ms = parked.first_failed_ms
            self._lanes.came_back(lane)
            age_ms = time.time() * 1000 - parked.first_failed_ms
            if age_ms > lane.record.retry.max_age_s * 1000 and not lane.removed:
                self._lanes.hold(flight)
                self._settle.dead(flight, "expired", "", "older than max_age")
                return
        self._lanes.admit(flight, time.monotonic())

    # ---------------------------------------------------------------- what is no batch of anybody

    def _unreadable(self, slot: Slot, message: Any) -> None:
        offset = message.offset()
        log.error("stage_record_unrouted", topic=slot.topic, reason="malformed")
        slot.items[offset] = None
        self._settle.unrouted(
            slot.vendor,
            message.key(),
            message.value(),
            message.headers() or (),
            origin=f"{slot.topic}/{slot.partition}/{offset}",
            reason="malformed",
            detail="not a record of ours: a header is missing or wrong",
            source=slot,
            offset=offset,
        )

    def _end_alone(self, slot: Slot, batch: StagedBatch) -> None:
        task = self._loop.create_task(self._to_unrouted(slot, batch), name="stage: unrouted")
        self._loads.add(task)
        task.add_done_callback(self._loaded)

    async def _to_unrouted(self, slot: Slot, batch: StagedBatch) -> None:
        records = batch.records if batch.records is not None else await slot.read_again(batch)
        each = Fan(lambda _: slot.settled((batch.item,)))
        each.expect(0, len(records))
        if not records:
            slot.settled((batch.item,))
        for record in records:
            self._settle.unrouted(
                slot.vendor,
                batch.of,
                record.value,
                list(record.headers.items()),
                origin=f"{slot.topic}/{slot.partition}/{record.offset}",
                reason="unknown_tenant",
                detail="no such tenant",
                source=each,
                offset=0,
            )

    async def read_range(self, topic: str, batch: StagedBatch) -> list[Record]:
        """Until it works: what is asked for is there, and without it the batch can neither be sent nor end."""
        span = batch.span
        while True:
            try:
                return await self._loop.run_in_executor(
                    self._threads,
                    partial(
                        read_range,
                        self._kafka,
                        topic,
                        span.partition,
                        span.first,
                        span.last,
                        batch.of,
                        frozenset(batch.skip),
                    ),
                )
            except KafkaException as fault:
                log.warning("stage_waits", fault=str(fault)[:300])
                await asyncio.sleep(AGAIN_S)

    # ---------------------------------------------------------------- the time

    def _tick(self) -> None:
        """Where nothing follows, a window's end must be written, or its batch would stay open."""
        now = time.monotonic()
        if now - self._ticked_at < TICK_EVERY_S or self._paused_by:
            return
        self._ticked_at = now
        now_ms = time.time() * 1000
        for slot in self._slots.values():
            if slot.behind or not slot.gathering or now - slot.ticked_at < TICK_AGAIN_S:
                continue
            end_ms = slot.boundaries.next_end_ms()
            if end_ms is not None and now_ms > end_ms + TICK_MARGIN_MS:
                slot.ticked_at = now
                self._outbox.write(Letter(slot.topic, None, None, tick_headers(), nothing, slot.partition))

    # ---------------------------------------------------------------- what is kept

    def changed(self) -> None:
        self._wanted.set()
        self._drained.set()

    async def written(self) -> bool:
        """Writes what is to be written, at once, with what others have; False where it was refused."""
        ended = self._ended
        self._now.set()
        self._wanted.set()
        return await asyncio.shield(ended)

    async def _write(self) -> None:
        while True:
            await self._wanted.wait()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._commit_interval_s):
                    await self._now.wait()
            self._wanted.clear()
            self._now.clear()
            await self._write_once()

    async def _write_once(self) -> None:
        ended, self._ended = self._ended, self._loop.create_future()
        entries, offsets, taken = self._due()
        if not entries and not offsets:
            ended.set_result(True)
            return
        try:
            group = self._consumer.consumer_group_metadata()
            await self._loop.run_in_executor(self._writer_thread, self._writer.write, entries, offsets, group)
        except Refused as fault:
            log.warning("stage_cursor_refused", fault=str(fault)[:300])
            for slot, dirty, dirty_batches in taken:
                slot.dirty |= dirty
                slot.dirty_batches |= dirty_batches
            await asyncio.sleep(REFUSED_S)
            self._wanted.set()
            ended.set_result(False)
            return
        for topic, partition, offset in offsets:
            slot_now = self._slots.get((topic, partition))
            if slot_now is not None:
                slot_now.committed = offset
        ended.set_result(True)

    def _due(self) -> tuple[list[Entry], list[tuple[str, int, int]], list[tuple[Slot, set[bytes], set[BatchKey]]]]:
        entries: list[Entry] = []
        offsets: list[tuple[str, int, int]] = []
        taken: list[tuple[Slot, set[bytes], set[BatchKey]]] = []
        for slot in self._slots.values():
            if not slot.ready or slot.position < 0:
                continue
            offset = slot.committable()
            if offset == slot.committed and not slot.dirty and not slot.dirty_batches:
                continue
            offsets.append((slot.topic, slot.partition, offset))
            topic, partition = slot.cursor_topic, slot.partition
            entries += [
                Entry(topic, partition, cursor_key(partition, of), encode_cursor(slot.cursor(of))) for of in slot.dirty
            ]
            for of, first in slot.dirty_batches:
                record = slot.batches.get((of, first))
                value = None if record is None else encode_cursor(record)
                entries.append(Entry(topic, partition, cursor_key(partition, of, first), value))
            taken.append((slot, slot.dirty, slot.dirty_batches))
            slot.dirty, slot.dirty_batches = set(), set()
        return entries, offsets, taken


def batch_id(tenant: TenantRef, destination: DestinationId, span: Span) -> DeliveryId:
    text = parts(tenant.vendor, tenant.tenant, destination, span.log, str(span.partition), str(span.first))
    return DeliveryId("bat_" + base32(digest(text)))
