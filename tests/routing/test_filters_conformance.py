"""The conformance cases of the CEL project that JSON-shaped data can express, each against the expected value."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from msgspec import Raw

from routing.cel.check import DYN, Checker, Type
from routing.cel.compile import Code, Compiler, Field
from routing.cel.errors import FilterError, FilterFault
from routing.cel.syntax import parse
from routing.cel.values import Scope, equal, from_map_key, kind, make_map
from routing.documents import MAX_STEPS
from routing.filters import compile_filter
from schemas.event import Event

CASES = json.loads((Path(__file__).parents[1] / "vectors" / "cel-conformance.json").read_text())["tests"]

# cases that do not pass, by file, section and name, and why; docs/filters.md says the same
REFUSED: dict[tuple[str, str, str], str] = {}
AT_LEAST = 660


class Bound:
    """Variables with fixed values."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.types = {name: Type(kind(value), _args(value)) for name, value in values.items()}

    def read(self, name: str) -> Code:
        value = self.values[name]
        return lambda scope: value

    def field(self, name: str, path: tuple[str, ...]) -> Field | None:
        return None

    def present(self, name: str, path: tuple[str, ...]) -> Code | None:
        return None


def _args(value: Any) -> tuple[Type, ...]:
    return (DYN,) if isinstance(value, list) else (Type("string"), DYN) if isinstance(value, dict) else ()


def decoded(tagged: Mapping[str, Any]) -> Any:
    ((tag, value),) = tagged.items()
    match tag:
        case "list":
            return [decoded(item) for item in value]
        case "map":
            return make_map([decoded(key) for key, _ in value], [decoded(item) for _, item in value])
        case "double":
            return float(value)
    return value


def scope() -> Scope:
    return Scope(None, None, None, MAX_STEPS, [None] * 8)


def evaluated(case: Mapping[str, Any]) -> Any:
    names = Bound({name: decoded(value) for name, value in case.get("bindings", {}).items()})
    tree = parse(case["expr"])
    checker = Checker(case["expr"], names.types)
    if not case.get("unchecked"):
        checker.of(tree, {})
    return Compiler(case["expr"], names, checker.types).code(tree, {})(scope())


def identical(got: Any, expected: Any) -> bool:
    """Of one type, down to the elements; -0.0 is not 0.0."""
    if type(got) is not type(expected):
        return False
    if isinstance(got, list):
        return len(got) == len(expected) and all(map(identical, got, expected))
    if isinstance(got, dict):
        return len(got) == len(expected) and all(
            key in expected and identical(value, expected[key]) for key, value in got.items()
        )
    if isinstance(got, float):
        return got == expected and math.copysign(1, got) == math.copysign(1, expected)
    return bool(got == expected)


def named(case: Mapping[str, Any]) -> str:
    return f"{case['file']}-{case['section']}-{case['name']}"


def expected() -> Iterator[Any]:
    for case in CASES:
        if (case["file"], case["section"], case["name"]) not in REFUSED:
            yield pytest.param(case, id=named(case))


@pytest.mark.parametrize("case", list(expected()))
def test_an_expression_gives_what_the_language_defines(case: Mapping[str, Any]) -> None:
    if case.get("error"):
        with pytest.raises((FilterError, FilterFault)):
            evaluated(case)
        return
    got, wanted = evaluated(case), decoded(case["value"])
    assert identical(got, wanted), f"{case['expr']} gave {got!r}"
    if not isinstance(got, float) or not math.isnan(got):
        assert equal(got, wanted, scope())


def test_the_suite_is_whole_and_what_is_left_out_is_named() -> None:
    assert len(CASES) == 671
    assert len(list(expected())) == len(CASES) - len(REFUSED) >= AT_LEAST


def test_what_needs_no_other_variables_passes_as_a_filter_too() -> None:
    """`compile_filter` is what `apply` and the workers call."""
    through = 0
    shown = Event("t", Raw(b"{}"), "evt_1", "2026-11-21T09:30:00Z", "acme")
    for case in CASES:
        if "bindings" in case or case.get("unchecked"):
            continue
        if case.get("error"):
            with pytest.raises((FilterError, FilterFault)):
                compile_filter(f"({case['expr']}) == dyn(0)").matches(shown)
        elif list(case["value"]) == ["bool"]:
            assert compile_filter(case["expr"]).matches(shown) is case["value"]["bool"]
        else:
            continue
        through += 1
    assert through > 300


def test_keys_of_maps_keep_their_type() -> None:
    keys = evaluated({"expr": "{true: 1, 1: 2, 'a': 3}.map(k, k)"})
    assert [type(key) for key in keys] == [bool, int, str]
    assert from_map_key("a") == "a"
