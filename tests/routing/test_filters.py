"""What filters decide on events, and what is refused before any event is seen."""

import pickle
from collections.abc import Iterator

import msgspec
import pytest
from msgspec import Raw

from routing.filters import Filter, FilterError, FilterFault, compile_filter, documents_for
from schemas.event import Event

PAYLOAD = {
    "total": 150,
    "price": 9.5,
    "country": "CH",
    "vip": True,
    "note": None,
    "big": 2**63,
    "items": [{"sku": "a1", "qty": 2}, {"sku": "b2", "qty": 0}],
    "customer": {"tier": "gold", "address": {"city": "Bern"}},
    "content-type": "json",
    'quote"d': 1,
    "": "empty",
    "häuser": 3,
}


def event(payload: object = PAYLOAD, *, raw: bytes | None = None, metadata: bytes = b'{"userId": "u1"}') -> Event:
    return Event(
        eventType="invoice.paid",
        payload=Raw(msgspec.json.encode(payload) if raw is None else raw),
        eventId="evt_1",
        occurredAt="2026-11-21T09:30:00.250Z",
        customerExternalId="acme",
        source="billing",
        metadata=Raw(metadata),
    )


@pytest.mark.parametrize(
    ("expression", "matches"),
    [
        ("payload.total > 100", True),
        ("payload.total > 100.5", True),
        ("150.0 == payload.total", True),
        ("100 > payload.total", False),
        ('payload.total > 100 && payload.country in ["CH", "DE"]', True),
        ('payload["country"] in {"CH": 1}', True),
        ("payload.vip", True),
        ("!payload.vip", False),
        ("payload.note == null", True),
        ("has(payload.note) && !has(payload.nothing)", True),
        ('has(payload["content-type"])', True),
        ("payload.`content-type` == 'json'", True),
        ("payload['quote\"d'] == 1 && payload[''] == 'empty' && payload['häuser'] == 3", True),
        ('payload.customer.address.city == "Bern"', True),
        ("has(payload.customer.address) && size(payload.customer) == 2", True),
        ('payload.items[1].sku.startsWith("b")', True),
        ("payload.items.exists(i, i.qty == 0)", True),
        ("payload.items.all(i, i.qty > 0)", False),
        ("payload.items.exists_one(i, i.qty > 1)", True),
        ("size(payload.items.filter(i, i.qty > 0)) == 1", True),
        ('"a1" in payload.items.map(i, i.sku)', True),
        ("payload.items.exists(payload, payload.qty == 2)", True),
        ("payload.price * 2.0 == 19.0", True),
        ("double(payload.total) * payload.price > 1400.0", True),
        ("payload.big == 9223372036854775808.0", True),
        ("payload.big > 9223372036854775807", True),
        ("type(payload.big) == double && type(payload.total) == int", True),
        ("payload.total == true", False),
        ("payload.vip == 1", False),
        ('type == "invoice.paid" && source == "billing" && aggregateId == ""', True),
        ('id == "evt_1" && schemaVersion == 1', True),
        ('metadata.userId == "u1"', True),
        ('size(metadata) == 1 && "userId" in metadata', True),
        ('occurredAt > timestamp("2026-01-01T00:00:00Z")', True),
        ('occurredAt - duration("1h") < timestamp("2026-11-21T08:30:00.251Z")', True),
        ('occurredAt.getHours("Europe/Zurich") == 10', True),
        ("occurredAt.getDayOfWeek() in [1, 2, 3, 4, 5]", False),
        ("payload.total > 100 ? payload.vip : false", True),
        ("payload.nothing > 1 || payload.total > 1", True),
        ("payload.nothing > 1 && payload.total > 1000", False),
        ("true || payload", True),
        ("payload.total in [1, 150.0]", True),
        ("[payload.total, 2] == [150, 2]", True),
        ("type.matches('^invoice[.](paid|void)$')", True),
        ("type.matches('^paid')", False),
        ("matches(payload.country, '^[A-Z]{2}$')", True),
        ("payload.country.matches('^' + payload.country + '$')", True),
        ("payload.items.all(i, i.sku.matches('[a-z][0-9]'))", True),
        (r"'häuser'.matches(r'^\p{Latin}+$') && '\n'.matches('[[:space:]]')", True),
        (r"'A'.matches('(?i)a') && 'a\nb'.matches('(?s)a.b') && !'a\nb'.matches('a.b')", True),
        ("payload.items[0] == {'sku': 'a1', 'qty': 2.0}", True),
    ],
)
def test_an_expression_decides(expression: str, matches: bool) -> None:
    assert compile_filter(expression).matches(event()) is matches


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ("payload.nothing > 1", "payload.nothing is missing"),
        ("payload.nothing == 'x'", "payload.nothing is missing"),
        ("payload.nothing in ['x']", "payload.nothing is missing"),
        ("payload.customer.age.years > 1", "payload.customer.age is missing"),
        ("payload.country.code == 'x'", "payload.country is no object but string: `code` was asked for"),
        ("payload.country > 1", "`>` cannot compare string with int"),
        ("100 < payload.country", "`<` cannot compare int with string"),
        ("payload.vip > 1", "`>` cannot compare bool with int"),
        ("payload.total", "the expression gives int, not a bool"),
        ("!payload.total", "`!` needs a bool, found int"),
        ("payload.total && true", "`&&` needs bools, found int"),
        ("payload.total * 1.1 > 1.0", "`*` does not go with int and double: make both double() or both int()"),
        ("payload.total + 9223372036854775807 > 0", "`+` overflows 64 bits"),
        ("payload.total / 0 == 1", "division by zero"),
        ("payload.items[2].sku == 'x'", "the index is outside the list"),
        ("payload.items[0].nothing == 'x'", "there is no field `nothing`"),
        ("payload.total.startsWith('x')", "startsWith() does not go with int"),
        ("size(payload.total) == 1", "size() does not go with int"),
        ("int(payload.country) == 1", "int() of a text that is no 64-bit integer"),
        ("has(payload.country.code)", "payload.country is no object but string: `code` was asked for"),
        ("payload.items.all(i, i.qty / 0 == 1)", "division by zero"),
        ("payload.total.matches('1')", "matches() does not go with int"),
        ("'a'.matches(payload.country + '(')", "matches() with a pattern that is none, or too large"),
        ("'a'.matches(payload.total)", "matches() does not go with string, int"),
    ],
)
def test_what_cannot_be_evaluated_is_a_fault_that_quotes_no_value(expression: str, text: str) -> None:
    with pytest.raises(FilterFault) as fault:
        compile_filter(expression).matches(event())
    assert str(fault.value) == text
    assert "CH" not in text and "150" not in text


