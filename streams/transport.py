"""Faust, made safe: a transport whose consumer never commits past a record that is not settled.

Owns fetching, handing over and committing. Stock Faust 0.15.3 acknowledges a record when its agent goes on to the next
one, and commits past records that finish out of order, that were fetched around a rebalance or that were open when the
process was told to stop (ADR 0003). Here

* one Faust event is one fetch of one partition: `event.key` is its `Source`, `event.value` the list of records;
* nothing is settled until `Consumer.settled(source, offsets)` says so, and the commit is the contiguous prefix of what
  was fetched (`offsets.Tracker`), per partition and assignment;
* whatever was fetched is handed over or kept until its assignment is gone; nothing is dropped from a live one, so no
  position ever has to be guessed again after a rebalance;
* the last commit of an assignment is made before it is given up;
* a static member whose id was taken by another process stops for good and says which id.

It leaves to others: what a record means (`ingress.py`), when it counts as settled (`settle.py`), how much memory the
worker may hold (it is told by `pause_fetch`), metrics (`lags` has the numbers), and the life of the process (`app.py`).

Faust and aiokafka are untyped here, and we override their internals: both are pinned exactly, and
`tests/streams/test_faust_pins.py` fails when what we lean on changes.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any, Final, NamedTuple, Protocol, cast

import aiokafka
import faust
import structlog
from aiokafka.client import AIOKafkaClient
from aiokafka.consumer.group_coordinator import HeartbeatRequest, OffsetCommitRequest
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor
from aiokafka.errors import (
    ConsumerStoppedError,
    CorruptRecordException,
    KafkaError,
    RecordTooLargeError,
)
from aiokafka.protocol.api import Request, RequestStruct
from aiokafka.protocol.commit import OffsetCommitResponse_v3
from aiokafka.protocol.group import HeartbeatResponse_v1
from aiokafka.protocol.types import Array, Int32, Int64, Schema, String
from aiokafka.structs import OffsetAndMetadata
from faust.events import Event
from faust.transport.drivers import aiokafka as driver
from faust.types import TP
from faust.types.tuples import ConsumerMessage
from msgspec import Struct
from yarl import URL

import streams.fetching  # noqa: F401  (for what it does to aiokafka)
from streams.offsets import NO_CARRY, Carry, Tracker

log = structlog.get_logger(__name__)

FENCED_INSTANCE_ID: Final = 82  # the broker's error code; aiokafka 0.14.0 does not know it
FULL_POLL_S: Final = 0.005
IDLE_POLL_S: Final = 1.0
FETCH_WAIT_S: Final = 0.25  # without a record for so long the partitions are idle
FULL_WAIT_S: Final = 0.01  # while some partition is full: it may have room again
IDLE_MAX_WAIT_MS: Final = 500
BEHIND_MAX_WAIT_MS: Final = 2  # while more is at hand than was drawn: nothing is gained by gathering
FAULT_BACKOFF_S: Final = 1.0
FAULT_LOG_EVERY_S: Final = 30.0
COMMIT_RETRY_S: Final = 0.1
DRAINING: Final = "draining"


class Record(Protocol):
    """What we use of aiokafka's ConsumerRecord. A record without a key has `key` None, a tombstone `value` None."""

    topic: str
    partition: int
    offset: int
    timestamp: int  # ms; append time or create time, as the topic is set
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]]


class TopicPartition(NamedTuple):
    topic: str
    partition: int


class Source(NamedTuple):
    """Where a fetch came from; what `Consumer.settled` wants back.

    `generation` counts the assignments of this process. (Kafka's own number does not: a static member that joins again
    gets the same one.)
    """

    topic: str
    partition: int
    generation: int


class Fetch(NamedTuple):
    """One Faust event, typed."""

    source: Source
    records: Sequence[Record]


class PartitionLag(Struct, frozen=True):
    """How far one assigned partition is behind."""

    topic: str
    partition: int
    unread: int  # records (and transaction markers) on the broker that were not handed over yet
    unsettled: int  # records handed over and not settled
    oldest_at_ms: int | None  # append time of the oldest record that waits (a lower bound where it was not read yet)
    committed: int | None  # committed by this process in this assignment


class Fetching(Struct, frozen=True):
    """How the consumer asks the broker for records.

    At a trickle a fetch costs more than what it brings (ADR 0003): the broker gathers up to `min_bytes` for at most
    `max_wait_ms`, and after a fetch of less than `small_records` the consumer waits `gather_s` before the next one.
    While nothing comes at all the broker holds the question, and answers with the first record at once.
    """

    min_bytes: int = 1_000_000
    max_wait_ms: int = 10
    max_bytes: int = 4 * 2**20  # of one answer, all partitions together; aiokafka holds it three times for a moment
    max_partition_bytes: int = 2**20  # aiokafka fetches so much of each partition ahead; a larger batch comes alone
    max_records: int = 1000  # of one hand-over, all partitions together
    small_records: int = 500
    gather_s: float = 0.005
    buffer_events: int = 16  # fetches of partitions that wait for the agent
    buffer_bytes: int = 4 * 2**20  # and their values together


