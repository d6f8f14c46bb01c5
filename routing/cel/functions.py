"""The functions and methods of CEL: which types each takes, what it gives, what it does.

One table serves the checker (which overloads can apply) and the closures (which one does). Methods stand under their
name with a leading dot.
"""

import math
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from functools import lru_cache
from typing import Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from msgspec import Struct

from routing.cel.errors import FilterFault
from routing.cel.patterns import matches
from routing.cel.values import (
    BYTES_PER_STEP_SHIFT,
    MAX_INT,
    MAX_UINT,
    MIN_INT,
    Duration,
    Scope,
    Timestamp,
    TypeName,
    UInt,
    Value,
    duration_of,
    kind,
    nearest_double,
    spend,
    timestamp_of,
)


class Overload(Struct, frozen=True):
    """One way to call a function: the result's type and the code, called with the scope and the arguments."""

    result: str
    run: Callable[..., Value]


# ---------------------------------------------------------------- conversions

_INT_TEXT: Final = re.compile(r"[+-]?[0-9]{1,40}")
_UINT_TEXT: Final = re.compile(r"[0-9]{1,40}")
_DOUBLE_TEXT: Final = re.compile(
    r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|[+-]?(?:[iI]nf|[iI]nfinity)|NaN"
)
_TRUE: Final = frozenset({"1", "t", "T", "true", "TRUE", "True"})
_FALSE: Final = frozenset({"0", "f", "F", "false", "FALSE", "False"})
_MAX_NUMBER_CHARACTERS: Final = 500


def _int_of_double(scope: Scope, value: float) -> int:
    # the bounds themselves are refused: doubles near them stand for numbers on both sides
    if not float(MIN_INT) < value < float(MAX_INT):
        raise FilterFault("int() of a double beyond 64 bits")
    return int(value)


def _int_of_uint(scope: Scope, value: UInt) -> int:
    if value > MAX_INT:
        raise FilterFault("int() of a uint beyond 64 bits")
    return int(value)


def _int_of_text(scope: Scope, value: str) -> int:
    if _INT_TEXT.fullmatch(value) is None or not MIN_INT <= int(value) <= MAX_INT:
        raise FilterFault("int() of a text that is no 64-bit integer")
    return int(value)


def _int_of_timestamp(scope: Scope, value: Timestamp) -> int:
    return int(value) // 10**9


def _uint_of_int(scope: Scope, value: int) -> UInt:
    if value < 0:
        raise FilterFault("uint() of a negative number")
    return UInt(value)


def _uint_of_double(scope: Scope, value: float) -> UInt:
    if not -1.0 < value < float(MAX_UINT):
        raise FilterFault("uint() of a double outside 0 to 2^64-1")
    return UInt(int(value))


def _uint_of_text(scope: Scope, value: str) -> UInt:
    if _UINT_TEXT.fullmatch(value) is None or int(value) > MAX_UINT:
        raise FilterFault("uint() of a text that is no 64-bit integer without sign")
    return UInt(int(value))


def _double_of_int(scope: Scope, value: int) -> float:
    return nearest_double(int(value))


def _double_of_text(scope: Scope, value: str) -> float:
    if len(value) <= _MAX_NUMBER_CHARACTERS:
        spend(scope, len(value) >> 1)
    if len(value) > _MAX_NUMBER_CHARACTERS or _DOUBLE_TEXT.fullmatch(value) is None:
        raise FilterFault("double() of a text that is no number")
    return float(value)


def _text_of_int(scope: Scope, value: int) -> str:
    return str(int(value))


