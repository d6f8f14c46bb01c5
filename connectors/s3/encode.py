"""The objects of a batch: which events go where, the lines that hold them, and their compressed bytes.

All of it is a function of the batch and the options: the same batch gives the same names and the same bytes.
"""

import hashlib
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Final

import cramjam
import msgspec
from isal import isal_zlib
from msgspec import Raw, Struct

from connectors.body import Body
from connectors.contract import Span
from schemas.delivery import Delivery
from schemas.event import EMPTY_OBJECT, rfc3339
from schemas.ids import DestinationId, TenantRef, base32, digest, parts, percent

MAX_KEY_BYTES: Final = 1024
# How many lines, and of what size together, are made before the event loop goes on: a millisecond or less.
SLICE_EVENTS: Final = 256
SLICE_BYTES: Final = 256 * 1024
EXTENSIONS: Final = {"gzip": "ndjson.gz", "zstd": "ndjson.zst", "none": "ndjson"}
GZIP_LEVEL: Final = 2
ZSTD_LEVEL: Final = 1
_GZIP_WINDOW: Final = 31  # with a gzip header, which has no time stamp then


class Line(Body, gc=False):
    """The body that receivers of single events get, and what a batch's reader cannot know otherwise."""

    deliveryId: str
    receivedAt: str
    source: str


class Planned(Struct, frozen=True, gc=False):
    """An object to be: its key, and what it will hold."""

    key: str
    deliveries: list[Delivery]


_encode_lines: Final = msgspec.json.Encoder().encode_lines


def place_of(event_type: str, occurred_at: str) -> tuple[str, str, str]:
    """What decides about an event's object: type, date and hour in UTC. `occurred_at` was judged where it came in."""
    if occurred_at[-1] in "Zz" and occurred_at[4] == occurred_at[7] == "-":
        return event_type, occurred_at[:10], occurred_at[11:13]
    at = datetime.fromisoformat(occurred_at)
    try:
        at = at.astimezone(UTC)
    except OverflowError:
        pass  # within a day of the calendar's ends: as it is written
    return event_type, f"{at.year:04d}-{at.month:02d}-{at.day:02d}", f"{at.hour:02d}"


def stem(span: Span, tenant: TenantRef, destination: DestinationId) -> str:
    """The name of a batch's objects: no other batch of any destination, here or in another deployment, has it."""
    owner = base32(digest(parts(span.log, tenant.vendor, tenant.tenant, destination)))[:8]
    return f"part-{owner}-{span.partition}-{span.first:020d}"


def key_of(prefix: str, place: tuple[str, str, str], name: str) -> str:
    """Every field of an event stands behind a fixed text and is percent-encoded: it cannot leave its folder."""
    event_type, date, hour = place
    return f"{prefix}{'/' if prefix else ''}event_type={percent(event_type)}/dt={date}/hour={hour}/{name}"


def plan(deliveries: Iterable[Delivery], groups: dict[tuple[str, str, str], list[Delivery]]) -> None:
    """Adds deliveries to the groups of what goes into one object."""
    for delivery in deliveries:
        event = delivery.event
        place = place_of(event.eventType, event.occurredAt)
        group = groups.get(place)
        if group is None:
            groups[place] = [delivery]
        else:
            group.append(delivery)


def identity(span: Span, tenant: TenantRef, destination: DestinationId, planned: Planned) -> str:
    """What an object of ours says of itself: it is of this batch, and holds these deliveries.

    Not a hash of its bytes: a newer worker may write the same deliveries in other ones.
    """
    head = parts(
        span.log, str(span.partition), str(span.first), str(span.last), tenant.vendor, tenant.tenant, destination
    )
    return hashlib.sha256(head + "".join([one.id for one in planned.deliveries]).encode()).hexdigest()


def compact(raw: Raw) -> Raw:
    """Without the white space between tokens: the digits of numbers and the texts stay as they are.

    Most payloads hold none, which four looks for a byte tell.
    """
    if raw is EMPTY_OBJECT:
        return raw
    data = bytes(raw)
    if b" " not in data and b"\n" not in data and b"\r" not in data and b"\t" not in data:
        return raw
    try:
        return Raw(msgspec.json.format(data, indent=-1))
    except (msgspec.DecodeError, RecursionError):  # nested deeper than that reaches: a line it must be all the same
        return Raw(data.translate(_ONE_LINE))


_ONE_LINE: Final = bytes.maketrans(b"\n\r", b"  ")


def slices(deliveries: list[Delivery]) -> Iterator[bytes]:
    """The object's lines, a bounded number of them at a time."""
    received: dict[int, str] = {}
    lines: list[Line] = []
    size = 0
    for delivery in deliveries:
        event = delivery.event
        appended_ms = delivery.appended_ms
        received_at = received.get(appended_ms)
        if received_at is None:
            received_at = received[appended_ms] = rfc3339(appended_ms)
        lines.append(
            Line(
                event.eventId,
                event.eventType,
                event.occurredAt,
                event.schemaVersion,
                compact(event.payload),
                compact(event.metadata),
                delivery.id,
                received_at,
                event.source,
            )
        )
        size += delivery.size
        if len(lines) >= SLICE_EVENTS or size >= SLICE_BYTES:
            yield _encode_lines(lines)
            lines.clear()
            size = 0
    if lines:
        yield _encode_lines(lines)


class Squeezer:
    """One object's compressor. It may be used from any thread, one at a time; others run while it works."""

    def __init__(self, compression: str) -> None:
        self._chunks: list[bytes] = []
        self._gzip = isal_zlib.compressobj(GZIP_LEVEL, isal_zlib.DEFLATED, _GZIP_WINDOW)
        self._zstd = cramjam.zstd.Compressor(ZSTD_LEVEL)
        self._compression = compression

    def add(self, data: bytes) -> None:
        match self._compression:
            case "gzip":
                self._chunks.append(self._gzip.compress(data))
            case "zstd":
                self._zstd.compress(data)  # which keeps what comes of it
            case _:
                self._chunks.append(data)

    def end(self, data: bytes) -> bytes:
        """The whole object, after its last lines."""
        self.add(data)
        match self._compression:
            case "gzip":
                self._chunks.append(self._gzip.flush())
            case "zstd":
                self._chunks.append(bytes(self._zstd.finish()))
        return b"".join(self._chunks)
