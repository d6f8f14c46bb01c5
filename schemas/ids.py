"""Identity: tenants, slugs, and the hashes that name an event, a delivery and an attempt.

Owns every id's spelling. All hashes are BLAKE2b with 128 bits over length-prefixed UTF-8 parts, so that no two
different tuples of texts share an input; they are written as 26 characters of lower-case base32.
"""

import re
from collections.abc import Sequence
from hashlib import blake2b
from typing import Final, NewType
from urllib.parse import quote, unquote

from msgspec import Struct

Vendor = NewType("Vendor", str)
ExternalId = NewType("ExternalId", str)
Slug = NewType("Slug", str)
Tag = NewType("Tag", str)
DestinationId = NewType("DestinationId", str)
RouteId = NewType("RouteId", str)
EventId = NewType("EventId", str)
DeliveryId = NewType("DeliveryId", str)

DEFAULT_VENDOR: Final = Vendor("default")
RESERVED_NAMES: Final = frozenset({"control", "keys", "state", "ingress", "unrouted"})
NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,47}")
MAX_EXTERNAL_ID_BYTES: Final = 200


class TenantRef(Struct, frozen=True, gc=False, order=True):
    """One customer of one vendor. The first parameter of everything that touches a tenant's thing."""

    vendor: Vendor
    tenant: ExternalId


def name_problem(text: str) -> str | None:
    """Why `text` cannot name a vendor, a slug, a destination or a route; None if it can."""
    if not NAME.fullmatch(text):
        return "must match [a-z0-9][a-z0-9-]{0,47}: lower-case letters, digits and hyphens, at most 48"
    if text in RESERVED_NAMES or text.startswith("pool-"):
        return "is reserved (control, keys, state, ingress, unrouted, pool-*)"
    return None


def external_id_problem(text: str) -> str | None:
    """Why `text` cannot be a customerExternalId; None if it can."""
    if not text:
        return "is empty"
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return "is not valid Unicode"
    if size > MAX_EXTERNAL_ID_BYTES:
        return f"has {size} bytes, more than {MAX_EXTERNAL_ID_BYTES}"
    if not text.isascii() or not text.isprintable():
        for character in text:
            if ord(character) < 0x20 or 0x7F <= ord(character) < 0xA0:
                return "holds a control character"
    return None


def percent(external_id: str) -> str:
    """A customerExternalId as it stands in keys and paths."""
    return quote(external_id, safe="")


def unpercent(text: str) -> ExternalId:
    return ExternalId(unquote(text, errors="strict"))


def parts(*texts: str) -> bytes:
    """Length-prefixed UTF-8 parts: `3:abc5:hello`. The input of every hash and every AAD."""
    out = bytearray()
    for text in texts:
        raw = text.encode()
        out += b"%d:" % len(raw)
        out += raw
    return bytes(out)


def digest(data: bytes) -> bytes:
    """128 bits of BLAKE2b."""
    return blake2b(data, digest_size=16).digest()


def default_slug(external_id: str) -> Slug:
    """The external id itself where it can be a slug, else `t-` and 12 base32 characters of its hash."""
    if name_problem(external_id) is None:
        return Slug(external_id)
    return Slug("t-" + base32(digest(parts(external_id)))[:12])


# ---------------------------------------------------------------- base32 of many digests at once

_ALPHABET: Final = b"abcdefghijklmnopqrstuvwxyz234567"
_SPREAD: Final = bytes(_ALPHABET[i] if i < 32 else 0 for i in range(256))
_mask_cache: dict[int, list[tuple[int, int, int]]] = {}


def _masks(cells: int) -> list[tuple[int, int, int]]:
    """For each halving step: the mask of what stays, the mask of what moves, and by how many bits."""
    found = _mask_cache.get(cells)
    if found is None:
        found = []
        for bits, gap in ((80, 128), (40, 64), (20, 32), (10, 16), (5, 8)):
            group = (1 << bits) - 1
            low = sum(group << (i * gap) for i in range(0, 256 // gap, 2))
            stay = int.from_bytes(low.to_bytes(32, "big") * cells, "big")
            move = int.from_bytes((low << bits).to_bytes(32, "big") * cells, "big")
            found.append((stay, move, gap - bits))
        _mask_cache[cells] = found
    return found


def base32_many(digests: Sequence[bytes]) -> list[str]:
    """26 lower-case base32 characters for each 16-byte digest.

    All digests lie in 256-bit cells of one big integer; five shifts spread their 5-bit groups to bytes, and one
    `translate` writes the letters: 0.4 us a digest, 2 us one by one (`python -m bench ids`).
    """
    if not digests:
        return []
    cells = 16
    while cells < len(digests):
        cells *= 2
    # 128 bits are 25.6 groups of 5: two zero bits are appended, so that the last character holds the last three bits
    pad = b"\0" * 12
    joined = b"".join([b"%b%b\0\0\0\0" % (pad, d) for d in digests])
    number = int.from_bytes(joined, "big") >> 30
    for stay, move, shift in _masks(cells):
        number = number & stay | (number & move) << shift
    text = number.to_bytes(32 * cells, "big").translate(_SPREAD).decode("ascii")
    first = 32 * (cells - len(digests))
    return [text[i + 6 : i + 32] for i in range(first, 32 * cells, 32)]


def base32(value: bytes) -> str:
    return base32_many((value,))[0]


# ---------------------------------------------------------------- named things


def event_digest(tenant: TenantRef, event_type: str, idempotency_key: str) -> bytes:
    """Two records are the same event when this is the same (design, section 6)."""
    return digest(parts(tenant.vendor, tenant.tenant, event_type, idempotency_key))


def delivery_id(tenant: TenantRef, event_type: str, idempotency_key: str, destination: DestinationId) -> DeliveryId:
    """`dlv_` and 26 characters; survives retry, replay and restart."""
    hashed = digest(parts(tenant.vendor, tenant.tenant, event_type, idempotency_key, destination))
    return DeliveryId("dlv_" + base32(hashed))


def attempt_digest(delivery: DeliveryId, attempt: int, replay: str) -> bytes:
    """What names an attempt: the same for a repeat of the same record."""
    if attempt < 10 and not replay:  # the same bytes as below, made faster
        return blake2b(b"%d:%b1:%d0:" % (len(delivery), delivery.encode(), attempt), digest_size=16).digest()
    return digest(parts(delivery, str(attempt), replay))


def default_event_id(topic: str, topic_id8: str, partition: int, offset: int | str) -> EventId:
    """The id of an event that brought none: its place in the log, which a redelivery shares.

    `topic_id8` is the first 8 hex digits of the topic's id, so that a topic made anew does not repeat ids. With an
    empty text as `offset`, what all ids of the partition begin with.
    """
    return EventId(f"{topic}-{topic_id8}-{partition}-{offset}")
