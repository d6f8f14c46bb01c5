"""The record: key, headers and value of an event; and a batch of records."""

from collections.abc import Callable, Iterable
from typing import Final

from aiokafka.record.default_records import DefaultRecordBatch, DefaultRecordBatchBuilder
from msgspec import Struct

from connectors.contract import Expression
from schemas.delivery import Delivery
from schemas.event import Event
from schemas.outcome import Outcome

MAX_BATCH_BYTES: Final = 1024 * 1024
MAX_KEY_BYTES: Final = 1024
# of a record in a batch, beside its value: key and headers of usual length, offset and time
RECORD_OVERHEAD: Final = 300
_MAGIC: Final = 2
CODECS: Final = {
    "none": DefaultRecordBatch.CODEC_NONE,
    "gzip": DefaultRecordBatch.CODEC_GZIP,
    "lz4": DefaultRecordBatch.CODEC_LZ4,
    "zstd": DefaultRecordBatch.CODEC_ZSTD,
}
_NAMED: Final[dict[str, Expression]] = {
    "tenant": lambda event: event.customerExternalId,
    "event_id": lambda event: event.eventId,
    "aggregate_id": lambda event: event.aggregateId,
}


class Record(Struct, eq=False, gc=False):
    """One record from `start` until `done` is called, with its outcome. Its headers are made when it goes."""

    delivery: Delivery
    key: bytes | None
    value: bytes
    at_ms: int
    deadline: float
    done: Callable[[Outcome], None]


class Key:
    """A destination's key: one of the names, or the expression, compiled."""

    def __init__(self, named: str, compiled: Expression | None) -> None:
        self._text = _NAMED[named] if compiled is None else compiled

    def of(self, event: Event) -> bytes | None:
        """An empty text is no key. Raises ValueError, which quotes no value."""
        key = self._text(event).encode()
        if len(key) > MAX_KEY_BYTES:
            raise ValueError(f"it has more than {MAX_KEY_BYTES} bytes")
        return key or None


def headers(delivery: Delivery) -> list[tuple[str, bytes]]:
    """The event's fields, by their names in ingress; those that it does not have are left out."""
    event = delivery.event
    made = [
        ("deliveryId", delivery.id.encode()),
        ("eventId", event.eventId.encode()),
        ("eventType", event.eventType.encode()),
        ("occurredAt", event.occurredAt.encode()),
        ("schemaVersion", b"%d" % event.schemaVersion),
    ]
    if event.source:
        made.append(("source", event.source.encode()))
    if event.aggregateId:
        made.append(("aggregateId", event.aggregateId.encode()))
    return made


def batch(records: Iterable[Record], codec: int, producer: int, epoch: int, sequence: int) -> bytes:
    """A record batch in the form that the broker keeps. The caller has seen to its size."""
    builder = DefaultRecordBatchBuilder(_MAGIC, codec, 0, producer, epoch, sequence, 1 << 30)
    append = builder.append
    for offset, record in enumerate(records):
        append(offset, record.at_ms, record.key, record.value, headers(record.delivery))
    return bytes(builder.build())
