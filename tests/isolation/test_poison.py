"""Poison among good events: all of it lies in `dlq.unrouted`, all of the good arrives, nothing falls over (R10).

The control is in the counts: what is in `dlq.unrouted` is named by where it came from, so that nothing missing, nothing
twice and no good event among it passes.
"""

import asyncio
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.record.util import calc_crc32c
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType
from msgspec import Struct

from schemas.ids import DEFAULT_VENDOR
from schemas.wire import MAX_HEADERS_BYTES, STUB_BYTES
from tests.deployment import Deployment, Read, event, eventually
from tests.schema_registry import FarRegistry

pytestmark = pytest.mark.broker

MIB: Final = 1 << 20


class Poison(Struct, frozen=True):
    """A record that cannot be routed, and why."""

    name: str
    reason: str
    value: bytes | None
    key: bytes | None = b"acme"
    headers: Sequence[tuple[str, bytes | None]] = ()


def _event(payload: bytes = b"{}", more: bytes = b"") -> bytes:
    return b'{"eventType": "invoice.paid", "payload": ' + payload + more + b"}"


def _schema(payload: Any) -> dict[str, Any]:
    fields = [{"name": "eventType", "type": "string"}, {"name": "payload", "type": payload}]
    return {"type": "record", "name": "Event", "fields": fields}


def _avro(number: int, raw: bytes) -> bytes:
    """Of type `t`; `raw` is the payload."""
    return b"\x00" + number.to_bytes(4, "big") + b"\x02t" + raw


