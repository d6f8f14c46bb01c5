"""Which of a tenant's destinations want an event, and why.

Owns the grammar of type patterns, and the index from an event's type to the routes that name it. An event that reaches
a destination by several routes is one delivery, redacted by all of them.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from msgspec import Struct

from routing.documents import MAX_STEPS
from routing.filters import Filter, FilterFault, compile_filter, documents_for
from routing.redact import Path, Redaction, parse_path, redaction
from schemas.attempt import RouteVerdict
from schemas.control import RouteRecord
from schemas.event import MAX_TYPE_CHARACTERS, Event
from schemas.ids import DestinationId, RouteId, parts

# event types come from producers: what is remembered of them is bounded, per tenant
MAX_REMEMBERED_TYPES: Final = 256
# of the ways in which the filters of one type can turn out, how many are kept ready
MAX_REMEMBERED_OUTCOMES: Final = 64
# steps for all filters of a tenant on one event, 20 ms at most: one tenant's rules cannot hold up a worker for longer
MAX_EVENT_STEPS: Final = 5 * MAX_STEPS


class PatternError(ValueError):
    """A type pattern is at fault. The text says what to write instead."""


class Pattern(Struct, frozen=True):
    """`order.*` (prefix `order.`), `*` (the empty prefix), or one exact type."""

    text: str
    prefix: bool

    def fits(self, event_type: str) -> bool:
        return event_type.startswith(self.text) if self.prefix else event_type == self.text

    def __str__(self) -> str:
        return f"{self.text}*" if self.prefix else self.text


def parse_pattern(text: str) -> Pattern:
    """Raises PatternError."""
    if text == "*":
        return Pattern("", True)
    if not text:
        raise PatternError("an empty type: write * for every type")
    if len(text) > MAX_TYPE_CHARACTERS + 1 or not text.isprintable():
        raise PatternError(f"{text[:40]!r} can be no type: 1 to {MAX_TYPE_CHARACTERS} printable characters")
    if "*" not in text:
        if len(text) > MAX_TYPE_CHARACTERS:
            raise PatternError(f"{text[:40]!r}… is longer than any type: at most {MAX_TYPE_CHARACTERS} characters")
        return Pattern(text, False)
    stem = text[:-1]
    if text == ".*":
        raise PatternError("'.*': write * for every type")
    if "*" in stem or not text.endswith(".*"):
        suggestion = stem.split("*")[0].rstrip(".")
        remedy = f"write {suggestion}.* for every type that starts with {suggestion}." if suggestion else "write *"
        raise PatternError(f"{text!r}: a star stands alone or at the end after a dot; {remedy}")
    return Pattern(stem, True)


class Route(Struct, frozen=True):
    """A tenant's rule, compiled."""

    id: RouteId
    types: tuple[Pattern, ...]
    to: tuple[DestinationId, ...]
    where: Filter | None = None
    redact: tuple[Path, ...] = ()

    def names(self, event_type: str) -> bool:
        return any(pattern.fits(event_type) for pattern in self.types)


def compile_route(record: RouteRecord) -> Route:
    """Raises PatternError, FilterError or PathError; `apply` has refused such a route before it was written."""
    return Route(
        id=RouteId(record.id),
        types=tuple(map(parse_pattern, record.types)),
        to=tuple(map(DestinationId, record.to)),
        where=compile_filter(record.where) if record.where else None,
        redact=tuple(map(parse_path, record.redact)),
    )


class Matched(Struct, frozen=True):
    """One delivery to make: a destination, the routes that led there, and what all of them take out together.

    Made once for many events, so it also holds what would else be made for each: `route_ids`, the routes separated by
    commas, and `destination_part`, the destination as the last part of a delivery's hash (`ids.delivery_id`).
    """

    destination: DestinationId
    routes: tuple[RouteId, ...]
    redaction: Redaction | None
    route_ids: str
    destination_part: bytes


class Matching(Struct, frozen=True):
    """What became of one event. Shared between events that turned out alike: nobody writes to it.

    `verdicts` says of every route, in the table's order, whether it matched; else `why`: `type`, `where`, or the text
    of the fault, which quotes no value of the event. `faults` counts those. `hidden` is what any of the deliveries
    takes out: what the event's own record must not show either.
    """

    matched: tuple[Matched, ...]
    verdicts: tuple[RouteVerdict, ...]
    faults: int = 0
    hidden: Redaction | None = None


