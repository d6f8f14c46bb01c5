"""Which objects a batch becomes, under which names, and what bytes they hold: a function of the batch alone."""

import gzip
import json
import re
from datetime import UTC, datetime
from typing import Any

import cramjam
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from connectors.contract import Span
from connectors.egress import Egress
from connectors.s3 import encode
from connectors.s3.encode import Planned, Squeezer, compact, key_of, place_of, slices, stem
from schemas.ids import DestinationId, ExternalId, TenantRef, Vendor
from tests.connectors.post import ACME
from tests.connectors.s3s import AT, LAKE, deliver, delivery, sink
from tests.contract.farsides.s3 import S3FarSide

SPAN = Span("cluster/topic", 2, 40, 49)


# ---------------------------------------------------------------- names


async def test_a_batch_is_one_object_for_each_type_and_hour(store: S3FarSide, egress: Egress) -> None:
    connector = sink(egress, store.options(), store.secrets(), prefix="head/gate")
    sent = [
        delivery(1),
        delivery(2, at="2026-11-21T10:59:59.999+01:00"),
        delivery(3, at="2026-11-21T10:00:00Z"),
        delivery(4, event_type="invoice.void"),
        delivery(5),
    ]
    outcomes = await deliver(connector, *sent)
    name = f"{stem(SPAN, ACME, LAKE)}.ndjson.gz"
    paid = f"head/gate/event_type=invoice.paid/dt=2026-11-21/hour=09/{name}"
    ids = {key: [json.loads(line)["id"] for line in store.lines(key)] for key in store.objects}
    assert ids == {
        paid: ["evt_1", "evt_2", "evt_5"],
        f"head/gate/event_type=invoice.paid/dt=2026-11-21/hour=10/{name}": ["evt_3"],
        f"head/gate/event_type=invoice.void/dt=2026-11-21/hour=09/{name}": ["evt_4"],
    }
    assert re.fullmatch(r"part-[a-z2-7]{8}-2-00000000000000000040\.ndjson\.gz", name)
    assert outcomes[0].receipt == outcomes[1].receipt == paid
    await connector.close()


def test_the_name_differs_with_all_that_makes_a_batch_another() -> None:
    span = SPAN
    others = [
        (Span("cluster2/topic", 2, 40, 49), ACME, LAKE),
        (Span("cluster/topic2", 2, 40, 49), ACME, LAKE),
        (Span("cluster/topic", 3, 40, 49), ACME, LAKE),
        (Span("cluster/topic", 2, 41, 49), ACME, LAKE),
        (span, TenantRef(Vendor("other"), ExternalId("acme")), LAKE),
        (span, TenantRef(Vendor("default"), ExternalId("ACME")), LAKE),
        (span, TenantRef(Vendor("default"), ExternalId("acme2")), LAKE),
        (span, ACME, DestinationId("lake2")),
        # the same letters, parted elsewhere
        (span, TenantRef(Vendor("defaulta"), ExternalId("cme")), LAKE),
        (span, TenantRef(Vendor("default"), ExternalId("acmel")), DestinationId("ake")),
    ]
    names = {stem(*other) for other in others}
    assert len(names) == len(others)
    assert stem(span, ACME, LAKE) not in names


@given(st.text(min_size=1, max_size=200), st.sampled_from(["", "a/b"]))
def test_no_type_leaves_its_folder(event_type: str, prefix: str) -> None:
    if not event_type.isprintable():
        return
    key = key_of(prefix, (event_type, "2026-11-21", "09"), "part")
    start = f"{prefix}/" if prefix else ""
    found = re.fullmatch(re.escape(start) + r"event_type=([A-Za-z0-9._~%-]+)/dt=2026-11-21/hour=09/part", key)
    assert found is not None
    assert not {"", ".", ".."} & set(key.split("/"))


@pytest.mark.parametrize(
    "event_type", ["..", ".", "../../x", "a/../b", "%2e%2e", "dt=1/hour=2", "é\u3042", "a b+c&d?e#f"]
)
async def test_what_a_hostile_type_is_stored_as(store: S3FarSide, egress: Egress, event_type: str) -> None:
    """The far side has the very key that was signed, whatever the type holds."""
    connector = sink(egress, store.options(), store.secrets())
    (outcome,) = await deliver(connector, delivery(event_type=event_type))
    assert outcome.verdict == "delivered"
    (key,) = store.objects
    assert key == outcome.receipt
    assert key.startswith("in/here/event_type=")
    assert key.count("/") == 5
    assert json.loads(store.lines(key)[0])["type"] == event_type
    await connector.close()


