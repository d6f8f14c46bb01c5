"""Upcasters: chains, refusals, and that a payload keeps its digits on the way."""

import json
from decimal import Decimal
from typing import Any

import pytest

from schemas.event import Event, Problem
from schemas.ids import ExternalId
from schemas.upcast import Upcaster, Upcasters

MAX_BYTES = 100_000


def upcasters(**steps: Upcaster) -> Upcasters:
    """`upcasters(v1=…, v2=…)` of the type `order.paid`."""
    made = Upcasters()
    for name, step in steps.items():
        made.register("order.paid", int(name[1:]), step)
    return made


def decoded(made: Upcasters, payload: str = "{}", version: int = 1, event_type: str = "order.paid") -> Event | Problem:
    value = f'{{"eventType": "{event_type}", "schemaVersion": {version}, "payload": {payload}}}'
    return made.decode(value.encode(), ExternalId("acme"), "p-", 7, 0, MAX_BYTES)


def raised(made: Upcasters, payload: str = "{}", version: int = 1) -> str:
    event = decoded(made, payload, version)
    assert isinstance(event, Event), event
    return bytes(event.payload).decode()


def add(name: str) -> Upcaster:
    return lambda payload: {**payload, name: 1}


def same(payload: Any) -> Any:
    return payload


def test_steps_are_chained_from_the_version_of_the_event_to_the_newest() -> None:
    made = upcasters(v1=add("one"), v2=add("two"))
    assert json.loads(raised(made, version=1)) == {"one": 1, "two": 1}
    assert json.loads(raised(made, version=2)) == {"two": 1}
    assert raised(made, '{"as": "published" }', version=3) == '{"as": "published" }'
    for version in (1, 2, 3):
        event = decoded(made, version=version)
        assert isinstance(event, Event)
        assert event.schemaVersion == 3


@pytest.mark.parametrize(
    ("made", "version", "why"),
    [
        (upcasters(v1=same), 3, "newest known is 2"),
        (upcasters(v2=same), 1, "nothing raises version 1"),
        (upcasters(v1=same, v3=same), 1, "nothing raises version 2"),
        (upcasters(v1=same, v3=same), 2, "nothing raises version 2"),
        (upcasters(v1=same), 2**62, "newest known is 2"),
    ],
)
def test_a_gap_or_a_version_above_the_newest_is_unknown(made: Upcasters, version: int, why: str) -> None:
    problem = decoded(made, version=version)
    assert isinstance(problem, Problem)
    assert problem.code == "unknown_schema"
    assert why in problem.detail


def test_above_a_gap_events_are_raised() -> None:
    assert raised(upcasters(v1=same, v3=add("new")), version=3) == '{"new":1}'


def test_of_a_type_without_upcasters_every_version_is_taken_as_it_is() -> None:
    event = decoded(upcasters(v1=add("x")), '{"n": 1.10 }', version=99, event_type="order.opened")
    assert isinstance(event, Event)
    assert (event.schemaVersion, bytes(event.payload)) == (99, b'{"n": 1.10 }')


@pytest.mark.parametrize(
    "number",
    ["1.10", "1E+400", "-0", "-0.0", "0.1000000000000000055511151231257827", "9" * 5000, "18446744073709551617"],
)
def test_numbers_keep_their_digits(number: str) -> None:
    assert raised(upcasters(v1=same), f'{{"n": [{number}]}}') == f'{{"n":[{number}]}}'


def test_an_upcaster_gets_exact_numbers() -> None:
    seen: list[Any] = []

    def look(payload: Any) -> Any:
        seen.append(payload)
        return {"total": payload["total"] / 100}

    assert raised(upcasters(v1=look), '{"total": 1234.50, "count": 3}') == '{"total":12.345}'
    assert seen == [{"total": Decimal("1234.50"), "count": 3}]
    assert type(seen[0]["count"]) is int


@pytest.mark.parametrize(
    "step",
    [
        lambda payload: payload["secret-canary"],
        lambda payload: float("nan"),
        lambda payload: {"n": Decimal("Infinity")},
        lambda payload: {1: 2},
        lambda payload: {"set": {1}},
        lambda payload: b"bytes",
        lambda payload: "\ud800",
        lambda payload: (1, 2),
    ],
)
def test_what_raises_or_returns_no_json_is_malformed_and_told_without_a_value(step: Upcaster) -> None:
    problem = decoded(upcasters(v1=step), '{"secret": 1}')
    assert isinstance(problem, Problem)
    assert problem.code == "malformed"
    assert "to version 2 of order.paid" in problem.detail
    assert "canary" not in problem.detail


def test_a_number_beyond_every_exponent_is_malformed() -> None:
    problem = decoded(upcasters(v1=same), "1e9999999999999999999")
    assert isinstance(problem, Problem)
    assert problem.code == "malformed"


def test_what_grows_beyond_an_event_is_too_large() -> None:
    problem = decoded(upcasters(v1=lambda payload: "x" * MAX_BYTES))
    assert isinstance(problem, Problem)
    assert problem.code == "too_large"


@pytest.mark.parametrize("version", [0, -1])
def test_versions_begin_with_1(version: int) -> None:
    with pytest.raises(ValueError):
        Upcasters().register("order.paid", version, same)


def test_two_upcasters_of_one_step_are_refused() -> None:
    made = upcasters(v1=same)
    with pytest.raises(ValueError, match=r"order\.paid: two upcasters from version 1"):
        made.register("order.paid", 1, same)