AS_MEASURED: Final = Fetching()


class Hooks(Struct, frozen=True):
    """What the application wants to be told; called on the application's loop, must return at once and not raise."""

    on_assigned: Callable[[frozenset[TopicPartition]], None] = lambda partitions: None  # the whole assignment
    on_revoked: Callable[[frozenset[TopicPartition]], None] = lambda partitions: None
    on_fatal: Callable[[BaseException], None] = lambda reason: None  # the process has to end, exit code 1; told once
    full: Callable[[], frozenset[tuple[str, int]]] = lambda: frozenset()  # partitions of which nothing is to be drawn


NO_HOOKS: Final = Hooks()


class FencedInstance(KafkaError):
    """Another process has joined the group under this worker's static id: this one must end."""

    def __init__(self, group: str, instance_id: str) -> None:
        super().__init__(
            f"worker id {instance_id!r} is taken: another process joined the group {group!r} with it; "
            "give each worker its own HEADGATE_WORKER_ID"
        )
        self.group = group
        self.instance_id = instance_id


class ConsumerDied(Exception):
    """A background task of aiokafka ended by a fault; nothing would ever be fetched again."""


class TopicNotServed(Exception):
    """A topic is assigned that has not exactly one agent."""


def fetch_of(event: Any) -> Fetch:
    """The typed content of a Faust event of this transport."""
    return Fetch(event.key, event.value)


# ---------------------------------------------------------------------------------------- aiokafka: the static member


class _HeartbeatRequest_v3(RequestStruct):
    API_KEY = 12
    API_VERSION = 3
    RESPONSE_TYPE = HeartbeatResponse_v1
    SCHEMA = Schema(
        ("group", String("utf-8")),
        ("generation_id", Int32),
        ("member_id", String("utf-8")),
        ("group_instance_id", String("utf-8")),
    )


class _StaticHeartbeat(Request[_HeartbeatRequest_v3]):
    """A heartbeat that says which static member it comes from, so that the broker can refuse a fenced one."""

    API_KEY = 12

    def __init__(self, plain: Any, instance_id: str) -> None:
        self._plain = plain
        self._instance_id = instance_id

    def build(self, request_struct_class: Any) -> Any:
        plain = self._plain
        return request_struct_class(plain._group, plain._generation_id, plain._member_id, self._instance_id)


class _OffsetCommitRequest_v7(RequestStruct):
    API_KEY = 8
    API_VERSION = 7
    RESPONSE_TYPE = OffsetCommitResponse_v3
    SCHEMA = Schema(
        ("group", String("utf-8")),
        ("generation_id", Int32),
        ("member_id", String("utf-8")),
        ("group_instance_id", String("utf-8")),
        (
            "topics",
            Array(
                ("topic", String("utf-8")),
                (
                    "partitions",
                    Array(
                        ("partition", Int32),
                        ("offset", Int64),
                        ("leader_epoch", Int32),
                        ("metadata", String("utf-8")),
                    ),
                ),
            ),
        ),
    )


class _StaticOffsetCommit(Request[_OffsetCommitRequest_v7]):
    """A commit that says which static member it comes from."""

    API_KEY = 8

    def __init__(self, plain: Any, instance_id: str) -> None:
        self._plain = plain
        self._instance_id = instance_id

    def build(self, request_struct_class: Any) -> Any:
        plain = self._plain
        topics = [
            (topic, [(partition, offset, -1, metadata) for partition, offset, metadata in partitions])
            for topic, partitions in plain._topics
        ]
        return request_struct_class(
            plain._consumer_group, plain._consumer_group_generation_id, plain._consumer_id, self._instance_id, topics
        )


class _StaticMemberClient(AIOKafkaClient):
    """The connection of a static member, which notices when its id is taken.

    aiokafka leaves the instance id out of heartbeats and commits. The broker then calls a fenced member "unknown",
    the member joins again, fences the other one, and the two take turns for ever. With the id in them it answers
    FENCED_INSTANCE_ID, and after that nothing more is asked of the group.
    """

    def __init__(self, group: str, instance_id: str, on_fenced: Callable[[FencedInstance], None], **kwargs: Any):
        super().__init__(**kwargs)
        self._group = group
        self._instance_id = instance_id
        self._on_fenced = on_fenced
        self._fenced: FencedInstance | None = None

    async def send(self, node_id: Any, request: Any, **kwargs: Any) -> Any:
        if isinstance(request, HeartbeatRequest):
            request = _StaticHeartbeat(request, self._instance_id)
        elif isinstance(request, OffsetCommitRequest):
            request = _StaticOffsetCommit(request, self._instance_id)
        if request.API_KEY in _GROUP_APIS and self._fenced is not None:
            raise self._fenced
        response = await super().send(node_id, request, **kwargs)
        if request.API_KEY in _GROUP_APIS and FENCED_INSTANCE_ID in _error_codes(response):
            if self._fenced is None:
                self._fenced = FencedInstance(self._group, self._instance_id)
                self._on_fenced(self._fenced)
            raise self._fenced
        return response


