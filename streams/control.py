"""Feeds the tenant registry of a process from the compacted topics, and knows how far it has come.

One consumer without a group over `control`, `keys` and `state`: every process reads all of them, from the earliest,
read committed. What the records mean is `config/registry.py`'s.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import ConsumerStoppedError, KafkaError

from config.registry import Fault, Registry
from config.settings import Settings
from schemas.topics import record_bytes

log = structlog.get_logger()

# a question for the ends shares the connection with the fetch, and can wait behind it as long as this
FETCH_WAIT_MS: Final = 250
POLL_MS: Final = 200
CHUNK_RECORDS: Final = 500
AGAIN_S: Final = 1.0
SAY_AGAIN_S: Final = 30.0
REQUEST_TIMEOUT_MS: Final = 10_000
POSITION_EVERY_S: Final = 0.01
STUCK_AFTER_S: Final = 30.0


class ControlReader:
    """Reads for as long as it runs; broker restarts, missing topics and denials are waited out and logged.

    `caught_up` is set once everything that was committed at the start has been folded: an end of the topics, not a
    last record, since transaction markers and compaction leave offsets without one.
    """

    def __init__(self, settings: Settings, registry: Registry) -> None:
        topics = settings.topics
        self._kafka = settings.kafka
        self._max_bytes = record_bytes(settings.sizes.max_event_bytes)
        self._control = TopicPartition(topics.control, 0)
        self._all = tuple(TopicPartition(name, 0) for name in (topics.control, topics.keys, topics.state))
        self._asked = self._all[:2]
        self._registry = registry
        self._consumer: Any = None  # set while it is assigned
        self._next: dict[TopicPartition, int] = {}
        self._task: asyncio.Task[None] | None = None
        self._said: tuple[str, float] = ("", 0.0)
        self.caught_up = asyncio.Event()
        registry.on_fault(_log_fault)

    @property
    def offset(self) -> int:
        """The offset in `control` up to which this process has read."""
        return self._next.get(self._control, 0)

    @property
    def alive(self) -> bool:
        """False before `start`, and once reading has ended: by `stop`, or by a bug, which is logged."""
        return self._task is not None and not self._task.done()

    async def start(self) -> None:
        """Runs `run` as a task, and returns at once: await `caught_up`."""
        self._task = asyncio.get_running_loop().create_task(self.run(), name="control-reader")
        self._task.add_done_callback(_log_death)

    def on_end(self, ended: Callable[["asyncio.Task[None]"], None]) -> None:
        """`ended` is told if the reading, once started, has ended: whoever goes on would route by what is old."""
        assert self._task is not None, "not started"
        self._task.add_done_callback(ended)

    async def stop(self) -> None:
        """Twice is fine. What awaits `read_to_end` goes on waiting: it must not take the unread for the absent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def read_to_end(self) -> None:
        """Returns once the registry has folded all that was committed to `control` and `keys` when this was called.

        Waits for as long as the brokers are away. Each call asks the brokers: gather what to ask for, one a second.
        """
        await self._reach(await self._ends(self._asked))

    # ---------------------------------------------------------------- reading

    async def run(self) -> None:
        """Reads until it is cancelled. Raises nothing that the brokers do; what comes out is a bug."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._catch_up(time.monotonic()), name="control-catch-up")
            while True:
                try:
                    async with self._connected() as consumer:
                        await self._wait_for_topics(consumer)
                        await self._read(consumer)
                except (KafkaError, OSError) as fault:
                    self._say("control_reader_waits", fault=f"{type(fault).__name__}: {fault}"[:300])
                await asyncio.sleep(AGAIN_S)

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[Any]:
        consumer = AIOKafkaConsumer(
            **self._kafka.aiokafka(),
            client_id="headgate-control",
            group_id=None,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            fetch_max_wait_ms=FETCH_WAIT_MS,
            max_partition_fetch_bytes=self._max_bytes,
            request_timeout_ms=REQUEST_TIMEOUT_MS,
            metadata_max_age_ms=30_000,
            retry_backoff_ms=100,
        )
        try:
            await consumer.start()
            yield consumer
        finally:
            self._consumer = None
            await consumer.stop()

    async def _wait_for_topics(self, consumer: Any) -> None:
        while True:
            there = await consumer.topics()
            missing = [partition.topic for partition in self._all if partition.topic not in there]
            if not missing:
                return
            self._say(
                "control_topics_missing",
                topics=missing,
                remedy="start a worker that may create topics, or run `headgate apply`; this process waits for them",
            )
            await asyncio.sleep(AGAIN_S)

    async def _read(self, consumer: Any) -> None:
        """Until the consumer fails, or is seen to be stuck behind the end of a topic. Goes on where reading ended."""
        consumer.assign(list(self._all))
        for partition, offset in self._next.items():
            consumer.seek(partition, offset)
        self._consumer = consumer
        fold = self._registry.fold
        ends: Mapping[TopicPartition, int] = {}
        looked_at = time.monotonic()
        while True:
            found = await consumer.getmany(timeout_ms=POLL_MS, max_records=CHUNK_RECORDS)
            for partition, records in found.items():
                for record in records:
                    fold(partition.topic, record.key, record.value)
                self._next[partition] = records[-1].offset + 1
            now = time.monotonic()
            if found:
                ends, looked_at = {}, now
                await asyncio.sleep(0)  # what was fetched ahead comes without a pause: let others have the loop
            elif now - looked_at > STUCK_AFTER_S:
                # nothing has come since these ends were asked for: they must have been reached long ago
                if any([await consumer.position(partition) < end for partition, end in ends.items()]):
                    self._say("control_reader_stuck", offset=self.offset)
                    return
                ends, looked_at = await consumer.end_offsets(list(self._all)), now

    # ---------------------------------------------------------------- how far

    async def _catch_up(self, started: float) -> None:
        await self._reach(await self._ends(self._all))
        self.caught_up.set()
        log.info(
            "control_caught_up",
            tenants=len(self._registry),
            offset=self.offset,
            took_s=round(time.monotonic() - started, 3),
            faults=dict(self._registry.faults),
        )

    async def _ends(self, partitions: tuple[TopicPartition, ...]) -> Mapping[TopicPartition, int]:
        """The read-committed ends (last stable offsets), asked for now."""
        while True:
            consumer = self._consumer
            if consumer is not None:
                try:
                    ends: Mapping[TopicPartition, int] = await consumer.end_offsets(list(partitions))
                    return ends
                except (KafkaError, ConsumerStoppedError, OSError) as fault:
                    self._say("control_end_unknown", fault=f"{type(fault).__name__}: {fault}"[:300])
            await asyncio.sleep(0.1)

    async def _reach(self, ends: Mapping[TopicPartition, int]) -> None:
        """Returns when all below these offsets has been folded.

        The consumer's position moves in the same step in which records are folded, and also over markers, which bring
        none: so it is looked at, there is nothing to be woken by.
        """
        for partition, end in ends.items():
            while True:
                consumer = self._consumer
                if consumer is not None:
                    try:
                        async with asyncio.timeout(AGAIN_S):
                            if await consumer.position(partition) >= end:
                                break
                    except (KafkaError, ConsumerStoppedError, TimeoutError):
                        pass  # no position yet, or it is being replaced
                await asyncio.sleep(POSITION_EVERY_S)

    def _say(self, event: str, **fields: Any) -> None:
        """Logs what lasts once, then every 30 s."""
        said, at = self._said
        now = time.monotonic()
        if event != said or now - at >= SAY_AGAIN_S:
            self._said = (event, now)
            log.warning(event, **fields)


def _log_fault(fault: Fault) -> None:
    log.error("control_record_left_out", reason=fault.reason, topic=fault.topic, key=fault.key)


def _log_death(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (fault := task.exception()) is not None:
        log.error("control_reader_died", exc_info=fault)
