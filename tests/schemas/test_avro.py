"""Avro records to the JSON of the envelope: how each type is spelled, held against fastavro, hostile input included."""

import base64
import io
import json
import random
import signal
import subprocess
import sys
import tracemalloc
import uuid
from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import fastavro
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.avro.reader import MAX_DEPTH, MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH, Envelope, compile_envelope, schema_id
from schemas.event import Event, Problem, decode_event
from schemas.ids import ExternalId
from tests.schema_registry import record

EVENT_SCHEMA: Final = Path(__file__).parents[2] / "schemas" / "avro" / "event.avsc"
MIB: Final = 1 << 20
MORNING: Final = datetime(2026, 11, 21, 9, 30, tzinfo=UTC)
UUID: Final = uuid.UUID("9f7c1a52-1111-4222-8333-abcdefabcdef")
HEAD: Final = b"\x00\x00\x00\x00\x01"


def logical(kind: str, known_as: str, **more: Any) -> dict[str, Any]:
    return {"type": kind, "logicalType": known_as, **more}


def envelope(payload: Any, *more: dict[str, Any]) -> dict[str, Any]:
    """A schema of the envelope with this type of payload, and `more` fields."""
    fields = [{"name": "eventType", "type": "string"}, *more, {"name": "payload", "type": payload}]
    return {"type": "record", "name": "Event", "namespace": "test", "fields": fields}


def reader(schema: Any) -> Envelope:
    made = compile_envelope(schema if isinstance(schema, str) else json.dumps(schema))
    assert not isinstance(made, Problem), made
    return made


def text_of(schema: Any, value: dict[str, Any]) -> str:
    found = reader(schema)(record(1, schema, value), MIB)
    assert isinstance(found, bytes), found
    return found.decode()


def payload_of(kind: Any, value: Any) -> str:
    text = text_of(envelope(kind), {"eventType": "t", "payload": value})
    assert text.startswith('{"eventType":"t","payload":')
    return text[len('{"eventType":"t","payload":') : -1]


def problem_of(schema: Any, raw: bytes, max_bytes: int = MIB) -> Problem:
    """`raw` is the record behind the header."""
    found = reader(schema)(HEAD + raw, max_bytes)
    assert isinstance(found, Problem), found
    return found


def long(number: int) -> bytes:
    number = (number << 1) ^ (number >> 63)
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


NODE: Final = {"type": "record", "name": "Node", "fields": [{"name": "next", "type": ["null", "Node"]}]}
TREE: Final = {"type": "record", "name": "T", "fields": [{"name": "below", "type": {"type": "array", "items": "T"}}]}


# ---------------------------------------------------------------- how each type is spelled