_GROUP_APIS: Final = frozenset({8, 11, 12, 14})  # OffsetCommit, JoinGroup, Heartbeat, SyncGroup


def _error_codes(response: Any) -> Iterator[int]:
    if response.API_KEY == OffsetCommitRequest.API_KEY:
        for _topic, partitions in response.topics:
            for _partition, code in partitions:
                yield code
    else:
        yield response.error_code


class GroupConsumer(aiokafka.AIOKafkaConsumer):
    """aiokafka's consumer, with the connection of a static member where there is an instance id."""

    def __init__(
        self,
        *,
        group: str,
        instance_id: str | None,
        on_fenced: Callable[[FencedInstance], None],
        connection: Mapping[str, Any],
        **settings: Any,
    ) -> None:
        super().__init__(group_id=group, group_instance_id=instance_id, **connection, **settings)
        if instance_id is not None:
            self._client = _StaticMemberClient(group, instance_id, on_fenced, loop=self._loop, **connection)

    async def stop(self) -> None:
        """aiokafka cancels its fetches and awaits them; one that rests, its broker being away, raises that here."""
        try:
            await super().stop()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            await self._client.close()

    def check_alive(self) -> None:
        """A background task of aiokafka that died of a fault would leave whoever reads waiting for ever.

        Raises ConsumerDied.
        """
        for task in (self._coordinator._coordination_task, self._fetcher._fetch_task):
            if task.done() and not task.cancelled():
                raise ConsumerDied(f"aiokafka: {task.get_coro()} ended") from task.exception()

    def join_again_if_needed(self) -> None:
        """A heartbeat that the group refused (its right was taken away) has ended for good: aiokafka tells of that for
        ever, and begins another one only when it joins. So it has to join, and does once it may again."""
        coordinator = self._coordinator
        for task in (coordinator._heartbeat_task, coordinator._commit_refresh_task):
            if task is not None and task.done() and not task.cancelled() and task.exception() is not None:
                coordinator.request_rejoin()


# ----------------------------------------------------------------------------------------- the consumer's own thread


class _Drawn(NamedTuple):
    """What one look at aiokafka brought, and the assignment object that it belongs to."""

    assignment: Any
    records: Mapping[Any, list[Record]]


