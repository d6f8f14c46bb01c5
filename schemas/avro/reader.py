"""An Avro schema of the envelope, compiled to a reader that turns its records into the JSON that `decode_event` takes.

Owns how Avro's types are spelled in JSON (docs/events.md) and the bounds on what a schema and a record may ask for.
fastavro checks schemas. Records are read here, without objects in between, since its reader trusts what they declare
(ADR 0014).
"""

import math
import struct
from base64 import b64encode
from collections.abc import Callable, Iterable
from datetime import UTC, date, datetime, timedelta
from typing import Any, Final, TypeAlias
from uuid import UUID

import msgspec
from fastavro import parse_schema

from schemas.event import Problem

MAGIC: Final = 0
HEADER_BYTES: Final = 5
MAX_SCHEMA_BYTES: Final = 256 * 1024
MAX_SCHEMA_DEPTH: Final = 64  # of the schema's own JSON: fastavro's recursion over it is the C stack's
MAX_DEPTH: Final = 200  # of a record: three Python frames each at most
MAX_DECIMAL_DIGITS: Final = 1000
_MAX_DECIMAL_BYTES: Final = 416

Envelope: TypeAlias = Callable[[bytes, int], "bytes | Problem"]
"""From a record in the Confluent wire format, and the most bytes that its JSON may have, to that JSON."""

_json_text = msgspec.json.Encoder().encode
_document = msgspec.json.Decoder(msgspec.Raw).decode
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC).replace(tzinfo=None)
_EPOCH_DAY: Final = _EPOCH.toordinal()


class _Refused(Exception):
    """Why a record cannot be read on; caught where its reading began."""

    def __init__(self, detail: str, code: str = "malformed") -> None:
        self.code = code
        self.detail = detail


class _Cursor:
    """How far a record is read, and the JSON written so far. `room`: the bytes that it may still grow by."""

    __slots__ = ("at", "data", "depth", "room", "text")

    def __init__(self, data: bytes, room: int) -> None:
        self.data = data
        self.at = HEADER_BYTES
        self.text = bytearray()
        self.room = room
        self.depth = 0

    def put(self, part: bytes) -> None:
        """Every value puts at least a byte, so that `room` also bounds how many there are."""
        self.room -= len(part)
        if self.room < 0:
            raise _Refused("has more bytes as JSON than an event may have", "too_large")
        self.text += part

    def number(self) -> int:
        """Zigzag, of at most 64 bits."""
        data, at, shift, number = self.data, self.at, 0, 0
        try:
            while (byte := data[at]) > 127:
                number |= (byte & 127) << shift
                shift += 7
                at += 1
                if shift > 63:
                    raise _Refused("holds a number of more than 64 bits")
        except IndexError:
            raise _Refused("ends too early") from None
        number |= byte << shift
        if number >> 64:
            raise _Refused("holds a number of more than 64 bits")
        self.at = at + 1
        return (number >> 1) ^ -(number & 1)

    def take(self, size: int) -> bytes:
        start = self.at
        if not 0 <= size <= len(self.data) - start:
            raise _Refused("ends too early")
        self.at = start + size
        return self.data[start : start + size]

    def enter(self, part: bytes) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _Refused(f"is nested deeper than {MAX_DEPTH}")
        self.put(part)

    def leave(self, part: bytes) -> None:
        self.depth -= 1
        self.put(part)


_Read: TypeAlias = Callable[[_Cursor], None]


def schema_id(value: bytes) -> int | None:
    """Of a value in the Confluent wire format: a zero byte and four bytes of id; None for anything else."""
    if len(value) < HEADER_BYTES or value[0] != MAGIC:
        return None
    found = int.from_bytes(value[1:HEADER_BYTES], "big")
    return found if 0 < found < 2**31 else None