@pytest.mark.parametrize(
    ("expression", "line", "column", "message", "remedy"),
    [
        ("payloda.total > 1", 1, 1, "no variable `payloda`", "Did you mean payload?"),
        ("total > 1", 1, 1, "no variable `total`", "payload.total"),
        ("payload.a = 1", 1, 11, "`=` is no operator", "=="),
        ("payload.a & payload.b", 1, 11, "`&` is no operator", "&&"),
        ("payload.a and payload.b", 1, 11, "`and` does not belong here", "&&"),
        ("not payload.a", 1, 1, "`not` is no operator", "!"),
        ("payload.a ==\n  'x", 2, 3, "no end", "quote"),
        ("payload.a == “x”", 1, 14, "typographic", '"'),
        ("(payload.a", 1, 11, "expected `)`", ""),
        ("payload.a payload.b", 1, 11, "does not belong here", "operator"),
        ("payload.in == 1", 1, 9, "expected the name of a field", '["in"]'),
        ("var == 1", 1, 1, "reserved word", 'payload["var"]'),
        ("type > 3", 1, 6, "`>` cannot compare string with int", "without quotes"),
        ('schemaVersion == "1"', 1, 15, "int never equals string", "without quotes"),
        ('occurredAt > "2026-01-01"', 1, 12, "cannot compare timestamp with string", "timestamp("),
        ('timestamp("tomorrow") < occurredAt', 1, 1, "timestamp() of a text", ""),
        ("type && true", 1, 1, "`&&` needs a bool, found string", ""),
        ("1 + 1", 1, 3, "gives int, not a bool", ""),
        ("1 + 1.0 == 2.0", 1, 3, "`+` does not go with int and double", "double(x)"),
        ("-type == 'x'", 1, 1, "`-` needs a number", ""),
        ("size(1) == 1", 1, 1, "size() does not go with int", "size(list)"),
        ("type.startsWith(1)", 1, 6, "startsWith() on string does not go with int", "string.startsWith(string)"),
        ("type.startWith('x')", 1, 6, "no method startWith()", "startsWith()"),
        ("startsWith(type, 'x')", 1, 1, "no function startsWith()", "method"),
        ("type.matches('a(b')", 1, 15, "the pattern has an error: missing ) `a(b`", "backslash"),
        ("true &&\n  matches(type, 'a**')", 2, 19, "bad repetition operator `**`", "RE2's"),
        (r"type.matches(r'(?<=a)b')", 1, 16, "invalid perl operator `(?<=`", "no look-ahead"),
        (r"type.matches('(a)\\1')", 1, 19, "invalid escape sequence", "back-reference"),
        ("type.matches('a{1001}')", 1, 16, "invalid repetition size", "{1000}"),
        ("type.matches('(a{50}){20}b{1000}')", 1, 14, "the pattern is too large", "smaller repetitions"),
        ("type.matches('[xy]{999}') || id.matches('.{130}')", 1, 41, "too large together", "split"),
        (f"type.matches('{'a' * 501}')", 1, 14, "a pattern of 501 characters, more than 500", ""),
        (r"type.matches(r'\pL\pM\PN\pS\pZ')", 1, 14, "more than 4 classes", ""),
        ("type.matches(3)", 1, 6, "matches() on string does not go with int", "string.matches(string)"),
        ("schemaVersion.matches('a')", 1, 15, "matches() on int does not go with string", ""),
        ("type.matches()", 1, 6, "matches() on string does not go with nothing", ""),
        ("1 in type", 1, 6, "`in` needs a list or a map", "[a, b]"),
        ("1 in ['a']", 1, 3, "int is never in list(string)", ""),
        ("has(type)", 1, 1, "has() takes one field", "has(payload.field)"),
        ("{'a': 1, 'a': 2} == {}", 1, 10, "twice", ""),
        ("9223372036854775808 > 1", 1, 1, "not within 64 bits", "9223372036854775808.0"),
        (r"'\q' == type", 1, 2, "no escape", "raw"),
        (r"'\ud800' == type", 1, 2, "no character of Unicode", ""),
        ("occurredAt.getHours('Mars/Olympus') == 1", 1, 21, "no time zone Mars/Olympus", "Europe/Zurich"),
        ("", 1, 1, "empty", "Leave `where` out"),
        ("a{b: 1}", 1, 2, "messages cannot be built", "map"),
        ("payload.items.exists(i)", 1, 15, "takes a variable and an expression", "exists(x"),
        ("!-payload.x", 1, 2, "side by side", "parentheses"),
    ],
)
def test_a_fault_in_the_text_names_place_and_remedy(
    expression: str, line: int, column: int, message: str, remedy: str
) -> None:
    with pytest.raises(FilterError) as error:
        compile_filter(expression)
    fault = error.value
    assert (fault.line, fault.column) == (line, column)
    assert message in fault.message
    assert remedy in fault.remedy
    caret = str(fault).split("\n")[2]
    assert caret == " " * (column - 1) + "^"
    copy = pickle.loads(pickle.dumps(fault))
    assert (str(copy), copy.line, copy.column) == (str(fault), line, column)


