"""The records that Headgate writes for itself: headers, sealed values, stubs (design, section 5).

Owns their spelling on the wire and their size limits. Sealing itself is the vault's (`config/vault.py`).
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from schemas.ids import DeliveryId, DestinationId, EventId, ExternalId, TenantRef, Vendor, parts

Headers: TypeAlias = list[tuple[str, bytes]]

SEALED_FORMAT: Final = 1
NONCE_BYTES: Final = 12
SEALED_OVERHEAD_BYTES: Final = 1 + 4 + NONCE_BYTES + 16
MAX_HEADERS_BYTES: Final = 16 * 1024
MAX_DETAIL_BYTES: Final = 512
STUB_BYTES: Final = 64 * 1024


def aad(tenant: TenantRef, purpose: str, destination: str, item: str, key_version: int) -> bytes:
    """What a sealed value is bound to: moved to another tenant, destination or item it does not open.

    `item` is the delivery's id or the field's name. Each part is length-prefixed, since ids may hold any character.
    """
    return parts(tenant.vendor, tenant.tenant, purpose, destination, item, str(key_version))


class Sealed(Struct, frozen=True, gc=False):
    key_version: int
    nonce: bytes
    ciphertext: bytes


def pack_sealed(key_version: int, nonce: bytes, ciphertext: bytes) -> bytes:
    """`1 byte format | 4 bytes key version | 12 bytes nonce | ciphertext and tag`."""
    return b"%c%b%b%b" % (SEALED_FORMAT, key_version.to_bytes(4, "big"), nonce, ciphertext)


def unpack_sealed(value: bytes) -> Sealed | None:
    """None if the value is not of the form that `pack_sealed` writes."""
    if len(value) < SEALED_OVERHEAD_BYTES or value[0] != SEALED_FORMAT:
        return None
    return Sealed(int.from_bytes(value[1:5], "big"), value[5:17], value[17:])


class Manifest(Struct, frozen=True, gc=False):
    """What stands for a batch of a stage kind while it waits: the range of its stage partition, not its events.

    `count` and `digest` are of its deliveries, for whoever reads that range again; `turn` tells the manifests of one
    batch apart: only one of them counts at a time.
    """

    partition: int
    first: int
    last: int
    count: int
    digest: str
    turn: int


class Parked(Struct, frozen=True, gc=False):
    """What the headers of a retry or dead-letter record say of the delivery inside, or of the batch that it stands for.

    `version` is that of the record it was read from: a record that takes over its sealed value is written in it again.
    None: the value is sealed anew, and so of the version that this release writes.
    """

    tenant: TenantRef
    destination: DestinationId
    delivery: DeliveryId
    event: EventId
    event_type: str
    attempt: int
    hop: int
    parks: int
    not_before_ms: int
    origin: str
    error: str
    fault: str
    detail: str
    first_failed_ms: int
    replay: str
    version: int | None = None
    manifest: Manifest | None = None


def clip(text: str, max_bytes: int = MAX_DETAIL_BYTES) -> bytes:
    """UTF-8, cut at a character's end."""
    raw = text.encode("utf-8", "replace")
    return raw if len(raw) <= max_bytes else raw[:max_bytes].decode("utf-8", "ignore").encode()


class Form(Struct, frozen=True):
    """One version of retry and dead-letter records: its headers, but for `hg-v`.

    `read` raises KeyError or ValueError if a header is missing, or is no number where one is due.
    """

    write: Callable[[Parked], Headers]
    read: Callable[[Mapping[str, str]], Parked]


def _write_1(parked: Parked) -> Headers:
    tenant = parked.tenant
    headers = [
        ("hg-vendor", tenant.vendor.encode()),
        ("hg-tenant", tenant.tenant.encode()),
        ("hg-destination", parked.destination.encode()),
        ("hg-delivery", parked.delivery.encode()),
        ("hg-event", parked.event.encode()),
        ("hg-type", parked.event_type.encode()),
        ("hg-attempt", b"%d" % parked.attempt),
        ("hg-hop", b"%d" % parked.hop),
        ("hg-parks", b"%d" % parked.parks),
        ("hg-not-before", b"%d" % parked.not_before_ms),
        ("hg-origin", parked.origin.encode()),
        ("hg-error", parked.error.encode()),
        ("hg-fault", parked.fault.encode()),
        ("hg-first-failed", b"%d" % parked.first_failed_ms),
    ]
    if parked.detail:
        headers.append(("hg-detail", clip(parked.detail)))
    if parked.replay:
        headers.append(("hg-replay", parked.replay.encode()))
    batch = parked.manifest
    if batch is not None:
        headers += [
            ("hg-batch", f"{batch.partition}/{batch.first}-{batch.last}".encode()),
            ("hg-batch-count", b"%d" % batch.count),
            ("hg-batch-hash", batch.digest.encode()),
            ("hg-batch-turn", b"%d" % batch.turn),
        ]
    return headers


def _read_manifest(text: Mapping[str, str]) -> Manifest | None:
    batch = text.get("hg-batch")
    if batch is None:
        return None
    partition, _, span = batch.partition("/")
    first, _, last = span.partition("-")
    return Manifest(
        _count(partition),
        _count(first),
        _count(last),
        _count(text["hg-batch-count"]),
        text["hg-batch-hash"],
        _count(text["hg-batch-turn"]),
    )