class ConsumerThread(driver.AIOKafkaConsumerThread):
    """The aiokafka side, on its own loop and thread: heartbeats go on whatever the application's loop does."""

    def _create_worker_consumer(self, transport: Any) -> GroupConsumer:
        conf = self.app.conf
        fetching: Fetching = transport.fetching
        return GroupConsumer(
            group=conf.id,
            instance_id=conf.consumer_group_instance_id or None,
            on_fenced=self._on_fenced,
            connection={
                "bootstrap_servers": driver.server_list(transport.url, transport.default_port),
                "client_id": conf.broker_client_id,
                "request_timeout_ms": int(conf.broker_request_timeout * 1000),
                "metadata_max_age_ms": conf.consumer_metadata_max_age_ms,
                "connections_max_idle_ms": conf.consumer_connections_max_idle_ms,
                **driver.credentials_to_aiokafka_auth(conf.broker_credentials, conf.ssl_context),
            },
            partition_assignment_strategy=[RoundRobinPartitionAssignor],
            enable_auto_commit=False,
            auto_offset_reset=conf.consumer_auto_offset_reset,
            isolation_level="read_committed",
            fetch_min_bytes=fetching.min_bytes,
            fetch_max_wait_ms=fetching.max_wait_ms,
            fetch_max_bytes=fetching.max_bytes,
            max_partition_fetch_bytes=conf.consumer_max_fetch_size,
            max_poll_records=fetching.max_records,
            max_poll_interval_ms=int(conf.broker_max_poll_interval * 1000),
            rebalance_timeout_ms=int(conf.broker_rebalance_timeout * 1000),
            session_timeout_ms=int(conf.broker_session_timeout * 1000),
            heartbeat_interval_ms=int(conf.broker_heartbeat_interval * 1000),
            check_crcs=conf.broker_check_crcs,
        )

    def _on_fenced(self, fault: FencedInstance) -> None:
        self.parent_loop.call_soon_threadsafe(self.consumer.fail, fault)

    async def draw(self, timeout_s: float, max_records: int, full: frozenset[tuple[str, int]]) -> _Drawn:
        """Records that aiokafka has fetched, none of those in `full`; waits up to `timeout_s`. Raises KafkaError."""
        return cast(_Drawn, await self.call_thread(self._draw, timeout_s, max_records, full))

    async def _draw(self, timeout_s: float, max_records: int, full: frozenset[tuple[str, int]]) -> _Drawn:
        consumer = self._healthy_consumer()
        fetcher = consumer._fetcher
        wanted = consumer.assignment() - full if full else None  # None: all
        with _polling(fetcher._subscriptions):
            if wanted is not None and not wanted:
                await asyncio.sleep(timeout_s)
                records = {}
            else:
                records = await fetcher.fetched_records(wanted, timeout=timeout_s, max_records=max_records)
        fetching: Fetching = self.transport.fetching
        idle = not records and not full
        fetcher._fetch_min_bytes = 1 if idle else fetching.min_bytes
        behind = bool(fetcher._records)  # more of some partition than its turn: the others' few must not wait for it
        wait_ms = BEHIND_MAX_WAIT_MS if behind else fetching.max_wait_ms
        fetcher._fetch_max_wait_ms = IDLE_MAX_WAIT_MS if idle else wait_ms
        subscription = consumer._subscription.subscription
        return _Drawn(subscription.assignment if subscription is not None else None, records)

    async def touch(self) -> None:
        """Nothing is drawn for now, the worker is alive: the group must not take its partitions away.

        Raises KafkaError, as `draw` does.
        """
        await self.call_thread(self._touch)

    async def _touch(self) -> None:
        with _polling(self._healthy_consumer()._fetcher._subscriptions):
            pass

    def _healthy_consumer(self) -> Any:
        consumer = self._ensure_consumer()
        fetcher, coordinator = consumer._fetcher, consumer._coordinator
        if consumer._closed or fetcher._closed:
            raise ConsumerStoppedError
        consumer.check_alive()
        consumer.join_again_if_needed()
        coordinator.check_errors()  # takes the fault, else the coordinator waits for ever for someone to take it
        return consumer

    @property
    def current_assignment(self) -> Any:
        """aiokafka's own object: each assignment is another one, with its own positions."""
        subscription = self._ensure_consumer()._subscription.subscription
        return subscription.assignment if subscription is not None else None

    async def _commit(self, offsets: Mapping[Any, int]) -> bool:
        """Commit what is still assigned. False, and nothing worse, when the broker refuses or does not answer."""
        consumer = self._ensure_consumer()
        assigned = consumer.assignment()
        due = {
            aiokafka.TopicPartition(at.topic, at.partition): OffsetAndMetadata(offset, "")
            for at, offset in offsets.items()
            if at in assigned
        }
        if not due:
            return False
        try:
            async with asyncio.timeout(self.transport.commit_timeout_s):
                await consumer.commit(due)
        except (KafkaError, TimeoutError) as fault:
            log.warning("commit_refused", fault=repr(fault), partitions=len(due))
            return False
        return len(due) == len(offsets)


@contextmanager
def _polling(subscriptions: Any) -> Iterator[None]:
    """Mark the consumer as polling. aiokafka's own `fetch_context` leaks its count when the body raises."""
    context = subscriptions.fetch_context()
    context.__enter__()
    try:
        yield
    finally:
        context.__exit__(None, None, None)


# ------------------------------------------------------------------------------ the consumer, on the application's loop


class _Waiting(NamedTuple):
    at: TopicPartition
    first: int
    size: int


class _Buffer:
    """What was handed to one agent's queue and not taken by it yet."""

    __slots__ = ("_size", "_waiting", "queue")

    def __init__(self, queue: Any) -> None:
        self.queue = queue
        self._waiting: deque[_Waiting] = deque()
        self._size = 0

    def put(self, event: Any, waiting: _Waiting) -> None:
        self._follow()
        self._waiting.append(waiting)
        self._size += waiting.size
        self.queue.put_nowait(event)

    def full(self, max_bytes: int) -> bool:
        self._follow()
        return bool(self.queue.full()) or self._size >= max_bytes

    def take_back(self) -> list[_Waiting]:
        """Empty the queue; what the agent had not taken."""
        self._follow()
        untaken = list(self._waiting)
        self.queue.clear()
        self._follow()
        return untaken

    def _follow(self) -> None:
        untaken = self.queue.qsize()
        while len(self._waiting) > untaken:
            self._size -= self._waiting.popleft().size