NODE: Final = {"type": "record", "name": "Node", "fields": [{"name": "next", "type": ["null", "Node"]}]}
SCHEMAS: Final = [
    _schema({"type": "map", "values": "double"}),
    _schema(NODE),
    _schema({"type": "array", "items": "null"}),
    '{"type": "record", "name": "Event", "fields": [',
    '{"type":"array","items":' * 10_000 + '"int"' + "}" * 10_000,
]
BIG: Final = _event(b'"' + b"x" * (5 * MIB) + b'"')
POISON: Final = [
    Poison("no JSON", "malformed", b"not json"),
    Poison("cut off", "malformed", _event()[:-1]),
    Poison("two documents", "malformed", _event() + _event()),
    Poison("an array", "malformed", b"[]"),
    Poison("a BOM", "malformed", b"\xef\xbb\xbf" + _event()),
    Poison("UTF-16", "malformed", _event().decode().encode("utf-16")),
    Poison("a magic byte without a schema", "malformed", b"\x00\x00\x00"),
    Poison("deep arrays", "malformed", _event(b"[" * 100_000 + b"]" * 100_000)),
    Poison("deep objects", "malformed", _event(b'{"a":' * 100_000 + b"1" + b"}" * 100_000)),
    Poison("deep metadata", "malformed", _event(b"{}", b', "metadata": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000)),
    Poison("deep before anything else", "malformed", b"[" * 100_000),
    Poison("NaN", "malformed", _event(b'{"total": NaN}')),
    Poison("Infinity", "malformed", _event(b"-Infinity")),
    Poison("a bare NUL", "malformed", _event(b'"a\x00b"')),
    Poison("nothing but NUL", "malformed", b"\x00" * 100),
    Poison("invalid UTF-8", "malformed", _event(b'"\xff\xfe"')),
    Poison("an overlong NUL", "malformed", _event(b'"\xc0\x80"')),
    Poison("a surrogate as UTF-8", "malformed", _event(b'"\xed\xa0\x80"')),
    Poison("a lone surrogate in the type", "malformed", b'{"eventType": "\\ud800", "payload": 1}'),
    Poison("a lone surrogate in the id", "malformed", _event(b"{}", b', "eventId": "\\udfff"')),
    Poison("a lone surrogate in the payload", "malformed", _event(b'{"text": "\\ud800"}')),
    Poison("a NUL in the id", "malformed", _event(b"{}", b', "eventId": "a\\u0000b"')),
    Poison("a line feed in the type", "malformed", b'{"eventType": "a\\r\\nx: y", "payload": 1}'),
    Poison("an unknown field", "malformed", _event(b"{}", b', "customerID": "acme"')),
    Poison("no type", "malformed", b'{"payload": {}}'),
    Poison("no payload", "malformed", b'{"eventType": "invoice.paid"}'),
    Poison("a type that is a number", "malformed", b'{"eventType": 1, "payload": {}}'),
    Poison("a huge version", "malformed", _event(b"{}", b', "schemaVersion": ' + b"9" * 5000)),
    Poison("a version in exponents", "malformed", _event(b"{}", b', "schemaVersion": 1e999')),
    Poison("a time that is none", "malformed", _event(b"{}", b', "occurredAt": "2026-02-30T25:61:00Z"')),
    Poison("a time out of range", "malformed", _event(b"{}", b', "occurredAt": "99999-01-01T00:00:00Z"')),
    Poison("empty", "malformed", b""),
    Poison("a tombstone", "malformed", None),
    Poison("no key", "key_missing", _event(), None),
    Poison("an empty key", "unknown_tenant", _event(), b""),
    Poison("a key that is not UTF-8", "unknown_tenant", _event(), b"\xff\xfe\x00"),
    Poison("a key with a line feed", "unknown_tenant", _event(), b"acme\n"),
    Poison("another case", "unknown_tenant", _event(), b"ACME"),
    Poison("another tenant in the value", "key_mismatch", _event(b"{}", b', "customerExternalId": "acme2"')),
    Poison("over the limit", "too_large", _event(b'"' + b"x" * MIB + b'"')),
    Poison("an unknown schema", "unknown_schema", _avro(99, b"\x00")),
    Poison("Avro, cut off", "malformed", _avro(1, b"\x02")),
    Poison("Avro, and more", "malformed", _avro(1, b"\x00\x00")),
    Poison("Avro, a map of 2^62", "malformed", _avro(1, b"\x80" * 8 + b"\x80\x01")),
    Poison("Avro, NaN", "malformed", _avro(1, b"\x02\x02a" + b"\x00" * 6 + b"\xf8\x7f" + b"\x00")),
    Poison("Avro, a chain of a million", "malformed", _avro(2, b"\x02" * (MIB - 1000) + b"\x00")),
    Poison("Avro, 2^62 nulls", "too_large", _avro(3, b"\x80" * 8 + b"\x80\x01")),
    Poison("Avro, a schema that is none", "malformed", _avro(4, b"\x00")),
    Poison("Avro, a deep schema", "malformed", _avro(5, b"\x00")),
    Poison("junk headers", "malformed", b"{", headers=[(f"junk-{n}", b"j" * 200) for n in range(300)]),
    Poison("headers like ours", "malformed", b"{", headers=[("hg-error", b"ok"), ("hg-tenant", b"acme2"), ("x", None)]),
    Poison("strange header names", "malformed", b"{", headers=[("", b"1"), ("\x00", b"2"), ("é\n", b"\xff")]),
]


def _raise_limit(deployment: Deployment, max_bytes: int) -> None:
    """As an operator would, who changes the topic under us."""
    topic = deployment.settings.topics.ingress(DEFAULT_VENDOR)
    change = ConfigEntry("max.message.bytes", str(max_bytes), incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[change])
    admin = AdminClient(deployment.settings.kafka.confluent())
    for waiting in admin.incremental_alter_configs([resource]).values():
        waiting.result(20)


def _write(deployment: Deployment, records: Sequence[Poison], **settings: Any) -> dict[str, Poison]:
    """Writes the records; where each of them lies, as `hg-origin` spells it."""
    producer = Producer(
        {**deployment.settings.kafka.confluent(), "acks": "all", "message.max.bytes": 64 * MIB} | settings
    )
    written: dict[str, Poison] = {}

    def report(record: Poison, error: Any, message: Any) -> None:
        assert error is None, (record.name, error)
        written[f"{message.topic()}/{message.partition()}/{message.offset()}"] = record

    topic = deployment.settings.topics.ingress(DEFAULT_VENDOR)
    for record in records:
        producer.produce(
            topic,
            record.value,
            record.key,
            headers=list(record.headers),
            on_delivery=lambda error, message, record=record: report(record, error, message),
        )
        producer.flush(30)  # each in a batch of its own: none hides behind another
    assert len(written) == len(records)
    return written


async def _unrouted(deployment: Deployment, count: int) -> dict[str, Read]:
    """What lies in `dlq.unrouted`, by origin, once it is that much."""
    letters = await eventually(lambda: (x := deployment.unrouted())[count - 1 :] and x, f"{count} unrouted records")
    found = {one.headers["hg-origin"].decode(): one for one in letters}
    assert len(found) == len(letters)
    return found


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("events", "times"), [(3000, 1), pytest.param(100_000, 23, marks=pytest.mark.chaos("R10"))], ids=["small", "full"]
)
async def test_all_poison_is_unrouted_and_all_good_events_arrive(
    deployment: Deployment, events: int, times: int, report: Callable[[str], None]
) -> None:
    """`times` of each poison; in full size one record of a hundred is poison."""
    await deployment.apply({"tenants": [deployment.tenant("acme"), deployment.tenant("acme2")]})
    async with FarRegistry() as far:
        for schema in SCHEMAS:
            far.register(schema)
        await _among_good_events(deployment, far, events, times, report)


async def _among_good_events(
    deployment: Deployment, far: FarRegistry, events: int, times: int, report: Callable[[str], None]
) -> None:
    worker = await deployment.worker(SCHEMA_REGISTRY_URL=far.url)
    await asyncio.to_thread(_raise_limit, deployment, 8 * MIB)
    steps = 10 * times
    pace = events // steps
    good = [(t, event(f"{t}-{n}")) for n in range(events // 2) for t in ("acme", "acme2")]
    written: dict[str, Poison] = {}
    poison = POISON * times
    share = -(-len(poison) // steps)
    for step in range(steps):
        await deployment.publish(good[step * pace : (step + 1) * pace])
        for tenant in ("acme", "acme2"):  # no faster than they arrive: what has to be parked may wait for minutes
            await deployment.inbox.wait_for(f"/{tenant}", (step - 1) * pace // 2, 120)
        written |= await asyncio.to_thread(_write, deployment, poison[step * share : (step + 1) * share])
    await deployment.publish(good[steps * pace :])
    written |= await asyncio.to_thread(_write, deployment, [Poison("5 MB", "too_large", BIG)])
    await asyncio.gather(*(deployment.inbox.wait_for(f"/{t}", events // 2, 300) for t in ("acme", "acme2")))
    letters = await _unrouted(deployment, len(written))
    report(f"{events:,} good events delivered, {len(letters):,} of {len(written):,} poisonous ones unrouted")
    await deployment.all_committed()
    assert set(letters) == set(written)
    for origin, record in written.items():
        letter = letters[origin]
        assert letter.headers["hg-error"] == record.reason.encode(), record.name
        assert letter.key == record.key, record.name
        assert sum(len(name) + len(value or b"") for name, value in letter.headers.items()) <= MAX_HEADERS_BYTES
        if record.name != "5 MB":
            assert (letter.value, record.name) == (record.value, record.name)
    by_name = {record.name: letters[origin] for origin, record in written.items()}
    cut = by_name["5 MB"]
    assert cut.value == BIG[:STUB_BYTES]
    assert cut.headers["hg-truncated"] == str(len(BIG)).encode()
    junk = by_name["junk headers"].headers
    kept = [name for name in junk if name.startswith("junk-")]
    assert len(kept) > 50
    assert int(junk["hg-headers-dropped"]) == 300 - len(kept)
    posed = by_name["headers like ours"].headers
    assert posed["hg-headers-dropped"] == b"2"
    assert posed["x"] is None
    assert "hg-tenant" not in posed
    assert by_name["strange header names"].headers["é\n"] == b"\xff"
    for tenant in ("acme", "acme2"):
        received = deployment.inbox.received(f"/{tenant}")
        assert sorted(json.loads(one.body)["id"] for one in received) == sorted(
            e["eventId"] for t, e in good if t == tenant
        )
    assert worker.process.poll() is None
    assert worker.metric("headgate_events_total", result="unrouted") == len(written)
    assert worker.metric("headgate_events_total", result="routed") == events
    log = worker.log.read_text()
    assert '"poison"' not in log  # none of it needed the guard
    assert "xxxxx" not in log


@pytest.mark.scoreboard("R10")
async def test_poison_that_is_acknowledged_and_not_kept_is_missed(deployment: Deployment) -> None:
    """The control of the test above."""
    await deployment.apply({"tenants": [deployment.tenant("acme")]})
    await deployment.launch(command=(sys.executable, "-m", "tests.isolation.without", "keeping")).ready()
    await asyncio.to_thread(_write, deployment, POISON[:5])
    await deployment.publish([("acme", event("good"))])
    await deployment.inbox.wait_for("/acme", 1, 30)
    await deployment.all_committed()
    assert deployment.unrouted() == []


@pytest.mark.scoreboard("R10")
async def test_five_megabytes_that_pass_the_usual_limit_as_zstd_are_unrouted_as_a_stub(deployment: Deployment) -> None:
    await deployment.apply({"tenants": [deployment.tenant("acme")]})
    await deployment.worker()
    record = Poison("zstd", "too_large", BIG)
    written = await asyncio.to_thread(_write, deployment, [record], **{"compression.type": "zstd"})
    await deployment.publish([("acme", event("after"))])
    await deployment.inbox.wait_for("/acme", 1, 60)
    letters = await _unrouted(deployment, 1)
    assert set(letters) == set(written)
    (letter,) = letters.values()
    assert letter.headers["hg-error"] == b"too_large"
    assert letter.value is not None and BIG.startswith(letter.value)
    await deployment.all_committed()


@pytest.mark.scoreboard("R10")
async def test_a_key_of_five_megabytes_holds_nothing_up(deployment: Deployment) -> None:
    await deployment.apply({"tenants": [deployment.tenant("acme")]})
    await deployment.worker()
    record = Poison("a long key", "unknown_tenant", _event(), b"k" * (5 * MIB))
    written = await asyncio.to_thread(_write, deployment, [record], **{"compression.type": "zstd"})
    letters = await _unrouted(deployment, 1)
    assert set(letters) == set(written)
    (letter,) = letters.values()
    assert (letter.value, letter.key) == (record.value, b"k" * STUB_BYTES)
    assert letter.headers["hg-key-truncated"] == b"%d" % (5 * MIB)
    await deployment.publish([("acme", event(f"after{n}")) for n in range(20)])
    await deployment.inbox.wait_for("/acme", 20, 30)
    await deployment.all_committed()


async def _write_as(
    deployment: Deployment, partition: int, name: bytes, headers: Sequence[bytes], key: bytes = b"acme"
) -> None:
    """An event before, one with a header of these names, and one after, in one batch: other languages' clients write
    names that are not UTF-8, which none of Python's does."""
    topic = deployment.settings.topics.ingress(DEFAULT_VENDOR)
    async with AIOKafkaProducer(bootstrap_servers=deployment.settings.kafka.bootstrap) as producer:
        batch = producer.create_batch()
        for place in ("before", "at", "after"):
            marks = [("\x01" * len(header), b"1") for header in headers] if place == "at" else []
            value = _event(b"{}", b', "eventId": "%b-%b"' % (name, place.encode()))
            batch.append(key=key, value=value, timestamp=None, headers=marks)
        built = bytearray(batch._build())
        for header in headers:
            at = built.index(b"\x01" * len(header))
            built[at : at + len(header)] = header
        built[17:21] = calc_crc32c(bytes(built[21:])).to_bytes(4, "big")  # over all that follows it
        batch._buffer = built
        await (await producer.send_batch(batch, topic, partition=partition))


async def test_a_header_name_that_is_not_utf8_holds_nothing_up(deployment: Deployment) -> None:
    await deployment.apply({"tenants": [deployment.tenant("acme")]})
    worker = await deployment.worker()
    for partition in range(4):
        await _write_as(deployment, partition, b"p%d" % partition, [b"\xff\xfe\xfd", b"na\xefve"])
    await _write_as(deployment, 0, b"nobody", [b"\xff\xfe\xfd"], key=b"nobody")
    await deployment.publish([("acme", event(f"later{n}")) for n in range(40)])
    sent = {f"p{partition}-{place}" for partition in range(4) for place in ("before", "at", "after")}
    sent |= {f"later{n}" for n in range(40)}
    await eventually(
        lambda: sent <= {json.loads(one.body)["id"] for one in deployment.inbox.received("/acme")}, "all good ones"
    )
    letters = await _unrouted(deployment, 3)
    assert [b"1" for one in letters.values() if one.headers.get(r"\xff\xfe\xfd") == b"1"] == [b"1"]
    await deployment.all_committed()
    assert len(deployment.inbox.received("/acme")) == 4 * 3 + 40
    assert worker.process.poll() is None


async def test_strange_but_valid_events_arrive_as_they_were_published(deployment: Deployment) -> None:
    await deployment.apply({"tenants": [deployment.tenant("acme")]})
    worker = await deployment.worker()
    payloads = [
        b'{"total": 1e400}',
        b'{"total": 0.1000000000000000055511151231257827}',
        b'{"total": ' + b"9" * 1000 + b"}",
        b'{"twice": 1, "twice": 2}',
        b'{"text": "\\u0000\\ud83d\\ude00"}',
        b'"\xf0\x9f\x98\x80"',
        b"null",
        b"[]",
        b"-0",
        b"[" * 500 + b"]" * 500,
        b'"' + b"y" * (MIB - 2000) + b'"',
    ]
    await deployment.publish(
        [("acme", _event(payload, b', "eventId": "e%d"' % n)) for n, payload in enumerate(payloads)]
    )
    received = await deployment.inbox.wait_for("/acme", len(payloads), 60)
    bodies = [one.body for one in received]
    for payload in payloads:
        assert sum(b'"payload":' + payload in body for body in bodies) == 1, payload[:60]
    assert worker.metric("headgate_events_total", result="routed") == len(payloads)
    assert deployment.unrouted() == []
