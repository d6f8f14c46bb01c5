"""Generated expressions, decided by our filters and by the language's own runtime in C++ (`cel-expr-python`)."""

import json
import random
from datetime import UTC, datetime
from typing import Any, Final

import pytest
from cel_expr_python import cel
from msgspec import Raw, Struct

from routing.filters import FilterError, FilterFault, compile_filter
from schemas.event import Event

Outcome = bool | str

# `type` is missing: the other runtime knows no variable that has the name of a function
ENVIRONMENT: Final = cel.NewEnv(
    variables={
        "payload": cel.Type.DYN,
        "metadata": cel.Type.Map(cel.Type.STRING, cel.Type.DYN),
        "id": cel.Type.STRING,
        "source": cel.Type.STRING,
        "schemaVersion": cel.Type.INT,
        "occurredAt": cel.Type.TIMESTAMP,
    }
)
OCCURRED_AT: Final = datetime(2026, 11, 21, 9, 30, 0, 250_000, tzinfo=UTC)


class Difference(Struct, frozen=True):
    """Where the two may differ, as parts of the two outcomes and of the expression, and why we keep it so."""

    ours: str
    theirs: str
    why: str
    text: str = ""


KNOWN: Final = (
    # of two faults under an `&&` the other names the first: so not only "No matching overloads found : @in"
    Difference("a value", "fault", "a value that can be no key is in no map, as in cel-go", " in "),
    Difference("a value", "No matching overloads found : -_(duration)", "a duration has an opposite here"),
    Difference("fault: int() does not go with bool", "a value", "int(bool) is the other's own: not in the language"),
    Difference("refused: int() does not go with bool", "", "the same, seen when the filter is compiled"),
    Difference("refused: duration() does not go with int", "", "duration(int) is the other's own: not in the language"),
    # we refuse what can never give a value, also where `||` or `?` would pass it by
    Difference("can be no index", "", "no list or map has an index of this type"),
    Difference("cannot be a key of a map", "", "no map has a key of this type"),
    Difference("this key stands twice", "", "such a map is an error whenever it is made"),
    Difference("() of a", "", "a conversion of a constant that fails, fails on every event"),
    Difference("cannot compare", "", "values of this type have no order"),
    Difference("there is no time zone", "", "a constant that names no zone"),
)

FIELDS: Final = ("a", "b", "s", "l", "m", "t", "n", "e", "o", "z", "ts", "d")
VALUES: Final[tuple[Any, ...]] = (
    *(
        0,
        1,
        -7,
        2,
        1.5,
        2.0,
        2**53,
        2**63 - 1,
        -(2**63),
        True,
        False,
        None,
        "",
        "a",
        "abc",
        "é",
        "a.c",
        "1h",
        "UTC",
    ),
    *(
        "2026-11-21T09:30:00Z",
        "+02:00",
        "17",
        "[a-c]+",
        [],
        [1, 2, 3],
        ["a", None],
        {},
        {"a": 1, "b": "x"},
        [{"a": 1}, {"a": 2.0}],
    ),
)
PATHS: Final = (
    *(f"payload.{name}" for name in FIELDS),
    *("payload.l[0]", "payload.m.a", "payload['zz']", "payload.o[1].a", "payload", "x", "x", "x"),
    *("id", "occurredAt", "schemaVersion", "metadata.userId", "metadata"),
)
CONSTANTS: Final = (
    *(
        "0",
        "1",
        "-7",
        "1.5",
        "1u",
        "2.0",
        "true",
        "false",
        "null",
        "''",
        "'a'",
        "b'a'",
        "[1, 'a']",
        "{'a': 1}",
        "[]",
        "{}",
    ),
    *("'1h'", "timestamp('2026-11-21T09:30:00Z')", "duration('1h1m')", "'Europe/Zurich'", "'é'", "'a.'", "'[a-c]'"),
    *("9223372036854775807", "-9223372036854775808", "18446744073709551615u", "1e308", "int", "string"),
)
OPERATORS: Final = ("==", "!=", "<", "<=", ">", ">=", "&&", "||", "+", "-", "*", "/", "%", "in")
FUNCTIONS: Final = (
    *("size", "int", "uint", "double", "string", "bool", "bytes", "timestamp", "duration", "dyn", "type", "!", "-"),
)
GETTERS: Final = (
    *("getFullYear", "getMonth", "getDate", "getDayOfMonth", "getDayOfWeek", "getDayOfYear", "getHours", "getMinutes"),
    *("getSeconds", "getMilliseconds"),
)
ZONES: Final = ("", "", "dyn('+01:00')", "'Europe/Zurich'", "'UTC'")
METHODS: Final = ("contains", "startsWith", "endsWith", "matches")
MACROS: Final = ("all", "exists", "exists_one", "map", "filter")


