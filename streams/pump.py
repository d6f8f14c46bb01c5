"""The retry pump: reads the retry topics and hands each record over when its time has come (design, section 5).

Owns the waiting. A partition is a tier: all its records wait the same time from their append, so that none holds up
another (ADR 0008); what is then left of a record's own wait is spent in memory, or in another tier. It leaves to others
what a record says (`retry.py`), how it is delivered, and when it counts as settled.

`Shelf` is what waits, without Kafka, clock or loop; `Pump` is the consumer around it. Everything runs on the loop of
the application; nothing here may be called from another thread.

Clocks: a tier's wait begins at the broker's append time and is watched on ours. If the broker's clock is ahead, the
wait is counted from the fetch at the latest; if it is behind, a record is looked at too early and waits on, since
`hg-not-before`, from a worker's clock, rules. So what skew costs is the difference between two workers' clocks.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from itertools import count
from math import inf
from typing import Any, Final

import aiokafka
import structlog
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor
from aiokafka.errors import ConsumerStoppedError, CorruptRecordException, KafkaError, RecordTooLargeError
from aiokafka.structs import OffsetAndMetadata
from msgspec import Struct

from routing.policy import Look, look, looked_at_ms
from streams.offsets import NO_CARRY, NOTHING_FETCHED, Carry, Tracker
from streams.transport import GroupConsumer, Record, TopicPartition

log = structlog.get_logger(__name__)

MIB: Final = 2**20
HEAP_BUDGET_BYTES: Final = 64 * MIB
HEADS_SHARE: Final = 4  # of the budget, one part is for records whose tier's time has not come
NEAR_MS: Final = 30_000  # what is looked at later than that is not kept, but fetched again shortly before
PARTITION_BYTES: Final = 4 * MIB  # that one partition may keep of what is near
RECORD_OVERHEAD_BYTES: Final = 3000  # Python's objects for a record and its fifteen headers
BATCH_RECORDS: Final = 100  # some 7 ms of the loop where all are parked again: others go on in between
BATCH_BYTES: Final = 4 * MIB
SLICE_RECORDS: Final = 50  # that one partition takes of a batch before it is another one's turn
FETCH_WAIT_MS: Final = 300
FETCH_BYTES: Final = 4 * MIB
PARTITION_FETCH_BYTES: Final = 256 * 1024  # kept of each of many partitions; a larger batch comes alone
FETCH_RECORDS: Final = 1000
METADATA_MAX_AGE_MS: Final = 5000
POLL_MS: Final = 5000
LONGEST_TIMER_S: Final = 10.0  # so that a clock that was set is noticed
FAULT_BACKOFF_S: Final = 1.0
COMMIT_TIMEOUT_S: Final = 5.0
CLOSE_TIMEOUT_S: Final = 5.0
DRAINING: Final = "draining"
NOT_BEFORE: Final = "hg-not-before"
LATEST_MS: Final = 2**53  # what a float holds: lateness and tiers are counted in such


class PumpSource:
    """A partition during one assignment; what `Due.source.settled` is told of."""

    __slots__ = ("_tell", "generation", "partition", "topic")

    def __init__(
        self, topic: str, partition: int, generation: int, tell: Callable[[PumpSource, Sequence[int]], None]
    ) -> None:
        self.topic = topic
        self.partition = partition
        self.generation = generation
        self._tell = tell

    def settled(self, offsets: Sequence[int]) -> None:
        """These records need nothing more. Idempotent, any order, also after the assignment is gone: true of a record
        whatever became of its partition, so that this process does not hand it out again."""
        self._tell(self, offsets)


class Due(Struct, frozen=True, gc=False):
    """A record of a retry topic that is handed over. `due_ms` is its `hg-not-before`, 0 where that is no number."""

    record: Record
    source: PumpSource
    offset: int
    due_ms: int
    size: int  # bytes it holds in memory


class Slot:
    """One partition during one assignment: what was read of it and is not handed over."""

    __slots__ = (
        "at",
        "full",
        "gone",
        "held",
        "held_bytes",
        "out",
        "passed",
        "resume_ms",
        "settled_here",
        "source",
        "tracker",
        "wake_ms",
    )

    def __init__(self, at: TopicPartition, source: PumpSource, tracker: Tracker) -> None:
        self.at = at
        self.source = source
        self.tracker = tracker
        self.held: deque[tuple[float, Due]] = deque()  # with the time to look at it; in the order of the log
        self.held_bytes = 0
        self.out: set[int] = set()  # handed over, not settled
        self.settled_here: set[int] = set()  # settled by an earlier copy while they wait here, from `passed` on
        self.passed = 0  # all before it is settled
        self.full = False  # nothing more is to be read for now
        self.resume_ms = 0.0  # while full: reading goes on then, at the earliest
        self.wake_ms = inf
        self.gone = False

    def knows(self, offset: int) -> bool:
        """Whether a record that waits here was settled by an earlier copy of it."""
        return offset < self.passed or offset in self.settled_here

    def committable(self) -> int | None:
        offset = self.tracker.committable()
        if offset is not None and offset != self.passed:
            self.passed = offset
            if self.settled_here:
                self.settled_here = {settled for settled in self.settled_here if settled >= offset}
        return offset


class Shelf:
    """What waits of all partitions of an assignment. Pure: the time is an argument, in epoch milliseconds.

    Records whose tier's time has not come lie at the head of their partition as far as they are near and there is room;
    what is beyond is given back to the log. Those with a rest of their own lie in a heap. Both stay under `max_bytes`.
    """

    def __init__(self, tiers_s: Sequence[float], max_bytes: int = HEAP_BUDGET_BYTES) -> None:
        self._tiers_ms = tuple(int(tier * 1000) for tier in tiers_s)
        self._max_heads_bytes = max_bytes // HEADS_SHARE
        self._max_rests_bytes = max_bytes - self._max_heads_bytes
        self._rests: list[tuple[int, int, Slot, Due]] = []
        self._wakes: list[tuple[float, int, Slot]] = []
        self._number = count()
        self._held = 0
        self.heads_bytes = 0
        self.rests_bytes = 0

    def __len__(self) -> int:
        return self._held + len(self._rests)

    @property
    def overfull(self) -> bool:
        """More has been read than there is room for: ripe records that were not collected yet."""
        return self.heads_bytes > self._max_heads_bytes

    def take(self, slot: Slot, records: Sequence[Record], now_ms: int) -> int | None:
        """Takes in what was read of a partition. Returns the offset from which on it must be read again, later.

        Then `slot.full` is set; `collect` says when reading may go on. Records settled before are dropped.
        """
        tracker = slot.tracker
        known = tracker.fetched([record.offset for record in records], [record.timestamp for record in records])
        held = slot.held
        back: int | None = None
        for record in records:
            if record.offset in known:
                continue
            size = _size(record)
            at_ms = looked_at_ms(record.timestamp, now_ms, record.partition, self._tiers_ms)
            if at_ms > now_ms:
                if at_ms > now_ms + NEAR_MS:
                    slot.resume_ms = at_ms - NEAR_MS
                    back = record.offset
                elif self.heads_bytes + size > self._max_heads_bytes:
                    slot.resume_ms = at_ms
                    back = record.offset
                elif held and slot.held_bytes + size > PARTITION_BYTES:
                    slot.resume_ms = held[0][0]
                    back = record.offset
                if back is not None:
                    break
            held.append((at_ms, Due(record, slot.source, record.offset, _not_before_ms(record), size)))
            slot.held_bytes += size
            self.heads_bytes += size
            self._held += 1
        if back is not None:
            tracker.forget_from(back)
            slot.full = True
        self._wake_at(slot, self._next_of(slot))
        return back

    def collect(self, now_ms: int) -> tuple[list[Due], list[Due], list[Slot]]:
        """What is to be handed over now, at most a batch: due, to be sent on; and the slots that may read on.

        Nothing of either only if nothing is ripe. Partitions take turns, the longest waiting first.
        """
        due: list[Due] = []
        moves: list[Due] = []
        freed: list[Slot] = []
        size = 0
        rests, wakes = self._rests, self._wakes
        while rests and rests[0][0] <= now_ms and len(due) < BATCH_RECORDS // 2 and size < BATCH_BYTES:
            _, _, slot, item = heapq.heappop(rests)
            self.rests_bytes -= item.size
            if not slot.knows(item.offset):
                slot.out.add(item.offset)
                due.append(item)
                size += item.size
        while wakes and wakes[0][0] <= now_ms and len(due) + len(moves) < BATCH_RECORDS and size < BATCH_BYTES:
            at_ms, _, slot = heapq.heappop(wakes)
            if slot.gone or slot.wake_ms != at_ms:
                continue
            slot.wake_ms = inf
            size += self._look_at(slot, now_ms, due, moves)
            if slot.full and slot.held_bytes <= PARTITION_BYTES // 2 and slot.resume_ms <= now_ms:
                slot.full = False
                freed.append(slot)
        return due, moves, freed

    def next_ms(self) -> float:
        """When there is something to collect; infinity if nothing waits."""
        wakes = self._wakes
        while wakes and (wakes[0][2].gone or wakes[0][2].wake_ms != wakes[0][0]):
            heapq.heappop(wakes)
        at_ms = wakes[0][0] if wakes else inf
        return min(at_ms, self._rests[0][0]) if self._rests else at_ms

    def settled(self, slot: Slot, offsets: Sequence[int]) -> None:
        """Records of the slot's partition are settled, whichever copy of them was handed over."""
        slot.tracker.settled(offsets)
        out = slot.out
        for offset in offsets:
            if offset in out:
                out.discard(offset)
            else:
                slot.settled_here.add(offset)

    def clear(self, slots: Iterable[Slot]) -> None:
        """The assignment of all slots is over: what they hold is not handed over."""
        self._rests.clear()
        self._wakes.clear()
        self.rests_bytes = 0
        for slot in slots:
            self._empty(slot)

    def give_up(self, slot: Slot) -> None:
        """The slot's log is not the same any more: what it holds is not handed over."""
        self._rests = [entry for entry in self._rests if entry[2] is not slot]
        heapq.heapify(self._rests)
        self.rests_bytes = sum(entry[3].size for entry in self._rests)
        self._empty(slot)

    def _empty(self, slot: Slot) -> None:
        slot.gone = True
        self.heads_bytes -= slot.held_bytes
        self._held -= len(slot.held)
        slot.held.clear()
        slot.held_bytes = 0

    def _look_at(self, slot: Slot, now_ms: int, due: list[Due], moves: list[Due]) -> int:
        """Looks at what is ripe of a partition, up to a slice; the bytes that are handed over."""
        held = slot.held
        handed = 0
        for _ in range(SLICE_RECORDS):
            if not held or held[0][0] > now_ms:
                break
            _, item = held[0]
            room = self.rests_bytes + item.size <= self._max_rests_bytes
            what = look(item.due_ms, now_ms, room, self._tiers_ms)
            if what is Look.PAUSE and not slot.knows(item.offset):
                self._wake_at(slot, item.due_ms)
                return handed
            held.popleft()
            self._held -= 1
            slot.held_bytes -= item.size
            self.heads_bytes -= item.size
            if slot.knows(item.offset):
                continue
            if what is Look.HEAP:
                heapq.heappush(self._rests, (item.due_ms, next(self._number), slot, item))
                self.rests_bytes += item.size
                continue
            slot.out.add(item.offset)
            handed += item.size
            (due if what is Look.DUE else moves).append(item)
        self._wake_at(slot, max(now_ms, self._next_of(slot)))
        return handed

    def _next_of(self, slot: Slot) -> float:
        """When the slot must be looked at next."""
        at_ms = slot.held[0][0] if slot.held else inf
        if slot.full and slot.held_bytes <= PARTITION_BYTES // 2:
            return min(at_ms, slot.resume_ms)
        return at_ms

    def _wake_at(self, slot: Slot, at_ms: float) -> None:
        if at_ms != slot.wake_ms:
            slot.wake_ms = at_ms
            if at_ms != inf:
                heapq.heappush(self._wakes, (at_ms, next(self._number), slot))