def _read_1(text: Mapping[str, str]) -> Parked:
    return Parked(
        tenant=TenantRef(Vendor(text["hg-vendor"]), ExternalId(text["hg-tenant"])),
        destination=DestinationId(text["hg-destination"]),
        delivery=DeliveryId(text["hg-delivery"]),
        event=EventId(text["hg-event"]),
        event_type=text["hg-type"],
        attempt=_count(text["hg-attempt"]),
        hop=_count(text["hg-hop"]),
        parks=_count(text["hg-parks"]),
        not_before_ms=_count(text["hg-not-before"]),
        origin=text["hg-origin"],
        error=text["hg-error"],
        fault=text["hg-fault"],
        detail=text.get("hg-detail", ""),
        first_failed_ms=_count(text["hg-first-failed"]),
        replay=text.get("hg-replay", ""),
        manifest=_read_manifest(text),
    )


# The versions that this release reads, and the one that it writes (ADR 0016). What raises the version: a header that an
# earlier release would misread or miss, another sealed form, an event inside that it could not deliver rightly.
# Every version keeps whose a record is (vendor, tenant, destination, delivery, event) and when it is due
# (`hg-not-before`); marks and unrouted records keep all that they say.
FORMS: Final = {1: Form(_write_1, _read_1)}
WRITTEN: Final = 1


def version_header() -> tuple[str, bytes]:
    return "hg-v", b"%d" % WRITTEN


def parked_headers(parked: Parked) -> Headers:
    version = parked.version or WRITTEN
    return [("hg-v", b"%d" % version), *FORMS[version].write(parked)]


def _count(text: str) -> int:
    """Raises ValueError: what is no count, or larger than any of ours, is not of our writing."""
    number = int(text)
    if not 0 <= number < 2**53:
        raise ValueError
    return number


def read_parked(headers: Iterable[tuple[str, bytes | None]]) -> Parked | None:
    """The inverse of `parked_headers`; None for what it never wrote, and for a version that this release does not read:
    `unread_of` tells them apart."""
    got = {name: value for name, value in headers if value is not None and name.startswith("hg-")}
    try:
        version = _count(got["hg-v"].decode())
        form = FORMS.get(version)
        if form is None:
            return None
        parked = form.read({name: value.decode() for name, value in got.items()})
    except (KeyError, ValueError):
        return None
    return replace(parked, version=version)


def unread_of(headers: Iterable[tuple[str, bytes | None]]) -> TenantRef | None:
    """Whose a record is that another release wrote, in a version that this one does not read; None if it is none."""
    got = {name: value for name, value in headers if value is not None}
    try:
        version = _count(got["hg-v"].decode())
        tenant = TenantRef(Vendor(got["hg-vendor"].decode()), ExternalId(got["hg-tenant"].decode()))
    except (KeyError, ValueError):
        return None
    return tenant if version > 0 and version not in FORMS else None


def _size(headers: Iterable[tuple[str, bytes | None]]) -> int:
    return sum(len(name) + len(value or b"") for name, value in headers)


def unrouted_headers(
    original: Sequence[tuple[str, bytes | None]], *, vendor: Vendor, origin: str, reason: str, detail: str
) -> list[tuple[str, bytes | None]]:
    """The record's own headers (up to 16 KiB in all, the rest dropped and counted) and ours.

    Names that start with `hg-` are ours: a producer's own ones are dropped and counted too.
    """
    ours: list[tuple[str, bytes | None]] = [
        version_header(),
        ("hg-vendor", vendor.encode()),
        ("hg-origin", origin.encode()),
        ("hg-error", reason.encode()),
        ("hg-detail", clip(detail)),
    ]
    room = MAX_HEADERS_BYTES - _size(ours) - 64
    kept: list[tuple[str, bytes | None]] = []
    dropped = 0
    for name, value in original:
        size = len(name.encode()) + len(value or b"")
        if name.startswith("hg-") or size > room:
            dropped += 1
            continue
        room -= size
        kept.append((name, value))
    if dropped:
        ours.append(("hg-headers-dropped", b"%d" % dropped))
    return kept + ours


def returned_headers(original: Iterable[tuple[str, bytes | None]]) -> list[tuple[str, bytes | None]] | None:
    """The headers of an unrouted record that goes back through ingress: the producer's own, and `hg-origin`.

    None if it says nothing of where it came from.
    """
    kept: list[tuple[str, bytes | None]] = []
    origin: tuple[str, bytes | None] | None = None
    for name, value in original:
        if name == "hg-origin":
            origin = (name, value)
        elif not name.startswith("hg-"):
            kept.append((name, value))
    return None if origin is None else [*kept, origin]


def read_origin(headers: Iterable[tuple[str, bytes | None]], topic: str) -> tuple[int, int] | None:
    """Partition and offset that `hg-origin` names in this very topic; None if it names none there."""
    for name, value in headers:
        if name == "hg-origin" and value is not None:
            found, _, place = value.decode("utf-8", "replace").rpartition("/")
            found, _, partition = found.rpartition("/")
            if found == topic and partition.isdecimal() and place.isdecimal() and len(partition) < 10:
                return (int(partition), int(place)) if len(place) < 19 else None
    return None


def stub(
    key: bytes | None, value: bytes | None, headers: Sequence[tuple[str, bytes | None]]
) -> tuple[bytes | None, bytes | None, list[tuple[str, bytes | None]]]:
    """What stands for a record that the broker refuses for its size: of value and key the first 64 KiB each.

    The headers tell the value's length and hash and, if the key was cut, the key's length.
    """
    whole = value or b""
    note: list[tuple[str, bytes | None]] = [
        ("hg-truncated", b"%d" % len(whole)),
        ("hg-sha256", hashlib.sha256(whole).hexdigest().encode()),
    ]
    if key is not None and len(key) > STUB_BYTES:
        note.append(("hg-key-truncated", b"%d" % len(key)))
        key = key[:STUB_BYTES]
    return key, value if value is None else value[:STUB_BYTES], [*headers, *note]
