"""Expressions and documents that are made to cost much or to break something.

From known bad ones, from the grammar, from bits of text. The same seed makes the same ones.
"""

import json
from collections.abc import Callable
from random import Random
from typing import Final

PATHS: Final = (
    *("payload", "payload.l", "payload.s", "payload.t", "payload.m", "payload.o", "payload.nest", "payload.zz"),
    *("payload.deep.a.b.c.d", "payload.deep", "payload.big", "payload.f", "payload.p", "payload.e", "payload.n"),
    *("payload.ts", "payload.dur", "payload.digits", "payload.sl", "payload.l[0]", "payload.o[1].a", "metadata", "id"),
    *("type", "occurredAt", "schemaVersion", "source", "x", "y"),
)
CONSTANTS: Final = (
    *("0", "1", "-7", "1.5", "1u", "9223372036854775807", "1e308", "true", "false", "null", "''", "'a'", "b'a'"),
    *("'aaaaaaaaaaaaaaaaaaaab'", "[1, 'a']", "{'a': 1}", "[]", "{}", "'1h'", "'2026-11-21T09:30:00Z'", "int", "'UTC'"),
    *("timestamp('2026-11-21T09:30:00Z')", "duration('1h1m')", "'Europe/Zurich'", "'é'", "r'\\d+'", "'x{9}'"),
)
BINARY: Final = ("==", "!=", "<", "<=", ">", ">=", "&&", "||", "+", "-", "*", "/", "%", "in")
FUNCTIONS: Final = (
    "size",
    "int",
    "uint",
    "double",
    "string",
    "bool",
    "bytes",
    "timestamp",
    "duration",
    "dyn",
    "type",
    "!",
    "-",
)
METHODS: Final = ("contains", "startsWith", "endsWith", "matches")
GETTERS: Final = ("getFullYear", "getMonth", "getDate", "getDayOfWeek", "getDayOfYear", "getHours", "getMilliseconds")
MACROS: Final = ("all", "exists", "exists_one", "map", "filter")

PATTERN_BITS: Final = (
    *(
        "a",
        "b",
        ".",
        "(a|b)",
        "(a*)*",
        "(a+)+",
        "[a-z]",
        "[^a]",
        "\\\\w",
        "\\\\pL",
        "\\\\PN",
        "(?i)",
        "^",
        "$",
        "(?:(?:a|b)?)",
    ),
    *(
        "a?",
        "{2}",
        "{50}",
        "{1000}",
        "{1,99}",
        "*",
        "+",
        "?",
        "|",
        "(",
        ")",
        "[",
        "]",
        "\\\\1",
        "(?=a)",
        "é",
        "(?s).",
        "x{9}",
    ),
)
SOUP: Final = (
    *("payload", ".", "a", "(", ")", "[", "]", "{", "}", ":", ",", "?", "&&", "||", "!", "-", "==", "<", "in", "has"),
    *("'x'", '"', "'''", "r'", "b'", "\\", "1", "1.5", "1u", "0x", "null", "`a ", "`", "//", "exists", "=", "é", "\0"),
)

# each loops over a list of 3,000: what a step of these costs is what bounds the whole
DEAR: Final = (
    *("x == x", "x + 1 > 0", "x * 1 - x + x - x + x >= 0", "payload.zz || true", "1 / 0 == 1 || true", "x.a.b || true"),
    *("string(x) != ''", "{'a': x} == {'a': x}", "[x, x] == [x, x]", "payload.l[x] == x", "payload.big > x"),
    *(
        "occurredAt.getDayOfYear('Europe/Zurich') >= 0",
        "occurredAt.getHours('+01:' + '00') >= 0",
        "string(occurredAt) != ''",
    ),
    *("timestamp(payload.ts) == occurredAt", "duration(payload.dur) > duration('0s')", "double(payload.digits) > 0.0"),
    *(
        "payload.s.contains(payload.n) || true",
        "payload.t.contains(payload.n) || true",
        "payload.s.startsWith(payload.s)",
    ),
    *(
        "payload.s <= payload.t",
        "payload.s == payload.t || true",
        "payload.t in payload.sl || true",
        "1 in payload.o || true",
    ),
    *(
        "payload.nest == payload.nest",
        "payload.m == payload.m",
        "payload.m.exists(k, k == '1')",
        "payload.l + payload.l != []",
    ),
    *(
        "payload.s + payload.t != ''",
        "bytes(payload.e) != b''",
        "payload.l.map(y, {'a': y}) != []",
        "payload.o.all(y, y.a == 1)",
    ),
    *("payload.ab.matches('(?:(?:a|b)?){200}c') || true", "payload.ab.matches('(a|b)*a(a|b){100}c') || true"),
    *("'aaa'.matches(payload.p)", "payload.p.matches('b') || 'b'.matches('x{5}' + string(x)) || true"),
    *(
        "((((((((((1 / 0) + 1) + 1) + 1) + 1) + 1) + 1) + 1) + 1) + 1) == 1 || true",
        "'a'.matches('((a{30}){30}' + 'b)') || true",
    ),
    *("payload.sl.exists(p, 'a'.matches(p)) || true", "payload.deep.a.b.c.q || true", "bool(payload.s) || true"),
)