def _text_of_double(scope: Scope, value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(value).removesuffix(".0")


def _text_of_bool(scope: Scope, value: bool) -> str:
    return "true" if value else "false"


def _text_of_bytes(scope: Scope, value: bytes) -> str:
    spend(scope, len(value) >> BYTES_PER_STEP_SHIFT)
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise FilterFault("string() of bytes that are no UTF-8") from None


def _bytes_of_text(scope: Scope, value: str) -> bytes:
    spend(scope, len(value) >> BYTES_PER_STEP_SHIFT)
    return value.encode()


def _bool_of_text(scope: Scope, value: str) -> bool:
    if value in _TRUE:
        return True
    if value in _FALSE:
        return False
    raise FilterFault("bool() of a text that is neither true nor false")


def _same(scope: Scope, value: Value) -> Value:
    return value


def _type(scope: Scope, value: Value) -> TypeName:
    return TypeName("null_type" if value is None else kind(value))


def _size(scope: Scope, value: Value) -> int:
    return len(value)


# ---------------------------------------------------------------- time

_TIMESTAMP: Final = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[Tt](\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))?(?:[Zz]|([+-])(\d\d):(\d\d))", re.ASCII
)
_DURATION: Final = re.compile(r"([+-]?)((?:[0-9]{1,30}(?:\.[0-9]{0,30})?(?:h|ms|m|s|us|µs|μs|ns))+|0)")
_DURATION_PART: Final = re.compile(r"([0-9]+)(?:\.([0-9]*))?(h|ms|m|s|us|µs|μs|ns)")
_UNIT_NANOS: Final = {
    "h": 3600 * 10**9,
    "m": 60 * 10**9,
    "s": 10**9,
    "ms": 10**6,
    "us": 10**3,
    "µs": 10**3,
    "μs": 10**3,
    "ns": 1,
}
_OFFSET: Final = re.compile(r"([+-]?)(\d\d):(\d\d)", re.ASCII)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_EPOCH_DAYS: Final = datetime(1970, 1, 1).toordinal()


def parse_timestamp(text: str) -> Timestamp:
    """RFC 3339, to the nanosecond. Raises FilterFault."""
    match = _TIMESTAMP.fullmatch(text)
    if match is None:
        raise FilterFault("timestamp() of a text that is not like 2026-11-21T09:30:00Z")
    year, month, day, hour, minute, second, fraction, sign, zone_hours, zone_minutes = match.groups()
    try:
        days = datetime(int(year), int(month), int(day), int(hour), int(minute), int(second)).toordinal() - _EPOCH_DAYS
    except ValueError:
        raise FilterFault("timestamp() of a time that does not exist") from None
    seconds = days * 86400 + int(hour) * 3600 + int(minute) * 60 + int(second)
    if sign:
        offset = int(zone_hours) * 3600 + int(zone_minutes) * 60
        seconds -= -offset if sign == "-" else offset
    return timestamp_of(seconds * 10**9 + (int(fraction.ljust(9, "0")) if fraction else 0))


def _timestamp_of_text(scope: Scope, value: str) -> Timestamp:
    return parse_timestamp(value)


def _timestamp_of_int(scope: Scope, value: int) -> Timestamp:
    return timestamp_of(value * 10**9)


def _duration_of_text(scope: Scope, value: str) -> Duration:
    if len(value) <= _MAX_NUMBER_CHARACTERS:
        spend(scope, len(value))
    match = _DURATION.fullmatch(value) if len(value) <= _MAX_NUMBER_CHARACTERS else None
    if match is None:
        raise FilterFault("duration() of a text that is not like 1h30m or 2.5s")
    total = 0
    for whole, fraction, unit in _DURATION_PART.findall(match.group(2)):
        total += int(whole) * _UNIT_NANOS[unit]
        if fraction:
            total += int(fraction) * _UNIT_NANOS[unit] // 10 ** len(fraction)
    return duration_of(-total if match.group(1) == "-" else total)


def _fraction(nanos: int) -> str:
    return f".{nanos:09d}".rstrip("0") if nanos else ""


def _text_of_timestamp(scope: Scope, value: Timestamp) -> str:
    nanos = int(value) % 10**9
    return f"{_at(value, UTC).replace(tzinfo=None, microsecond=0).isoformat()}{_fraction(nanos)}Z"


def _text_of_duration(scope: Scope, value: Duration) -> str:
    seconds, nanos = divmod(abs(int(value)), 10**9)
    return f"{'-' if value < 0 else ''}{seconds}{_fraction(nanos)}s"