def part(dice: random.Random, depth: int) -> str:
    def of(less: int = 1) -> str:
        return part(dice, depth - less)

    if depth <= 0 or dice.random() < 0.15:
        if dice.random() < 0.6:
            return dice.choice(PATHS)
        constant = dice.choice(CONSTANTS)
        return f"dyn({constant})" if dice.random() < 0.9 else constant  # of a known type most things are refused
    match dice.randrange(10):
        case 0 | 1 | 2:
            return f"({of()} {dice.choice(OPERATORS)} {of()})"
        case 3:
            return f"{dice.choice(FUNCTIONS)}({of()})"
        case 4:
            return f"({of()}).{dice.choice(METHODS)}({of(2)})"
        case 5:
            return f"({of()}).{dice.choice(MACROS)}(x, {of()})"
        case 6:
            return f"({of()} ? {of()} : {of()})"
        case 7:
            return f"({of()})[{of(2)}]"
        case 8:
            return f"({of()}).{dice.choice(GETTERS)}({dice.choice(ZONES)})"
        case _:
            return dice.choice(
                (
                    f"[{of()}, {of(2)}]",
                    f"has(payload.{dice.choice(FIELDS)}.a)",
                    f"{{{of(2)}: {of()}}}",
                    f"({of()}).size()",
                )
            )


class Fitting:
    """Expressions whose parts have the types that their operators want, but for one part in twenty."""

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice

    def pick(self, *choices: str) -> str:
        return self.dice.choice(choices)

    def of(self, wanted: str, depth: int) -> str:
        if self.dice.random() < 0.05:
            return part(self.dice, depth)
        return str(getattr(self, wanted)(depth - 1))

    def truth(self, depth: int) -> str:
        if depth <= 0:
            return self.pick("payload.t", "true", "has(payload.m.a)", "has(payload.zz)")
        number, text, items = self.of("number", depth), self.of("text", depth), self.of("items", depth)
        compare = self.pick("==", "!=", "<", "<=", ">", ">=")
        truth = self.of("truth", depth)
        return self.pick(
            f"{number} {compare} {self.of('number', depth)}",
            f"{text} {compare} {self.of('text', depth)}",
            f"{self.of('time', depth)} {compare} {self.of('time', depth)}",
            f"{number} in {items}",
            f"{text}.{self.pick(*METHODS)}({self.of('text', depth)})",
            f"{items}.{self.pick('all', 'exists', 'exists_one')}(x, {truth})",
            f"({truth} {self.pick('&&', '||')} {self.of('truth', depth)})",
            f"({truth} ? {self.of('truth', depth)} : {self.of('truth', depth)})",
            f"!({truth})",
            f"{items} == {self.of('items', depth)}",
            f"type({number}) == {self.pick('int', 'double', 'string')}",
        )

    def number(self, depth: int) -> str:
        if depth <= 0:
            return self.pick(
                "payload.a", "payload.b", "payload.l[0]", "schemaVersion", "x", "dyn(3)", "dyn(-2)", "dyn(1.5)"
            )
        number, text = self.of("number", depth), self.of("text", depth)
        return self.pick(
            f"({number} {self.pick('+', '-', '*', '/', '%')} {self.of('number', depth)})",
            f"-({number})",
            f"{self.pick('int', 'double', 'uint')}({number})",
            f"int({self.pick('payload.n', text)})",
            f"size({self.of('items', depth)})",
            f"({text}).size()",
            f"({self.of('time', depth)}).{self.pick(*GETTERS)}({self.pick(*ZONES)})",
            f"({self.of('truth', depth)} ? {number} : {self.of('number', depth)})",
        )

    def text(self, depth: int) -> str:
        if depth <= 0:
            return self.pick(
                "payload.s", "payload.e", "id", "source", "dyn('a')", "dyn('[a-c]')", "dyn('')", "payload.m['b']"
            )
        text = self.of("text", depth)
        return self.pick(
            f"({text} + {self.of('text', depth)})", f"string({self.of('number', depth)})", f"string({text})"
        )

    def items(self, depth: int) -> str:
        if depth <= 0:
            return self.pick("payload.l", "payload.z", "[payload.a, payload.b]", "dyn([1, 2, 3.0])", "payload.m")
        items, number = self.of("items", depth), self.of("number", depth)
        return self.pick(
            f"{items}.filter(x, {self.of('truth', depth)})",
            f"{items}.map(x, {number})",
            f"({items} + {self.of('items', depth)})",
            f"[{number}, {self.of('number', depth)}]",
        )

    def time(self, depth: int) -> str:
        if depth <= 0:
            return self.pick("occurredAt", "timestamp(payload.ts)", "dyn(timestamp('2026-01-01T00:00:00.5Z'))")
        length = self.pick("duration('1h1m')", "duration(payload.d)", "duration('-3.5s')")
        return f"({self.of('time', depth)} {self.pick('+', '-')} {length})"


