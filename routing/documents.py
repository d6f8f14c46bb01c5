"""Reads out of payload and metadata the fields that rules ask for, and skips the rest.

The fields that a set of rules reads make a shape; a shape makes msgspec structs that decode just those: 0.6 us for one
field of 1 KB, where decoding all of it takes 2.3. Whatever the document, what a rule sees is the same as if all of it
had been decoded.

Documents are JSON in UTF-8, as ingress has checked. One that cannot be decoded after all (nested a thousand deep) is
`UNREADABLE`: every read of it is a fault.
"""

import json
import math
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any, Final, Literal, TypeAlias
from weakref import WeakValueDictionary

import msgspec
from msgspec import UNSET, Raw, Struct, defstruct

from routing.cel.compile import Code, Field
from routing.cel.errors import FilterFault
from routing.cel.values import Scope, Value, kind
from schemas.event import Event

Root: TypeAlias = Literal["payload", "metadata"]
ROOTS: Final[tuple[Root, ...]] = ("payload", "metadata")

# of 0.1 us, at most 0.2: 3.2 ms
MAX_STEPS: Final = 16_000
# objects whose fields are told apart, in the payload or in the metadata; making a type for each takes 0.05 ms. Where
# rules look into more, all of it is decoded
_MAX_OBJECTS: Final = 24
# longer integers are beyond every double
_MAX_INTEGER_CHARACTERS: Final = 400
_NOTHING: Final[list[Value]] = []


class Read(Struct, frozen=True):
    """One read of a rule: the keys from the root down. `value` is False where only its presence is asked for."""

    root: Root
    path: tuple[str, ...]
    value: bool


class Shape(Struct, frozen=True):
    """What is read of one JSON value: all of it, some fields of an object, or (neither) only that it is there."""

    whole: bool
    fields: tuple[tuple[str, "Shape"], ...]


class Unreadable:
    """Stands for a document that could not be decoded. Has no fields."""


UNREADABLE: Final = Unreadable()


class _Asked:
    """A shape in the making."""

    def __init__(self) -> None:
        self.whole = False
        self.fields: dict[str, _Asked] = {}

    def add(self, path: tuple[str, ...], value: bool) -> None:
        asked = self
        for key in path:
            if asked.whole:
                return
            if not _nameable(key):
                asked.whole = True
                return
            asked = asked.fields.setdefault(key, _Asked())
        asked.whole = asked.whole or value

    def objects(self) -> int:
        """How many values have fields that are asked for."""
        count, level = 0, [self]
        while level and count <= _MAX_OBJECTS:
            level = [each for each in level if each.fields and not each.whole]
            count += len(level)
            level = [part for each in level for part in each.fields.values()]
        return count

    def shape(self) -> Shape:
        if self.whole:
            return Shape(True, ())
        return Shape(False, tuple((key, self.fields[key].shape()) for key in sorted(self.fields)))


def _nameable(key: str) -> bool:
    """msgspec renames no field to these."""
    return not any(character in '"\\' or character < " " for character in key)


def _attribute(key: str) -> str:
    return f"k_{key}" if key.isascii() and key.isidentifier() else f"x_{key.encode().hex()}"


class _Layout:
    """How a shape is decoded: the type for msgspec, and the way to each part of it."""

    def __init__(self, shape: Shape) -> None:
        self.whole = shape.whole
        self.parts = {key: _Layout(part) for key, part in shape.fields}
        self.made: Callable[..., Value] | None = None
        self.type: Any = Any if shape.whole else Raw
        if self.parts:
            struct = defstruct(
                "Fields",
                [(_attribute(key), part.type, UNSET) for key, part in self.parts.items()],
                rename={_attribute(key): key for key in self.parts},
                gc=False,
            )
            self.made = struct
            # a double, which no key leads on from, is left to `mend`: as a type it would be read by msgspec's own code
            self.type = struct | str | int | bool | None | list[Raw]

    def of(self, value: Value) -> Value:
        """The same from a value that was decoded whole."""
        if self.made is None or type(value) is not dict:
            return value
        return self.made(**{_attribute(key): part.of(value[key]) for key, part in self.parts.items() if key in value})


def _loose_int(text: str) -> int | float:
    if len(text) > _MAX_INTEGER_CHARACTERS:
        return -math.inf if text[0] == "-" else math.inf
    return int(text)


def _no_constant(text: str) -> float:
    raise ValueError(text)


def _loosely(raw: bytes) -> Value:
    """JSON with numbers that no double reaches: they are infinite, as the nearest double is. Python's own decoder."""
    try:
        value = json.loads(str(raw, "utf-8"), parse_int=_loose_int, parse_constant=_no_constant)
        if b"\\ud" in raw.lower():
            # this decoder takes half a character, which msgspec refuses and no text of the language can hold
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return UNREADABLE
    return value