class Consumer(driver.Consumer):
    """One consumer of a group, as seen from the application's loop. Nothing here may be called from another thread."""

    transport: Transport

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.assigned: frozenset[TopicPartition] = frozenset()
        self._generation = 0
        self._assignment: Any = None  # aiokafka's object of the current assignment
        self._trackers: dict[TopicPartition, Tracker] = {}
        self._carries: dict[TopicPartition, Carry] = {}
        self._valid_from: dict[TopicPartition, int] = {}  # generations before it read another log of that name
        self._committed: dict[TopicPartition, int] = {}
        self._restarted: set[TopicPartition] = set()
        self._read_at_ms: dict[TopicPartition, int] = {}  # what is not read yet was appended later than this
        self._buffers: dict[int, _Buffer] = {}
        self._drawing: asyncio.Future[_Drawn] | None = None
        self._drawn: _Drawn | None = None
        self._in_hand: deque[tuple[TopicPartition, list[Record]]] = deque()
        self._held_by: set[str] = set()
        self._released = asyncio.Event()
        self._resumable = False
        self._commit_lock = asyncio.Lock()
        self._all_settled: asyncio.Event | None = None
        self._logged_fault_at_s = float("-inf")

    def _new_consumer_thread(self) -> ConsumerThread:
        return ConsumerThread(self, loop=self.loop, beacon=self.beacon)

    # ------------------------------------------------------------------------------------------ for the application

    def settled(self, source: Source, offsets: Collection[int]) -> None:
        """These records need nothing more: delivered, or durably written where they go on. Idempotent, any order.

        True of the record whatever became of the partition meanwhile: if it is read again by this process, what was
        settled is not handed over again.
        """
        at = TopicPartition(source.topic, source.partition)
        if source.generation < self._valid_from.get(at, 0):
            return
        tracker = self._trackers.get(at)
        if tracker is not None:
            tracker.settled(offsets)
            if self._all_settled is not None and not self.unsettled:
                self._all_settled.set()
        elif at in self._carries:
            self._carries[at] = self._carries[at].plus(offsets)

    @property
    def unsettled(self) -> int:
        """How many records were handed over and are not settled."""
        return sum(tracker.pending for tracker in self._trackers.values())

    def pause_fetch(self, reason: str) -> None:
        """Hand over nothing more until each reason is taken back. Membership is kept, what was handed over goes on."""
        self._held_by.add(reason)
        self._released.clear()

    def resume_fetch(self, reason: str) -> None:
        self._held_by.discard(reason)
        if not self._held_by:
            self._released.set()

    @property
    def paused_by(self) -> frozenset[str]:
        return frozenset(self._held_by)

    async def drain(self, deadline_s: float) -> bool:
        """Stop for good: hand over nothing more, take back what no agent took, wait, commit.

        True: all that an agent took is settled and committed. False: `deadline_s` passed before; what is left will be
        read again by whoever reads the partition next. Takes `deadline_s` and one commit (`commit_timeout_s`) at most.
        Fetching stays paused, and taken-back records are not read again by this process: stop it afterwards.
        """
        end_s = monotonic() + deadline_s
        self.pause_fetch(DRAINING)
        self._take_back_untaken()
        await self._wait_settled(deadline_s)
        await self.commit()
        while self._due() and monotonic() < end_s and not self.should_stop:
            await self.sleep(COMMIT_RETRY_S)
            await self.commit()
        return not self.unsettled and not self._due()

    def lags(self, now_ms: int) -> list[PartitionLag]:
        """How far each assigned partition is behind; `now_ms` is the wall clock."""
        found = []
        for at in sorted(self.assigned):
            state = self._assignment.state_value(at) if self._assignment is not None else None
            tracker = self._trackers.get(at)
            unread = 0
            if state is not None and state.highwater is not None and state.has_valid_position:
                in_hand = sum(len(records) for held, records in self._in_hand if held == at)
                unread = max(0, state.highwater - state.position) + in_hand
            if not unread:
                self._read_at_ms[at] = now_ms
            oldest = tracker.oldest_unsettled if tracker is not None else None
            oldest_at_ms = oldest.appended_at_ms if oldest is not None else None
            if oldest_at_ms is None and unread:
                oldest_at_ms = self._read_at_ms.get(at)
            found.append(
                PartitionLag(
                    topic=at.topic,
                    partition=at.partition,
                    unread=unread,
                    unsettled=tracker.pending if tracker is not None else 0,
                    oldest_at_ms=oldest_at_ms,
                    committed=self._committed.get(at),
                )
            )
        return found

    def fail(self, fault: BaseException) -> None:
        """The consumer cannot go on: crash the application, which tells its `on_fatal` hook."""
        self.add_future(self.crash(fault))

    # ------------------------------------------------------------------------------------------------------ commits

    async def commit(self, topics: Any = None, start_new_transaction: bool = True) -> bool:
        """Commit every contiguous prefix that has grown. False when nothing was due or the broker refused."""
        async with self._commit_lock:
            due = self._due()
            if not due or not await self._thread.commit(due):
                return False
            self._committed.update({at: offset for at, offset in due.items() if at in self._trackers})
            return True

    def committed(self, at: TopicPartition) -> int | None:
        """What was committed of a partition in this assignment: nothing below is ever read again. 0 before that; None
        once another log of that name has taken its place, so that its offsets say nothing."""
        return None if at in self._restarted else self._committed.get(at, 0)

    def _due(self) -> dict[TopicPartition, int]:
        return {
            at: offset
            for at, tracker in self._trackers.items()
            if (offset := tracker.committable()) is not None and offset != self._committed.get(at)
        }

    async def on_task_error(self, exc: BaseException) -> None:
        """An agent raised."""
        await self.crash(exc)

    def ack(self, message: Any) -> bool:
        """Faust's acknowledgement of an event says nothing about its records: `settled` does."""
        return False

    def verify_event_path(self, now: float, tp: Any) -> None:
        """Faust's livelock messages go by its own acknowledgements; `lags` has the truth."""

    async def perform_seek(self) -> None:
        """Positions are right as they are.

        aiokafka starts each assignment at the committed offsets, and what was drawn from it is handed over or kept.
        Seeking to "the committed offset" as Faust does after each rebalance would do nothing where none is committed.
        """

    # --------------------------------------------------------------------------------------------------- rebalances

    async def on_partitions_revoked(self, revoked: Any) -> None:
        self._resumable = False
        self.stop_flow()
        self.app.flow_control.suspend()
        self._take_back_untaken()
        await self._wait_settled(self.transport.revoke_grace_s)
        await self.commit()
        for at, tracker in self._trackers.items():
            self._carries[at] = tracker.finished()
        self._trackers.clear()
        self._committed.clear()
        self._read_at_ms.clear()
        self._assignment = None
        given_up, self.assigned = self.assigned, frozenset()
        if given_up:
            self.transport.hooks.on_revoked(given_up)
        await super().on_partitions_revoked(revoked)

    async def on_partitions_assigned(self, assigned: Any, generation_id: int = 0) -> None:
        self._assignment = self._thread.current_assignment
        self._generation += 1
        self._resumable = True
        await super().on_partitions_assigned(assigned, generation_id)
        self.assigned = frozenset(TopicPartition(tp.topic, tp.partition) for tp in assigned)
        self.transport.hooks.on_assigned(self.assigned)

    def resume_flow(self) -> None:
        """Faust resumes from a task of its own, which may be late: not between a revocation and the next assignment."""
        if self._resumable:
            super().resume_flow()

    def _take_back_untaken(self) -> None:
        for buffer in self._buffers.values():
            for waiting in buffer.take_back():
                tracker = self._trackers.get(waiting.at)
                if tracker is not None:
                    tracker.forget_from(waiting.first)

    async def _wait_settled(self, timeout_s: float) -> None:
        if not self.unsettled:
            return
        self._all_settled = asyncio.Event()
        try:
            async with asyncio.timeout(timeout_s):
                await self._all_settled.wait()
        except TimeoutError:
            pass
        finally:
            self._all_settled = None

    # ----------------------------------------------------------------------------------------------------- fetching

    async def _drain_messages(self, fetcher: Any) -> None:
        """Faust's fetch loop. What it holds survives its cancellation: a restarted loop goes on with it."""
        try:
            while not (self.should_stop or fetcher.should_stop):
                await self._turn()
        except (asyncio.CancelledError, ConsumerStoppedError):
            if not self.app.should_stop:
                raise

    async def _turn(self) -> None:
        await asyncio.sleep(0)
        try:
            if not self.flow_active:
                await self._thread.touch()
                await self.wait(self.can_resume_flow, timeout=IDLE_POLL_S)
            elif self._held_by:
                await self._thread.touch()
                await self.wait(self._released, timeout=IDLE_POLL_S)
            elif self._in_hand:
                await self._hand_over()
            else:
                await self._draw_and_hand_over()
        except (CorruptRecordException, RecordTooLargeError):
            raise  # aiokafka would never get past the one, and skip the other
        except KafkaError as fault:
            self._log_fault(fault)
            await self.sleep(FAULT_BACKOFF_S)

    async def _draw_and_hand_over(self) -> None:
        drawn = await self._draw()
        if not drawn.records:
            return
        self._drawn = _Drawn(drawn.assignment, {})  # what is in hand is let go as it is handed over
        self._in_hand.extend((TopicPartition(at.topic, at.partition), records) for at, records in drawn.records.items())
        count = sum(map(len, drawn.records.values()))
        del drawn
        await self._hand_over()
        fetching = self.transport.fetching
        if count < fetching.small_records:
            await asyncio.sleep(fetching.gather_s)

    async def _draw(self) -> _Drawn:
        """The next records. A call that was cancelled while waiting leaves its question open for the next one."""
        if self._drawing is None:
            fetching = self.transport.fetching
            full = self.transport.hooks.full()
            wait_s = FULL_WAIT_S if full else FETCH_WAIT_S
            self._drawing = asyncio.ensure_future(self._thread.draw(wait_s, fetching.max_records, full))
        await asyncio.wait([self._drawing])
        drawing, self._drawing = self._drawing, None
        return drawing.result()

    async def _hand_over(self) -> None:
        """Give what is in hand to the agents, as far as they have room; the rest stays in hand."""
        drawn, in_hand = self._drawn, self._in_hand
        while in_hand and drawn is not None:
            if drawn.assignment is None or not drawn.assignment.active:
                in_hand.clear()  # its positions died with it: the next assignment starts at what is committed
                return
            if not self.flow_active or self._held_by or self.should_stop:
                return
            at, records = in_hand[0]
            if drawn.assignment is not self._assignment:
                await asyncio.sleep(FULL_POLL_S)  # the rebalance is through in aiokafka, and not yet here
                continue
            buffer = self._buffer(at)
            if buffer.full(self.transport.fetching.buffer_bytes):
                # no `await queue.put()`: a rebalance empties the queue without waking those who wait to put
                await asyncio.sleep(FULL_POLL_S)
                continue
            in_hand.popleft()
            self._put(buffer, at, records)

    def _put(self, buffer: _Buffer, at: TopicPartition, records: list[Record]) -> None:
        """Track a fetch and queue it, without an await between the two."""
        tracker = self._trackers.get(at)
        if tracker is not None and records[0].offset <= tracker.last:
            log.warning(
                "log_restarted", topic=at.topic, partition=at.partition, was=tracker.last, now=records[0].offset
            )
            self._generation += 1
            self._valid_from[at] = self._generation
            self._committed.pop(at, None)
            self._restarted.add(at)
            self._carries.pop(at, None)
            tracker = None
        if tracker is None:
            carry = self._carries.pop(at, NO_CARRY)
            if records[0].offset < carry.floor:
                self._valid_from[at] = self._generation  # what settles late may be of another log of that name
                self._restarted.add(at)
            tracker = self._trackers[at] = Tracker(self._generation, carry)
        first, last = records[0].offset, records[-1].offset
        whole = last - first < len(records)  # no number is missing between them
        offsets = range(first, last + 1) if whole else [record.offset for record in records]
        known = tracker.fetched(offsets, [record.timestamp for record in records])
        self._read_at_ms[at] = records[-1].timestamp
        if known:
            records = [record for record in records if record.offset not in known]
            if not records:
                return
        first = records[0].offset
        message = ConsumerMessage(
            at.topic, at.partition, first, records[0].timestamp / 1000, 0, None, None, None, None, 0, 0,
            TP(at.topic, at.partition), generation_id=self.app.consumer_generation_id,
        )  # fmt: skip
        message.refcount = 1
        source = Source(at.topic, at.partition, tracker.generation)
        size = sum([len(record.value) for record in records if record.value is not None])
        buffer.put(Event(self.app, source, records, None, message), _Waiting(at, first, size))

    def _buffer(self, at: TopicPartition) -> _Buffer:
        channels = self.app.topics._tp_index.get(at, ())
        if len(channels) != 1:
            raise TopicNotServed(f"{at.topic}: {len(channels)} agents read it, exactly one must")
        (channel,) = channels
        queue = channel.queue
        buffer = self._buffers.get(id(queue))
        if buffer is None or buffer.queue is not queue:
            buffer = self._buffers[id(queue)] = _Buffer(queue)
        return buffer

    def _log_fault(self, fault: KafkaError) -> None:
        now_s = monotonic()
        if now_s - self._logged_fault_at_s >= FAULT_LOG_EVERY_S:
            self._logged_fault_at_s = now_s
            log.error("fetch_refused", fault=repr(fault), assigned=len(self.assigned))

    async def on_stop(self) -> None:
        await super().on_stop()
        if self._drawing is not None:
            self._drawing.cancel()