async def test_an_event_whose_type_makes_too_long_a_name_is_rejected_alone(store: S3FarSide, egress: Egress) -> None:
    connector = sink(egress, store.options(), store.secrets())
    outcomes = await deliver(connector, delivery(1), delivery(2, event_type="\u3042" * 200), delivery(3))
    assert [one.verdict for one in outcomes] == ["delivered", "reject", "delivered"]
    assert (outcomes[1].fault, outcomes[1].code) == ("event", "key_too_long")
    assert [one.delivery for one in store.held()] == [delivery(1).id, delivery(3).id]
    await connector.close()


@pytest.mark.parametrize(
    ("text", "date", "hour"),
    [
        ("2026-11-21T09:30:00Z", "2026-11-21", "09"),
        ("2026-11-21 23:30:00.123456Z", "2026-11-21", "23"),
        ("2026-11-21T23:30:00-02:00", "2026-11-22", "01"),
        ("2026-01-01T00:10:00+00:30", "2025-12-31", "23"),
        ("2026-W47-6T09:30:00Z", "2026-11-21", "09"),
        ("0001-01-01T00:00:00+14:00", "0001-01-01", "00"),
        ("9999-12-31T23:59:59-14:00", "9999-12-31", "23"),
    ],
)
def test_date_and_hour_are_those_of_occurred_at_in_utc(text: str, date: str, hour: str) -> None:
    assert place_of("t", text) == ("t", date, hour)


@given(st.datetimes(min_value=datetime(1, 1, 2), max_value=datetime(9999, 12, 30), timezones=st.timezones()))
def test_any_time_with_a_zone_finds_its_hour(at: datetime) -> None:
    utc = at.astimezone(UTC)
    assert place_of("t", at.isoformat()) == ("t", f"{utc.date()}", f"{utc.hour:02d}")
    assert place_of("t", utc.isoformat().replace("+00:00", "Z")) == ("t", f"{utc.date()}", f"{utc.hour:02d}")


# ---------------------------------------------------------------- lines


def test_a_line_is_the_body_of_single_events_and_what_only_the_platform_knows() -> None:
    one = delivery(1, b'{"total":12}', source="billing", schemaVersion=3, metadata=Raw(b'{"userId":"u1"}'))
    (lines,) = slices([one])
    assert lines == (
        b'{"id":"evt_1","type":"invoice.paid","occurredAt":"2026-11-21T09:30:00Z","schemaVersion":3,'
        b'"payload":{"total":12},"metadata":{"userId":"u1"},"deliveryId":"dlv_%b",'
        b'"receivedAt":"2026-11-24T09:30:00.000Z","source":"billing"}\n' % one.id[4:].encode()
    )


PRINTED = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(),
        st.text(alphabet=' \t\n\r,:"{}[]\\/'),
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=15,
)


@given(PRINTED, st.sampled_from([0, 2, "\t"]), st.booleans())
def test_a_payload_in_many_lines_becomes_one_and_stays_the_same_json(value: Any, indent: Any, ascii_only: bool) -> None:
    wide = json.dumps(value, indent=indent, ensure_ascii=ascii_only).replace("\n", "\r\n").encode()
    narrow = json.dumps(value, separators=(",", ":"), ensure_ascii=ascii_only).encode()
    assert bytes(compact(Raw(wide))) == narrow


@pytest.mark.parametrize(
    ("wide", "narrow"),
    [
        (b'{"n" : 1.0e+05 ,\n"m":[1E400, -0.0,\t0.10 ]}', b'{"n":1.0e+05,"m":[1E400,-0.0,0.10]}'),
        (
            b'[ 123456789012345678901234567890 ,"\\u00e9 \\/ : , \\" " ]',
            b'[123456789012345678901234567890,"\\u00e9 \\/ : , \\" "]',
        ),
        (b'{"a":1,"a": 2}', b'{"a":1,"a":2}'),
        (b' "\xc3\xa9  x" ', b'"\xc3\xa9  x"'),
    ],
)
def test_digits_and_texts_stay_byte_for_byte(wide: bytes, narrow: bytes) -> None:
    assert bytes(compact(Raw(wide))) == narrow