@pytest.mark.parametrize(
    "expression",
    [
        "(" * 4000,
        "(" * 1000 + "1" + ")" * 1000,
        "[" * 2000 + "]" * 2000,
        "payload" + ".a" * 2000 + " == 1",
        "payload" + "[0]" * 1300 + " == 1",
        "1" + "+1" * 2000 + " == 1",
        "!(" * 1300 + "true" + ")" * 1300,
        "true ? " * 500 + "true" + ": true" * 500,
        "payload.a" + ".map(x, x)" * 400 + " == []",
        "payload.a" + ".map(x, x" * 400 + ")" * 400 + " == []",
        "'a'" * 1365,
        "x" * 5000,
        "payload.a in [" + ",".join(["1"] * 1001) + "]",
        " || ".join(["payload.a == 1"] * 251),
        " || ".join(["[1].exists(x,x==1)"] * 101),
        " || ".join(f"occurredAt.getHours('Etc/GMT+{n}') == 0" for n in range(1, 13))
        + "".join(f" || occurredAt.getHours('Etc/GMT-{n}') == 0" for n in range(1, 6)),
        "!" * 2001 + "true",
    ],
)
def test_hostile_nesting_and_length_are_refused_and_nothing_overflows(expression: str) -> None:
    with pytest.raises(FilterError):
        compile_filter(expression)


