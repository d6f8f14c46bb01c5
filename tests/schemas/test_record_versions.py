"""Which versions of retry and dead-letter records are read, and in which they are written (ADR 0016)."""

import pytest
from msgspec.structs import replace

from schemas.ids import DeliveryId, DestinationId, EventId, ExternalId, TenantRef, Vendor
from schemas.wire import FORMS, WRITTEN, Form, Parked, parked_headers, read_parked, unread_of
from tests.streams.other_release import read_2, write_2

ACME = TenantRef(Vendor("default"), ExternalId("acme"))
PARKED = Parked(
    tenant=ACME,
    destination=DestinationId("hook"),
    delivery=DeliveryId("dlv_x"),
    event=EventId("e"),
    event_type="t",
    attempt=1,
    hop=2,
    parks=3,
    not_before_ms=4,
    origin="in/0/5",
    error="timeout",
    fault="destination",
    detail="",
    first_failed_ms=6,
    replay="",
)


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> None:
    """A release that reads versions 1 and 2, and writes 1 still."""
    monkeypatch.setitem(FORMS, 2, Form(write_2, read_2))


def test_what_is_written_is_read_and_so_is_the_version_before():
    assert WRITTEN in FORMS
    assert WRITTEN == 1 or WRITTEN - 1 in FORMS


def test_a_value_that_is_taken_over_keeps_the_version_that_it_was_sealed_in(both: None):
    new = parked_headers(PARKED)
    old = parked_headers(replace(PARKED, version=2))
    assert (new[0], old[0]) == (("hg-v", b"1"), ("hg-v", b"2"))
    for headers, version in ((new, 1), (old, 2)):
        read = read_parked(headers)
        assert read == replace(PARKED, version=version)
        assert parked_headers(read) == headers


def test_a_record_of_another_release_is_told_from_one_that_is_not_ours():
    theirs = parked_headers(PARKED)
    theirs[0] = ("hg-v", b"2")
    assert (read_parked(theirs), unread_of(theirs)) == (None, ACME)
    assert unread_of(parked_headers(PARKED)) is None
    for version in (b"0", b"-1", b"two", b"", b"9" * 20):
        theirs[0] = ("hg-v", version)
        assert (read_parked(theirs), unread_of(theirs)) == (None, None)
    assert unread_of([("hg-v", b"2"), ("hg-vendor", b"default")]) is None