def test_a_payload_that_is_nested_deeper_than_anyone_reads_is_one_line_all_the_same() -> None:
    deep = b"[\n" * 100_000 + b'"a  b"' + b"\r\n]" * 100_000
    (lines,) = slices([delivery(1, deep)])
    assert lines.count(b"\n") == 1 and lines.endswith(b"\n") and b"\r" not in lines
    assert b'"a  b"' in lines


def test_what_is_made_between_two_turns_of_the_loop_is_bounded() -> None:
    few_large = [delivery(number, b'"%b"' % (b"x" * 100_000)) for number in range(20)]
    many_small = [delivery(number) for number in range(1000)]
    for every in (few_large, many_small):
        made = list(slices(every))
        assert all(part.count(b"\n") <= encode.SLICE_EVENTS for part in made)
        assert all(len(part) <= encode.SLICE_BYTES + 110_000 for part in made)
        ids = [json.loads(line)["deliveryId"] for line in b"".join(made).splitlines()]
        assert ids == [one.id for one in every]


# ---------------------------------------------------------------- bytes


def squeezed(compression: str, parts: list[bytes]) -> bytes:
    squeezer = Squeezer(compression)
    for part in parts[:-1]:
        squeezer.add(part)
    return squeezer.end(parts[-1])


UNDONE = {
    "gzip": gzip.decompress,
    "zstd": lambda data: bytes(cramjam.zstd.decompress(data)),
    "none": bytes,
}


@pytest.mark.parametrize("compression", UNDONE)
def test_the_same_lines_are_the_same_bytes_and_read_back(compression: str) -> None:
    lines = list(slices([delivery(number, b'{"n":%d}' % number) for number in range(2000)]))
    once = squeezed(compression, lines)
    assert squeezed(compression, lines) == once
    assert UNDONE[compression](once) == b"".join(lines)
    assert compression == "none" or len(once) < len(b"".join(lines)) / 5


def test_gzip_holds_no_time_and_no_name() -> None:
    head = squeezed("gzip", [b"x\n"])[:10]
    assert head[:4] == b"\x1f\x8b\x08\0"
    assert head[4:8] == b"\0\0\0\0"


@pytest.mark.parametrize(
    ("compression", "suffix"), [("gzip", ".ndjson.gz"), ("zstd", ".ndjson.zst"), ("none", ".ndjson")]
)
async def test_what_arrives_reads_back_in_every_compression(
    store: S3FarSide, egress: Egress, compression: str, suffix: str
) -> None:
    connector = sink(egress, store.options(), store.secrets(), compression=compression)
    sent = [delivery(number, b'{"n":\n%d}' % number) for number in range(700)]
    await deliver(connector, *sent)
    (key,) = store.objects
    assert key.endswith(suffix)
    assert [one.delivery for one in store.held()] == [one.id for one in sent]
    assert store.held()[7].payload == b'{"n":7}'
    assert store.objects[key].headers["content-type"] == "application/x-ndjson"
    await connector.close()


def test_an_identity_is_that_of_the_batch_and_of_what_its_object_holds() -> None:
    planned = Planned("key", [delivery(1), delivery(2)])
    mine = encode.identity(SPAN, ACME, LAKE, planned)
    assert mine == encode.identity(SPAN, ACME, LAKE, planned)
    others = [
        encode.identity(Span("cluster/topic", 2, 40, 48), ACME, LAKE, planned),
        encode.identity(SPAN, TenantRef(Vendor("default"), ExternalId("acme2")), LAKE, planned),
        encode.identity(SPAN, ACME, LAKE, Planned("key", [delivery(1)])),
        encode.identity(SPAN, ACME, LAKE, Planned("key", [delivery(2), delivery(1)])),
    ]
    assert len({mine, *others}) == 5


def test_the_line_has_the_fields_of_the_body_first() -> None:
    assert [field.name for field in msgspec.structs.fields(encode.Line)] == [
        "id", "type", "occurredAt", "schemaVersion", "payload", "metadata", "deliveryId", "receivedAt", "source"
    ]  # fmt: skip
    assert delivery().event.occurredAt == AT
