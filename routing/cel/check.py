"""What can be known before any event is seen: names, and types that can never go together.

Fields of documents have the type `dyn`: what they hold is seen when an event comes. Everything else is exact.
"""

import difflib
from collections.abc import Mapping
from functools import lru_cache
from typing import Final, assert_never

from msgspec import Struct

from routing.cel.errors import FilterError
from routing.cel.functions import LONG_TYPE_NAMES, OVERLOADS, TYPE_NAMES, named_zone
from routing.cel.syntax import (
    MACROS,
    Binary,
    Call,
    Conditional,
    Has,
    Ident,
    Index,
    ListOf,
    Literal,
    Logic,
    Macro,
    MapOf,
    Method,
    Node,
    Select,
    Unary,
)
from routing.cel.values import kind


class Type(Struct, frozen=True):
    """`args`: of a list its elements' type, of a map its keys' and its values'."""

    kind: str
    args: tuple["Type", ...] = ()

    def __str__(self) -> str:
        return f"{self.kind}({', '.join(map(str, self.args))})" if self.args else self.kind


DYN: Final = Type("dyn")
BOOL: Final = Type("bool")
INT: Final = Type("int")
STRING: Final = Type("string")
TIMESTAMP: Final = Type("timestamp")
DOCUMENT: Final = Type("map", (STRING, DYN))

Variables = Mapping[str, Type]

_NUMBERS: Final = frozenset({"int", "uint", "double"})
_ORDERED: Final = frozenset({"string", "bytes", "bool", "timestamp", "duration"})
_ARITHMETIC: Final[dict[str, dict[tuple[str, str], str]]] = {
    "+": {
        **{(each, each): each for each in ("int", "uint", "double", "string", "bytes", "list", "duration")},
        ("timestamp", "duration"): "timestamp",
        ("duration", "timestamp"): "timestamp",
    },
    "-": {
        **{(each, each): each for each in ("int", "uint", "double", "duration")},
        ("timestamp", "timestamp"): "duration",
        ("timestamp", "duration"): "timestamp",
    },
    "*": {(each, each): each for each in ("int", "uint", "double")},
    "/": {(each, each): each for each in ("int", "uint", "double")},
    "%": {(each, each): each for each in ("int", "uint")},
}


# each is read from a file
MAX_ZONES: Final = 16

_LAST_WORDS: Final = frozenset(name.rpartition(".")[2] for name in LONG_TYPE_NAMES)


def dotted(node: Node) -> str | None:
    """`a.b.c` where the node is a chain of plain names: variables may be called so."""
    names: list[str] = []
    root: Node = node
    while isinstance(root, Select):
        names.append(root.field)
        root = root.operand
    if not isinstance(root, Ident):
        return None
    names.append(root.name)
    return ".".join(reversed(names))


def variable_name(node: Node, variables: Variables, local: Mapping[str, object]) -> str | None:
    """The variable that the node names, if it names one; the variables of macros come first."""
    if isinstance(node, Ident):
        return node.name if node.name in variables and (node.absolute or node.name not in local) else None
    if not isinstance(node, Select) or not any("." in each for each in variables):
        return None
    name = dotted(node)
    if name is None or name not in variables:
        return None
    root: Node = node
    while isinstance(root, Select):
        root = root.operand
    assert isinstance(root, Ident)
    return name if root.absolute or root.name not in local else None


def type_name(node: Node) -> str | None:
    """The type that the node names (`int`, `google.protobuf.Duration`), if it names one."""
    if isinstance(node, Select) and node.field not in _LAST_WORDS:
        return None
    name = dotted(node)
    if name is None:
        return None
    return LONG_TYPE_NAMES.get(name, name if name in TYPE_NAMES else None)


def _joined(a: Type, b: Type) -> Type:
    """What is known of a value that has either type."""
    return a if a == b else DYN