@pytest.mark.parametrize(
    ("kind", "value", "spelled"),
    [
        ("null", None, "null"),
        ("boolean", True, "true"),
        ("int", -(2**31), "-2147483648"),
        ("long", 2**63 - 1, "9223372036854775807"),
        ("long", -(2**63), "-9223372036854775808"),
        ("float", 0.1, "0.1"),
        ("float", 3.4028234663852886e38, "3.4028235e+38"),
        ("double", 0.1, "0.1"),
        ("double", -0.0, "-0.0"),
        ("double", 5e-324, "5e-324"),
        ({"type": "array", "items": "int"}, [1, -2], "[1,-2]"),
        ({"type": "array", "items": "int"}, [], "[]"),
        ({"type": "map", "values": "int"}, {'a"b': 1, "é": 2}, '{"a\\"b":1,"é":2}'),
        ({"type": "enum", "name": "Side", "symbols": ["LEFT", "RIGHT"]}, "RIGHT", '"RIGHT"'),
        ({"type": "fixed", "name": "F", "size": 2}, b"\xff\x00", '"/wA="'),
        ({"type": "array", "items": "bytes"}, [b"\xff\x00"], '["/wA="]'),
        ({"type": "array", "items": "string"}, ['{"a"\n', "\u2028"], '["{\\"a\\"\\n","\u2028"]'),
        (["null", "long", {"type": "array", "items": "long"}], 7, "7"),
        (logical("bytes", "decimal", precision=9, scale=2), Decimal("12.00"), "12.00"),
        (logical("bytes", "decimal", precision=9, scale=2), Decimal("-0.05"), "-0.05"),
        (logical("bytes", "decimal", precision=9), Decimal("12"), "12"),
        (logical("fixed", "decimal", name="D", size=40, precision=90, scale=9), Decimal(10**60), f"{10**60}.000000000"),
        (logical("int", "date"), date(2026, 11, 21), '"2026-11-21"'),
        (logical("int", "time-millis"), time(9, 30, 0, 5000), '"09:30:00.005"'),
        (logical("long", "time-micros"), time(9, 30, 0, 5), '"09:30:00.000005"'),
        (logical("long", "timestamp-millis"), MORNING, '"2026-11-21T09:30:00.000Z"'),
        (logical("long", "timestamp-micros"), datetime(1, 1, 1, tzinfo=UTC), '"0001-01-01T00:00:00.000000Z"'),
        (logical("long", "timestamp-nanos"), 1, '"1970-01-01T00:00:00.000000001Z"'),
        (logical("long", "local-timestamp-millis"), datetime(2026, 11, 21, 9, 30), '"2026-11-21T09:30:00.000"'),
        ({"type": "array", "items": logical("string", "uuid")}, [UUID], f'["{UUID}"]'),
        (logical("fixed", "uuid", name="U", size=16), UUID.bytes, f'"{UUID}"'),
        (logical("int", "of-our-own"), 7, "7"),
        (NODE, {"next": {"next": None}}, '{"next":{"next":null}}'),
        ({"type": "record", "name": "Empty", "fields": []}, {}, "{}"),
    ],
)  # fmt: skip
def test_a_payload_is_spelled_as(kind: Any, value: Any, spelled: str) -> None:
    assert payload_of(kind, value) == spelled


@pytest.mark.parametrize("kind", ["string", "bytes", ["null", "string"]])
def test_a_text_or_bytes_as_payload_are_json_and_stay_as_they_are(kind: Any) -> None:
    text = '{"total": 1.10,\t"big": 1e400, "twice": 1, "twice": 2}'
    assert payload_of(kind, text if kind != "bytes" else text.encode()) == text


@pytest.mark.parametrize(
    "text", ['{"a": 1}, "eventId": "injected"', "", "NaN", "{", '"\\ud800"', '"\x00"', "[" * 10**5]
)
@pytest.mark.parametrize("kind", ["string", "bytes"])
def test_a_text_as_payload_that_is_not_one_json_value_is_malformed(kind: str, text: str) -> None:
    raw = long(1) + b"t" + long(len(text)) + text.encode()
    assert problem_of(envelope(kind), raw).code == "malformed"


def test_the_published_schema_holds_every_field_of_the_envelope_and_its_defaults_are_ours() -> None:
    schema = json.loads(EVENT_SCHEMA.read_text())
    assert {field["name"] for field in schema["fields"]} == set(Event.__struct_fields__)
    least = decoded(schema, {"eventType": "invoice.paid", "payload": '{"total": 12}'})
    assert least == decode_event(
        b'{"eventType": "invoice.paid", "payload": {"total": 12}}', ExternalId("acme"), "p-", 7, 0, MIB
    )
    all_of_it = decoded(
        schema,
        {
            "eventType": "invoice.paid",
            "payload": "[]",
            "eventId": "e1",
            "occurredAt": datetime(2026, 11, 21, 9, 30, tzinfo=UTC),
            "customerExternalId": "acme",
            "schemaVersion": 3,
            "idempotencyKey": "k1",
            "source": "billing",
            "aggregateId": "inv_42",
            "metadata": {"correlationId": "c1"},
        },
    )
    assert isinstance(all_of_it, Event)
    assert (all_of_it.occurredAt, all_of_it.schemaVersion) == ("2026-11-21T09:30:00.000Z", 3)
    assert bytes(all_of_it.metadata) == b'{"correlationId":"c1"}'


