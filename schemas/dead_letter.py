"""Dead letters as they are looked through: which are meant, and the marks that say what became of them.

Pure. Owns the spelling of marks, of a letter's id and of the replay job of a letter (design, section 5, Marks). Reading
and writing the topics is `streams/replay.py`'s.
"""

from base64 import b64encode
from collections.abc import Iterable, Mapping
from typing import Final, Literal, TypeAlias, cast

from msgspec import Struct

from schemas.event import rfc3339
from schemas.ids import TenantRef, base32, digest, parts
from schemas.wire import Headers, read_parked, version_header

MarkKind: TypeAlias = Literal["replayed", "dropped"]

MARK: Final = "hg-mark"
UNKNOWN_OUTCOME: Final = "unknown_outcome"  # the code of a letter that its destination may hold all the same
_KINDS: Final = (b"replayed", b"dropped")


class Selectors(Struct, frozen=True):
    """Which letters; None chooses all. Times are those of the letters, in ms."""

    destination: str | None = None
    error: str | None = None
    since_ms: int | None = None
    until_ms: int | None = None
    key: str | None = None


class Letter(Struct, frozen=True, omit_defaults=True):
    """A dead letter as it may be listed: nothing of its event's content. `replay` is the job it came of."""

    letter: str
    at: str
    error: str
    tenant: str = ""
    destination: str = ""
    type: str = ""
    event: str = ""
    delivery: str = ""
    attempts: int = 0
    fault: str = ""
    detail: str = ""
    origin: str = ""
    firstFailed: str = ""
    replay: str = ""
    key: str = ""
    bytes: int = 0
    mark: str = ""


class Mark(Struct, frozen=True):
    """A record in a letter's own partition that says that the letter at `offset` is done, and by which job."""

    kind: MarkKind
    partition: int
    offset: int
    job: str


def letter_id(partition: int, offset: int) -> str:
    return f"{partition}/{offset}"


def read_letter_id(text: str) -> tuple[int, int] | None:
    """The inverse of `letter_id`; None for any other text."""
    partition, _, offset = text.partition("/")
    if not (partition.isdecimal() and offset.isdecimal() and len(partition) < 10 and len(offset) < 19):
        return None
    return int(partition), int(offset)


def mark_headers(mark: Mark) -> Headers:
    return [
        version_header(),
        (MARK, mark.kind.encode()),
        ("hg-letter", letter_id(mark.partition, mark.offset).encode()),
        ("hg-replay", mark.job.encode()),
    ]


def read_mark(headers: Mapping[str, bytes]) -> Mark | None:
    """The inverse of `mark_headers`; None for what is no mark of ours."""
    kind = headers.get(MARK)
    at = read_letter_id(text_of(headers, "hg-letter"))
    if kind not in _KINDS or at is None:
        return None
    return Mark(cast(MarkKind, kind.decode()), *at, text_of(headers, "hg-replay"))


def replay_job(topic_id8: str, partition: int, offset: int) -> str:
    """The replay job of a letter that is not forced: the same whoever replays it, and however often.

    The ledger keeps what has been done by (delivery, replay job): a copy from a resumed or a concurrent replay is
    dropped there. `topic_id8` is the first 8 hex digits of the id of the letter's topic.
    """
    return base32(digest(parts(topic_id8, str(partition), str(offset))))


def text_of(headers: Mapping[str, bytes], name: str) -> str:
    return headers.get(name, b"").decode("utf-8", "replace")


def readable(value: bytes) -> str:
    """UTF-8 text as it is, other bytes as `base64:…`."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return "base64:" + b64encode(value).decode("ascii")


def tenant_letter(
    owner: TenantRef, partition: int, offset: int, at_ms: int, size: int, headers: Iterable[tuple[str, bytes]]
) -> Letter | None:
    """The letter that a record is; None if it is not the owner's: a pool's topic holds the letters of several."""
    parked = read_parked(headers)
    if parked is None or parked.tenant != owner:
        return None
    return Letter(
        letter=letter_id(partition, offset),
        at=rfc3339(at_ms),
        error=parked.error,
        tenant=parked.tenant.tenant,
        destination=parked.destination,
        type=parked.event_type,
        event=parked.event,
        delivery=parked.delivery,
        attempts=parked.attempt,
        fault=parked.fault,
        detail=parked.detail,
        origin=parked.origin,
        firstFailed=rfc3339(parked.first_failed_ms) if parked.first_failed_ms else "",
        replay=parked.replay,
        bytes=size,
    )


def unrouted_letter(
    partition: int, offset: int, at_ms: int, size: int, key: bytes | None, headers: Mapping[str, bytes]
) -> Letter:
    """A record of `dlq.unrouted`, which is nobody's."""
    return Letter(
        letter=letter_id(partition, offset),
        at=rfc3339(at_ms),
        error=text_of(headers, "hg-error"),
        detail=text_of(headers, "hg-detail"),
        origin=text_of(headers, "hg-origin"),
        key=readable(key or b""),
        bytes=size,
    )


def matches(letter: Letter, chosen: Selectors, at_ms: int) -> bool:
    return (
        (chosen.destination is None or letter.destination == chosen.destination)
        and (chosen.error is None or letter.error == chosen.error)
        and (chosen.since_ms is None or at_ms >= chosen.since_ms)
        and (chosen.until_ms is None or at_ms <= chosen.until_ms)
        and (chosen.key is None or letter.key == chosen.key)
    )