def compile_envelope(text: str) -> Envelope | Problem:
    """The reader of a schema, or why there is none. Raises nothing for any text."""
    if len(text.encode("utf-8", "replace")) > MAX_SCHEMA_BYTES:
        return Problem("malformed", f"the schema has more than {MAX_SCHEMA_BYTES} bytes")
    try:
        schema = msgspec.json.decode(text)
        if _depth(schema) > MAX_SCHEMA_DEPTH:
            return Problem("malformed", f"the schema is nested deeper than {MAX_SCHEMA_DEPTH}")
        parsed: Any = parse_schema(schema, _force=True)  # also one that says it was parsed already
        if not isinstance(parsed, dict) or parsed["type"] != "record":
            return Problem("malformed", "the schema is no record with the fields of the envelope")
        fields = _Compiler().envelope(parsed)
    except Exception as fault:  # whatever the library makes of a text that is no schema
        return Problem("malformed", f"the schema is no valid Avro schema ({type(fault).__name__})")

    def read(value: bytes, max_bytes: int) -> bytes | Problem:
        cursor = _Cursor(value, max_bytes)
        try:
            return _read_envelope(cursor, fields)
        except _Refused as refused:
            return Problem(refused.code, f"the Avro record {refused.detail} (at byte {cursor.at})")
        except RecursionError:
            return Problem("malformed", "the Avro record is nested too deep")

    return read


def _depth(schema: object) -> int:
    """How deep a JSON document is nested, without recursion."""
    deepest, level = 0, [schema]
    while level:
        deepest += 1
        below: list[object] = []
        for one in level:
            if isinstance(one, dict):
                below += one.values()
            elif isinstance(one, list):
                below += one
        level = below
    return deepest


def _read_envelope(cursor: _Cursor, fields: Iterable[tuple[bytes, bool, _Read]]) -> bytes:
    text = cursor.text
    for key, null_counts, read in fields:
        start = len(text)
        cursor.put(key)
        read(cursor)
        if not null_counts and text.endswith(b":null") and len(text) == start + len(key) + 4:
            del text[start:]  # as a field that is left out
    if cursor.at != len(cursor.data):
        raise _Refused("has bytes behind its end")
    text[:1] = b"{"  # the first field's comma
    text += b"}"
    return bytes(text)


# ---------------------------------------------------------------- from types to readers


class _Compiler:
    """Makes readers of what fastavro has parsed: names are whole there, references are names."""

    def __init__(self) -> None:
        self._named: dict[str, _Read] = {}

    def envelope(self, schema: dict[str, Any]) -> list[tuple[bytes, bool, _Read]]:
        """Of each field: its key, whether a null is one, and its reader."""
        self._named[schema["name"]] = _nothing_inside_itself
        fields = []
        for field in schema["fields"]:
            name = field["name"]
            document = name in ("payload", "metadata")
            fields.append((b"," + _key(name), name == "payload", self.read_of(field["type"], document=document)))
        return fields

    def read_of(self, schema: Any, *, document: bool = False) -> _Read:
        """`document`: a text or bytes hold JSON, in the envelope's free fields."""
        if isinstance(schema, list):
            return _union([self.read_of(branch, document=document) for branch in schema])
        if isinstance(schema, str):
            kind, schema = schema, {}
        else:
            kind = schema["type"]
            if not isinstance(kind, str):
                return self.read_of(kind, document=document)
        if (logical := _logical(kind, schema)) is not None:
            return self._keep(schema, logical) if kind == "fixed" else logical
        if document and kind in ("string", "bytes"):
            return _json
        match kind:
            case "array":
                return _array(self.read_of(schema["items"]))
            case "map":
                return _map(self.read_of(schema["values"]))
            case "record" | "error":
                return self._record(schema)
            case "enum":
                return self._keep(schema, _enum(schema["symbols"]))
            case "fixed":
                return self._keep(schema, _fixed(_size(schema)))
        return _PRIMITIVE.get(kind) or self._reference(kind)

    def _keep(self, schema: dict[str, Any], read: _Read) -> _Read:
        self._named[schema["name"]] = read
        return read

    def _reference(self, name: str) -> _Read:
        named = self._named
        found = named[name]
        # a record that is still being compiled: the one that will stand there
        return (lambda cursor: named[name](cursor)) if found is _nothing_inside_itself else found

    def _record(self, schema: dict[str, Any]) -> _Read:
        self._named[schema["name"]] = _nothing_inside_itself
        fields = [
            ((b"," if place else b"{") + _key(field["name"]), self.read_of(field["type"]))
            for place, field in enumerate(schema["fields"])
        ]

        def read(cursor: _Cursor) -> None:
            cursor.enter(b"" if fields else b"{")
            for key, field in fields:
                cursor.put(key)
                field(cursor)
            cursor.leave(b"}")

        return self._keep(schema, read)