@pytest.mark.parametrize(
    "expression", ["!" * 1990 + "true", "-" * 1989 + "1 == 1 || true", " || ".join(["payload.a == 1"] * 150)]
)
def test_long_chains_that_need_no_depth_are_fine(expression: str) -> None:
    assert compile_filter(expression).matches(event({"a": 1}))


@pytest.mark.parametrize(
    "expression",
    [
        "payload.l.all(a, payload.l.all(b, payload.l.all(c, true)))",
        "payload.l.map(a, payload.l.map(b, payload.l)) == []",
        "payload.l.exists(a, payload.l == payload.m)",
        "payload.l.all(a, !(payload.l in [payload.m]))",
        "size(payload.s" + " + payload.s" * 60 + ") > 0",
        "payload.l.all(a, payload.s.contains('b') == false)",
        "payload.l.all(a, payload.t.contains(payload.n) || true)",
        "payload.l.all(a, payload.s <= payload.s + 'b')",
        "payload.l.all(a, payload.t.matches('(?:(?:a|b)?){200}c') || true)",
        "payload.l.all(a, 'a'.matches('a{99}' + payload.n) || true)",
        "payload.l.all(a, 'a'.matches('(' + payload.n) || true)",
        "payload.l.all(a, double(payload.d) > 0.0)",
    ],
)
def test_an_expression_that_multiplies_its_work_ends_in_a_fault(expression: str) -> None:
    many = {"l": list(range(2000)), "m": [*range(1999), 0], "s": "a" * 500_000, "d": "1" * 400}
    many |= {"t": "a" * 1199 + "b" + "a" * 1200, "n": "a" * 200 + "b" + "a" * 200}
    with pytest.raises(FilterFault, match="costs too much"):
        compile_filter(expression).matches(event(many))
    # the control: the same work on less data is done
    few = {"l": [0, 1], "m": [0, 0], "s": "a", "d": "1", "t": "a", "n": "b"}
    assert compile_filter(expression).matches(event(few)) in (True, False)


@pytest.mark.parametrize("expression", ["payload.a > 1", "size(payload) > 1", "has(payload.a)", "payload == payload"])
@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_json_nested_without_end_is_a_fault_and_no_crash(expression: str, opening: bytes) -> None:
    deep = opening * 100_000
    closing = (b"1" + b"}" * 100_000) if opening != b"[" else b"]" * 100_000
    for raw in (deep + closing, b'{"b":' + deep + closing + b"}", deep):
        with pytest.raises(FilterFault, match="cannot be decoded"):
            compile_filter(expression).matches(event(raw=raw))