def expression(dice: random.Random) -> str:
    if dice.random() < 0.7:
        return Fitting(dice).truth(dice.randrange(1, 4))
    joined = dice.choice(("==", "!=", "<", "&&", "||", "in"))
    return f"{part(dice, dice.randrange(1, 4))} {joined} {part(dice, dice.randrange(1, 3))}"


def document(dice: random.Random) -> dict[str, Any]:
    fitting: dict[str, tuple[Any, ...]] = {
        "a": (0, 1, -7, 42, 2**53, 2**63 - 1, -(2**63)),
        "b": (1.5, 2.0, -0.0, 1e308, 3.25),
        "s": ("", "a", "abc", "a.c"),
        "l": ([1, 2, 3], [], [1, 1.0, 2.5], [7]),
        "m": ({"a": 1, "b": "x"}, {"b": ""}, {}),
        "t": (True, False),
        "n": ("17", "-3", "x"),
        "e": ("é", "ß€😀", "[a-c]+"),
        "z": ([], [1, "a"]),
        "ts": ("2026-11-21T09:30:00Z", "1969-12-31T23:59:59.999+01:00", "no time"),
        "d": ("1h", "1.5s", "-2m3ms", "x"),
    }
    made = {name: dice.choice(fitting.get(name, VALUES) if dice.random() < 0.9 else VALUES) for name in FIELDS}
    return {name: value for name, value in made.items() if dice.random() < 0.95}


def ours(text: str, payload: Any) -> Outcome:
    shown = Event(
        eventType="t",
        payload=Raw(json.dumps(payload).encode()),
        eventId="evt_1",
        occurredAt="2026-11-21T09:30:00.250Z",
        customerExternalId="acme",
        source="billing",
        metadata=Raw(b'{"userId": "u1"}'),
    )
    try:
        return compile_filter(text).matches(shown)
    except FilterError as fault:
        return f"refused: {fault.message}"
    except FilterFault as fault:
        return f"fault: {fault}"


def theirs(text: str, payload: Any, checked: bool) -> Outcome:
    try:
        compiled = ENVIRONMENT.compile(text, disable_check=not checked)
    except Exception as fault:  # its errors have no class of their own
        return f"refused: {fault}"
    try:
        value = compiled.eval(
            data={
                "payload": payload,
                "metadata": {"userId": "u1"},
                "id": "evt_1",
                "source": "billing",
                "schemaVersion": 1,
                "occurredAt": OCCURRED_AT,
            }
        )
    except Exception as fault:
        return f"fault: {fault}"
    plain = value.plain_value()
    return plain if isinstance(plain, bool) else f"fault: {plain}"


def shown(outcome: Outcome) -> str:
    return "a value" if isinstance(outcome, bool) else outcome


def known(text: str, mine: Outcome, other: Outcome) -> bool:
    return any(each.ours in shown(mine) and each.theirs in shown(other) and each.text in text for each in KNOWN)


def only_large_integers(text: str, payload: dict[str, Any]) -> bool:
    """Whether both agree once integers that no double holds are others: ours compares them with doubles exactly."""
    tame = {name: 42 if type(value) is int and abs(value) > 2**53 else value for name, value in payload.items()}
    return tame != payload and agree(*compared(text, tame))