def decoded(schema: Any, value: dict[str, Any]) -> Event | Problem:
    return decode_event(text_of(schema, value).encode(), ExternalId("acme"), "p-", 7, 0, MIB)


def test_a_null_leaves_a_field_of_the_envelope_out_but_is_a_payload() -> None:
    schema = envelope(["null", "string"], {"name": "source", "type": ["null", "string"]})
    assert text_of(schema, {"eventType": "t", "source": None, "payload": None}) == '{"eventType":"t","payload":null}'
    # a text of that spelling is none
    assert '"source":"null"' in text_of(schema, {"eventType": "t", "source": "null", "payload": None})


def test_a_field_that_the_envelope_does_not_have_is_refused_as_in_json() -> None:
    schema = envelope("string", {"name": "customerID", "type": "string"})
    problem = decoded(schema, {"eventType": "t", "customerID": "acme", "payload": "1"})
    assert isinstance(problem, Problem)
    assert "customerID" in problem.detail


@pytest.mark.parametrize(
    ("value", "found"),
    [(HEAD, 1), (b"\x00\x7f\xff\xff\xff...", 2**31 - 1), (b"\x00" * 9, None), (b"\x00\xff\xff\xff\xff", None),
     (b"\x00\x00\x00\x00", None), (b"\x01\x00\x00\x00\x01", None), (b"", None)],
)  # fmt: skip
def test_the_wire_format_is_a_zero_byte_and_an_id(value: bytes, found: int | None) -> None:
    assert schema_id(value) == found


# ---------------------------------------------------------------- held against fastavro


_NAMES = st.text("abcdefgh", min_size=1, max_size=8)
_COUNTER = iter(range(10**9))