# units that fill a rule of the greatest length, and what joins them
FILLERS: Final[tuple[tuple[str, str], ...]] = (
    *((f"payload.{key} == 1", "||") for key in "abc"),
    *(
        ("1", "+"),
        ("1", ","),
        ("[]", ","),
        ("'ab'", ","),
        ("(1)", "*"),
        ("!payload.a", "&&"),
        ("true ? 1 : ", ""),
        ("-", ""),
    ),
    *(
        ("!", ""),
        ("(", ""),
        ("[", ""),
        ("{1:", ""),
        (".a", ""),
        ("[0]", ""),
        (".size()", ""),
        (".map(x, x)", ""),
        ("''.size()", "||"),
    ),
    *(
        ("[1].exists(x, ", ""),
        ("[1].exists(x, x == 1)", "||"),
        ("has(payload.a.b)", "||"),
        ("dyn(", ""),
        ("'a'.matches('x{99}')", "||"),
    ),
    *(
        ("'a'.matches('(?i)[!-\\uffff]')", "||"),
        ("'a'.matches('\\\\pL')", "||"),
        ("occurredAt.getHours('Asia/Tokyo') == 1", "||"),
    ),
    *(
        ("duration('1s') == duration('2s')", "||"),
        ("timestamp('x') == occurredAt", "||"),
        ("{1: 1}", ","),
        ("/* ", ""),
        ("'\\n", ""),
    ),
)


def expression(dice: Random) -> str:
    return dice.choices(_WAYS, _WEIGHTS)[0](dice)


def _grown(dice: Random, depth: int) -> str:
    if depth <= 0 or dice.random() < 0.15:
        if dice.random() < 0.6:
            return dice.choice(PATHS)
        constant = dice.choice(CONSTANTS)
        return f"dyn({constant})" if dice.random() < 0.85 else constant  # of a known type most things are refused
    a = _grown(dice, depth - 1)
    match dice.randrange(10):
        case 0 | 1 | 2:
            return f"({a} {dice.choice(BINARY)} {_grown(dice, depth - 1)})"
        case 3:
            return f"{dice.choice(FUNCTIONS)}({a})"
        case 4:
            return f"({a}).{dice.choice(METHODS)}({_grown(dice, depth - 2)})"
        case 5:
            return f"({a}).{dice.choice(MACROS)}({dice.choice('xy')}, {_grown(dice, depth - 1)})"
        case 6:
            return f"({a} ? {_grown(dice, depth - 2)} : {_grown(dice, depth - 2)})"
        case 7:
            return f"({a})[{_grown(dice, depth - 2)}]"
        case 8:
            return f"({a}).{dice.choice(GETTERS)}({dice.choice(('', 'payload.s', repr('+01:00')))})"
        case _:
            return f"[{a}, {_grown(dice, depth - 2)}]" if dice.random() < 0.6 else f"has({dice.choice(PATHS)}.a)"


def _from_grammar(dice: Random) -> str:
    return f"{_grown(dice, dice.randrange(2, 6))} == {_grown(dice, dice.randrange(3))}"


def _looped(dice: Random) -> str:
    """Something dear for each element, in loops inside each other."""
    body = dice.choice(DEAR) if dice.random() < 0.7 else _from_grammar(dice)
    for _ in range(dice.choice((0, 0, 0, 1, 2))):
        over = dice.choice(("payload.l", "payload.o", "payload.sl", "payload.m", "[1, 2]"))
        body = f"{over}.{dice.choice(MACROS)}(y, {body})"
    return f"payload.l.{dice.choice(MACROS)}(x, {body})" + dice.choice(("", " || true", " == []", " && false"))


