"""Which destinations want an event, and why the others do not."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Raw

from routing.filters import FilterError
from routing.match import (
    MAX_REMEMBERED_TYPES,
    Matching,
    PatternError,
    Route,
    RouteTable,
    compile_route,
    parse_pattern,
)
from routing.redact import PathError
from schemas.control import RouteRecord
from schemas.event import Event


def event(event_type: str = "order.paid", payload: object = None) -> Event:
    return Event(
        eventType=event_type,
        payload=Raw(msgspec.json.encode({} if payload is None else payload)),
        eventId="e",
        occurredAt="2026-11-21T09:30:00Z",
        customerExternalId="acme",
    )


def route(
    name: str, *types: str, to: tuple[str, ...] = ("hook",), where: str = "", redact: tuple[str, ...] = ()
) -> Route:
    return compile_route(RouteRecord(id=name, version=1, types=types, to=to, where=where, redact=redact))


def table(*routes: Route) -> RouteTable:
    return RouteTable.build(routes)


def destinations(found: Matching) -> list[str]:
    return [each.destination for each in found.matched]


def why(found: Matching) -> dict[str, str]:
    return {each.route: each.why for each in found.verdicts}


@pytest.mark.parametrize(
    ("pattern", "fitting", "others"),
    [
        ("invoice.paid", ["invoice.paid"], ["invoice.paid2", "invoice", "INVOICE.PAID", "invoice.paid.late"]),
        ("order.*", ["order.paid", "order.a.b", "order."], ["order", "orders.paid", "xorder.paid", "order*"]),
        ("order.line.*", ["order.line.added"], ["order.paid", "order.line"]),
        ("*", ["order.paid", "x", "*"], []),
    ],
)
def test_a_pattern_names_its_types_and_no_others(pattern: str, fitting: list[str], others: list[str]) -> None:
    routes = table(route("r", pattern))
    for each in fitting:
        assert destinations(routes.match(event(each))) == ["hook"], each
    for each in others:
        found = routes.match(event(each))
        assert destinations(found) == []
        assert why(found) == {"r": "type"}


@pytest.mark.parametrize(
    ("pattern", "remedy"),
    [
        ("order*", "write order.* "),
        ("*.paid", "write *"),
        ("a.*.b", "write a.* "),
        ("**", "write *"),
        (".*", "write * "),
        ("", "write * "),
        ("x" * 201, "at most 200"),
        ("a\nb", "printable"),
        ("*order", "write *"),
    ],
)
def test_other_stars_are_refused_with_a_remedy(pattern: str, remedy: str) -> None:
    with pytest.raises(PatternError) as error:
        parse_pattern(pattern)
    assert remedy in str(error.value)


def test_a_route_with_a_fault_is_no_route() -> None:
    with pytest.raises(PatternError):
        route("r", "order*")
    with pytest.raises(FilterError):
        route("r", "*", where="payload.total >")
    with pytest.raises(PathError):
        route("r", "*", redact=("card",))


def test_several_routes_to_one_destination_are_one_delivery_redacted_by_all_that_match() -> None:
    routes = table(
        route("a", "order.*", redact=("payload.card",), to=("hook", "hook", "lake")),
        route("b", "*", redact=("payload.name",), to=("hook",)),
        route("c", "order.paid", where="payload.total > 1000", redact=("payload.total",)),
        route("d", "invoice.*", redact=("payload.address",)),
    )
    found = routes.match(event(payload={"card": 1, "name": "x", "total": 5, "address": "y"}))
    hook, lake = found.matched
    assert (hook.destination, hook.routes) == ("hook", ("a", "b"))
    assert (lake.destination, lake.routes) == ("lake", ("a",))
    assert hook.redaction is not None and lake.redaction is not None
    assert [str(path) for path in hook.redaction.paths] == ["payload.card", "payload.name"]
    assert [str(path) for path in lake.redaction.paths] == ["payload.card"]
    sent = hook.redaction.apply(event(payload={"card": 1, "name": "x", "total": 5}))
    assert bytes(sent.payload) == b'{"card":"[redacted]","name":"[redacted]","total":5}'
    assert why(found) == {"a": "", "b": "", "c": "where", "d": "type"}


def test_each_route_says_why_it_did_not_match() -> None:
    routes = table(
        route("type", "invoice.*"),
        route("false", "order.*", where="payload.total > 100"),
        route("fault", "order.*", where="payload.nothing > 100"),
        route("yes", "order.*", where="payload.total < 100", to=("other",)),
    )
    found = routes.match(event(payload={"total": 42}))
    assert why(found) == {"type": "type", "false": "where", "fault": "payload.nothing is missing", "yes": ""}
    assert found.faults == 1
    assert destinations(found) == ["other"]
    assert not any("42" in each.why for each in found.verdicts)


def test_a_fault_on_one_event_does_not_stay() -> None:
    routes = table(route("r", "*", where="payload.total > 1"), route("s", "*", where="payload.total > 10"))
    assert routes.match(event(payload={})).faults == 2
    found = routes.match(event(payload={"total": 5}))
    assert (why(found), found.faults) == ({"r": "", "s": "where"}, 0)
    assert routes.match(event(payload={"total": 50})).verdicts[1].matched
    assert routes.match(event(payload={})).faults == 2


def test_costly_rules_of_one_tenant_are_bounded_together_and_cheap_ones_still_decide() -> None:
    costly = "payload.l.all(a, payload.l.all(b, true))"
    some = [route(f"c{number}", "*", where=costly) for number in range(50)]
    routes = table(
        *some, route("cheap", "*", where="payload.n == 1"), route("walk", "*", where="payload.l.all(a, true)")
    )
    found = routes.match(event(payload={"l": list(range(2000)), "n": 1}))
    assert why(found)["cheap"] == ""
    # the control: alone, a walk over the list is no cost at all
    assert why(found)["walk"] == "the expression costs too much on this event"
    assert destinations(table(routes.routes[-1]).match(event(payload={"l": list(range(2000))}))) == ["hook"]
    # and nothing of it stays for the next event
    assert routes.match(event(payload={"l": [1], "n": 1})).faults == 0


def test_no_routes_match_nothing() -> None:
    assert table().match(event()) == Matching((), ())


def test_types_from_producers_do_not_fill_the_memory() -> None:
    routes = table(route("all", "*", where="payload.n == 1"), route("o", "order.*", to=("other",)))
    first = event("order.paid", {"n": 1})
    before = routes.match(first)
    for number in range(4 * MAX_REMEMBERED_TYPES):
        assert destinations(routes.match(event(f"order.{number}", {"n": 1}))) == ["hook", "other"]
        assert destinations(routes.match(event(f"x{number}", {"n": 2}))) == []
        assert routes.remembered_types <= MAX_REMEMBERED_TYPES
    assert routes.match(first) == before


PATTERNS = st.sampled_from(["a", "a.b", "a.*", "a.b.*", "b.*", "*", "a.b.c", "b"])
TYPES = st.lists(st.sampled_from(["a", "b", "c", ""]), min_size=1, max_size=4).map(".".join)
ROUTES = st.lists(
    st.tuples(st.lists(PATTERNS, min_size=1, max_size=3), st.sampled_from(["", "payload.n == 1", "payload.m == 1"])),
    max_size=6,
)


@settings(max_examples=200, deadline=None)
@given(ROUTES, st.lists(st.tuples(TYPES, st.sampled_from([{}, {"n": 1}, {"n": 2, "m": 1}])), max_size=8))
def test_the_index_answers_as_asking_every_route_does(
    drawn: list[tuple[list[str], str]], events: list[tuple[str, dict[str, int]]]
) -> None:
    routes = [
        route(f"r{number}", *types, where=where, to=(f"d{number % 2}",)) for number, (types, where) in enumerate(drawn)
    ]
    index = table(*routes)
    for event_type, payload in events:
        shown = event(event_type, payload)
        alone = [table(each).match(shown).verdicts[0] for each in routes]
        found = index.match(shown)
        assert list(found.verdicts) == alone
        assert {each.destination: each.routes for each in found.matched} == {
            to: named
            for to in ("d0", "d1")
            if (
                named := tuple(
                    each.id for each, verdict in zip(routes, alone, strict=True) if verdict.matched and each.to == (to,)
                )
            )
        }
        assert found.faults == sum(verdict.why not in ("", "type", "where") for verdict in alone)