class Producer(driver.Producer):
    """Faust's own producer, which nothing of ours uses: safe all the same if someone does."""

    def _settings_extra(self) -> Mapping[str, Any]:
        return {"acks": "all", "enable_idempotence": True}


class Transport(driver.Transport):
    """What a `SafeApp` plugs in instead of Faust's Kafka transport."""

    Consumer = Consumer
    Producer = Producer

    def __init__(
        self,
        url: list[URL],
        app: Any,
        *,
        fetching: Fetching,
        hooks: Hooks,
        revoke_grace_s: float,
        commit_timeout_s: float,
    ) -> None:
        super().__init__(url, app)
        self.fetching = fetching
        self.hooks = hooks
        self.revoke_grace_s = revoke_grace_s
        self.commit_timeout_s = commit_timeout_s


class SafeApp(faust.App):
    """A Faust application on the safe transport. Made by `safe_app`, inside the loop that will run it."""

    def __init__(
        self, *, fetching: Fetching, hooks: Hooks, revoke_grace_s: float, commit_timeout_s: float, **conf: Any
    ) -> None:
        super().__init__(**conf)
        self._fetching = fetching
        self._hooks = hooks
        self._revoke_grace_s = revoke_grace_s
        self._commit_timeout_s = commit_timeout_s
        self._told_fatal = False

    def _new_transport(self) -> Transport:
        return Transport(
            self.conf.broker_consumer,
            self,
            fetching=self._fetching,
            hooks=self._hooks,
            revoke_grace_s=self._revoke_grace_s,
            commit_timeout_s=self._commit_timeout_s,
        )

    def _new_producer_transport(self) -> Transport:
        return self._new_transport()

    def reads(self, topic: str) -> Callable[[Any], Any]:
        """Decorate the one agent of a topic; its events are of raw bytes, see `fetch_of`.

        An agent must not raise. Faust would start it anew and go on without what it held; here that is fatal, and what
        it held is read again by the next process.
        """
        source = self.topic(
            topic, key_type=bytes, value_type=bytes, key_serializer="raw", value_serializer="raw", internal=False
        )
        return cast(Callable[[Any], Any], self.agent(source, name=f"reads-{topic}"))

    @property
    def reader(self) -> Consumer:
        """The consumer, typed."""
        return cast(Consumer, self.consumer)

    def _crash(self, reason: BaseException) -> None:
        """Every crash of every service of the application comes through here, whichever thread it began in."""
        super()._crash(reason)
        if not self._told_fatal:
            self._told_fatal = True
            self.loop.call_soon_threadsafe(self._hooks.on_fatal, reason)