def _at(value: Timestamp, zone: tzinfo) -> datetime:
    at = _EPOCH + timedelta(seconds=int(value) // 10**9)
    if zone is UTC:
        return at
    try:
        return at.astimezone(zone)
    except (OverflowError, ValueError):
        raise FilterFault("a timestamp lies outside the years 1 to 9999 in this time zone") from None


def fixed_zone(name: str) -> tzinfo | None:
    """UTC or an offset such as +02:00; None for anything else."""
    if name in ("UTC", "Z"):
        return UTC
    match = _OFFSET.fullmatch(name)
    if match is None or int(match.group(2)) > 23 or int(match.group(3)) > 59:
        return None
    offset = timedelta(hours=int(match.group(2)), minutes=int(match.group(3)))
    return timezone(-offset if match.group(1) == "-" else offset)


@lru_cache(maxsize=64)
def named_zone(name: str) -> tzinfo | None:
    """A zone of the IANA database, looked up when a filter is compiled; None if there is none of that name.

    Never asked with a text from an event: the database is files.
    """
    try:
        return fixed_zone(name) or ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return None


# what each method reads from the local time
DATE_PARTS: Final[Mapping[str, Callable[[datetime], int]]] = {
    "getFullYear": lambda at: at.year,
    "getMonth": lambda at: at.month - 1,
    "getDate": lambda at: at.day,
    "getDayOfMonth": lambda at: at.day - 1,
    "getDayOfWeek": lambda at: at.isoweekday() % 7,
    "getDayOfYear": lambda at: at.timetuple().tm_yday - 1,
    "getHours": lambda at: at.hour,
    "getMinutes": lambda at: at.minute,
    "getSeconds": lambda at: at.second,
}


def date_part(name: str, zone: tzinfo) -> Callable[[Scope, Timestamp], int]:
    """The method `name` of timestamps, in one zone."""
    if name == "getMilliseconds":
        return lambda scope, value: int(value) % 10**9 // 10**6
    part = DATE_PARTS[name]
    return lambda scope, value: part(_at(value, zone))


def _date_part_in(name: str) -> Callable[[Scope, Timestamp, str], int]:
    def run(scope: Scope, value: Timestamp, zone_name: str) -> int:
        zone = fixed_zone(zone_name)
        if zone is None:
            raise FilterFault("a time zone that is not written in the expression must be UTC or an offset like +02:00")
        return date_part(name, zone)(scope, value)

    return run


def _duration_part(nanos: int) -> Callable[[Scope, Duration], int]:
    """Whole units, cut towards zero."""

    def run(scope: Scope, value: Duration) -> int:
        count = abs(int(value)) // nanos
        return -count if value < 0 else count

    return run


def _duration_millis(scope: Scope, value: Duration) -> int:
    """The milliseconds within the second."""
    millis = abs(int(value)) % 10**9 // 10**6
    return -millis if value < 0 else millis


# ---------------------------------------------------------------- texts


# where one of these is exceeded, Python searches in linear time; below both, it may look at each part of the text once
# for each character of what it searches
_LONG_TEXT: Final = 30_000
_LONG_PART: Final = 100
_SHORT_TEXT: Final = 2_500


def contains(scope: Scope, text: str, part: str) -> bool:
    length, sought = len(text), len(part)
    steps = length >> BYTES_PER_STEP_SHIFT
    if length < _SHORT_TEXT or (sought < _LONG_PART and length < _LONG_TEXT):
        steps += max(0, length - sought) * sought >> 8
    spend(scope, steps)
    return part in text


def starts_with(scope: Scope, text: str, part: str) -> bool:
    if len(part) > _LONG_PART:
        spend(scope, len(part) >> BYTES_PER_STEP_SHIFT)
    return text.startswith(part)


def ends_with(scope: Scope, text: str, part: str) -> bool:
    if len(part) > _LONG_PART:
        spend(scope, len(part) >> BYTES_PER_STEP_SHIFT)
    return text.endswith(part)


# ---------------------------------------------------------------- the table

_EVERY: Final = (
    "int",
    "uint",
    "double",
    "string",
    "bytes",
    "bool",
    "null",
    "list",
    "map",
    "timestamp",
    "duration",
    "type",
)
_SIZES: Final[dict[tuple[str, ...], Overload]] = {
    (of,): Overload("int", _size) for of in ("string", "bytes", "list", "map")
}

OVERLOADS: Final[dict[str, dict[tuple[str, ...], Overload]]] = {
    "size": _SIZES,
    ".size": _SIZES,
    "int": {
        ("int",): Overload("int", _same),
        ("uint",): Overload("int", _int_of_uint),
        ("double",): Overload("int", _int_of_double),
        ("string",): Overload("int", _int_of_text),
        ("timestamp",): Overload("int", _int_of_timestamp),
    },
    "uint": {
        ("uint",): Overload("uint", _same),
        ("int",): Overload("uint", _uint_of_int),
        ("double",): Overload("uint", _uint_of_double),
        ("string",): Overload("uint", _uint_of_text),
    },
    "double": {
        ("double",): Overload("double", _same),
        ("int",): Overload("double", _double_of_int),
        ("uint",): Overload("double", _double_of_int),
        ("string",): Overload("double", _double_of_text),
    },
    "string": {
        ("string",): Overload("string", _same),
        ("int",): Overload("string", _text_of_int),
        ("uint",): Overload("string", _text_of_int),
        ("double",): Overload("string", _text_of_double),
        ("bool",): Overload("string", _text_of_bool),
        ("bytes",): Overload("string", _text_of_bytes),
        ("timestamp",): Overload("string", _text_of_timestamp),
        ("duration",): Overload("string", _text_of_duration),
    },
    "bool": {("bool",): Overload("bool", _same), ("string",): Overload("bool", _bool_of_text)},
    "bytes": {("bytes",): Overload("bytes", _same), ("string",): Overload("bytes", _bytes_of_text)},
    "timestamp": {
        ("timestamp",): Overload("timestamp", _same),
        ("string",): Overload("timestamp", _timestamp_of_text),
        ("int",): Overload("timestamp", _timestamp_of_int),
    },
    "duration": {
        ("duration",): Overload("duration", _same),
        ("string",): Overload("duration", _duration_of_text),
    },
    "dyn": {(of,): Overload("dyn", _same) for of in _EVERY},
    "type": {(of,): Overload("type", _type) for of in _EVERY},
    ".contains": {("string", "string"): Overload("bool", contains)},
    ".startsWith": {("string", "string"): Overload("bool", starts_with)},
    ".endsWith": {("string", "string"): Overload("bool", ends_with)},
    ".matches": {("string", "string"): Overload("bool", matches)},
    "matches": {("string", "string"): Overload("bool", matches)},
}

for _name in (*DATE_PARTS, "getMilliseconds"):
    OVERLOADS["." + _name] = {
        ("timestamp",): Overload("int", date_part(_name, UTC)),
        ("timestamp", "string"): Overload("int", _date_part_in(_name)),
    }
for _name, _nanos in (("getHours", 3600 * 10**9), ("getMinutes", 60 * 10**9), ("getSeconds", 10**9)):
    OVERLOADS["." + _name][("duration",)] = Overload("int", _duration_part(_nanos))
OVERLOADS[".getMilliseconds"][("duration",)] = Overload("int", _duration_millis)

# called with fixed texts these are worked out when the filter is compiled
CONVERSIONS: Final = frozenset({"int", "uint", "double", "string", "bool", "bytes", "timestamp", "duration"})
TYPE_NAMES: Final = frozenset(_EVERY) - {"null", "timestamp", "duration"} | {"null_type"}
# types whose names in the language are long
LONG_TYPE_NAMES: Final = {"google.protobuf.Timestamp": "timestamp", "google.protobuf.Duration": "duration"}
