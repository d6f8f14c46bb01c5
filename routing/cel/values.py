"""The values of CEL as Python has them, their equality and order, and what a large one costs.

int, double, string, bytes, bool, null and list are int, float, str, bytes, bool, None and list. A map is a dict whose
keys went through `map_key`. uint, timestamp and duration are kinds of int (nanoseconds), so that they compare at C
speed with their own kind; everything here asks for the exact type, since True, UInt(1) and 1 are equal to Python.

JSON integers beyond 64 bits are doubles: `number` makes them so where a value is read out of a document.
"""

import math
from types import NoneType
from typing import Any, Final, TypeAlias

from msgspec import Struct

from routing.cel.errors import FilterFault

MIN_INT: Final = -(2**63)
MAX_INT: Final = 2**63 - 1
MAX_UINT: Final = 2**64 - 1

Value: TypeAlias = Any


class UInt(int):
    __slots__ = ()


class Timestamp(int):
    """Nanoseconds since 1970, UTC."""

    __slots__ = ()


class Duration(int):
    """Nanoseconds."""

    __slots__ = ()


class TypeName(Struct, frozen=True):
    """What `type(x)` gives."""

    name: str


class Scope(Struct, gc=False):
    """What one evaluation sees. Lives as long as one event is looked at.

    `payload` and `metadata` are as `routing/documents.py` decoded them; `local` holds the variables of macros by depth;
    `steps` is what may still be spent: about a hundred nanoseconds each.
    """

    event: Any
    payload: Value
    metadata: Value
    steps: int
    local: list[Value]


KINDS: Final[dict[type, str]] = {
    int: "int",
    UInt: "uint",
    float: "double",
    str: "string",
    bytes: "bytes",
    bool: "bool",
    NoneType: "null",
    list: "list",
    dict: "map",
    Timestamp: "timestamp",
    Duration: "duration",
    TypeName: "type",
}

_NUMBERS: Final = frozenset({int, float, UInt})
_ORDERED: Final = frozenset({str, bool, bytes, Timestamp, Duration})
# what a step pays for, where C does the work
BYTES_PER_STEP_SHIFT: Final = 6
_CONTAINER_STEPS: Final = 3

TRUE_KEY: Final = (True,)
FALSE_KEY: Final = (False,)


def kind(value: Value) -> str:
    return KINDS.get(type(value), "map")


def number(value: Value) -> Value:
    """A JSON integer beyond 64 bits as the double it stands for; anything else as it is."""
    if type(value) is int and not MIN_INT <= value <= MAX_INT:
        return nearest_double(value)
    return value