def _key(name: str) -> bytes:
    return _json_text(name) + b":"


def _size(schema: dict[str, Any]) -> int:
    """Of a fixed; fastavro leaves it unchecked. Raises ValueError."""
    size = schema["size"]
    if not isinstance(size, int) or size < 0:
        raise ValueError
    return size


def _nothing_inside_itself(cursor: _Cursor) -> None:
    raise _Refused("holds an envelope in an envelope")


def _union(branches: list[_Read]) -> _Read:
    def read(cursor: _Cursor) -> None:
        place = cursor.number()
        if not 0 <= place < len(branches):
            raise _Refused("names a branch that its union does not have")
        branches[place](cursor)

    return read


def _blocks(cursor: _Cursor) -> Iterable[int]:
    """How many items each block has. What a block says of its bytes is not needed."""
    while (count := cursor.number()) != 0:
        if count < 0:
            cursor.number()
        yield abs(count)


def _repeated(opening: bytes, one: _Read, closing: bytes) -> _Read:
    def read(cursor: _Cursor) -> None:
        cursor.enter(opening)
        between = b""
        for count in _blocks(cursor):
            for _ in range(count):
                cursor.put(between)
                one(cursor)
                between = b","
        cursor.leave(closing)

    return read


def _array(item: _Read) -> _Read:
    return _repeated(b"[", item, b"]")


def _map(value: _Read) -> _Read:
    def member(cursor: _Cursor) -> None:
        _string(cursor)
        cursor.put(b":")
        value(cursor)

    return _repeated(b"{", member, b"}")


def _enum(symbols: Iterable[str]) -> _Read:
    texts = [_json_text(symbol) for symbol in symbols]

    def read(cursor: _Cursor) -> None:
        place = cursor.number()
        if not 0 <= place < len(texts):
            raise _Refused("names a symbol that its enum does not have")
        cursor.put(texts[place])

    return read


def _fixed(size: int) -> _Read:
    return lambda cursor: cursor.put(b'"' + b64encode(cursor.take(size)) + b'"')


def _null(cursor: _Cursor) -> None:
    cursor.put(b"null")


def _boolean(cursor: _Cursor) -> None:
    match cursor.take(1):
        case b"\x00":
            cursor.put(b"false")
        case b"\x01":
            cursor.put(b"true")
        case _:
            raise _Refused("holds a boolean that is neither 0 nor 1")


def _integer(cursor: _Cursor) -> None:
    cursor.put(b"%d" % cursor.number())


def _float(cursor: _Cursor) -> None:
    """In the fewest digits that are this float and no other of 32 bits."""
    raw = cursor.take(4)
    (number,) = struct.unpack("<f", raw)
    if not math.isfinite(number):
        raise _Refused("holds a NaN or an infinity, which JSON does not have")
    text = next(text for digits in range(6, 10) if struct.pack("<f", float(text := f"{number:.{digits}g}")) == raw)
    cursor.put(text.encode())


def _double(cursor: _Cursor) -> None:
    (number,) = struct.unpack("<d", cursor.take(8))
    if not math.isfinite(number):
        raise _Refused("holds a NaN or an infinity, which JSON does not have")
    cursor.put(repr(number).encode())


def _bytes(cursor: _Cursor) -> None:
    cursor.put(b'"' + b64encode(cursor.take(cursor.number())) + b'"')


def _string(cursor: _Cursor) -> None:
    raw = cursor.take(cursor.number())
    try:
        cursor.put(_json_text(str(raw, "utf-8")))
    except UnicodeDecodeError:
        raise _Refused("holds a text that is not UTF-8") from None