def agree(mine: Outcome, other: Outcome) -> bool:
    """Both give the same bool, or neither gives one."""
    return mine is other if isinstance(mine, bool) or isinstance(other, bool) else True


def compared(text: str, payload: Any) -> tuple[Outcome, Outcome]:
    """What their type check refuses and ours does not is compared by what it gives.

    Ours lets numbers of two kinds, null and the branches of `?` meet, as the language does when it runs.
    """
    mine = ours(text, payload)
    return mine, theirs(text, payload, checked=isinstance(mine, str) and mine.startswith("refused"))


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("count", [6_000, pytest.param(200_000, marks=pytest.mark.chaos("filters"))])
def test_filters_decide_as_the_runtime_in_cpp_does(count: int) -> None:
    dice = random.Random(count)
    both = differing = 0
    for _ in range(count):
        payload, text = document(dice), expression(dice)
        mine, other = compared(text, payload)
        both += isinstance(mine, bool) and isinstance(other, bool)
        if not agree(mine, other):
            differing += 1
            assert known(text, mine, other) or only_large_integers(text, payload), (
                f"{text}\non {payload}\nours:   {mine}\ntheirs: {other}"
            )
    # the controls: many expressions give a value, and few differ
    assert both > count / 5
    assert differing < count / 50


@pytest.mark.parametrize(
    ("text", "payload"),
    [
        ("payload.a > 100 && payload.s in ['abc', 'x']", {"a": 150, "s": "abc"}),
        ("payload.l.all(x, x > 0) && payload.l.exists_one(x, x == 2)", {"l": [1, 2, 3]}),
        ("payload.l.filter(x, x > 1).map(x, x * 2) == [4, 6]", {"l": [1, 2, 3]}),
        ("payload.l.exists(x, x.a > 1 || true)", {"l": [1, {"a": 0}]}),
        ("payload.s.matches('^[a-c]{3}$') && !payload.s.matches('d')", {"s": "abc"}),
        ("timestamp(payload.ts) + duration(payload.d) > occurredAt", {"ts": "2026-11-21T09:30:00Z", "d": "1h"}),
        ("occurredAt.getHours('Europe/Zurich') == 10 && occurredAt.getDayOfWeek() == 6", {}),
        ("payload.a == 1 && payload.a == 1.0 && payload.b > 9007199254740991", {"a": 1, "b": 9007199254740992.0}),
        ("has(payload.m.a) && !has(payload.m.zz)", {"m": {"a": None}}),
        ("payload.m.map(k, k) == ['a']", {"m": {"a": 1}}),
        ("string(payload.a) + payload.s == '1é'", {"a": 1, "s": "é"}),
    ],
)
def test_both_say_yes(text: str, payload: Any) -> None:
    assert compared(text, payload) == (True, True)


@pytest.mark.parametrize(
    ("text", "mine", "other"),
    [
        ("[1] in payload.m", "False", "fault"),
        ("int(payload.t) == 1", "fault", "True"),
        ("-duration('1s') < duration('0s')", "True", "fault"),
        ("duration(schemaVersion) == duration('1s')", "refused", "fault"),
        ("payload.m[occurredAt] == 1 || true", "refused", "True"),
        ("payload.t || payload.a < null", "refused", "True"),
        # integers are compared with doubles exactly, on one line of numbers; the other makes doubles of them first
        ("payload.big > double(payload.big)", "True", "False"),
        # compared by what they give: the other's type check refuses these
        ("schemaVersion == 1.0 && id != null && (payload.t ? 1 : 'a') == 1", "True", "True"),
    ],
)
def test_the_known_differences_are_there_still(text: str, mine: str, other: str) -> None:
    """docs/filters.md names them."""
    got = compared(text, {"m": {"a": 1}, "t": True, "a": 1, "big": 2**53 + 1})
    assert [str(outcome).split(":")[0] for outcome in got] == [mine, other]


def test_the_comparison_sees_a_wrong_answer() -> None:
    """The control: of each kind that the list of known differences does not name."""
    for mine, other in (
        (True, False),
        (False, "fault: Key not found"),
        ("fault: payload.a is missing", True),
        ("refused: there is no variable `id`", True),
    ):
        assert not agree(mine, other) and not known("payload.a == id", mine, other)