class _Decoder:
    """`strict` raises one of `_FAULTS`, and then `mend` gives the value: the fast way has no wrapper around it."""

    def __init__(self, layout: _Layout) -> None:
        self._layout = layout
        # msgspec's own reading of a double takes up to 6 us (1.2345678901234567e-300), Python's 0.5 at most
        self.strict: Callable[[Any], Value] = msgspec.json.Decoder(layout.type, float_hook=float).decode

    def mend(self, raw: Any) -> Value:
        try:
            return self.strict(raw)
        except msgspec.ValidationError:  # a number out of range, or a double in an object's place
            return self._layout.of(_loosely(bytes(raw)))
        except _FAULTS:
            return UNREADABLE


_FAULTS: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class Documents:
    """What a set of rules reads of an event's documents. Get one by `documents`; the same reads share one."""

    def __init__(self, payload: Shape | None, metadata: Shape | None) -> None:
        self._layouts = {
            root: _Layout(shape) for root, shape in (("payload", payload), ("metadata", metadata)) if shape is not None
        }
        self.scope = self._scope()

    def _scope(self) -> Callable[[Event], Scope]:
        """Decodes what is read, once for all rules of an event."""
        decoders = {root: _Decoder(layout) for root, layout in self._layouts.items()}
        payload, metadata = decoders.get("payload"), decoders.get("metadata")

        def of_metadata(event: Event) -> Value:
            if metadata is None:
                return None
            try:
                return metadata.strict(event.metadata)
            except _FAULTS:
                return metadata.mend(event.metadata)

        if payload is None:
            return lambda event: Scope(event, None, of_metadata(event), MAX_STEPS, _NOTHING)
        strict, mend, alone = payload.strict, payload.mend, metadata is None

        def scope(event: Event) -> Scope:
            try:
                value = strict(event.payload)
            except _FAULTS:
                value = mend(event.payload)
            return Scope(event, value, None if alone else of_metadata(event), MAX_STEPS, _NOTHING)

        return scope

    def _way(self, root: Root, path: tuple[str, ...]) -> _Layout | None:
        """The layout at the end of `path`; None where the way ends before, in a part that is decoded whole."""
        layout = self._layouts[root]
        for key in path:
            if layout.whole:
                return None
            layout = layout.parts[key]
        return layout

    def field(self, root: Root, path: tuple[str, ...]) -> Field | None:
        if self._way(root, path) is None:
            return None
        get = attrgetter(".".join((root, *map(_attribute, path))))
        return Field(get, lambda scope: _fault(scope, root, path))

    def present(self, root: Root, path: tuple[str, ...]) -> Code | None:
        field = self.field(root, path)
        if field is None:
            return None
        get, fault = field.get, field.fault

        def run(scope: Scope) -> Value:
            try:
                return get(scope) is not UNSET
            except AttributeError:
                raise fault(scope) from None

        return run

    def read(self, root: Root) -> Code:
        """The whole document."""
        get = attrgetter(root)

        def run(scope: Scope) -> Value:
            value = get(scope)
            if value is UNREADABLE:
                raise _fault(scope, root, ())
            return value

        return run


def _fault(scope: Scope, root: Root, path: tuple[str, ...]) -> FilterFault:
    """Why a field could not be read. Names fields and types, never values."""
    value = scope.payload if root == "payload" else scope.metadata
    if value is UNREADABLE:
        return FilterFault(f"{root} cannot be decoded: it is malformed or nested too deep")
    shown: str = root
    for key in path:
        if not isinstance(value, Struct):
            return FilterFault(f"{shown} is no object but {kind(value)}: `{key}` was asked for")
        shown = f"{shown}.{key}"
        value = getattr(value, _attribute(key))
        if value is UNSET:
            break
    return FilterFault(f"{shown} is missing")


_shared: WeakValueDictionary[tuple[Shape | None, Shape | None], Documents] = WeakValueDictionary()


def documents(reads: Iterable[Read]) -> Documents:
    """The narrowest decoding that serves all of these reads."""
    asked: dict[Root, _Asked] = {}
    for read in reads:
        asked.setdefault(read.root, _Asked()).add(read.path, read.value)
    for each in asked.values():
        each.whole = each.whole or each.objects() > _MAX_OBJECTS
    payload, metadata = (asked[root].shape() if root in asked else None for root in ROOTS)
    found = _shared.get((payload, metadata))
    if found is None:
        found = _shared[payload, metadata] = Documents(payload, metadata)
    return found
