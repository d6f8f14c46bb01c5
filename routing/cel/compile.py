"""From the tree to closures: one call per operation, what is known beforehand worked out beforehand.

A closure takes the Scope and gives a value, or raises FilterFault. The shapes that rules are made of (a field compared
with a constant, a field in a list of constants, chains of && and ||) have closures of their own.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from operator import ge, gt, le, lt
from typing import Any, Final, Protocol, TypeAlias, assert_never

from msgspec import UNSET, Struct

from routing.cel.check import BOOL, DYN, TIMESTAMP, Type, Variables, type_name, variable_name
from routing.cel.errors import FilterError, FilterFault
from routing.cel.functions import CONVERSIONS, DATE_PARTS, OVERLOADS, date_part, named_zone
from routing.cel.patterns import MAX_INSTRUCTIONS, Pattern, PatternFault, compile_pattern
from routing.cel.syntax import (
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
    children,
)
from routing.cel.values import (
    BYTES_PER_STEP_SHIFT,
    Scope,
    Timestamp,
    TypeName,
    Value,
    add,
    contained,
    divide,
    element,
    equal,
    field,
    from_map_key,
    has_field,
    kind,
    make_map,
    modulo,
    multiply,
    negate,
    number,
    ordered,
    spend,
    subtract,
)

Code: TypeAlias = Callable[[Scope], Value]

_COMPARE: Final[dict[str, Callable[[Any, Any], Any]]] = {"<": lt, "<=": le, ">": gt, ">=": ge}
_MIRRORED: Final = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
_ARITHMETIC: Final = {"+": add, "-": subtract, "*": multiply, "/": divide, "%": modulo}
# integers that a double holds exactly: comparing with them needs no care about what lies beyond 64 bits
_EXACT: Final = 2**53
# a fault that an operator or a macro caught costs about this many steps more
_FAULT_STEPS: Final = 16
_LONG_TEXT: Final = 64


# measured, 0.1 us each
_LOOP_STEPS: Final = 2
_CALL_STEPS: Final = {
    **dict.fromkeys(("int", "uint", "double", "string", "bool", "bytes", "type"), 8),
    **dict.fromkeys((*DATE_PARTS, "getMilliseconds"), 30),
    "timestamp": 25,
    "duration": 15,
}


class Field(Struct, frozen=True, gc=False):
    """How a field of a document is read at full speed.

    `get` gives the value as decoded (integers of any size), UNSET for a missing field, or raises AttributeError where
    the way there is blocked; `fault` then says what is wrong.
    """

    get: Callable[[Scope], Value]
    fault: Callable[[Scope], FilterFault]


class Names(Protocol):
    """Where variables come from."""

    @property
    def types(self) -> Variables: ...

    def read(self, name: str) -> Code: ...

    def field(self, name: str, path: tuple[str, ...]) -> Field | None:
        """None where the field is no leaf of what was decoded: then it is read step by step from `read`."""

    def present(self, name: str, path: tuple[str, ...]) -> Code | None: ...


Local: TypeAlias = Mapping[str, int]


def document_path(node: Node, variables: Variables, local: Mapping[str, object]) -> tuple[str, tuple[str, ...]] | None:
    """The variable and the keys under it that `payload.a["b"].c` names; None for any other node."""
    keys: list[str] = []
    long_names = any("." in name for name in variables)
    while not isinstance(node, Ident):
        if long_names and isinstance(node, Select) and (name := variable_name(node, variables, local)) is not None:
            return name, tuple(reversed(keys))
        if isinstance(node, Select):
            keys.append(node.field)
        elif isinstance(node, Index) and isinstance(node.key, Literal) and isinstance(node.key.value, str):
            keys.append(node.key.value)
        else:
            return None
        node = node.operand
    root = variable_name(node, variables, local)
    return None if root is None else (root, tuple(reversed(keys)))


class Compiler:
    """`types` is what the checker found, by id() of the node; empty if it was not asked."""

    def __init__(self, source: str, names: Names, types: Mapping[int, Type]) -> None:
        self.source = source
        self.names = names
        self.types = types
        self.locals = 0
        """How many variables of macros live at once, at most."""
        self._instructions = 0
        self._steps: dict[int, int] = {}
        self._fixed: dict[int, bool] = {}

    def type_of(self, node: Node) -> Type:
        return self.types.get(id(node), DYN)

    def code(self, node: Node, local: Local) -> Code:
        match node:
            case Literal():
                return _constant(node.value)
            case Ident():
                return self.ident(node, local)
            case Select() | Index():
                return self.member(node, local)
            case Has():
                return self.has(node, local)
            case Call():
                if node.name == "matches" and len(node.args) == 2 and _text(node.args[1]) is not None:
                    return self.matching(node.args[0], node.args[1], local)
                return self.call(node, node.name, node.args, local)
            case Method():
                return self.method(node, local)
            case Unary():
                return self.unary(node, local)
            case Binary():
                return self.binary(node, local)
            case Logic():
                return self.logic(node, local)
            case Conditional():
                return self.conditional(node, local)
            case ListOf() | MapOf():
                return self.container(node, local)
            case Macro():
                return self.macro(node, local)
            case _:
                assert_never(node)

    # ------------------------------------------------------------ names and fields

    def ident(self, node: Ident, local: Local) -> Code:
        if node.name in local and not node.absolute:
            position = local[node.name]
            return lambda scope: scope.local[position]
        if node.name in self.names.types:
            return self.names.read(node.name)
        named = type_name(node)
        return _constant(TypeName(named)) if named is not None else _failing(f"there is no variable `{node.name}`")

    def leaf(self, node: Node, local: Local) -> Field | None:
        path = document_path(node, self.names.types, local)
        return self.names.field(*path) if path is not None else None

    def member(self, node: Select | Index, local: Local) -> Code:
        path = document_path(node, self.names.types, local)
        if path is not None:
            return self.document(*path)
        if isinstance(node, Select):
            named = type_name(node)
            if named is not None:
                return _constant(TypeName(named))
            operand, name = self.code(node.operand, local), node.field
            return lambda scope: field(operand(scope), name)
        container, key = self.code(node.operand, local), self.code(node.key, local)
        return lambda scope: element(container(scope), key(scope))

    def document(self, name: str, path: tuple[str, ...]) -> Code:
        """What `path` leads to: at once where it was decoded by itself, else step by step from what holds it."""
        leaf = self.names.field(name, path) if path else None
        if leaf is not None:
            return _read(leaf)
        holder: Code | None = None
        rest = 0
        for end in range(1, len(path)):
            found = self.names.field(name, path[:end])
            if found is None:
                break
            holder, rest = _read(found), end
        return _under(holder or self.names.read(name), path[rest:])

    def has(self, node: Has, local: Local) -> Code:
        path = document_path(node.operand, self.names.types, local)
        if path is not None:
            present = self.names.present(path[0], (*path[1], node.field))
            if present is not None:
                return present
        operand, name = self.code(node.operand, local), node.field
        return lambda scope: has_field(operand(scope), name)

    # ------------------------------------------------------------ functions

    def call(self, node: Call | Method, name: str, args: tuple[Node, ...], local: Local) -> Code:
        overloads = OVERLOADS.get(name)
        if overloads is None:
            return _failing(f"there is no function {name.lstrip('.')}()")
        codes = [self.code(arg, local) for arg in args]
        shown = name.lstrip(".")
        if len(codes) == 1:
            only = codes[0]
            by_kind = _by_kind(name)

            def one(scope: Scope) -> Value:
                value = only(scope)
                run = by_kind.get(kind(value))
                if run is None:
                    raise FilterFault(f"{shown}() does not go with {kind(value)}")
                return run(scope, value)

            if name in CONVERSIONS and isinstance(args[0], Literal):
                return self.folded(node, one)
            return one

        def several(scope: Scope) -> Value:
            values = [code(scope) for code in codes]
            overload = overloads.get(tuple([kind(value) for value in values]))
            if overload is None:
                raise FilterFault(f"{shown}() does not go with {', '.join(map(kind, values))}")
            return overload.run(scope, *values)

        return several

    def folded(self, node: Node, code: Code) -> Code:
        """A conversion of a constant, done now: a wrong date is a fault of the text, not of each event."""
        try:
            return _constant(code(Scope(None, None, None, 10**6, [])))
        except FilterFault as fault:
            if self.types:
                raise FilterError(self.source, node.at, str(fault)) from None
            return code

    def method(self, node: Method, local: Local) -> Code:
        argument = node.args[0] if len(node.args) == 1 else None
        if isinstance(argument, Literal) and isinstance(argument.value, str):
            if node.name.startswith("get") and "." + node.name in OVERLOADS:
                return self.date_part_in(node, argument.value, local)
            if node.name in ("startsWith", "endsWith", "contains"):
                return self.text_test(node, argument.value, local)
            if node.name == "matches":
                return self.matching(node.operand, argument, local)
        return self.call(node, "." + node.name, (node.operand, *node.args), local)

    def date_part_in(self, node: Method, zone_name: str, local: Local) -> Code:
        zone = named_zone(zone_name)
        if zone is None:
            return _failing(f"there is no time zone {zone_name}")
        part, operand, name = date_part(node.name, zone), self.code(node.operand, local), node.name

        def run(scope: Scope) -> Value:
            value = operand(scope)
            if type(value) is not Timestamp:
                raise FilterFault(f"{name}() with a time zone does not go with {kind(value)}")
            return part(scope, value)

        return run

    def matching(self, over: Node, constant: Node, local: Local) -> Code:
        """matches() with a pattern that is written in the expression: a wrong one is a fault of the text."""
        pattern = self.pattern(constant)
        operand, found = self.code(over, local), pattern.found

        def run(scope: Scope) -> Value:
            value = operand(scope)
            if type(value) is not str:
                raise FilterFault(f"matches() does not go with {kind(value)}")
            return found(scope, value)

        return run

    def pattern(self, constant: Node) -> Pattern:
        """Raises FilterError, at the part of the pattern that is wrong, where the text has it as it is."""
        text = _text(constant)
        assert text is not None
        try:
            pattern = compile_pattern(text)
        except PatternFault as fault:
            at = self.source.find(fault.part, constant.at) if fault.part else -1
            raise FilterError(self.source, max(at, constant.at), fault.message, fault.remedy) from None
        self._instructions += pattern.cost
        if self._instructions > MAX_INSTRUCTIONS:
            raise FilterError(
                self.source,
                constant.at,
                "the patterns of this filter are too large together",
                "Use smaller repetitions, and fewer, or split the rule into several routes.",
            )
        return pattern

    def text_test(self, node: Method, text: str, local: Local) -> Code:
        operand, name = self.code(node.operand, local), node.name
        run = OVERLOADS["." + name]["string", "string"].run

        def test(scope: Scope) -> Value:
            value = operand(scope)
            if type(value) is not str:
                raise FilterFault(f"{name}() does not go with {kind(value)}")
            return run(scope, value, text)

        return test

    # ------------------------------------------------------------ operators

    def unary(self, node: Unary, local: Local) -> Code:
        operand = self.code(node.operand, local)
        if node.op == "-":
            return lambda scope: negate(operand(scope))

        def no(scope: Scope) -> Value:
            value = operand(scope)
            if value is True:
                return False
            if value is False:
                return True
            raise FilterFault(f"`!` needs a bool, found {kind(value)}")

        return no

    def binary(self, node: Binary, local: Local) -> Code:
        op = node.op
        if op in _ARITHMETIC:
            run, left, right = _ARITHMETIC[op], self.code(node.left, local), self.code(node.right, local)
            return lambda scope: run(left(scope), right(scope), scope)
        if op in ("==", "!="):
            return self.equality(node, local)
        if op == "in":
            return self.membership(node, local)
        return self.comparison(node, local)

    def comparison(self, node: Binary, local: Local) -> Code:
        op = node.op
        leaf, constant = self.leaf(node.left, local), node.right
        if leaf is None:
            leaf, constant = self.leaf(node.right, local), node.left
            op = _MIRRORED[op] if leaf is not None else op
        if leaf is not None and isinstance(constant, Literal):
            value = constant.value
            if type(value) in (int, float) and -_EXACT < value < _EXACT:
                return _number_compared(op, leaf, value, node.op, mirrored=constant is node.left)
        left, right, compare, shown = (
            self.code(node.left, local),
            self.code(node.right, local),
            _COMPARE[node.op],
            node.op,
        )
        kinds = (int, float, str)

        def run(scope: Scope) -> Value:
            a, b = left(scope), right(scope)
            if type(a) is not type(b) or type(a) not in kinds:
                ordered(shown, a, b)
            elif type(a) is str and len(a) > _LONG_TEXT:
                spend(scope, len(a) >> BYTES_PER_STEP_SHIFT)
            return compare(a, b)

        return run

    def equality(self, node: Binary, local: Local) -> Code:
        wanted = node.op == "=="
        for side, other in ((node.left, node.right), (node.right, node.left)):
            if isinstance(other, Literal) and (type(other.value) in (str, bool) or other.value is None):
                return self.equal_to(side, other.value, wanted, local)
        left, right = self.code(node.left, local), self.code(node.right, local)

        def run(scope: Scope) -> Value:
            a, b = left(scope), right(scope)
            same = a == b if type(a) is int and type(b) is int else equal(a, b, scope)
            return same is wanted

        return run

    def equal_to(self, side: Node, constant: str | bool | None, wanted: bool, local: Local) -> Code:
        """A text, true, false or null: nothing of another type equals them."""
        leaf = self.leaf(side, local)
        if isinstance(constant, str):
            if leaf is not None:
                return _text_equal(leaf, constant, wanted)
            code = self.code(side, local)
            return lambda scope: (code(scope) == constant) is wanted
        code = self.code(side, local)
        return lambda scope: (code(scope) is constant) is wanted

    def membership(self, node: Binary, local: Local) -> Code:
        texts = _texts(node.right)
        leaf = self.leaf(node.left, local)
        if texts is not None and leaf is not None:
            return _text_in(leaf, texts)
        item, container = self.code(node.left, local), self.code(node.right, local)
        if texts is not None:

            def among(scope: Scope) -> Value:
                value = item(scope)
                return type(value) is str and value in texts

            return among
        return lambda scope: contained(item(scope), container(scope), scope)

    def logic(self, node: Logic, local: Local) -> Code:
        codes = [self.code(operand, local) for operand in node.operands]
        decisive = node.op == "||"
        if len(codes) == 2:
            sure = all(self.type_of(operand) == BOOL for operand in node.operands)
            return _logic_of_two(codes[0], codes[1], decisive, sure)
        return _logic_of_many(codes, decisive)

    def conditional(self, node: Conditional, local: Local) -> Code:
        test, then, other = self.code(node.test, local), self.code(node.then, local), self.code(node.other, local)

        def run(scope: Scope) -> Value:
            value = test(scope)
            if value is True:
                return then(scope)
            if value is False:
                return other(scope)
            raise FilterFault(f"the condition of `?` needs a bool, found {kind(value)}")

        return run

    def container(self, node: ListOf | MapOf, local: Local) -> Code:
        if self.fixed(node):
            # nothing changes a value once it is made: a constant one is made once
            return self.folded(node, lambda scope: _made(node))
        if isinstance(node, ListOf):
            items = [self.code(item, local) for item in node.items]
            return lambda scope: [item(scope) for item in items]
        keys = [self.code(key, local) for key, _ in node.entries]
        values = [self.code(value, local) for _, value in node.entries]
        return lambda scope: make_map([key(scope) for key in keys], [value(scope) for value in values])

    def fixed(self, node: Node) -> bool:
        """Whether the node is a constant, or a list or a map of such."""
        found = self._fixed.get(id(node))
        if found is None:
            inside = isinstance(node, (ListOf, MapOf)) and all(map(self.fixed, children(node)))
            found = self._fixed[id(node)] = inside or isinstance(node, Literal)
        return found

    # ------------------------------------------------------------ macros

    def steps(self, body: Node) -> int:
        """What working out `body` costs at most, without what grows with the values: that is spent as it is done."""
        found = self._steps.get(id(body))
        if found is None:
            found = self._steps[id(body)] = self.own_steps(body) + sum(self.steps(child) for child in children(body))
        return found

    def own_steps(self, node: Node) -> int:
        match node:
            case Call() | Method():
                return _CALL_STEPS.get(node.name, 4)
            case Binary():
                return 3
            case Ident() if self.names.types.get(node.name) == TIMESTAMP:
                return 20  # read from a text each time
            case MapOf():
                return 6 + 4 * len(node.entries)
            case Literal():
                return 1
            case _:
                return 2

    def macro(self, node: Macro, local: Local) -> Code:
        # the variable is set only after the list is worked out, which does not see it
        over = self.code(node.over, local)
        position = max(local.values(), default=-1) + 1
        self.locals = max(self.locals, position + 1)
        inner = {**local, node.variable: position}
        body = self.code(node.body, inner)
        keep = self.code(node.keep, inner) if node.keep is not None else None
        cost = _LOOP_STEPS + self.steps(node.body) + (self.steps(node.keep) if node.keep is not None else 0)
        name = node.kind

        def elements(scope: Scope) -> list[Value]:
            value = over(scope)
            if type(value) is list:
                return value
            if type(value) is dict:
                spend(scope, len(value) >> 2)
                return [from_map_key(key) for key in value]
            raise FilterFault(f"{name}() needs a list or a map, found {kind(value)}")

        def truth(value: Value) -> bool:
            if value is True:
                return True
            if value is False:
                return False
            raise FilterFault(f"the condition of {name}() needs a bool, found {kind(value)}")

        def quantified(scope: Scope) -> Value:
            """all() and exists(): one decisive element settles it, whatever faults others end in."""
            fault: FilterFault | None = None
            for each in elements(scope):
                spend(scope, cost)
                scope.local[position] = number(each)
                try:
                    if truth(body(scope)) is decisive:
                        return decisive
                except FilterFault as found:
                    fault = fault or found
                    spend(scope, _FAULT_STEPS)
            if fault is not None:
                raise fault
            return not decisive

        def exactly_one(scope: Scope) -> Value:
            count = 0
            for each in elements(scope):
                spend(scope, cost)
                scope.local[position] = number(each)
                count += truth(body(scope))
            return count == 1

        def filtered(scope: Scope) -> Value:
            kept = []
            for each in elements(scope):
                spend(scope, cost)
                scope.local[position] = each = number(each)
                if truth(body(scope)):
                    kept.append(each)
            return kept

        def mapped(scope: Scope) -> Value:
            made = []
            for each in elements(scope):
                spend(scope, cost)
                scope.local[position] = number(each)
                if keep is None or truth(keep(scope)):
                    made.append(body(scope))
            return made

        decisive = name == "exists"
        match name:
            case "all" | "exists":
                return quantified
            case "exists_one":
                return exactly_one
            case "filter":
                return filtered
            case _:
                return mapped


# ---------------------------------------------------------------- closures


def _made(node: Node) -> Value:
    """The value of a constant, or of a list or a map of such."""
    match node:
        case ListOf():
            return [_made(item) for item in node.items]
        case MapOf():
            return make_map([_made(key) for key, _ in node.entries], [_made(value) for _, value in node.entries])
        case Literal():
            return node.value
    raise AssertionError(node)


def _constant(value: Value) -> Code:
    return lambda scope: value


def _failing(text: str) -> Code:
    def run(scope: Scope) -> Value:
        raise FilterFault(text)

    return run


def _read(leaf: Field) -> Code:
    get, fault = leaf.get, leaf.fault

    def run(scope: Scope) -> Value:
        try:
            value = get(scope)
        except AttributeError:
            raise fault(scope) from None
        if value is UNSET:
            raise fault(scope)
        return number(value) if type(value) is int else value

    return run


def _under(holder: Code, path: tuple[str, ...]) -> Code:
    if not path:
        return holder
    if len(path) == 1:
        (name,) = path
        return lambda scope: field(holder(scope), name)

    def run(scope: Scope) -> Value:
        value = holder(scope)
        for name in path:
            value = field(value, name)
        return value

    return run


def _number_compared(op: str, leaf: Field, constant: float, shown: str, *, mirrored: bool) -> Code:
    get, fault = leaf.get, leaf.fault
    compare = _COMPARE[op]

    def refused(value: Value, scope: Scope) -> FilterFault:
        if value is UNSET:
            return fault(scope)
        a, b = (kind(constant), kind(value)) if mirrored else (kind(value), kind(constant))
        return FilterFault(f"`{shown}` cannot compare {a} with {b}")

    # one closure for each operator: calling `compare` costs a third of the whole
    def greater(scope: Scope) -> Value:
        try:
            value = get(scope)
        except AttributeError:
            raise fault(scope) from None
        of = type(value)
        if of is int or of is float:
            return value > constant
        raise refused(value, scope)

    def less(scope: Scope) -> Value:
        try:
            value = get(scope)
        except AttributeError:
            raise fault(scope) from None
        of = type(value)
        if of is int or of is float:
            return value < constant
        raise refused(value, scope)

    def other(scope: Scope) -> Value:
        try:
            value = get(scope)
        except AttributeError:
            raise fault(scope) from None
        of = type(value)
        if of is int or of is float:
            return compare(value, constant)
        raise refused(value, scope)

    return greater if op == ">" else less if op == "<" else other


def _text_equal(leaf: Field, constant: str, wanted: bool) -> Code:
    get, fault = leaf.get, leaf.fault

    def same(scope: Scope) -> Value:
        try:
            value = get(scope)
        except AttributeError:
            raise fault(scope) from None
        if value is UNSET:
            raise fault(scope)
        return value == constant

    def different(scope: Scope) -> Value:
        try:
            value = get(scope)
        except AttributeError:
            raise fault(scope) from None
        if value is UNSET:
            raise fault(scope)
        return value != constant

    return same if wanted else different


def _text_in(leaf: Field, texts: frozenset[str]) -> Code:
    get, fault = leaf.get, leaf.fault

    def run(scope: Scope) -> Value:
        try:
            value = get(scope)
        except AttributeError:
            raise fault(scope) from None
        if type(value) is str:
            return value in texts
        if value is UNSET:
            raise fault(scope)
        return False

    return run


@lru_cache(maxsize=256)
def _by_kind(name: str) -> Mapping[str, Callable[..., Value]]:
    """What a function does with one argument, by the argument's type."""
    return {wanted[0]: overload.run for wanted, overload in OVERLOADS[name].items() if len(wanted) == 1}


