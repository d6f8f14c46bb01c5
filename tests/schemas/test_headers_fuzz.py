"""Whatever headers and sealed values say: what our readers make of them is whole, or nothing."""

from collections import Counter
from collections.abc import Callable, Sequence
from random import Random
from typing import Final

import pytest

from config.vault import Unsealable, Vault
from schemas.attempt import PURPOSE_DELIVERY
from schemas.dead_letter import Mark, letter_id, mark_headers, read_letter_id, read_mark, tenant_letter, unrouted_letter
from schemas.ids import DEFAULT_VENDOR, DeliveryId, DestinationId, EventId, ExternalId, TenantRef
from schemas.wire import (
    MAX_DETAIL_BYTES,
    MAX_HEADERS_BYTES,
    Parked,
    parked_headers,
    read_origin,
    read_parked,
    returned_headers,
    unrouted_headers,
)
from tests.mutate import mutated

Headers = list[tuple[str, bytes | None]]

ACME: Final = TenantRef(DEFAULT_VENDOR, ExternalId("acme"))
INGRESS: Final = "headgate.default.ingress"
PARKED: Final = Parked(
    ACME,
    DestinationId("hook"),
    DeliveryId("dlv_1"),
    EventId("evt_1"),
    "invoice.paid",
    attempt=2,
    hop=3,
    parks=1,
    not_before_ms=1_795_000_000_000,
    origin=f"{INGRESS}/3/17",
    error="server_error",
    fault="destination",
    detail="the receiver answered 503",
    first_failed_ms=1_794_000_000_000,
    replay="job",
)
PRODUCERS: Final[Headers] = [("traceparent", b"00-ab-cd-01"), ("x", None), ("\xe9", b"\xff"), ("hg-origin", b"a/1/2")]
WHOLE: Final[Sequence[Headers]] = [
    [*parked_headers(PARKED)],
    [*parked_headers(PARKED), *PRODUCERS],
    unrouted_headers(PRODUCERS, vendor=DEFAULT_VENDOR, origin=f"{INGRESS}/0/5", reason="malformed", detail="no JSON"),
    [*mark_headers(Mark("replayed", 2, 9, "job"))],
]
NAMES: Final = tuple({name for headers in WHOLE for name, _ in headers})
NUMBERS: Final = (
    *(b"0", b"-1", b"1 ", b" 1", b"+1", b"1_0", b"1.0", b"1e3", b"", b"9" * 15, b"9" * 16, b"9" * 19, b"9" * 5000),
    *(b"\xd9\xa1", b"\xc2\xb2", b"9007199254740991", b"9007199254740992", b"253402300800000", b"nan", b"0x1", b"1/2"),
    *(b"/", b"//", b"0/0", f"{INGRESS}/1/2".encode(), f"{INGRESS}//".encode(), f"{INGRESS}/\u0661/\u0662".encode()),
)


def changed(dice: Random) -> Headers:
    """Headers of ours with one to four of them dropped, doubled, renamed, emptied or with another value."""
    headers = [*dice.choice(WHOLE)]
    for _ in range(dice.choice((1, 1, 2, 4))):
        if not headers:
            break
        at = dice.randrange(len(headers))
        name, value = headers[at]
        match dice.randrange(8):
            case 0:
                del headers[at]
            case 1:
                headers.insert(dice.randrange(len(headers) + 1), (name, mutated(dice, [value or b""])))
            case 2:
                headers[at] = (dice.choice(NAMES), value)
            case 3:
                headers[at] = (mutated(dice, [name.encode()]).decode("utf-8", "backslashreplace"), value)
            case 4:
                headers[at] = (name, None)
            case _:
                headers[at] = (name, mutated(dice, [value or b""], NUMBERS))
    return headers


def checked(headers: Headers) -> list[str]:
    """Reads the headers in every way there is; what they were taken for. Asserts that what was read is whole."""
    found = []
    parked = read_parked(headers)
    if parked is not None:
        found.append("parked")
        written = parked_headers(parked)
        if len(parked.detail.encode()) <= MAX_DETAIL_BYTES:
            assert read_parked(written) == parked
    known = [(name, value) for name, value in headers if value is not None]
    letter = tenant_letter(ACME, 0, 1, 2, 3, known)
    assert (letter is not None) == (parked is not None and parked.tenant == ACME)
    origin = read_origin(headers, INGRESS)
    if origin is not None:
        found.append("origin")
        assert 0 <= origin[0] < 10**9
        assert 0 <= origin[1] < 2**63
    returned = returned_headers(headers)
    assert (returned is None) == all(name != "hg-origin" for name, _ in headers)
    assert returned is None or [name for name, _ in returned if name.startswith("hg-")] == ["hg-origin"]
    mark = read_mark(dict(known))
    if mark is not None:
        found.append("mark")
        assert read_letter_id(letter_id(mark.partition, mark.offset)) == (mark.partition, mark.offset)
    unrouted_letter(0, 1, 2, 3, headers[0][1] if headers else None, dict(known))
    again = unrouted_headers(headers, vendor=DEFAULT_VENDOR, origin="t/0/1", reason="malformed", detail="x")
    assert sum(len(name.encode()) + len(value or b"") for name, value in again) <= MAX_HEADERS_BYTES
    return found or ["nothing"]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("count", [10_000, pytest.param(1_000_000, marks=pytest.mark.chaos("fuzz"))])
def test_whatever_headers_say_is_read_as_a_whole_or_not_at_all(count: int, report: Callable[[str], None]) -> None:
    dice = Random(count)
    ends: Counter[str] = Counter()
    for number in range(count):
        headers = changed(dice)
        try:
            ends.update(checked(headers))
        except Exception as fault:
            raise AssertionError(f"seed {count}, input {number}: {headers!r:.2000}") from fault
    report(f"{count:,} inputs (seed {count}), none unhandled: {dict(ends)}")
    # the control: inputs of all kinds
    assert min(ends[kind] for kind in ("parked", "origin", "mark", "nothing")) > count / 100


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("count", [10_000, pytest.param(1_000_000, marks=pytest.mark.chaos("fuzz"))])
def test_a_sealed_value_opens_as_it_was_or_not_at_all(count: int, report: Callable[[str], None]) -> None:
    dice = Random(count)
    vault = Vault(ACME, {1: b"k" * 32, 2: b"l" * 32}, 2)
    plain = b'{"eventType":"invoice.paid"}'
    whole = vault.seal(PURPOSE_DELIVERY, "hook", "dlv_1", plain)
    opened = 0
    for _ in range(count):
        value = mutated(dice, [whole])
        try:
            assert vault.open(PURPOSE_DELIVERY, "hook", "dlv_1", value) == plain
            assert value == whole
            opened += 1
        except Unsealable:
            assert value != whole
    report(f"{count:,} sealed values (seed {count}), none unhandled; {opened:,} unchanged ones opened")
    assert 0 < opened < count / 2