def test_half_a_character_is_no_text_wherever_it_stands() -> None:
    """With a number beyond every double before it, the document is read by another decoder, which takes such halves."""
    for raw in (rb'{"a": 1e400, "b": "\ud800"}', rb'{"b": "\uD800", "a": 1}'):
        for expression in (
            "size(payload) == 2 && bytes(payload.b) == b''",
            "size(payload) == 2 && payload.b.matches('a')",
        ):
            with pytest.raises(FilterFault, match="cannot be decoded"):
                compile_filter(expression).matches(event(raw=raw))
    # the control: two halves are a character
    assert compile_filter("size(payload) == 2 && bytes(payload.b) != b''").matches(
        event(raw=rb'{"a": 1e400, "b": "\ud83d\ude00"}')
    )


def test_values_nested_just_within_reach_compare_or_fault() -> None:
    raw = b'{"a":' + b"[" * 900 + b"]" * 900 + b"}"
    try:
        assert compile_filter("payload.a == payload['a']").matches(event(raw=raw))
    except FilterFault as fault:
        assert "nested too deep" in str(fault)


@pytest.mark.parametrize(
    ("number", "expression"),
    [
        (b"1e400", "payload.a > 1.0e308"),
        (b"-1e400", "payload.a < -1.0e308"),
        (b"9" * 5000, "payload.a > 1"),
        (b"-" + b"9" * 5000, "payload.a < 1"),
        (b"18446744073709551616", "payload.a == 18446744073709551616.0"),
        (b"-9223372036854775809", "payload.a == -9223372036854775808"),
        (b"9007199254740993", "payload.a == 9007199254740993"),
        (b"1.0", "payload.a == 1 && type(payload.a) == double"),
        (b"1E2", "type(payload.a) == double"),
    ],
)
def test_numbers_that_no_int_holds_are_the_nearest_double(number: bytes, expression: str) -> None:
    for raw in (b'{"a":%b}' % number, b'{"b":[%b],"a":%b}' % (number, number)):
        assert compile_filter(expression).matches(event(raw=raw))
        assert compile_filter(f"{expression} && size(payload) > 0").matches(event(raw=raw))


@pytest.mark.parametrize("raw", [b"[1, 2]", b'"text"', b"7", b"null", b"true"])
def test_a_payload_need_not_be_an_object(raw: bytes) -> None:
    with pytest.raises(FilterFault, match="payload is no object"):
        compile_filter("payload.a == 1").matches(event(raw=raw))
    with pytest.raises(FilterFault, match="payload is no object"):
        compile_filter("has(payload.a)").matches(event(raw=raw))
    assert compile_filter("payload == payload").matches(event(raw=raw))


def test_occurred_at_may_have_any_form_that_ingress_takes() -> None:
    found = compile_filter('occurredAt == timestamp("2026-11-21T09:30:00Z")')
    for text in ("2026-11-21T09:30:00Z", "2026-11-21 10:30:00+01:00", "2026-11-21T10:30:00+0100"):
        shown = event()
        shown.occurredAt = text
        assert found.matches(shown)


def test_the_fields_that_an_expression_reads_are_known() -> None:
    found = compile_filter('has(payload.a.b) && payload["c"] == type && metadata.m.exists(x, x.y == payload.d[0])')
    assert found.fields == ("metadata.m", "payload.a.b", "payload.c", "payload.d", "type")


@pytest.fixture
def shared() -> Iterator[list[Filter]]:
    yield [
        compile_filter("payload.customer.tier == 'gold'"),
        compile_filter("size(payload.customer) == 2"),
        compile_filter("has(payload.customer.address.city) && payload.total > 1"),
        compile_filter("metadata.userId == 'u1'"),
        compile_filter("payload.nothing == 1 || payload.customer.address == {'city': 'Bern'}"),
    ]


def test_filters_that_share_one_decoding_decide_as_they_do_alone(shared: list[Filter]) -> None:
    through = documents_for(shared)
    scope = through.scope(event())
    assert [each.bound(through).decide(scope) for each in shared] == [each.matches(event()) for each in shared]
    assert all(each.matches(event()) for each in shared)