def _json(cursor: _Cursor) -> None:
    raw = cursor.take(cursor.number())
    try:
        str(raw, "utf-8")
        cursor.put(bytes(_document(raw)))
    except (UnicodeDecodeError, msgspec.DecodeError, RecursionError):
        raise _Refused("holds a payload or metadata, as string or bytes, that is not JSON") from None


_PRIMITIVE: Final[dict[str, _Read]] = {
    "null": _null,
    "boolean": _boolean,
    "int": _integer,
    "long": _integer,
    "float": _float,
    "double": _double,
    "bytes": _bytes,
    "string": _string,
}


# ---------------------------------------------------------------- logical types


def _logical(kind: str, schema: dict[str, Any]) -> _Read | None:
    """None where there is none that we know on this type: then the type itself counts, as Avro asks for."""
    match schema.get("logicalType"), kind:
        case "decimal", "bytes":
            return _decimal(schema, lambda cursor: cursor.take(cursor.number()))
        case "decimal", "fixed":
            size = _size(schema)
            return _decimal(schema, lambda cursor: cursor.take(size))
        case "uuid", "fixed" if schema["size"] == 16:
            return lambda cursor: cursor.put(b'"%b"' % str(UUID(bytes=cursor.take(16))).encode())
        case "date", "int":
            return _date
        case "time-millis", "int":
            return _time(3)
        case "time-micros", "long":
            return _time(6)
        case ("timestamp-millis" | "timestamp-micros" | "timestamp-nanos") as name, "long":
            return _timestamp(_DIGITS[name.rpartition("-")[2]], "Z")
        case ("local-timestamp-millis" | "local-timestamp-micros" | "local-timestamp-nanos") as name, "long":
            return _timestamp(_DIGITS[name.rpartition("-")[2]], "")
    return None


_DIGITS: Final = {"millis": 3, "micros": 6, "nanos": 9}


def _decimal(schema: dict[str, Any], take: Callable[[_Cursor], bytes]) -> _Read:
    """A number in all the digits of its scale: 1200 of scale 2 is 12.00."""
    scale = schema.get("scale", 0)
    if not 0 <= scale <= MAX_DECIMAL_DIGITS:
        raise ValueError

    def read(cursor: _Cursor) -> None:
        raw = take(cursor)
        if len(raw) > _MAX_DECIMAL_BYTES:
            raise _Refused(f"holds a decimal of more than {MAX_DECIMAL_DIGITS} digits")
        number = int.from_bytes(raw, "big", signed=True)
        digits = str(abs(number)).zfill(scale + 1)
        sign = "-" if number < 0 else ""
        point = len(digits) - scale
        cursor.put(f"{sign}{digits[:point]}.{digits[point:]}".rstrip(".").encode())

    return read


def _date(cursor: _Cursor) -> None:
    try:
        cursor.put(b'"%b"' % date.fromordinal(_EPOCH_DAY + cursor.number()).isoformat().encode())
    except (ValueError, OverflowError):
        raise _Refused("holds a date outside the years 1 to 9999") from None


def _time(digits: int) -> _Read:
    def read(cursor: _Cursor) -> None:
        number = cursor.number()
        if not 0 <= number < 86_400 * 10**digits:
            raise _Refused("holds a time of day outside the day")
        cursor.put(b'"%b"' % _instant(number, digits)[11:].encode())

    return read


def _timestamp(digits: int, zone: str) -> _Read:
    def read(cursor: _Cursor) -> None:
        try:
            cursor.put(f'"{_instant(cursor.number(), digits)}{zone}"'.encode())
        except OverflowError:
            raise _Refused("holds a time outside the years 1 to 9999") from None

    return read


def _instant(number: int, digits: int) -> str:
    """Of so many parts of a second since the epoch."""
    seconds, rest = divmod(number, 10**digits)
    return f"{(_EPOCH + timedelta(seconds=seconds)).isoformat()}.{rest:0{digits}d}"
