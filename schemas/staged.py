"""The records of the stage: what batching kinds are fed with, and what their reader keeps beside (design, section 3).

`headgate.<vendor>.stage.<tag>` holds one record a delivery, sealed as in the retry topic; ticks, which say what time it
is; and the manifests of batches that are due again. `….stage-cursor.<tag>`, compacted, holds for each destination of a
partition how far it has come, and for each batch that is under way or parked what must be known to deliver it again.
"""

import base64
import zlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Final

import msgspec
from msgspec import Struct

from schemas.delivery import Delivery
from schemas.ids import DeliveryId, DestinationId, ExternalId, TenantRef, Vendor
from schemas.wire import Headers, version_header

SOURCE: Final = "hg-source"
LIMITS: Final = "hg-limits"
MARK: Final = "hg-mark"
TICK: Final = b"tick"


class Place(Struct, frozen=True, gc=False):
    """Where the record stood that a delivery came from. `log` names its partition for good, `floor` is the offset that
    its group had committed when this was written: nothing below is ever read, and staged, again."""

    log: str
    offset: int
    floor: int


class Staged(Struct, frozen=True, gc=False):
    """What the headers of a staged delivery say."""

    tenant: TenantRef
    destination: DestinationId
    delivery: DeliveryId
    origin: str
    received_ms: int
    attempt: int
    hop: int
    replay: str


def limits_header(window_ms: int, max_events: int, max_bytes: int) -> bytes:
    return b"%d/%d/%d" % (window_ms, max_events, max_bytes)


def read_limits(header: bytes) -> tuple[int, int, int]:
    """Window in ms, events, bytes. Raises ValueError."""
    window_ms, max_events, max_bytes = map(int, header.split(b"/"))
    return window_ms, max_events, max_bytes


def staged_headers(delivery: Delivery, limits: bytes, place: Place | None) -> Headers:
    headers = [
        version_header(),
        ("hg-vendor", delivery.tenant.vendor.encode()),
        ("hg-tenant", delivery.tenant.tenant.encode()),
        ("hg-destination", delivery.destination.encode()),
        ("hg-delivery", delivery.id.encode()),
        ("hg-origin", delivery.origin.encode()),
        ("hg-received", b"%d" % delivery.appended_ms),
        (LIMITS, limits),
    ]
    if place is not None:
        headers.append((SOURCE, f"{place.log}/{place.offset}/{place.floor}".encode()))
    if delivery.attempt or delivery.hop or delivery.replay:
        headers += [
            ("hg-attempt", b"%d" % delivery.attempt),
            ("hg-hop", b"%d" % delivery.hop),
            ("hg-replay", delivery.replay.encode()),
        ]
    return headers


def read_place(header: bytes) -> tuple[str, int, int]:
    """The fields of a `Place`. Raises ValueError."""
    log, offset, floor = header.decode().rsplit("/", 2)
    return log, int(offset), int(floor)


def read_staged(headers: Mapping[str, bytes]) -> Staged | None:
    """None for what `staged_headers` never wrote."""
    try:
        return Staged(
            TenantRef(Vendor(headers["hg-vendor"].decode()), ExternalId(headers["hg-tenant"].decode())),
            DestinationId(headers["hg-destination"].decode()),
            DeliveryId(headers["hg-delivery"].decode()),
            headers["hg-origin"].decode(),
            int(headers["hg-received"]),
            int(headers.get("hg-attempt", b"0")),
            int(headers.get("hg-hop", b"0")),
            headers.get("hg-replay", b"").decode(),
        )
    except (KeyError, ValueError):
        return None


def tick_headers() -> Headers:
    return [version_header(), (MARK, TICK)]


# ---------------------------------------------------------------------------------------------------------- the cursor


class CursorRecord(Struct, frozen=True, omit_defaults=True, tag_field="kind", tag="cursor"):
    """Of one destination in one partition: all its records up to `last` are stored or parked, as batches.

    `seen`: by log, its floor, and the offsets from there on that one of those records was read from (`pack_offsets`):
    whatever comes from one of these, or from below the floor, is a further copy, and left out. `log` is the stage's own
    (`Span.log`): of one that took its place this says nothing.
    """

    last: int
    log: str
    seen: dict[str, tuple[int, str]] = {}


class BatchRecord(Struct, frozen=True, omit_defaults=True, tag_field="kind", tag="batch"):
    """Of one batch that is under way (`turn` 0, or that of the manifest that began this turn) or parked.

    `turn` is that of the only manifest that counts. `skip` are offsets of its range that do not belong to it, though of
    its destination. `noted` is its connector's (`connectors/contract.py`). `unsure`: nobody knows whether the far side
    holds some of it. `over`: it is stored, or dead letters stand for it; its cursor waits for one in front of it.
    """

    last: int
    count: int
    log: str
    turn: int = 0
    unsure: bool = False
    skip: Sequence[int] = ()
    noted: bytes = b""
    over: bool = False


encode_cursor = msgspec.json.Encoder().encode
decode_cursor: Final = msgspec.json.Decoder(CursorRecord | BatchRecord).decode


def cursor_key(partition: int, of: bytes, first: int | None = None) -> bytes:
    """`<stage partition>/<tenant>/<destination>`; of one of its batches, its first offset after it. `of` is the stage's
    record key."""
    return b"%d/%b" % (partition, of) if first is None else b"%d/%b/%d" % (partition, of, first)


def read_cursor_key(key: bytes) -> tuple[bytes, int | None] | None:
    """The destination and the batch's first offset; None for what `cursor_key` never wrote."""
    parts = key.split(b"/")
    try:
        if len(parts) == 4:
            return b"/".join(parts[1:3]), int(parts[3])
        return (b"/".join(parts[1:]), None) if len(parts) == 3 else None
    except ValueError:
        return None


def pack_offsets(offsets: Iterable[int]) -> str:
    """A set of offsets: their distances, compressed. A few bytes where they lie dense."""
    distances = array("Q")
    before = 0
    for offset in sorted(offsets):
        distances.append(offset - before)
        before = offset
    return base64.b64encode(zlib.compress(distances.tobytes(), 1)).decode()


def unpack_offsets(packed: str) -> list[int]:
    distances = array("Q")
    distances.frombytes(zlib.decompress(base64.b64decode(packed)))
    return list(accumulate(distances))