def _schemas(kinds: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    fields = st.lists(st.tuples(_NAMES, kinds), max_size=4, unique_by=lambda pair: pair[0])
    return st.one_of(
        kinds.map(lambda items: {"type": "array", "items": items}),
        kinds.map(lambda values: {"type": "map", "values": values}),
        kinds.filter(lambda kind: kind != "null" and not isinstance(kind, list)).map(lambda kind: ["null", kind]),
        fields.map(
            lambda pairs: {
                "type": "record",
                "name": f"R{next(_COUNTER)}",
                "fields": [{"name": name, "type": kind} for name, kind in pairs],
            }
        ),
    )


KINDS = st.recursive(
    st.one_of(
        st.sampled_from(["null", "boolean", "int", "long", "float", "double"]),
        st.just(logical("long", "timestamp-micros")),
        st.just(logical("int", "date")),
        st.just(logical("bytes", "decimal", precision=30, scale=4)),
    ),
    _schemas,
    max_leaves=8,
)


def values(kind: Any) -> st.SearchStrategy[Any]:
    if isinstance(kind, list):
        return st.one_of([values(branch) for branch in kind])
    if isinstance(kind, dict):
        match kind.get("logicalType", kind["type"]):
            case "array":
                return st.lists(values(kind["items"]), max_size=4)
            case "map":
                return st.dictionaries(st.text(max_size=5), values(kind["values"]), max_size=4)
            case "record":
                return st.fixed_dictionaries({field["name"]: values(field["type"]) for field in kind["fields"]})
            case "timestamp-micros":
                return st.datetimes(timezones=st.just(UTC))
            case "date":
                return st.dates()
            case "decimal":
                return st.decimals(-(10**20), 10**20, places=4, allow_nan=False)
    return {
        "null": st.none(),
        "boolean": st.booleans(),
        "int": st.integers(-(2**31), 2**31 - 1),
        "long": st.integers(-(2**63), 2**63 - 1),
        "float": st.floats(width=32, allow_nan=False, allow_infinity=False),
        "double": st.floats(allow_nan=False, allow_infinity=False),
    }[kind]


def meant(value: Any) -> Any:
    """What fastavro has read, as JSON would hold it."""
    match value:
        case datetime():
            parts = (value - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
            return (datetime(1970, 1, 1) + timedelta(seconds=parts // 10**6)).isoformat() + f".{parts % 10**6:06d}Z"
        case date():
            return value.isoformat()
        case bytes():
            return base64.b64encode(value).decode()
        case dict():
            return {name: meant(one) for name, one in value.items()}
        case list():
            return [meant(one) for one in value]
    return value


def same(ours: Any, theirs: Any) -> bool:
    match theirs:
        case dict():
            return ours.keys() == theirs.keys() and all(same(ours[name], theirs[name]) for name in theirs)
        case list():
            return len(ours) == len(theirs) and all(map(same, ours, theirs))
        case bool() | None | str():
            return bool(ours == theirs)
        case float():  # the digits that a 32-bit float needs are fewer
            return float(ours) == theirs or abs(float(ours) - theirs) <= abs(theirs) * 2**-24 + 1e-45
    return Decimal(ours) == theirs


@given(st.data())
def test_a_payload_reads_as_fastavro_reads_it(data: st.DataObject) -> None:
    kind = data.draw(KINDS)
    value = data.draw(values(kind))
    schema = envelope(kind)
    written = record(1, schema, {"eventType": "t", "payload": value})
    found = reader(schema)(written, MIB)
    assert isinstance(found, bytes), found
    ours = json.loads(found, parse_float=Decimal)["payload"]
    theirs = fastavro.schemaless_reader(io.BytesIO(written[5:]), fastavro.parse_schema(schema), None)
    assert same(ours, meant(theirs["payload"]))


# ---------------------------------------------------------------- hostile records


WIDE: Final = {
    "type": "record",
    "name": "Wide",
    "fields": [{"name": f"a_long_name_of_field_{number}", "type": "null"} for number in range(2000)],
}
TEXTS: Final = {"type": "array", "items": "string"}
ONE: Final = long(1) + b"t"  # the field eventType
HOSTILE: Final[list[tuple[str, Any, bytes, str]]] = [
    ("a chain of a million", NODE, long(1) * MIB + long(0), "malformed"),
    ("a tree of a million", TREE, long(1) * MIB + long(0) * MIB, "malformed"),
    ("2^62 nulls", {"type": "array", "items": "null"}, long(2**62) + long(0), "too_large"),
    ("2^62 empty records", {"type": "array", "items": WIDE}, long(2**62) + long(0), "too_large"),
    ("-2^63 items", {"type": "array", "items": "null"}, long(-(2**63)) + long(3) + long(0), "too_large"),
    ("2^62 items that are not there", {"type": "array", "items": "int"}, long(2**62), "malformed"),
    ("2^62 entries that are not there", {"type": "map", "values": "null"}, long(2**62), "malformed"),
    ("bytes of 2^62", {"type": "array", "items": "bytes"}, long(1) + long(2**62) + b"x", "malformed"),
    ("bytes of -1", {"type": "array", "items": "bytes"}, long(1) + long(-1) + b"x", "malformed"),
    ("a text of 2^62", TEXTS, long(1) + long(2**62) + b"x", "malformed"),
    ("a zigzag of a megabyte", "long", b"\xff" * MIB, "malformed"),
    ("a zigzag of 65 bits", "long", b"\xff" * 9 + b"\x03", "malformed"),
    ("a decimal of a megabyte", logical("bytes", "decimal", precision=9), long(MIB) + b"\x7f" * MIB, "malformed"),
    ("no such branch", ["null", "int"], long(2), "malformed"),
    ("a branch of -1", ["null", "int"], long(-1), "malformed"),
    ("no such symbol", {"type": "enum", "name": "E", "symbols": ["A"]}, long(1), "malformed"),
    ("a symbol of -1", {"type": "enum", "name": "E", "symbols": ["A"]}, long(-1), "malformed"),
    ("a boolean of 2", "boolean", b"\x02", "malformed"),
    ("NaN", "double", b"\x00" * 6 + b"\xf8\x7f", "malformed"),
    ("infinity", "float", b"\x00\x00\x80\x7f", "malformed"),
    ("a text that is not UTF-8", TEXTS, long(1) + long(2) + b"\xff\xfe" + long(0), "malformed"),
    ("a surrogate", TEXTS, long(1) + long(3) + b"\xed\xa0\x80" + long(0), "malformed"),
    ("the year 300,000", logical("long", "timestamp-millis"), long(2**63 - 1), "malformed"),
    ("the day before all", logical("int", "date"), long(-(2**31)), "malformed"),
    ("the 25th hour", logical("int", "time-millis"), long(90_000_000), "malformed"),
    ("a time of day before midnight", logical("int", "time-millis"), long(-1), "malformed"),
    ("bytes behind its end", "null", b"x", "malformed"),
    ("an envelope in an envelope", ["null", "test.Event"], long(1), "malformed"),
    ("nothing at all", "int", b"", "malformed"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "raw", "code"), [case[1:] for case in HOSTILE], ids=[case[0] for case in HOSTILE])
def test_a_hostile_record_ends_as_a_problem_in_little_memory(kind: Any, raw: bytes, code: str) -> None:
    schema = envelope(kind)
    read, value = reader(schema), HEAD + ONE + raw
    tracemalloc.start()
    try:
        found = read(value, MIB)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert isinstance(found, Problem)
    assert found.code == code
    assert peak < 6 * MIB  # of a record of up to 2 MiB, and an event of 1 MiB


def test_fastavro_by_itself_would_not_survive_them() -> None:
    """The control, in processes that may die: why records are read here."""
    script = """
import io, json, resource, sys, fastavro
resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
schema = fastavro.parse_schema(json.loads(sys.argv[1]))
fastavro.schemaless_reader(io.BytesIO(sys.stdin.buffer.read()), schema, None)
"""
    ended = {}
    for name, kind, raw, _ in HOSTILE:
        if name in ("a chain of a million", "2^62 nulls"):
            done = subprocess.run([sys.executable, "-c", script, json.dumps(kind)], input=raw, capture_output=True)
            ended[name] = "MemoryError" if b"MemoryError" in done.stderr else done.returncode
    assert ended == {"a chain of a million": -signal.SIGSEGV, "2^62 nulls": "MemoryError"}


CHAIN: Final = {
    "type": "record",
    "name": "Chain",
    "fields": [{"name": "next", "type": {"type": "array", "items": ["null", "Chain"]}}],
}


@pytest.mark.parametrize(("kind", "step"), [(NODE, 1), (CHAIN, 2)])
def test_a_record_may_be_nested_as_deep_as_said(kind: Any, step: int) -> None:
    raw = {1: long(1) * (MAX_DEPTH - 1) + long(0), 2: (long(1) * 2) * (MAX_DEPTH // 2 - 1) + long(0) * (MAX_DEPTH // 2)}
    found = reader(envelope(kind))(HEAD + ONE + raw[step], MIB)
    assert isinstance(found, bytes), found
    assert isinstance(decode_event(found, ExternalId("acme"), "p-", 7, 0, MIB), Event)
    assert "nested deeper" in problem_of(envelope(kind), ONE + long(1) * 2 * MAX_DEPTH).detail


def test_no_detail_quotes_what_a_record_holds() -> None:
    schema = envelope({"type": "array", "items": "string"})
    whole = record(1, schema, {"eventType": "canary", "payload": ["canary"] * 5})
    read = reader(schema)
    for cut in range(5, len(whole)):
        problem = read(whole[:cut], MIB)
        assert isinstance(problem, Problem)
        assert "canary" not in problem.detail
    assert isinstance(read(whole, 20), Problem)


# ---------------------------------------------------------------- hostile schemas


def _nested(depth: int) -> Any:
    kind: Any = "int"
    for _ in range(depth):
        kind = {"type": "array", "items": kind}
    return kind


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "no valid Avro"),
        ("{", "no valid Avro"),
        ("null", "no valid Avro"),
        ('"string"', "no record"),
        ('["null", {"type": "record", "name": "E", "fields": []}]', "no record"),
        ('{"type": "record", "name": "E", "fields": [{"name": "payload", "type": "nowhere"}]}', "no valid Avro"),
        ('{"type": "record", "name": "E", "fields": [{"name": "payload", "type": {"type": {}}}]}', "no valid Avro"),
        (json.dumps(envelope(logical("bytes", "decimal", precision=9999, scale=9999))), "no valid Avro"),
        (json.dumps(envelope({"type": "fixed", "name": "F", "size": "x"})), "no valid Avro"),
        (json.dumps(envelope({"type": "fixed", "name": "F", "size": -1})), "no valid Avro"),
        (json.dumps({"__fastavro_parsed": True, "__named_schemas": {}, "type": "record"}), "no valid Avro"),
        (json.dumps(envelope(_nested(MAX_SCHEMA_DEPTH))), "nested deeper"),
        ("[" * 100_000 + "]" * 100_000, "no valid Avro"),
        ('{"type":"array","items":' * 10_000 + '"int"' + "}" * 10_000, "no valid Avro"),
        (" " * MAX_SCHEMA_BYTES + "1", "more than"),
        ("\ud800", "no valid Avro"),
    ],
)  # fmt: skip
def test_a_schema_that_cannot_be_used_is_a_problem(text: str, part: str) -> None:
    problem = compile_envelope(text)
    assert isinstance(problem, Problem)
    assert problem.code == "malformed"
    assert part in problem.detail


def test_a_schema_nested_as_deep_as_may_be_is_read() -> None:
    kind = _nested(28)  # two levels of JSON each, in an envelope of four
    assert payload_of(kind, json.loads("[" * 28 + "]" * 28)) == "[" * 28 + "]" * 28


# ---------------------------------------------------------------- fuzz


def seeds() -> Iterator[tuple[str, bytes]]:
    """Schemas with a record of each."""
    for name, kind, raw, _ in HOSTILE:
        yield json.dumps(envelope(kind)), ONE + raw[:64]
        del name
    schema = json.loads(EVENT_SCHEMA.read_text())
    yield json.dumps(schema), record(1, schema, {"eventType": "t", "payload": '{"a": [1, 2.5]}'})[5:]


def mutated(dice: random.Random, raw: bytes) -> bytes:
    changed = bytearray(raw)
    for _ in range(dice.randint(1, 4)):
        at = dice.randint(0, len(changed))
        match dice.randint(0, 3):
            case 0:
                changed[at : at + 1] = bytes([dice.randrange(256)])
            case 1:
                changed[at:at] = dice.choice([b"\xff" * 8, b"\x80", b"\x00", b"\x01", b"{", b'"', long(2**40)])
            case 2:
                del changed[at : at + dice.randint(1, 8)]
            case 3:
                start = dice.randint(0, len(changed))
                changed[at:at] = changed[start : start + dice.randint(1, 16)]
    return bytes(changed)


def fuzz(count: int) -> None:
    """Every input ends as an event or as a problem, and every JSON that is made is JSON."""
    dice = random.Random(7)
    known = [(text, raw, compile_envelope(text)) for text, raw in seeds()]
    events = problems = readers = 0
    for _ in range(count):
        text, raw, read = dice.choice(known)
        if dice.random() < 0.2:
            read = compile_envelope(mutated(dice, text.encode()).decode("utf-8", "surrogateescape"))
            readers += not isinstance(read, Problem)
        if isinstance(read, Problem):
            problems += 1
            continue
        raw = raw if dice.random() < 0.3 else mutated(dice, raw)
        found = read(HEAD + raw, 4096)
        if isinstance(found, Problem):
            problems += 1
            assert found.code in ("malformed", "too_large")
            continue
        event = decode_event(found, ExternalId("acme"), "p-", 7, 0, MIB)
        if isinstance(event, Problem):
            problems += 1
            json.loads(found)
        else:
            events += 1
    # the control: all of it is met
    assert min(events, problems, readers) > count // 200


def test_no_input_raises() -> None:
    fuzz(20_000)


@pytest.mark.chaos
def test_no_input_of_many_raises() -> None:
    fuzz(1_000_000)