def _filled(dice: Random) -> str:
    unit, between = dice.choice(FILLERS)
    count = int(dice.choice((5, 40, 90, 300, 4096)) / max(1, len(unit + between) if dice.random() < 0.8 else 1))
    text = between.join([unit] * max(1, count))
    return (
        dice.choice(("", "payload", "payload.a in [", "[", "1 == "))
        + text
        + dice.choice(("", "true", "]", "1", " == []"))
    )


def _pattern(dice: Random) -> str:
    pattern = "".join(dice.choices(PATTERN_BITS, k=dice.choice((1, 3, 8, 20, 120))))
    over = dice.choice(("payload.s", "payload.ab", "payload.e", "payload.t", "type"))
    return f"{over}.matches('{pattern}')" + dice.choice(("", f" || {over}.matches('{pattern[:40]}')"))


def _soup(dice: Random) -> str:
    return dice.choice((" ", "")).join(dice.choices(SOUP, k=dice.randrange(25)))


def _text(dice: Random) -> str:
    return "".join(
        chr(dice.choice((dice.randrange(128), dice.randrange(0x3000), dice.randrange(0x10FFFF)))) for _ in range(30)
    )


def _broken(dice: Random) -> str:
    """A sound one, cut or with a part put elsewhere."""
    text = dice.choice((_from_grammar, _looped, _pattern))(dice)
    at, to = sorted((dice.randrange(len(text) + 1), dice.randrange(len(text) + 1)))
    return dice.choice((text[:at], text[:at] + text[to:], text[at:to] + text, text[:to] + text[at:]))


_WAYS: Final[tuple[Callable[[Random], str], ...]] = (_from_grammar, _looped, _filled, _pattern, _soup, _text, _broken)
_WEIGHTS: Final = (35, 25, 8, 12, 5, 3, 12)


# ---------------------------------------------------------------- documents

_NUMBERS: Final = (
    "0",
    "-0",
    "1",
    "-7",
    "1.5",
    "2e3",
    "1e400",
    "9223372036854775808",
    "1" * 400,
    "-1e999",
    "9" * 4000,
    "1.2345678901234567e-300",
)
_TEXTS: Final = ('"a"', '""', '"\\u00e9"', '"\\ud800"', '"' + "a" * 300 + '"', "true", "false", "null")
_KEYS: Final = (*"lstmopefn", "nest", "zz", "deep", "big", "ts", "dur", "digits", "sl", "ab", "a", "b", "c", "d", "")


def heavy() -> bytes:
    """What `DEAR` reads, as large as it may be without being the cost itself."""
    return json.dumps(
        {
            "l": list(range(3000)),
            "f": [1.5] * 100,
            "s": "a" * 2400,
            "t": "a" * 1199 + "b" + "a" * 1200,
            "n": "a" * 600 + "b" + "a" * 600,
            "ab": "ab" * 1000,
            "e": "é" * 800,
            "p": "a{3}b",
            "sl": [f"(a|b){{{n}}}" for n in range(300)],
            "m": {str(n): n for n in range(300)},
            "o": [{"a": 1}] * 300,
            "nest": [[[1]] * 20] * 20,
            "big": 2**70,
            "digits": "1" * 400,
            "ts": "2026-11-21T09:30:00Z",
            "dur": "1h1ms" * 90,
            "deep": {"a": {"b": {"c": {"d": 1}}}},
        }
    ).encode()


def document(dice: Random) -> bytes:
    roll = dice.random()
    if roll < 0.05:
        return bytes(dice.randrange(256) for _ in range(40))
    if roll < 0.08:
        return dice.choice((b"[", b'{"a":', b'{"l":[')) * dice.choice((10, 900, 5000))
    members = ", ".join(f"{json.dumps(dice.choice(_KEYS))}: {_value(dice, 3)}" for _ in range(dice.randrange(12)))
    return ("{" + members + "}").encode()


def _value(dice: Random, depth: int) -> str:
    roll = dice.random()
    if depth == 0 or roll < 0.35:
        return dice.choice(_NUMBERS)
    if roll < 0.6:
        return dice.choice(_TEXTS)
    if roll < 0.8:
        return "[" + ", ".join(_value(dice, depth - 1) for _ in range(dice.choice((0, 1, 3, 20)))) + "]"
    return (
        "{"
        + ", ".join(f"{json.dumps(dice.choice(_KEYS))}: {_value(dice, depth - 1)}" for _ in range(dice.randrange(5)))
        + "}"
    )