def _size(record: Record) -> int:
    return RECORD_OVERHEAD_BYTES + len(record.value or b"") + sum([len(value or b"") for _, value in record.headers])


def _not_before_ms(record: Record) -> int:
    for name, value in record.headers:
        if name == NOT_BEFORE:
            try:
                return min(max(0, int(value)), LATEST_MS)
            except (ValueError, TypeError):  # the broker takes headers without a value
                return 0
    return 0


class Pump(aiokafka.ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka is untyped
    """The consumer of all retry topics that match `pattern`, one member of `group`.

    `on_due` gets records whose time has come, `on_move` those that must be written again to the tier of what is left of
    their wait; both see to it that `due.source.settled((due.offset,))` is called once the record needs nothing more.
    Their return is back-pressure: no more is handed over before. What was handed over, is not settled, and is read
    again after a rebalance is handed over again (the lanes join it); what was settled here is not.
    """

    def __init__(
        self,
        *,
        connection: Mapping[str, Any],
        group: str,
        pattern: str,
        tiers_s: Sequence[float],
        on_due: Callable[[Sequence[Due]], Awaitable[None]],
        on_move: Callable[[Sequence[Due]], Awaitable[None]],
        on_fatal: Callable[[BaseException], None],
        instance_id: str | None = None,
        client_id: str = "headgate-retry",
        max_bytes: int = HEAP_BUDGET_BYTES,
        commit_interval_s: float = 0.5,
        session_timeout_s: float = 10.0,
        revoke_grace_s: float = 1.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`connection`: aiokafka's arguments that say how to connect. `instance_id` makes a static member. `on_fatal`
        is told once if the pump cannot go on: the process has to end. `revoke_grace_s`: how long a rebalance may wait
        for what was handed over, so that it is not done twice. `clock`: epoch seconds."""
        self._connection = {"client_id": client_id, "metadata_max_age_ms": METADATA_MAX_AGE_MS, **connection}
        self._group = group
        self._pattern = pattern
        self._on_due = on_due
        self._on_move = on_move
        self._on_fatal = on_fatal
        self._instance_id = instance_id
        self._commit_interval_s = commit_interval_s
        self._session_timeout_s = session_timeout_s
        self._revoke_grace_s = revoke_grace_s
        self._clock = clock
        self._shelf = Shelf(tiers_s, max_bytes)
        self._slots: dict[TopicPartition, Slot] = {}
        self._carries: dict[TopicPartition, Carry] = {}
        self._valid_from: dict[TopicPartition, int] = {}  # generations before it read another log of that name
        self._committed: dict[TopicPartition, int] = {}
        self._grown: set[TopicPartition] = set()  # something was settled since the last commit
        self._generation = 0
        self._assignment: Any = None  # aiokafka's object of the current assignment
        self._held_by: set[str] = set()
        self._behind = False
        self._handing_records = 0
        self._handing_bytes = 0
        self._kick = asyncio.Event()
        self._commit_wanted = asyncio.Event()
        self._some_settled = asyncio.Event()
        self._commit_lock = asyncio.Lock()
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._consumer: Any = None
        self._failed = False
        self._closing = False

    # ------------------------------------------------------------------------------------------------- for the worker

    async def start(self) -> None:
        """Joins the group. Raises KafkaError if no broker can be reached."""
        self._consumer = GroupConsumer(
            group=self._group,
            instance_id=self._instance_id,
            on_fenced=self._fail,
            connection=self._connection,
            partition_assignment_strategy=[RoundRobinPartitionAssignor],
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            fetch_max_wait_ms=FETCH_WAIT_MS,
            fetch_max_bytes=FETCH_BYTES,
            max_partition_fetch_bytes=PARTITION_FETCH_BYTES,
            session_timeout_ms=int(self._session_timeout_s * 1000),
            heartbeat_interval_ms=int(min(3.0, self._session_timeout_s / 3) * 1000),
            rebalance_timeout_ms=int(
                max(self._session_timeout_s, self._revoke_grace_s + COMMIT_TIMEOUT_S + 5.0) * 1000
            ),
        )
        await self._consumer.start()
        self._consumer.subscribe(pattern=self._pattern, listener=self)
        for name, work in (("read", self._read), ("hand over", self._hand_over), ("commit", self._commit_grown)):
            task = asyncio.create_task(work(), name=f"retry pump: {name}")
            task.add_done_callback(self._task_ended)
            self._tasks.append(task)

    def pause(self, reason: str) -> None:
        """Hands nothing more over and reads nothing more until each reason is taken back. Membership is kept."""
        going = not self._held_by
        self._held_by.add(reason)
        if going:
            self._apply_all()

    def resume(self, reason: str) -> None:
        self._held_by.discard(reason)
        if not self._held_by:
            self._apply_all()
            self._kick.set()

    @property
    def held_bytes(self) -> int:
        """Of records that wait here. What `on_due` or `on_move` has returned from is theirs."""
        return self._shelf.heads_bytes + self._shelf.rests_bytes + self._handing_bytes

    @property
    def due_waiting(self) -> int:
        """How many records wait in memory, or are being handed over."""
        return len(self._shelf) + self._handing_records

    @property
    def unsettled(self) -> int:
        """How many records were handed over and are not settled."""
        return sum(len(slot.out) for slot in self._slots.values())

    def assigned(self) -> frozenset[TopicPartition]:
        return frozenset(self._slots)

    def committed(self) -> Mapping[TopicPartition, int]:
        """What this process has committed in this assignment."""
        return dict(self._committed)

    async def drain(self, deadline_s: float) -> bool:
        """Stop for good: hand nothing more over, wait for what was, commit; then `close`.

        True: all that was handed over is settled and committed. False: `deadline_s` passed before.
        """
        self.pause(DRAINING)
        await self._wait_settled(deadline_s)
        await self._commit()
        return not self.unsettled and not self._due_to_commit()

    async def close(self) -> None:
        """Leaves the group (a static member stays in it until its session ends). Twice is fine."""
        self._closing = True
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._timer is not None:
            self._timer.cancel()
        if self._consumer is not None:
            consumer, self._consumer = self._consumer, None
            with contextlib.suppress(KafkaError, TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await consumer.stop()

    # ------------------------------------------------------------------------------------------------------ settling

    def _settled(self, source: PumpSource, offsets: Sequence[int]) -> None:
        at = TopicPartition(source.topic, source.partition)
        if source.generation < self._valid_from.get(at, 0):
            return
        slot = self._slots.get(at)
        if slot is not None:
            self._shelf.settled(slot, offsets)
            self._grown.add(at)
            self._commit_wanted.set()
            self._some_settled.set()
        elif at in self._carries:
            self._carries[at] = self._carries[at].plus(offsets)

    async def _wait_settled(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                while self._handing_records or self.unsettled:
                    self._some_settled.clear()
                    await self._some_settled.wait()
        except TimeoutError:
            pass

    async def _commit_grown(self) -> None:
        while True:
            await self._commit_wanted.wait()
            await asyncio.sleep(self._commit_interval_s)
            self._commit_wanted.clear()
            if not await self._commit():
                self._commit_wanted.set()

    def _due_to_commit(self) -> dict[TopicPartition, int]:
        due = {}
        for at in self._grown:
            slot = self._slots.get(at)
            offset = slot.committable() if slot is not None else None
            if offset is not None and offset != self._committed.get(at):
                due[at] = offset
        return due

    async def _commit(self) -> bool:
        """Commits every contiguous prefix that has grown. False if the broker refused or did not answer."""
        async with self._commit_lock:
            due, asked, assignment = self._due_to_commit(), set(self._grown), self._assignment
            self._grown.clear()
            if not due or self._consumer is None:
                return True
            offsets = {
                aiokafka.TopicPartition(at.topic, at.partition): OffsetAndMetadata(offset, "")
                for at, offset in due.items()
            }
            try:
                # not `consumer.commit`: where a new topic ended the assignment that refuses, though the group takes it
                async with asyncio.timeout(COMMIT_TIMEOUT_S):
                    await self._consumer._coordinator.commit_offsets(assignment, offsets)
            except (KafkaError, TimeoutError) as fault:
                log.warning("commit_refused", group=self._group, fault=repr(fault), partitions=len(due))
                self._grown |= asked & self._slots.keys()
                return False
            if assignment is self._assignment:
                self._committed.update(due)
            return True

    # ---------------------------------------------------------------------------------------------------- rebalances

    async def on_partitions_revoked(self, revoked: Any) -> None:
        """Of the eager protocol: everything goes. What waits is given up, what was handed over may end for a moment."""
        self._shelf.clear(self._slots.values())
        await self._wait_settled(self._revoke_grace_s)
        await self._commit()
        self._end_assignment()

    def _end_assignment(self) -> None:
        self._shelf.clear(self._slots.values())
        for at, slot in self._slots.items():
            self._carries[at] = slot.tracker.finished()
        self._slots.clear()
        self._committed.clear()
        self._grown.clear()
        self._assignment = None

    async def on_partitions_assigned(self, assigned: Any) -> None:
        self._begin_assignment()
        log.info("retry_assigned", group=self._group, partitions=len(self._slots))

    def _begin_assignment(self) -> None:
        """Positions are right as they are: aiokafka begins each assignment at what is committed, else earliest."""
        subscription = self._consumer._subscription.subscription if self._consumer is not None else None
        assignment = subscription.assignment if subscription is not None else None
        if assignment is None or assignment is self._assignment:
            return
        if self._assignment is not None:
            self._end_assignment()
        self._assignment = assignment
        self._generation += 1
        for tp in assignment.tps:
            self._open(TopicPartition(tp.topic, tp.partition))
        self._apply_all()

    def _open(self, at: TopicPartition) -> Slot:
        source = PumpSource(at.topic, at.partition, self._generation, self._settled)
        slot = Slot(at, source, Tracker(self._generation, self._carries.pop(at, NO_CARRY)))
        self._slots[at] = slot
        return slot

    # ------------------------------------------------------------------------------------------------------- reading

    async def _read(self) -> None:
        while True:
            try:
                batch = await self._consumer.getmany(timeout_ms=POLL_MS, max_records=FETCH_RECORDS)
            except (CorruptRecordException, RecordTooLargeError, ConsumerStoppedError):
                raise  # aiokafka would skip it, or never get past it
            except KafkaError as fault:
                log.error("fetch_refused", group=self._group, fault=repr(fault))
                self._consumer.join_again_if_needed()
                await asyncio.sleep(FAULT_BACKOFF_S)
                continue
            self._consumer.check_alive()
            if not batch:
                continue
            # no await since the records were returned: they belong to the assignment that is in force now, even if
            # `on_partitions_assigned` has not been called for it yet
            self._begin_assignment()
            for tp, records in batch.items():
                self._take(TopicPartition(tp.topic, tp.partition), records)
            del batch, records  # or they stay in memory until the next ones come
            if self._shelf.overfull:
                self._throttle(True)
            self._kick.set()
            await asyncio.sleep(0)

    def _take(self, at: TopicPartition, records: list[Record]) -> None:
        slot = self._slots[at]
        if slot.tracker.last != NOTHING_FETCHED and records[0].offset <= slot.tracker.last:
            slot = self._begin_log(slot, records)
        back = self._shelf.take(slot, records, int(self._clock() * 1000))
        if back is not None:
            self._consumer.seek(aiokafka.TopicPartition(at.topic, at.partition), back)
            self._apply(slot)

    def _begin_log(self, slot: Slot, records: list[Record]) -> Slot:
        """The topic was made anew under the same name: offsets of before mean other records."""
        at = slot.at
        log.warning(
            "log_restarted", topic=at.topic, partition=at.partition, was=slot.tracker.last, now=records[0].offset
        )
        self._shelf.give_up(slot)
        self._generation += 1
        self._valid_from[at] = self._generation
        self._committed.pop(at, None)
        self._carries.pop(at, None)
        return self._open(at)

    def _apply(self, slot: Slot) -> None:
        """Let aiokafka read a partition or not, as it should be now."""
        if self._consumer is None or self._assignment is None or not self._assignment.active:
            return
        tp = aiokafka.TopicPartition(slot.at.topic, slot.at.partition)
        if slot.full or self._held_by or self._behind:
            self._consumer.pause(tp)
        else:
            self._consumer.resume(tp)

    def _apply_all(self) -> None:
        for slot in self._slots.values():
            self._apply(slot)

    # -------------------------------------------------------------------------------------------------- handing over

    async def _hand_over(self) -> None:
        while True:
            await self._kick.wait()
            self._kick.clear()
            while not self._held_by:
                due, moves, freed = self._shelf.collect(int(self._clock() * 1000))
                for slot in freed:
                    self._apply(slot)
                if not due and not moves:
                    if not freed:
                        break
                    continue
                self._handing_records = len(due) + len(moves)
                self._handing_bytes = sum([item.size for item in due]) + sum([item.size for item in moves])
                if moves:
                    await self._on_move(moves)
                if due:
                    await self._on_due(due)
                del due, moves
                self._handing_records = self._handing_bytes = 0
                self._some_settled.set()
                await asyncio.sleep(0)
            if not self._held_by:
                self._throttle(False)
                self._arm()

    def _throttle(self, behind: bool) -> None:
        """Handing over does not keep up: what has been read is enough for now."""
        if behind != self._behind:
            self._behind = behind
            self._apply_all()

    def _arm(self) -> None:
        """One timer for all that waits."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        at_ms = self._shelf.next_ms()
        if at_ms != inf:
            wait_s = min(max(0.001, at_ms / 1000 - self._clock()), LONGEST_TIMER_S)
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._kick.set)

    # --------------------------------------------------------------------------------------------------------- faults

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (fault := task.exception()) is not None:
            self._fail(fault)

    def _fail(self, fault: BaseException) -> None:
        if not self._failed and not self._closing:
            self._failed = True
            self._on_fatal(fault)
