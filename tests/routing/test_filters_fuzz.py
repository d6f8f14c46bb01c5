"""Whatever the text and whatever the event: a filter, a FilterError, a decision or a FilterFault, and nothing else."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Raw

from routing.documents import Read, documents
from routing.filters import Filter, FilterError, FilterFault, compile_filter
from schemas.event import Event

KEYS = st.sampled_from(["a", "b", "c", "k d", 'q"', "é"])

NUMBERS = st.sampled_from(
    [
        *("0", "-0", "1", "-7", "1.0", "1.5", "2e3", "1e400", "-1e999", "9223372036854775807", "9223372036854775808"),
        *("-9223372036854775809", "123456789012345678901234567890", "9" * 5000),
    ]
)
SCALARS = NUMBERS | st.sampled_from(['"a"', '""', '"b"', '"1"', '"\\u00e9"', "true", "false", "null"])


def objects(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Objects as text: keys may stand twice."""
    members = st.lists(st.tuples(KEYS, values), max_size=4)
    return members.map(lambda pairs: "{" + ", ".join(f"{json.dumps(key)}: {value}" for key, value in pairs) + "}")


DOCUMENTS = st.recursive(
    SCALARS,
    lambda inner: objects(inner) | st.lists(inner, max_size=3).map(lambda items: f"[{','.join(items)}]"),
    max_leaves=12,
)

PATHS = st.lists(KEYS, max_size=3).map(lambda keys: "payload" + "".join(f"[{json.dumps(key)}]" for key in keys))
CONSTANTS = st.sampled_from(["0", "1", "-7", "1.0", "1.5", '"a"', '"1"', "true", "null", "[1, 'a']", "{'a': 1}", "1u"])


PATTERNS = st.text("ab.*+?|()[]{}19\\\\^$é", max_size=8).map(lambda text: f"r'{text}'")


def larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    binary = st.sampled_from(["==", "!=", "<", "<=", ">", ">=", "&&", "||", "+", "-", "*", "/", "%", "in"])
    return (
        st.tuples(inner, binary, inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})")
        | st.tuples(PATHS, KEYS).map(lambda t: f"has({t[0]}[{json.dumps(t[1])}])")
        | st.tuples(st.sampled_from(["size", "int", "double", "string", "bool", "type", "!", "-"]), inner).map(
            lambda t: f"{t[0]}({t[1]})"
        )
        | st.tuples(inner, st.sampled_from(["all", "exists", "exists_one", "map", "filter"]), inner).map(
            lambda t: f"({t[0]}).{t[1]}(x, {t[2]})"
        )
        | st.tuples(inner, st.sampled_from(["contains", "startsWith", "endsWith", "matches"]), inner | PATTERNS).map(
            lambda t: f"({t[0]}).{t[1]}({t[2]})"
        )
        | st.tuples(inner, inner, inner).map(lambda t: f"({t[0]} ? {t[1]} : {t[2]})")
        | st.tuples(inner, inner).map(lambda t: f"({t[0]})[{t[1]}]")
    )


EXPRESSIONS = st.recursive(PATHS | CONSTANTS, larger, max_leaves=6)
WORDS = """
payload . a ( ) [ ] { } : , ? && || ! - == < in has 'x' " ''' r' b' \\ 1 1.5 1u 0x null `a ` // exists = é
"""
TOKENS = st.lists(st.sampled_from([*WORDS.split(), "\n"]), max_size=20).map(" ".join)


def event(payload: str) -> Event:
    return Event(
        eventType="t",
        payload=Raw(payload.encode()),
        eventId="e",
        occurredAt="2026-11-21T09:30:00Z",
        customerExternalId="acme",
    )


def compiled(text: str) -> Filter | None:
    try:
        return compile_filter(text)
    except FilterError as fault:
        assert fault.line >= 1 and fault.column >= 1 and str(fault)
        return None


def outcome(found: Filter, shown: Event) -> Any:
    try:
        return found.matches(shown)
    except FilterFault:
        return "fault"


@settings(max_examples=400, deadline=None)
@given(st.text() | TOKENS | EXPRESSIONS, DOCUMENTS)
def test_no_text_and_no_event_break_a_filter(text: str, payload: str) -> None:
    found = compiled(text)
    if found is not None:
        assert outcome(found, event(payload)) in (True, False, "fault")


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60), EXPRESSIONS)
def test_bytes_that_are_no_json_are_a_fault_at_worst(raw: bytes, text: str) -> None:
    found = compiled(text)
    if found is not None:
        shown = event("null")
        shown.payload = Raw(raw)
        assert outcome(found, shown) in (True, False, "fault")


@settings(max_examples=600, deadline=None)
@given(EXPRESSIONS, EXPRESSIONS, DOCUMENTS)
def test_reading_only_some_fields_decides_as_reading_all_does(text: str, other: str, payload: str) -> None:
    """Also with another filter beside it, that makes the decoded part larger or smaller."""
    found = compiled(text)
    if found is None:
        return
    shown = event(payload)
    alone = outcome(found, shown)
    everything = documents([Read("payload", (), True)])
    assert _through(found, everything, shown) == alone
    beside = compiled(other)
    if beside is not None:
        assert _through(found, documents([*found.reads, *beside.reads]), shown) == alone


def _through(found: Filter, decoding: Any, shown: Event) -> Any:
    try:
        return found.bound(decoding).decide(decoding.scope(shown))
    except FilterFault:
        return "fault"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["true", "false", "1/0 == 1", "payload.a", "!payload.b"]), min_size=2, max_size=5))
def test_and_or_do_not_depend_on_the_order_of_their_operands(operands: list[str]) -> None:
    shown = event('{"a": true}')
    for op in ("&&", "||"):
        results = {
            outcome(compile_filter(f" {op} ".join(f"({each})" for each in order)), shown)
            for order in (operands, operands[::-1])
        }
        assert len(results) == 1


@pytest.mark.parametrize("text", ["payload.a == 1", "size(payload) == 1"])
def test_the_last_of_two_keys_of_one_name_counts(text: str) -> None:
    assert compile_filter(text).matches(event('{"a": 2, "a": 1}'))