class Checker:
    def __init__(self, source: str, variables: Variables) -> None:
        self.source = source
        self.variables = variables
        self.types: dict[int, Type] = {}
        """By id() of the node, for as long as the tree lives."""
        self._zones: set[str] = set()

    def fault(self, at: int, message: str, remedy: str = "") -> FilterError:
        return FilterError(self.source, at, message, remedy)

    def of(self, node: Node, local: Mapping[str, Type]) -> Type:
        found = self._of(node, local)
        self.types[id(node)] = found
        return found

    def _of(self, node: Node, local: Mapping[str, Type]) -> Type:
        match node:
            case Literal():
                return Type(kind(node.value))
            case Ident():
                return self.ident(node, local)
            case Select():
                named = variable_name(node, self.variables, local)
                if named is not None:
                    return self.variables[named]
                if type_name(node) is not None:
                    return Type("type")
                return self.field(node.at, self.of(node.operand, local), node.field)
            case Has():
                self.field(node.at, self.of(node.operand, local), node.field)
                return BOOL
            case Index():
                return self.index(node, local)
            case Call():
                return self.call(node.at, node.name, node.args, local)
            case Method():
                return self.method(node, local)
            case Unary():
                return self.unary(node, local)
            case Binary():
                return self.binary(node, local)
            case Logic():
                for operand in node.operands:
                    self.want_bool(operand, local, f"`{node.op}`")
                return BOOL
            case Conditional():
                self.want_bool(node.test, local, "the condition of `?`")
                return _joined(self.of(node.then, local), self.of(node.other, local))
            case ListOf():
                return Type("list", (self.common(node.items, local),))
            case MapOf():
                return self.map_of(node, local)
            case Macro():
                return self.macro(node, local)
            case _:
                assert_never(node)

    def want_bool(self, node: Node, local: Mapping[str, Type], who: str) -> None:
        found = self.of(node, local)
        if found.kind not in ("bool", "dyn"):
            raise self.fault(node.at, f"{who} needs a bool, found {found}", "Compare it with something.")

    def ident(self, node: Ident, local: Mapping[str, Type]) -> Type:
        if node.name in local and not node.absolute:
            return local[node.name]
        if node.name in self.variables:
            return self.variables[node.name]
        if type_name(node) is not None:
            return Type("type")
        known = sorted({*self.variables, *local})
        near = difflib.get_close_matches(node.name, known, 1, 0.6)
        remedy = f"Did you mean {near[0]}?" if near else f"There are {', '.join(known)}."
        if node.name in OVERLOADS:
            remedy = f"{node.name} is a function: write {node.name}(…)."
        elif "payload" in known and not near:
            remedy += f" A field of the payload is written payload.{node.name}; a text stands in quotes."
        raise self.fault(node.at, f"there is no variable `{node.name}`", remedy)

    def field(self, at: int, of: Type, name: str) -> Type:
        if of.kind == "dyn":
            return DYN
        if of.kind != "map":
            raise self.fault(at, f"{of} has no fields: `{name}` was asked for")
        if of.args[0].kind not in ("string", "dyn"):
            raise self.fault(at, f"{of} has no fields: its keys are no strings", "Write m[key].")
        return of.args[1]

    def index(self, node: Index, local: Mapping[str, Type]) -> Type:
        of, key = self.of(node.operand, local), self.of(node.key, local)
        if of.kind == "list":
            if key.kind not in ("int", "uint", "dyn"):
                raise self.fault(node.key.at, f"the index of a list must be an int, found {key}")
            return of.args[0]
        if of.kind == "map":
            wanted = of.args[0].kind
            if "dyn" not in (wanted, key.kind) and wanted != key.kind and not {wanted, key.kind} <= _NUMBERS:
                raise self.fault(node.key.at, f"the keys of this map are {wanted}, found {key}")
            return of.args[1]
        if of.kind == "dyn":
            if key.kind in ("list", "map", "null", "bytes", "timestamp", "duration", "type"):
                raise self.fault(node.key.at, f"{key} can be no index")
            return DYN
        raise self.fault(node.at, f"{of} cannot be indexed")

    def call(self, at: int, name: str, args: tuple[Node, ...], local: Mapping[str, Type]) -> Type:
        if name not in OVERLOADS:
            remedy = ""
            if name in MACROS or "." + name in OVERLOADS:
                remedy = f"It is a method: write value.{name}(…)."
            else:
                near = difflib.get_close_matches(name, [each for each in (*OVERLOADS, "has") if each[0] != "."], 1)
                remedy = f"Did you mean {near[0]}()?" if near else ""
            raise self.fault(at, f"there is no function {name}()", remedy)
        return self.overload(at, name, [self.of(arg, local) for arg in args])

    def method(self, node: Method, local: Mapping[str, Type]) -> Type:
        name = node.name
        if "." + name not in OVERLOADS:
            if name in OVERLOADS or name == "has":
                raise self.fault(node.at, f"there is no method {name}()", f"It is a function: write {name}(value).")
            near = difflib.get_close_matches(name, [*(e[1:] for e in OVERLOADS if e[0] == "."), *MACROS], 1)
            raise self.fault(node.at, f"there is no method {name}()", f"Did you mean {near[0]}()?" if near else "")
        types = [self.of(node.operand, local), *(self.of(arg, local) for arg in node.args)]
        result = self.overload(node.at, "." + name, types)
        if len(node.args) == 1 and name.startswith("get") and isinstance(node.args[0], Literal):
            zone = node.args[0].value
            self._zones.add(zone)
            if len(self._zones) > MAX_ZONES:
                raise self.fault(
                    node.args[0].at, f"more than {MAX_ZONES} time zones", "Split the rule into several routes."
                )
            if named_zone(zone) is None:
                raise self.fault(node.args[0].at, f"there is no time zone {zone}", "Write Europe/Zurich or +02:00.")
        return result

    def overload(self, at: int, name: str, args: list[Type]) -> Type:
        """`name` with a leading dot is a method, whose first argument stands before the dot."""
        result = _result(name, tuple([each.kind for each in args]))
        if result is not None:
            return Type(result)
        # said in words: "contains() does not go with int: it takes string.contains(string)"
        method = name.startswith(".")
        shown = sorted({self._signature(name, wanted) for wanted in OVERLOADS[name]})
        given = ", ".join(str(each) for each in (args[1:] if method else args)) or "nothing"
        on = f" on {args[0]}" if method else ""
        raise self.fault(at, f"{name.lstrip('.')}(){on} does not go with {given}", f"It takes {' or '.join(shown)}.")

    @staticmethod
    def _signature(name: str, wanted: tuple[str, ...]) -> str:
        if name.startswith("."):
            return f"{wanted[0]}{name}({', '.join(wanted[1:])})"
        return f"{name}({', '.join(wanted)})"

    def unary(self, node: Unary, local: Mapping[str, Type]) -> Type:
        of = self.of(node.operand, local)
        if node.op == "!":
            if of.kind not in ("bool", "dyn"):
                raise self.fault(node.at, f"`!` needs a bool, found {of}", "Use parentheses: !(a == b).")
            return BOOL
        if of.kind not in ("int", "double", "duration", "dyn"):
            raise self.fault(node.at, f"`-` needs a number, found {of}")
        return of

    def binary(self, node: Binary, local: Mapping[str, Type]) -> Type:
        op = node.op
        a, b = self.of(node.left, local), self.of(node.right, local)
        if op in _ARITHMETIC:
            return self.arithmetic(node, a, b)
        if op == "in":
            if b.kind not in ("list", "map", "dyn"):
                raise self.fault(node.right.at, f"`in` needs a list or a map on its right, found {b}", "Write [a, b].")
            if b.args and not _may_equal(a, b.args[0]):
                raise self.fault(node.at, f"{a} is never in {b}")
            return BOOL
        if op in ("==", "!="):
            if not _may_equal(a, b):
                raise self.fault(node.at, f"{a} never equals {b}", _conversion(a, b))
            return BOOL
        if "dyn" in (a.kind, b.kind):
            other = b if a.kind == "dyn" else a
            fits = other.kind == "dyn" or other.kind in _NUMBERS or other.kind in _ORDERED
        else:
            fits = (a.kind in _NUMBERS and b.kind in _NUMBERS) or (a.kind == b.kind and a.kind in _ORDERED)
        if not fits:
            raise self.fault(node.at, f"`{op}` cannot compare {a} with {b}", _conversion(a, b))
        return BOOL

    def arithmetic(self, node: Binary, a: Type, b: Type) -> Type:
        results = {
            result
            for (left, right), result in _ARITHMETIC[node.op].items()
            if a.kind in ("dyn", left) and b.kind in ("dyn", right)
        }
        if not results:
            raise self.fault(node.at, f"`{node.op}` does not go with {a} and {b}", _conversion(a, b))
        if len(results) > 1:
            return DYN
        result = results.pop()
        return (
            Type("list", (_joined(a.args[0], b.args[0]),))
            if result == "list" and a.args and b.args
            else (Type("list", (DYN,)) if result == "list" else Type(result))
        )

    def common(self, items: tuple[Node, ...], local: Mapping[str, Type]) -> Type:
        found: Type | None = None
        for item in items:
            of = self.of(item, local)
            found = of if found is None else _joined(found, of)
        return found or DYN

    def map_of(self, node: MapOf, local: Mapping[str, Type]) -> Type:
        keys = self.common(tuple(key for key, _ in node.entries), local)
        seen: set[tuple[type, object]] = set()
        for key, _ in node.entries:
            of = self.types[id(key)]
            if of.kind not in ("string", "int", "uint", "bool", "dyn"):
                raise self.fault(key.at, f"{of} cannot be a key of a map")
            if isinstance(key, Literal):
                if (type(key.value), key.value) in seen:
                    raise self.fault(key.at, "this key stands twice in the map")
                seen.add((type(key.value), key.value))
        return Type("map", (keys, self.common(tuple(value for _, value in node.entries), local)))

    def macro(self, node: Macro, local: Mapping[str, Type]) -> Type:
        over = self.of(node.over, local)
        if over.kind not in ("list", "map", "dyn"):
            raise self.fault(node.at, f"{node.kind}() needs a list or a map, found {over}")
        # of a map the macros see the keys
        element = over.args[0] if over.args else DYN
        inner = {**local, node.variable: element}
        if node.keep is not None:
            self.want_bool(node.keep, inner, "the condition of map()")
        if node.kind == "map":
            return Type("list", (self.of(node.body, inner),))
        self.want_bool(node.body, inner, f"the condition of {node.kind}()")
        return Type("list", (element,)) if node.kind == "filter" else BOOL


