"""The row: its columns, the table that it goes to, and its bytes as the Storage Write API takes them."""

import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto

from connectors.bigquery.options import Layout
from schemas.delivery import Delivery
from schemas.ids import base32, digest, parts

# name, type in a table's schema, and the type that the API writes it from
COLUMNS: Final = (
    ("event_id", "STRING", FieldDescriptorProto.TYPE_STRING),
    ("event_type", "STRING", FieldDescriptorProto.TYPE_STRING),
    ("occurred_at", "TIMESTAMP", FieldDescriptorProto.TYPE_INT64),
    ("customer_external_id", "STRING", FieldDescriptorProto.TYPE_STRING),
    ("source", "STRING", FieldDescriptorProto.TYPE_STRING),
    ("payload", "JSON", FieldDescriptorProto.TYPE_STRING),
    ("metadata", "JSON", FieldDescriptorProto.TYPE_STRING),
    ("received_at", "TIMESTAMP", FieldDescriptorProto.TYPE_INT64),
    ("delivery_id", "STRING", FieldDescriptorProto.TYPE_STRING),
)
PARTITIONED_BY: Final = "occurred_at"
CLUSTERED_BY: Final = "event_type"

# A request has at most 10 MB. Few large ones cost less than many small ones; several fill the time of an answer.
REQUEST_BYTES: Final = 2 * 1024 * 1024
MAX_ROW_BYTES: Final = 9 * 1024 * 1024

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
FIRST_US: Final = -62_135_596_800_000_000  # 0001-01-01, and with it all that a TIMESTAMP holds
LAST_US: Final = 253_402_300_799_999_999

_PLAIN_TYPE: Final = re.compile(r"[a-z0-9]+(?:\.[a-z0-9]+)*")
_ODD: Final = re.compile(r"[^a-z0-9]+")
_HASH_CHARACTERS: Final = 16


def _row_class() -> tuple[DescriptorProto, type[Any]]:
    row = DescriptorProto(name="Row")
    for number, (name, _, kind) in enumerate(COLUMNS, 1):
        row.field.add(name=name, number=number, type=kind, label=FieldDescriptorProto.LABEL_OPTIONAL)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(FileDescriptorProto(name="headgate/row.proto", syntax="proto2", message_type=[row]))
    return row, message_factory.GetMessageClass(pool.FindMessageTypeByName("Row"))


DESCRIPTOR, _Row = _row_class()


def table_of(layout: Layout, table: str, event_type: str) -> str:
    """The table that events of this type go to. No two types share one, not even where a dataset ignores case.

    A type of lower-case letters and digits with single dots between, `invoice.paid`, is that with underscores:
    `events_invoice_paid`. In any other the odd characters are underscores, and what tells it from its likes is two more
    and a hash: no plain type has two.
    """
    if layout == "wide":
        return table
    if _PLAIN_TYPE.fullmatch(event_type):
        return f"{table}_{event_type.replace('.', '_')}"
    near = _ODD.sub("_", event_type.lower()).strip("_")
    return f"{table}_{near}__{base32(digest(parts(event_type)))[:_HASH_CHARACTERS]}"


def micros(text: str) -> int:
    """Microseconds since 1970 of an RFC 3339 time; digits beyond are cut off."""
    return (datetime.fromisoformat(text) - _EPOCH) // _MICROSECOND


def row(delivery: Delivery) -> bytes | str:
    """The row, or the code of why no table can hold it. The same at every attempt."""
    event = delivery.event
    occurred_us, received_us = micros(event.occurredAt), delivery.appended_ms * 1000
    if not (FIRST_US <= occurred_us <= LAST_US and FIRST_US <= received_us <= LAST_US):
        return "timestamp"
    made = _Row()
    made.event_id = event.eventId
    made.event_type = event.eventType
    made.occurred_at = occurred_us
    made.customer_external_id = event.customerExternalId
    if event.source:
        made.source = event.source
    # as they were published: BigQuery parses them itself
    made.payload = bytes(event.payload)
    made.metadata = bytes(event.metadata)
    made.received_at = received_us
    made.delivery_id = delivery.id
    content: bytes = made.SerializeToString()
    return content if len(content) <= MAX_ROW_BYTES else "too_large"


def requests(rows: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    """The rows in order, in pieces of about `REQUEST_BYTES`."""
    start = total = 0
    for at, one in enumerate(rows):
        total += len(one)
        if total > REQUEST_BYTES and at > start:
            yield rows[start:at]
            start, total = at, len(one)
    if start < len(rows):
        yield rows[start:]