def safe_app(
    *,
    group: str,
    bootstrap: str,
    datadir: Path,
    max_record_bytes: int,
    instance_id: str | None = None,
    client_id: str = "headgate",
    credentials: Any = None,
    ssl_context: ssl.SSLContext | None = None,
    commit_interval_s: float = 0.5,
    session_timeout_s: float = 10.0,
    revoke_grace_s: float = 1.0,
    commit_timeout_s: float = 5.0,
    metadata_max_age_s: float = 30.0,
    fetching: Fetching = AS_MEASURED,
    hooks: Hooks = NO_HOOKS,
) -> SafeApp:
    """A Faust application that loses nothing, makes no topic, listens on no port and handles no signal.

    `bootstrap` is `host:port[,host:port…]`; `instance_id` makes a static member; `max_record_bytes` is the largest
    record that the topics take; `credentials` are `faust.auth` ones. `revoke_grace_s`: how long a rebalance may wait
    for what is in flight, so that it is not done twice; `metadata_max_age_s`: how soon new partitions are seen. Call it
    inside the running loop.
    """
    return SafeApp(
        fetching=fetching,
        hooks=hooks,
        revoke_grace_s=revoke_grace_s,
        commit_timeout_s=commit_timeout_s,
        id=group,
        broker=[URL(f"kafka://{server.strip()}") for server in bootstrap.split(",")],
        broker_client_id=client_id,
        broker_credentials=credentials,
        ssl_context=ssl_context,
        broker_commit_interval=commit_interval_s,
        broker_commit_every=2**31,
        broker_session_timeout=session_timeout_s,
        broker_heartbeat_interval=min(3.0, session_timeout_s / 3),
        broker_rebalance_timeout=max(session_timeout_s, revoke_grace_s + commit_timeout_s + 5.0),
        broker_request_timeout=max(30.0, session_timeout_s),
        broker_max_poll_interval=300.0,
        broker_max_poll_records=fetching.max_records,
        consumer_auto_offset_reset="earliest",
        consumer_metadata_max_age_ms=int(metadata_max_age_s * 1000),
        consumer_group_instance_id=instance_id,
        consumer_max_fetch_size=min(fetching.max_partition_bytes, max_record_bytes + 64 * 1024),
        datadir=datadir,
        store="memory://",
        processing_guarantee="at_least_once",
        stream_buffer_maxsize=fetching.buffer_events,
        stream_wait_empty=False,
        table_standby_replicas=0,
        topic_allow_declare=False,
        topic_disable_leader=True,
        web_enabled=False,
        web_router_enabled=False,
        web_tables_enabled=False,
        worker_redirect_stdouts=False,
        autodiscover=False,
    )