class _Plan:
    """The routes that name a type: what is left to ask is their filters."""

    __slots__ = ("_filtered", "_named", "_outcomes", "_routes", "_scope", "settled")

    def __init__(self, routes: Sequence[Route], named: frozenset[int]) -> None:
        filters = [
            (position, route.where)
            for position, route in enumerate(routes)
            if position in named and route.where is not None
        ]
        # only what these filters read is decoded, once for all of them
        through = documents_for([each for _, each in filters])
        self._routes = routes
        self._named = named
        self._scope = through.scope
        self._filtered = [(1 << bit, at, each.bound(through)) for bit, (at, each) in enumerate(filters)]
        self._outcomes: dict[int, Matching] = {}
        self.settled = None if filters else self._matching({})
        """The outcome, where it does not depend on the event."""

    def decide(self, event: Event) -> Matching:
        scope = self._scope(event)
        passed = 0
        left = MAX_EVENT_STEPS
        faults: dict[int, str] | None = None
        for bit, position, where in self._filtered:
            given = left if left < MAX_STEPS else MAX_STEPS
            try:
                if where.decide(scope, given):
                    passed |= bit
            except FilterFault as fault:
                if faults is None:
                    faults = {}
                faults[position] = str(fault)
            left -= given - scope.steps
        if faults is None:
            found = self._outcomes.get(passed)
            if found is not None:
                return found
        why = {position: "where" for bit, position, _ in self._filtered if not passed & bit}
        if faults is not None:
            return self._matching(why | faults, len(faults))
        made = self._matching(why)
        if len(self._outcomes) < MAX_REMEMBERED_OUTCOMES:
            self._outcomes[passed] = made
        return made

    def _matching(self, why: Mapping[int, str], faults: int = 0) -> Matching:
        """`why`: of the routes that name the type, those that do not match after all."""
        verdicts = []
        by_destination: dict[DestinationId, list[Route]] = {}
        for position, route in enumerate(self._routes):
            reason = why.get(position, "") if position in self._named else "type"
            verdicts.append(RouteVerdict(route.id, not reason, reason))
            if not reason:
                for destination in dict.fromkeys(route.to):
                    by_destination.setdefault(destination, []).append(route)
        matched = tuple(
            Matched(
                destination,
                tuple(route.id for route in routes),
                redaction(path for route in routes for path in route.redact),
                ",".join(route.id for route in routes),
                parts(destination),
            )
            for destination, routes in by_destination.items()
        )
        hidden = redaction(path for one in matched if one.redaction is not None for path in one.redaction.paths)
        return Matching(matched, tuple(verdicts), faults, hidden)


class RouteTable:
    """A tenant's routes, indexed by type. Its answers depend on the event and the routes alone."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self.routes = tuple(routes)
        self._exact: dict[str, list[int]] = {}
        self._prefixes: dict[str, list[int]] = {}
        for position, route in enumerate(self.routes):
            for pattern in route.types:
                (self._prefixes if pattern.prefix else self._exact).setdefault(pattern.text, []).append(position)
        # different types that the same routes name share a plan; there are no more plans than patterns, and one
        self._plans: dict[frozenset[int], _Plan] = {}
        self._by_type: dict[str, _Plan] = {}

    @classmethod
    def build(cls, routes: Iterable[Route]) -> "RouteTable":
        return cls(routes)

    @property
    def remembered_types(self) -> int:
        return len(self._by_type)

    def match(self, event: Event) -> Matching:
        """Never fails: a filter that does is a verdict."""
        plan = self._by_type.get(event.eventType)
        if plan is None:
            plan = self._plan(event.eventType)
        settled = plan.settled
        return settled if settled is not None else plan.decide(event)

    def _plan(self, event_type: str) -> _Plan:
        named = set(self._exact.get(event_type, ()))
        named.update(self._prefixes.get("", ()))
        if self._prefixes:
            dot = event_type.find(".")
            while dot >= 0:
                named.update(self._prefixes.get(event_type[: dot + 1], ()))
                dot = event_type.find(".", dot + 1)
        key = frozenset(named)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = _Plan(self.routes, key)
        if len(self._by_type) >= MAX_REMEMBERED_TYPES:
            self._by_type.clear()
        self._by_type[event_type] = plan
        return plan