@lru_cache(maxsize=2048)
def _result(name: str, kinds: tuple[str, ...]) -> str | None:
    """The type that a function gives for arguments of these types; None if it takes no such."""
    fits = {
        overload.result
        for wanted, overload in OVERLOADS[name].items()
        if len(wanted) == len(kinds) and all(given in ("dyn", want) for given, want in zip(kinds, wanted, strict=True))
    }
    return (fits.pop() if len(fits) == 1 else "dyn") if fits else None


def _may_equal(a: Type, b: Type) -> bool:
    if "dyn" in (a.kind, b.kind) or "null" in (a.kind, b.kind) or (a.kind in _NUMBERS and b.kind in _NUMBERS):
        return True
    return a.kind == b.kind and all(_may_equal(x, y) for x, y in zip(a.args, b.args, strict=False))


def _conversion(a: Type, b: Type) -> str:
    kinds = {a.kind, b.kind}
    if kinds == {"int", "double"}:
        return "Write double(x), or int(x), so that both are of one kind."
    if "timestamp" in kinds and "string" in kinds:
        return 'Write timestamp("2026-11-21T09:30:00Z").'
    if "duration" in kinds and ("string" in kinds or kinds & _NUMBERS):
        return 'Write duration("90s").'
    if "string" in kinds and kinds & _NUMBERS:
        return "Write a number without quotes; int(x), double(x) and string(x) convert."
    if "string" in kinds and "bool" in kinds:
        return "Write true and false without quotes."
    return ""
