"""Upcasters: how the payload of an event type is raised from one `schemaVersion` to the next.

The one place where they are registered. An operator's package names a function under the entry point group
`headgate.upcasters`; it is called once at start, with the `Upcasters` to register with (docs/events.md). Of a type with
none every version is taken as it is.
"""

import json
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any, Final, TypeAlias

import msgspec

from schemas.event import Event, Problem, canonical, decode_event
from schemas.ids import ExternalId

GROUP: Final = "headgate.upcasters"
_MAX_INT_DIGITS: Final = 4000  # Python makes no int of more than 4300

Upcaster: TypeAlias = Callable[[Any], Any]
"""From a payload of its version to one of the next: dict, list, str, int, Decimal, bool or None. Pure, and quick."""

_write = msgspec.json.Encoder(decimal_format="number").encode


def _integer(text: str) -> int | Decimal:
    return int(text) if len(text) < _MAX_INT_DIGITS and text != "-0" else Decimal(text)


# `parse_float` and `parse_int` see the digits as published
_parse = json.JSONDecoder(parse_float=Decimal, parse_int=_integer).decode


class Upcasters:
    """The steps by type and version; false while there are none."""

    def __init__(self) -> None:
        self._steps: dict[str, dict[int, Upcaster]] = {}

    def register(self, event_type: str, version: int, upcaster: Upcaster) -> None:
        """Raises payloads of this type from `version` to the next. Raises ValueError for one that is there already."""
        if version < 1 or not callable(upcaster):
            raise ValueError(f"{event_type}: an upcaster is a function from a version that is 1 or more")
        steps = self._steps.setdefault(event_type, {})
        if version in steps:
            raise ValueError(f"{event_type}: two upcasters from version {version}")
        steps[version] = upcaster

    def __bool__(self) -> bool:
        return bool(self._steps)

    def chains(self) -> Iterator[tuple[str, list[int]]]:
        """Each type, and the versions that are raised, ascending."""
        for event_type, steps in sorted(self._steps.items()):
            yield event_type, sorted(steps)

    def decode(
        self, value: bytes, tenant: ExternalId, place: str, offset: int, appended_ms: int, max_bytes: int
    ) -> Event | Problem:
        """As `decode_event`, and raised to the newest version."""
        event = decode_event(value, tenant, place, offset, appended_ms, max_bytes)
        if isinstance(event, Problem) or (steps := self._steps.get(event.eventType)) is None:
            return event
        return _raised(event, steps, max_bytes)


def _raised(event: Event, steps: dict[int, Upcaster], max_bytes: int) -> Event | Problem:
    newest = max(steps) + 1
    version = event.schemaVersion
    if version == newest:
        return event
    # all of them or none: what a later step would need is not found out by running the earlier ones
    missing = next((one for one in range(version, newest) if one not in steps), None)
    if version > newest or missing is not None:
        why = f"nothing raises version {missing}" if missing is not None else f"the newest known is {newest}"
        return Problem("unknown_schema", f"field schemaVersion: {version} of {event.eventType}, but {why}")
    try:
        payload = _parse(bytes(event.payload).decode())
        while version < newest:
            payload = steps[version](payload)
            version += 1
        _refuse_other_than_json(payload)
        event.payload = msgspec.Raw(_write(payload))
    except Exception as fault:  # an operator's function, and whatever it returns
        # its words may quote the payload
        why = f"{type(fault).__name__} at version {version}"
        return Problem("malformed", f"field payload: cannot be raised to version {newest} of {event.eventType}: {why}")
    event.schemaVersion = newest
    if len(canonical(event)) > max_bytes:
        return Problem("too_large", f"the event's canonical form, raised to version {newest}, has too many bytes")
    return event


def _refuse_other_than_json(value: object) -> None:
    """What the encoder would silently make something else of. Raises TypeError or ValueError."""
    match value:
        case None | bool() | str() | int():
            return
        case float() | Decimal():
            if not Decimal(value).is_finite():
                raise ValueError
        case list():
            for one in value:
                _refuse_other_than_json(one)
        case dict():
            for name, one in value.items():
                if not isinstance(name, str):
                    raise TypeError
                _refuse_other_than_json(one)
        case _:
            raise TypeError