def nearest_double(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def spend(scope: Scope, steps: int) -> None:
    scope.steps -= steps
    if scope.steps < 0:
        raise FilterFault("the expression costs too much on this event")


def map_key(value: Value) -> Value:
    """A key as dicts hold it: Python would take True for 1."""
    if value is True:
        return TRUE_KEY
    if value is False:
        return FALSE_KEY
    return value


def from_map_key(key: Value) -> Value:
    return key[0] if type(key) is tuple else key


def equal(a: Value, b: Value, scope: Scope) -> bool:
    """Equality across all types: values of different types are unequal, numbers are compared by what they amount to."""
    kind_a, kind_b = type(a), type(b)
    if kind_a in _NUMBERS and kind_b in _NUMBERS:
        return bool(number(a) == number(b))
    if kind_a is not kind_b:
        return False
    if kind_a is list:
        if len(a) != len(b):
            return False
        spend(scope, 2 * len(a) + _CONTAINER_STEPS)
        return all(equal(x, y, scope) for x, y in zip(a, b, strict=True))
    if kind_a is dict:
        if len(a) != len(b):
            return False
        spend(scope, 4 * len(a) + _CONTAINER_STEPS)
        return all(key in b and equal(value, b[key], scope) for key, value in a.items())
    if kind_a is str or kind_a is bytes:
        spend(scope, len(a) >> BYTES_PER_STEP_SHIFT)
    return bool(a == b)


def ordered(op: str, a: Value, b: Value) -> None:
    """Raises unless `a` and `b` have an order."""
    kind_a, kind_b = type(a), type(b)
    if (kind_a in _NUMBERS and kind_b in _NUMBERS) or (kind_a is kind_b and kind_a in _ORDERED):
        return
    raise FilterFault(f"`{op}` cannot compare {kind(a)} with {kind(b)}")


def contained(item: Value, container: Value, scope: Scope) -> bool:
    """`item in container`: an element of a list, a key of a map."""
    if type(container) is list:
        if type(item) is str:
            spend(scope, (len(container) >> 1) + (len(container) * len(item) >> BYTES_PER_STEP_SHIFT + 4))
            return item in container  # no other type equals a str
        spend(scope, 2 * len(container))
        return any(equal(item, element, scope) for element in container)
    if type(container) is dict:
        return _is_key(item) and map_key(item) in container
    raise FilterFault(f"`in` needs a list or a map on its right, found {kind(container)}")


def _is_key(value: Value) -> bool:
    return type(value) in _NUMBERS or type(value) is str or type(value) is bool


def element(container: Value, key: Value) -> Value:
    """`container[key]`."""
    if type(container) is dict:
        if not _is_key(key):
            raise FilterFault(f"a map has no keys of type {kind(key)}")
        try:
            return number(container[map_key(key)])
        except KeyError:
            raise FilterFault("the map has no such key") from None
    if type(container) is list:
        position = key
        if type(key) is float and key.is_integer():
            position = int(key)
        elif type(key) is not int and type(key) is not UInt:
            raise FilterFault(f"the index of a list must be an int, found {kind(key)}")
        if not 0 <= position < len(container):
            raise FilterFault("the index is outside the list")
        return number(container[position])
    raise FilterFault(f"{kind(container)} cannot be indexed")


def field(container: Value, name: str) -> Value:
    """`container.name`."""
    if type(container) is not dict:
        raise FilterFault(f"{kind(container)} has no fields: `{name}` was asked for")
    try:
        return number(container[name])
    except KeyError:
        raise FilterFault(f"there is no field `{name}`") from None


def has_field(container: Value, name: str) -> bool:
    if type(container) is not dict:
        raise FilterFault(f"{kind(container)} has no fields: `{name}` was asked for")
    return name in container


def make_map(keys: list[Value], values: list[Value]) -> dict[Value, Value]:
    made: dict[Value, Value] = {}
    for key, value in zip(keys, values, strict=True):
        if not _is_key(key) or type(key) is float:
            raise FilterFault(f"{kind(key)} cannot be a key of a map")
        made[map_key(key)] = value
    if len(made) != len(keys):
        raise FilterFault("a map has the same key twice")
    return made


# ---------------------------------------------------------------- arithmetic


def _int(op: str, value: int) -> int:
    if not MIN_INT <= value <= MAX_INT:
        raise FilterFault(f"`{op}` overflows 64 bits")
    return value


def _uint(op: str, value: int) -> UInt:
    if not 0 <= value <= MAX_UINT:
        raise FilterFault(f"`{op}` overflows 64 bits")
    return UInt(value)


MIN_TIMESTAMP: Final = -62_135_596_800 * 10**9
MAX_TIMESTAMP: Final = 253_402_300_800 * 10**9 - 1


def timestamp_of(nanos: int) -> Timestamp:
    if not MIN_TIMESTAMP <= nanos <= MAX_TIMESTAMP:
        raise FilterFault("a timestamp lies outside the years 1 to 9999")
    return Timestamp(nanos)


def duration_of(nanos: int) -> Duration:
    if not MIN_INT <= nanos <= MAX_INT:
        raise FilterFault("a duration is longer than 292 years")
    return Duration(nanos)


def _mismatch(op: str, a: Value, b: Value) -> FilterFault:
    text = f"`{op}` does not go with {kind(a)} and {kind(b)}"
    if {type(a), type(b)} == {int, float}:
        text += ": make both double() or both int()"
    return FilterFault(text)


def add(a: Value, b: Value, scope: Scope) -> Value:
    kind_a, kind_b = type(a), type(b)
    if kind_a is kind_b:
        if kind_a is int:
            return _int("+", a + b)
        if kind_a is float:
            return a + b
        if kind_a is str or kind_a is bytes:
            spend(scope, (len(a) + len(b)) >> BYTES_PER_STEP_SHIFT)
            return a + b
        if kind_a is list:
            spend(scope, len(a) + len(b))
            return a + b
        if kind_a is UInt:
            return _uint("+", int(a) + int(b))
        if kind_a is Duration:
            return duration_of(int(a) + int(b))
    elif {kind_a, kind_b} == {Timestamp, Duration}:
        return timestamp_of(int(a) + int(b))
    raise _mismatch("+", a, b)


def subtract(a: Value, b: Value, scope: Scope) -> Value:
    kind_a, kind_b = type(a), type(b)
    if kind_a is kind_b:
        if kind_a is int:
            return _int("-", a - b)
        if kind_a is float:
            return a - b
        if kind_a is UInt:
            return _uint("-", int(a) - int(b))
        if kind_a is Duration or kind_a is Timestamp:
            return duration_of(int(a) - int(b))
    elif kind_a is Timestamp and kind_b is Duration:
        return timestamp_of(int(a) - int(b))
    raise _mismatch("-", a, b)


def multiply(a: Value, b: Value, scope: Scope) -> Value:
    if type(a) is type(b):
        if type(a) is int:
            return _int("*", a * b)
        if type(a) is float:
            return a * b
        if type(a) is UInt:
            return _uint("*", int(a) * int(b))
    raise _mismatch("*", a, b)


def divide(a: Value, b: Value, scope: Scope) -> Value:
    """Integers are cut towards zero; a double divided by zero is infinite or no number (IEEE 754)."""
    if type(a) is type(b):
        if type(a) is float:
            if b != 0.0:
                return a / b
            if a == 0.0 or math.isnan(a):
                return math.nan
            return math.copysign(math.inf, a) * math.copysign(1.0, b)
        if type(a) is int or type(a) is UInt:
            if b == 0:
                raise FilterFault("division by zero")
            quotient = abs(int(a)) // abs(int(b))
            return _uint("/", quotient) if type(a) is UInt else _int("/", quotient if (a < 0) == (b < 0) else -quotient)
    raise _mismatch("/", a, b)


def modulo(a: Value, b: Value, scope: Scope) -> Value:
    """The sign is the dividend's."""
    if type(a) is type(b) and (type(a) is int or type(a) is UInt):
        if b == 0:
            raise FilterFault("`%` by zero")
        rest = abs(int(a)) % abs(int(b))
        return UInt(rest) if type(a) is UInt else (-rest if a < 0 else rest)
    raise _mismatch("%", a, b)


def negate(a: Value) -> Value:
    if type(a) is int:
        return _int("-", -a)
    if type(a) is float:
        return -a
    if type(a) is Duration:
        return duration_of(-int(a))
    raise FilterFault(f"`-` does not go with {kind(a)}")
