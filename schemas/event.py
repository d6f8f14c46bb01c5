"""The event: what a producer wrote, decoded strictly, and its canonical form.

Owns the JSON envelope of the ingress topic (design, section 5), its defaults and its refusals. A payload is never
parsed here: its bytes go on as they were published.
"""

from datetime import datetime
from typing import Final

import msgspec
from msgspec import Raw, Struct

from schemas.ids import ExternalId, TenantRef, percent

MAX_TYPE_CHARACTERS: Final = 200
MAX_FIELD_CHARACTERS: Final = 1024
EMPTY_OBJECT: Final = Raw(b"{}")


class Event(Struct, gc=False, omit_defaults=False, forbid_unknown_fields=True):
    """One event; every field is filled once `decode_event` has returned it.

    Encoded as JSON it is the canonical event: the sealed value of retry, stage and dead-letter records.
    Mutable only so that decoding can fill its defaults in place; nobody writes to it afterwards.
    """

    eventType: str
    payload: Raw
    eventId: str = ""
    occurredAt: str = ""
    customerExternalId: str = ""
    schemaVersion: int = 1
    idempotencyKey: str = ""
    source: str = ""
    aggregateId: str = ""
    metadata: Raw = EMPTY_OBJECT


class _Metadata(Struct, gc=False):
    correlationId: str = ""


class Problem(Struct, frozen=True, gc=False):
    """Why a record of ingress cannot be an event. `code` goes to metrics; `detail` quotes no value of a payload."""

    code: str
    detail: str


_decode = msgspec.json.Decoder(Event).decode
_encode = msgspec.json.Encoder().encode
_decode_metadata = msgspec.json.Decoder(_Metadata).decode


def rfc3339(at_ms: int) -> str:
    """UTC with milliseconds: 2026-11-21T09:30:00.000Z.

    A time that no calendar has, such as a record's that a producer stamped in nanoseconds, is the last or the first.
    """
    seconds, millis = divmod(at_ms, 1000)
    try:
        return f"{datetime.utcfromtimestamp(seconds).isoformat()}.{millis:03d}Z"
    except (ValueError, OverflowError, OSError):
        return "9999-12-31T23:59:59.999Z" if at_ms > 0 else "0001-01-01T00:00:00.000Z"


def _is_rfc3339(text: str) -> bool:
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        return False
    return at.tzinfo is not None and len(text) >= 20 and text[10] in "Tt "


def decode_event(
    value: bytes, tenant: ExternalId, place: str, offset: int, appended_ms: int, max_bytes: int
) -> Event | Problem:
    """The event that a record of ingress holds, its defaults filled, or why it holds none.

    `place` is the default event id (`ids.default_event_id`) without the offset that ends it; `appended_ms` the
    record's timestamp; `max_bytes` bounds the canonical form. Raises nothing for any input.
    """
    if not value:
        return Problem("malformed", "the record has no value")
    try:
        if not value.isascii():
            str(value, "utf-8")  # a Raw field is skipped, not decoded: its text would go on unchecked
        event = _decode(value)
    except UnicodeDecodeError as fault:
        return Problem("malformed", f"not UTF-8 at byte {fault.start}")
    except msgspec.ValidationError as fault:
        return Problem("malformed", str(fault)[:300])
    except msgspec.DecodeError as fault:
        return Problem("malformed", str(fault)[:300])
    except RecursionError:
        return Problem("malformed", "JSON nested too deep")
    named = event.customerExternalId
    if named and named != tenant:
        return Problem("key_mismatch", "field customerExternalId: differs from the record's key")
    event.customerExternalId = tenant
    event_type = event.eventType
    if not 0 < len(event_type) <= MAX_TYPE_CHARACTERS or not event_type.isprintable():
        return Problem("malformed", f"field eventType: must be 1 to {MAX_TYPE_CHARACTERS} printable characters")
    event_id = event.eventId
    if not event_id:
        event_id = event.eventId = f"{place}{offset}"
    if not event.idempotencyKey:
        event.idempotencyKey = event_id
    if not event.occurredAt:
        event.occurredAt = rfc3339(appended_ms)
    elif not _is_rfc3339(event.occurredAt):
        return Problem("malformed", "field occurredAt: not an RFC 3339 time with a zone, such as 2026-11-21T09:30:00Z")
    if len(event_id) > MAX_FIELD_CHARACTERS or len(event.idempotencyKey) > MAX_FIELD_CHARACTERS:
        return Problem("malformed", f"field eventId or idempotencyKey: more than {MAX_FIELD_CHARACTERS} characters")
    if not event_id.isprintable():
        return Problem("malformed", "field eventId: holds a character that is not printable")
    if event.metadata is not EMPTY_OBJECT and not bytes(event.metadata).startswith(b"{"):
        return Problem("malformed", "field metadata: must be an object")
    if event.schemaVersion < 1:
        return Problem("malformed", "field schemaVersion: must be 1 or more")
    if len(value) + 1024 > max_bytes and len(_encode(event)) > max_bytes:
        return Problem("too_large", f"the event's canonical form has more than {max_bytes} bytes")
    return event


def canonical(event: Event) -> bytes:
    """The event as JSON with every field, payload and metadata in their published bytes."""
    return _encode(event)


def from_canonical(value: bytes) -> Event:
    """The inverse of `canonical`. Raises msgspec.DecodeError: only our own sealed bytes come here."""
    return _decode(value)


def correlation_id(event: Event) -> str:
    """`metadata.correlationId` where it is a text, else an empty text; at most 200 characters."""
    if event.metadata is EMPTY_OBJECT:
        return ""
    try:
        return _decode_metadata(event.metadata).correlationId[:200]
    except (msgspec.DecodeError, RecursionError):
        return ""


def tenant_path(tenant: TenantRef) -> str:
    """`<vendor>/<tenant>` with the external id percent-encoded."""
    return f"{tenant.vendor}/{percent(tenant.tenant)}"
