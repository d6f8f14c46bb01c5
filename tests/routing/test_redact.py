"""No byte of a redacted value goes on, and every other value keeps its bytes."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Raw

from routing.redact import Path, PathError, parse_path, redact, redaction
from schemas.event import Event

SECRET = "4111-secret"


def redacted(raw: bytes, *paths: str) -> bytes:
    return redact(raw, [parse_path(path) for path in paths])


@pytest.mark.parametrize(
    ("raw", "paths", "expected"),
    [
        (b'{"a":{"b":1,"c":1.50}}', ["payload.a.b"], b'{"a":{"b":"[redacted]","c":1.50}}'),
        (b'{"a":{"b":1}}', ["payload.a"], b'{"a":"[redacted]"}'),
        (b'{"a":{"b":1},"z":1}', ["payload.a.b", "payload.a"], b'{"a":"[redacted]","z":1}'),
        (b'{"a":{"b":1},"z":1}', ["payload.a", "payload.a.b", "payload.z"], b'{"a":"[redacted]","z":"[redacted]"}'),
        (b'{"a":null}', ["payload.a"], b'{"a":"[redacted]"}'),
        (b'{"a":[{"b":1},{"c":2},3,[{"b":{}}]]}', ["payload.a.b"], None),
        (b'[{"a":1},{"a":2}]', ["payload.a"], b'[{"a":"[redacted]"},{"a":"[redacted]"}]'),
        (b'{"\\u0061":1,"b":2}', ["payload.a"], b'{"a":"[redacted]","b":2}'),
        (b'{"a.b":1,"a":{"b":2}}', ["payload.`a.b`"], b'{"a.b":"[redacted]","a":{"b":2}}'),
        (b'{"big":123456789012345678901234567890.10,"e":1E400,"a":1}', ["payload.a"], None),
        (b'{"s":"\\u00e9\\/","a":1}', ["payload.a"], b'{"s":"\\u00e9\\/","a":"[redacted]"}'),
    ],
)
def test_a_value_is_replaced_and_the_rest_keeps_its_bytes(raw: bytes, paths: list[str], expected: bytes | None) -> None:
    exact = {
        b"[": b'{"a":[{"b":"[redacted]"},{"c":2},3,[{"b":"[redacted]"}]]}',
        b"1": b'{"big":123456789012345678901234567890.10,"e":1E400,"a":"[redacted]"}',
    }
    assert redacted(raw, *paths) == (expected or exact[b"[" if b"[{" in raw else b"1"])


@pytest.mark.parametrize(
    "raw",
    [
        b'{ "x" : 1 }',
        b'{"a":1, "a": {"c": 1}}',
        b"[1, 2]",
        b"7",
        b'"a"',
        b'{"A":{"B":1}}',
        b'[ [ {"a": 5} ] ]',
        b" null",
    ],
)
def test_a_path_that_leads_nowhere_removes_nothing(raw: bytes) -> None:
    assert json.loads(redacted(raw, "payload.a.b")) == json.loads(raw)


@pytest.mark.parametrize(
    "raw",
    [
        b'{"card":{"number":"4111-secret"},"card":{}}',
        b'{"card":{"number":"4111-secret"},"card":5}',
        b'{"card":{"number":"4111-secret","number":1}}',
        b'{"card":{"number":1,"number":"4111-secret"}}',
        b'{"c\\u0061rd":{"number":"4111-secret"},"card":{"x":1}}',
        b'[{"card":{"number":"4111-secret"},"card":[]}]',
    ],
)
def test_a_second_key_of_the_same_name_hides_nothing(raw: bytes) -> None:
    first_wins = json.loads(raw, object_pairs_hook=lambda pairs: dict(reversed(pairs)))
    last_wins = json.loads(raw)
    # the control: there are readers that would find it
    assert SECRET in json.dumps(first_wins) or SECRET in json.dumps(last_wins)
    assert SECRET.encode() not in redacted(raw, "payload.card.number")


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a":' + b"[" * 100_000 + b'"4111-secret"' + b"]" * 100_000 + b"}",
        b'{"a":' + b'{"a":' * 100_000 + b'"4111-secret"' + b"}" * 100_001,
        b'{"a":' + b"[" * 20 + b'{"b":"4111-secret"}' + b"]" * 20 + b"}",
        b'{"a":{"b":"4111-secret"',
        b'{"a":{"b\xff":"4111-secret"}}',
        b"",
    ],
)
def test_what_cannot_be_read_is_redacted_whole(raw: bytes) -> None:
    out = redacted(raw, "payload.a.b")
    assert SECRET.encode() not in out
    json.loads(out)


def test_an_event_is_redacted_in_both_documents_and_stays_as_it_was() -> None:
    made = redaction(parse_path(path) for path in ("payload.a", "metadata.userId", "payload.a"))
    assert made is not None
    event = Event(
        eventType="t",
        payload=Raw(b'{"a":1,"b":2.0}'),
        eventId="e",
        customerExternalId="acme",
        metadata=Raw(b'{"userId":"u","correlationId":"c"}'),
    )
    sent = made.apply(event)
    assert bytes(sent.payload) == b'{"a":"[redacted]","b":2.0}'
    assert bytes(sent.metadata) == b'{"userId":"[redacted]","correlationId":"c"}'
    assert (sent.eventId, sent.customerExternalId) == ("e", "acme")
    assert bytes(event.payload) == b'{"a":1,"b":2.0}'
    assert redaction([]) is None


def test_metadata_stays_an_object_whatever_happens() -> None:
    made = redaction([parse_path("metadata.a.b")])
    assert made is not None
    event = Event(eventType="t", payload=Raw(b"{}"), metadata=Raw(b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}"))
    assert bytes(made.apply(event).metadata) == b"{}"
    assert bytes(made.apply(event).payload) == b"{}"


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("card.number", "start with payload."),
        ("payload", "names no field"),
        ("payload.", "names no field"),
        ("payload..a", "empty"),
        ("payload.a.", "empty"),
        ("payload.a[0].b", "goes through arrays"),
        ("payload.items.*.sku", "goes through arrays"),
        ("payload.`a", "backticks"),
        ("payload.a b", "backticks"),
        ("", "start with payload."),
        ("payload." + "a." * 40 + "a", "at most 32"),
        ("payload." + "a" * 600, "at most 512"),
    ],
)
def test_a_wrong_path_is_refused_with_a_remedy(text: str, remedy: str) -> None:
    with pytest.raises(PathError) as error:
        parse_path(text)
    assert remedy in str(error.value)


@given(st.text(max_size=60) | st.text(alphabet="pay.lod`[]* ", max_size=30).map("payload.".__add__))
def test_any_text_is_a_path_or_refused(text: str) -> None:
    try:
        path = parse_path(text)
    except PathError:
        return
    assert parse_path(str(path)) == path


# ---------------------------------------------------------------- properties

KEYS = st.sampled_from(["a", "b", "c", "k.d", 'q"', "é"])
NUMBERS = st.sampled_from(["0", "-0", "1.50", "1E400", "123456789012345678901234567890", "0.1000"])
SCALARS = NUMBERS | st.sampled_from(['"x"', '"\\u00e9"', "true", "null"])


@st.composite
def documents(draw: st.DrawFn, depth: int = 3) -> Any:
    """A JSON value as Python has it, its scalars as text: objects are lists of pairs, keys may stand twice."""
    kind = draw(st.sampled_from(["scalar", "object", "array"] if depth else ["scalar"]))
    if kind == "scalar":
        return draw(SCALARS)
    if kind == "array":
        return draw(st.lists(documents(depth=depth - 1), max_size=3))
    return tuple(draw(st.lists(st.tuples(KEYS, documents(depth=depth - 1)), max_size=4)))


def written(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return f"[{', '.join(map(written, value))}]"
    return "{" + ", ".join(f"{json.dumps(key)} : {written(inner)}" for key, inner in value) + "}"


def marked(value: Any, paths: Sequence[tuple[str, ...]]) -> Any:
    """The document with a secret in the place of every value that a path names, in every key of that name."""
    if () in paths:
        return f'"{SECRET}"'
    if isinstance(value, list):
        return [marked(each, paths) for each in value]
    if isinstance(value, tuple):
        return tuple((key, marked(inner, [p[1:] for p in paths if p[0] == key])) for key, inner in value)
    return value


def read(raw: str | bytes) -> Any:
    """Numbers as their digits."""
    return json.loads(raw, parse_int=lambda text: ("number", text), parse_float=lambda text: ("number", text))


@settings(max_examples=500, deadline=None)
@given(documents(), st.lists(st.lists(KEYS, min_size=1, max_size=3).map(tuple), min_size=1, max_size=3))
def test_no_redacted_value_survives_and_all_others_do(value: Any, keys: list[tuple[str, ...]]) -> None:
    raw = written(marked(value, keys))
    out = redact(raw.encode(), [Path("payload", each) for each in keys])
    assert SECRET.encode() not in out
    assert read(out) == read(raw.replace(SECRET, "[redacted]"))
