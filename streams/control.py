"""Reads the control plane's compacted topics into the tenant registry, from their beginning and for good.

Owns the consumer: every process reads all of `control`, `keys` and `state`, in no group, committed records only. What
the records mean is `config/registry.py`'s.
"""

import asyncio
from typing import Any, Final

import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from config.registry import Registry
from config.settings import Settings

log = structlog.get_logger()

POLL_MS: Final = 250
FAULT_WAIT_S: Final = 1.0


class ControlReader:
    """`caught_up` is set once all that was there at the start has been read. Survives the broker's absence."""

    def __init__(self, settings: Settings, registry: Registry) -> None:
        topics = settings.topics
        self._settings = settings
        self._registry = registry
        self._partitions = [TopicPartition(name, 0) for name in (topics.control, topics.keys, topics.state)]
        self._control = self._partitions[0]
        self._consumer: Any = None
        self._read = asyncio.Condition()
        self._positions: dict[TopicPartition, int] = {}
        self.caught_up = asyncio.Event()

    @property
    def offset(self) -> int:
        """How far `control` has been read."""
        return self._positions.get(self._control, 0)

    async def run(self) -> None:
        """Runs until cancelled."""
        try:
            await self._start()
            ends = await self._ends()
            while True:
                await self._turn()
                if not self.caught_up.is_set() and self._reached(ends):
                    self.caught_up.set()
        finally:
            if self._consumer is not None:
                await self._consumer.stop()

    async def _start(self) -> None:
        while True:
            consumer = AIOKafkaConsumer(
                **self._settings.kafka.aiokafka(),
                group_id=None,
                enable_auto_commit=False,
                auto_offset_reset="earliest",
                isolation_level="read_committed",
                fetch_max_wait_ms=POLL_MS,
                max_partition_fetch_bytes=4 * 2**20,
            )
            try:
                await consumer.start()
            except (KafkaError, OSError) as fault:
                log.warning("control_unreachable", fault=type(fault).__name__)
                await consumer.stop()
                await asyncio.sleep(FAULT_WAIT_S)
                continue
            consumer.assign(self._partitions)
            await consumer.seek_to_beginning(*self._partitions)
            self._consumer = consumer
            return

    async def _turn(self) -> None:
        try:
            batches = await self._consumer.getmany(timeout_ms=POLL_MS)
        except KafkaError as fault:
            log.warning("control_read_failed", fault=type(fault).__name__)
            await asyncio.sleep(FAULT_WAIT_S)
            return
        faults = self._registry.faults
        for partition, records in batches.items():
            for record in records:
                self._registry.fold(partition.topic, record.key or b"", record.value)
        if self._registry.faults > faults:
            log.error("control_records_unreadable", count=self._registry.faults - faults)
        async with self._read:
            for partition in self._partitions:
                self._positions[partition] = await self._consumer.position(partition)
            self._read.notify_all()

    async def _ends(self) -> dict[TopicPartition, int]:
        """The end offsets of what is committed now. Asks until the broker answers."""
        while True:
            if self._consumer is not None:
                try:
                    return dict(await self._consumer.end_offsets(self._partitions))
                except KafkaError as fault:
                    log.warning("control_read_failed", fault=type(fault).__name__)
            await asyncio.sleep(FAULT_WAIT_S / 4)

    def _reached(self, ends: dict[TopicPartition, int]) -> bool:
        """By position, never by the last record's offset: markers and compaction leave gaps at the end."""
        return all(self._positions.get(partition, 0) >= end for partition, end in ends.items())

    async def read_to_end(self) -> None:
        """Returns once everything that was committed when this was called has been folded."""
        ends = await self._ends()
        async with self._read:
            await self._read.wait_for(lambda: self._reached(ends))