def _text(node: Node) -> str | None:
    """The text that a literal is."""
    return node.value if isinstance(node, Literal) and isinstance(node.value, str) else None


def _texts(node: Node) -> frozenset[str] | None:
    """The elements of a list of constant texts."""
    if not isinstance(node, ListOf):
        return None
    values = [item.value for item in node.items if isinstance(item, Literal) and isinstance(item.value, str)]
    return frozenset(values) if len(values) == len(node.items) else None


def _logic_of_two(left: Code, right: Code, decisive: bool, sure: bool) -> Code:
    """`||` if `decisive`, else `&&`. `sure`: both sides give bools or faults."""

    def mend(fault: FilterFault, scope: Scope) -> Value:
        spend(scope, _FAULT_STEPS)
        if right(scope) is decisive:
            return decisive
        raise fault

    def either(scope: Scope) -> Value:
        try:
            if left(scope):
                return True
        except FilterFault as fault:
            return mend(fault, scope)
        return right(scope)

    def both(scope: Scope) -> Value:
        try:
            if not left(scope):
                return False
        except FilterFault as fault:
            return mend(fault, scope)
        return right(scope)

    if sure:
        return either if decisive else both
    return _logic_of_many([left, right], decisive)


def _logic_of_many(codes: list[Code], decisive: bool) -> Code:
    shown = "||" if decisive else "&&"

    def run(scope: Scope) -> Value:
        fault: FilterFault | None = None
        for code in codes:
            try:
                value = code(scope)
            except FilterFault as found:
                spend(scope, _FAULT_STEPS)
                fault = fault or found
                continue
            if value is decisive:
                return decisive
            if type(value) is not bool:
                fault = fault or FilterFault(f"`{shown}` needs bools, found {kind(value)}")
        if fault is not None:
            raise fault
        return not decisive

    return run
