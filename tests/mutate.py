"""Valid inputs, changed until they may be anything: for fuzzing. The same dice make the same ones."""

import re
from collections.abc import Callable, Sequence
from random import Random
from typing import Final

# A value, a mark of JSON, a line, a word: what is taken out, doubled or replaced as a whole.
_PIECES: Final = re.compile(rb'"(?:[^"\\]|\\.){0,200}"|-?\d[\d.eE+-]*|[\[\]{}:,]|\r\n|[\w-]+')

TOKENS: Final[Sequence[bytes]] = (
    # numbers
    *(b"0", b"-0", b"-1", b"1.5", b"1e999", b"-1e999", b"1e-999", b"0x10", b"01", b"+1", b"1_0", b"NaN", b"-Infinity"),
    *(b"9223372036854775807", b"9223372036854775808", b"-9223372036854775809", b"9" * 20, b"9" * 5000),
    # other values, and halves of them
    *(b"null", b"true", b'""', b'"a"', b"''", b"{}", b"[]", b"[{}]", b'{"a":1,"a":2}', b'{"":0}'),
    *(b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"/", b"[" * 900, b"[" * 5000, b'{"a":' * 900),
    # characters
    *(b"\\u0000", b"\\ud800", b"\\udfff\\ud800", b"\\ud83d\\ude00", b"\\u00e9", b"\x00", b"\x1b[31m", b"\xff\xfe"),
    *(
        b"\xc0\x80",
        b"\xed\xa0\x80",
        b"\xf4\x90\x80\x80",
        b"\xe2\x80",
        b"\xef\xbb\xbf",
        b"\xc3\xa9",
        b"\xd9\xa1\xd9\xa2",
    ),
    *(b"\xf0\x9f\x98\x80", b"\xe2\x80\xa8", b" ", b"\t", b"\n", b"\r", b"\r\n", b"\r\n\r\n", b"\x0b", b"\xc2\xa0"),
    *(b"a" * 300, b"a" * 5000, b"\xc3\xa9" * 2000, b"%00", b"../"),
    # times
    *(b"2026-11-21", b"2026-02-30T25:61:00Z", b"2026-11-21T09:30:00+99:99", b"0000-00-00T00:00:00Z"),
    b"99999-01-01T00:00:00Z",
)


def mutated(dice: Random, corpus: Sequence[bytes], more: Sequence[bytes] = ()) -> bytes:
    """One of the corpus after one to six changes; now and then nothing but noise. `more` are further tokens."""
    if dice.random() < 0.02:
        return dice.randbytes(dice.randrange(200))
    data = dice.choice(corpus)
    for _ in range(dice.choice((1, 1, 1, 2, 2, 3, 6))):
        data = dice.choice(_WAYS)(dice, data, dice.choice(corpus), dice.choice(more or TOKENS))
    return data


def _span(dice: Random, data: bytes) -> tuple[int, int]:
    start = dice.randrange(len(data) + 1)
    return start, min(len(data), start + dice.choice((0, 1, 1, 2, 8, 64)))


def _piece(dice: Random, data: bytes) -> tuple[int, int]:
    """A whole piece near a place at random."""
    found = _PIECES.search(data, dice.randrange(len(data) + 1))
    return found.span() if found else _span(dice, data)


def _flip(dice: Random, data: bytes, _other: bytes, _token: bytes) -> bytes:
    if not data:
        return b"\0"
    at = dice.randrange(len(data))
    return data[:at] + bytes((data[at] ^ 1 << dice.randrange(8),)) + data[at + 1 :]


def _noise(dice: Random, data: bytes, _other: bytes, _token: bytes) -> bytes:
    start, end = _span(dice, data)
    return data[:start] + dice.randbytes(dice.randrange(9)) + data[end:]


def _replace(dice: Random, data: bytes, _other: bytes, token: bytes) -> bytes:
    start, end = _piece(dice, data)
    return data[:start] + (token if dice.random() < 0.7 else dice.choice(TOKENS)) + data[end:]


def _insert(dice: Random, data: bytes, _other: bytes, token: bytes) -> bytes:
    at = dice.randrange(len(data) + 1)
    return data[:at] + token + data[at:]


def _drop(dice: Random, data: bytes, _other: bytes, _token: bytes) -> bytes:
    start, end = _piece(dice, data)
    return data[:start] + data[end:]


def _double(dice: Random, data: bytes, _other: bytes, _token: bytes) -> bytes:
    (start, _), (_, end) = sorted((_piece(dice, data), _piece(dice, data)))
    return data[:end] + dice.choice((b"", b",", b"\r\n")) + data[start:]


def _exchange(dice: Random, data: bytes, _other: bytes, _token: bytes) -> bytes:
    (a, b), (c, d) = sorted((_piece(dice, data), _piece(dice, data)))
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:] if b <= c else data


def _cut(dice: Random, data: bytes, _other: bytes, _token: bytes) -> bytes:
    return data[: dice.randrange(len(data) + 1)]


def _splice(dice: Random, data: bytes, other: bytes, _token: bytes) -> bytes:
    return data[: dice.randrange(len(data) + 1)] + other[dice.randrange(len(other) + 1) :]


_WAYS: Final[Sequence[Callable[[Random, bytes, bytes, bytes], bytes]]] = (
    *(_flip, _noise, _replace, _replace, _replace, _replace, _insert, _insert, _drop, _double, _exchange, _exchange),
    *(_cut, _splice),
)
