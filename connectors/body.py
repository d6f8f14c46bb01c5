"""The body: what every receiver of single events gets of one, whatever the kind of its destination."""

from typing import Final

import msgspec
from msgspec import Raw, Struct

from schemas.event import Event


class Body(Struct, gc=False):
    id: str
    type: str
    occurredAt: str
    schemaVersion: int
    payload: Raw
    metadata: Raw


_encode: Final = msgspec.json.Encoder().encode


def body(event: Event) -> bytes:
    """Payload and metadata in the bytes they were published in; the same for every attempt."""
    return _encode(
        Body(event.eventId, event.eventType, event.occurredAt, event.schemaVersion, event.payload, event.metadata)
    )
