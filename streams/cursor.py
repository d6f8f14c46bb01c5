"""What the stage's reader keeps of its partitions: loaded when they come, written in transactions (design, section 3).

A transaction holds cursors, batch records and offsets, with the group's metadata: a worker that has lost its
partitions without knowing writes none of it. Owns the blocking calls, in threads of its own: nothing here waits on the
event loop's thread.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import confluent_kafka
import msgspec
import structlog
from confluent_kafka import OFFSET_BEGINNING, KafkaError, KafkaException, TopicPartition
from msgspec import Struct

from schemas.staged import BatchRecord, CursorRecord, decode_cursor, read_cursor_key
from streams.batch import Record

log = structlog.get_logger()

TRANSACTION_MS: Final = 10_000  # after which the broker ends the one of a worker that died
CALL_S: Final = 8.0
POLL_S: Final = 0.2
READ_AT_ONCE: Final = 500
MISSING: Final = frozenset({KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION})


class Kept(Struct):
    """What is known of one partition: by destination, and by destination and a batch's first offset."""

    cursors: dict[bytes, CursorRecord]
    batches: dict[tuple[bytes, int], BatchRecord]


class Entry(Struct, frozen=True):
    """One record to be written; no value ends what its key says."""

    topic: str
    partition: int
    key: bytes
    value: bytes | None


class Refused(Exception):
    """The transaction was not committed: nothing of it counts."""


def _reader(kafka: Mapping[str, Any], isolation: str = "read_committed") -> Any:
    """It joins no group: `group.id` is what the library insists on."""
    return confluent_kafka.Consumer(
        {
            **kafka,
            "group.id": "unused",
            "enable.auto.commit": False,
            "isolation.level": isolation,
            "enable.partition.eof": True,
            "auto.offset.reset": "earliest",
            "log_level": 2,
        }
    )


def load(kafka: Mapping[str, Any], partitions: Sequence[tuple[str, int]]) -> dict[tuple[str, int], Kept]:
    """Reads partitions of cursor topics to where they ended when this was called, and to where what was open then has
    ended. Raises KafkaException; one whose topic is not there is left out. Blocks."""
    consumer = _reader(kafka)
    ends = _reader(kafka, "read_uncommitted")  # the other one's end lies before what is in an open transaction
    kept: dict[tuple[str, int], Kept] = {}
    left: dict[tuple[str, int], int] = {}
    try:
        for topic, number in partitions:
            try:
                _, end = ends.get_watermark_offsets(TopicPartition(topic, number), CALL_S)
            except KafkaException as fault:
                if fault.args[0].code() in MISSING:
                    continue
                raise
            kept[topic, number] = Kept({}, {})
            if end > 0:
                left[topic, number] = end
        consumer.assign([TopicPartition(topic, number, OFFSET_BEGINNING) for topic, number in left])
        until = time.monotonic() + TRANSACTION_MS / 1000 + 2 * CALL_S
        while left:
            for message in consumer.consume(READ_AT_ONCE, POLL_S):
                at = message.topic(), message.partition()
                error = message.error()
                if error is None:
                    _fold(kept[at], message.key(), message.value())
                    until = time.monotonic() + TRANSACTION_MS / 1000 + 2 * CALL_S
                elif error.code() == KafkaError._PARTITION_EOF:
                    if message.offset() >= left.get(at, 0):  # else a transaction is open before it
                        left.pop(at, None)
                else:
                    raise KafkaException(error)
            if left and time.monotonic() > until:
                raise KafkaException(KafkaError(KafkaError._TIMED_OUT, "a cursor topic was not read to its end"))
    finally:
        consumer.close()
        ends.close()
    return kept


def _fold(kept: Kept, key: bytes | None, value: bytes | None) -> None:
    name = read_cursor_key(key or b"")
    if name is None:
        return
    of, first = name
    try:
        record = decode_cursor(value) if value else None
    except msgspec.DecodeError:
        log.error("cursor_unread", key=(key or b"").decode("utf-8", "replace"))
        return
    if first is None:
        if isinstance(record, CursorRecord):
            kept.cursors[of] = record
    elif isinstance(record, BatchRecord):
        kept.batches[of, first] = record
    else:
        kept.batches.pop((of, first), None)


def read_range(
    kafka: Mapping[str, Any], topic: str, partition: int, first: int, last: int, of: bytes, skip: frozenset[int]
) -> list[Record]:
    """The deliveries of one destination between two offsets of a stage partition. Raises KafkaException. Blocks."""
    consumer = _reader(kafka)
    records: list[Record] = []
    try:
        consumer.assign([TopicPartition(topic, partition, first)])
        until = time.monotonic() + 2 * CALL_S
        while True:
            for message in consumer.consume(READ_AT_ONCE, POLL_S):
                fault = message.error()
                if fault is not None:
                    if fault.code() == KafkaError._PARTITION_EOF:
                        return records
                    raise KafkaException(fault)
                offset = message.offset()
                if offset > last:
                    return records
                record = record_of(message) if message.key() == of and offset not in skip else None
                if record is not None:
                    records.append(record)
                if offset == last:
                    return records
                until = time.monotonic() + 2 * CALL_S
            if time.monotonic() > until:
                raise KafkaException(KafkaError(KafkaError._TIMED_OUT, "a range of the stage was not read"))
    finally:
        consumer.close()


def record_of(message: Any) -> Record | None:
    """A staged delivery; None for what is none: a tick, a manifest."""
    headers = {name: value for name, value in message.headers() or () if value is not None}
    value = message.value()
    if value is None or "hg-batch" in headers or "hg-limits" not in headers:
        return None
    return Record(message.offset(), headers, value)


class CursorWriter:
    """The transactional producer of one worker. One call at a time, from any one thread."""

    def __init__(self, kafka: Mapping[str, Any], transactional_id: str, max_bytes: int) -> None:
        self._settings = {
            **kafka,
            "transactional.id": transactional_id,
            "transaction.timeout.ms": TRANSACTION_MS,
            "message.max.bytes": max_bytes,
            "linger.ms": 0,
            "compression.type": "lz4",
            "log_level": 2,
        }
        self._producer: Any = None

    def write(self, entries: Sequence[Entry], offsets: Sequence[tuple[str, int, int]], group: Any) -> None:
        """One transaction. Raises Refused. `group`: the consumer's metadata at the time when this was decided."""
        producer = self._producer
        try:
            if producer is None:
                producer = confluent_kafka.Producer(self._settings)
                producer.init_transactions(CALL_S)
                self._producer = producer
            producer.begin_transaction()
            for entry in entries:
                producer.produce(entry.topic, entry.value, entry.key, partition=entry.partition)
            if producer.flush(CALL_S):  # before the offsets: whoever is given these then finds the cursors
                raise KafkaException(KafkaError(KafkaError._TIMED_OUT, "not acknowledged in time"))
            producer.send_offsets_to_transaction(
                [TopicPartition(topic, partition, offset) for topic, partition, offset in offsets], group, CALL_S
            )
            producer.commit_transaction(CALL_S)
        except KafkaException as fault:
            self._undo(producer, fault.args[0])
            raise Refused(str(fault.args[0])) from None

    def _undo(self, producer: Any, error: KafkaError) -> None:
        if self._producer is None:
            return
        if not error.fatal():
            try:
                producer.abort_transaction(CALL_S)
                return
            except KafkaException:
                pass
        self._producer = None  # the next one fences it

    def close(self) -> None:
        self._producer = None
