"""Expressions over one event: the `where` of a route, and texts such as a record's key. CEL, compiled once.

Owns what an expression can name (design, section 7) and where that comes from. The language itself is `routing/cel`,
the decoding of documents `routing/documents.py`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Final

from routing.cel.check import DOCUMENT, INT, STRING, TIMESTAMP, Checker, Type, Variables
from routing.cel.compile import Code, Compiler, Field, document_path
from routing.cel.errors import FilterError, FilterFault
from routing.cel.functions import parse_timestamp
from routing.cel.syntax import Has, Ident, Index, Literal, Macro, Node, Select, children, parse
from routing.cel.values import Scope, Timestamp, Value, kind
from routing.documents import MAX_STEPS, Documents, Read, Root, documents
from schemas.event import Event

__all__ = ["VARIABLES", "Filter", "FilterError", "FilterFault", "compile_filter", "compile_text"]

VARIABLES: Final[Mapping[str, Type]] = {
    "id": STRING,
    "type": STRING,
    "source": STRING,
    "aggregateId": STRING,
    "occurredAt": TIMESTAMP,
    "schemaVersion": INT,
    "metadata": DOCUMENT,
    # any JSON value, most often an object
    "payload": Type("dyn"),
}
"""`source` and `aggregateId` are empty texts where the event has none."""

_MAX_CACHED: Final = 2048
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)


def _occurred_at(scope: Scope) -> Timestamp:
    text = scope.event.occurredAt
    try:
        return parse_timestamp(text)
    except FilterFault:
        # ingress takes every form that Python reads: a space for the T, +0100
        return Timestamp((datetime.fromisoformat(text) - _EPOCH) // _MICROSECOND * 1000)


_EVENT_FIELDS: Final[Mapping[str, Code]] = {
    "id": lambda scope: scope.event.eventId,
    "type": lambda scope: scope.event.eventType,
    "source": lambda scope: scope.event.source,
    "aggregateId": lambda scope: scope.event.aggregateId,
    "occurredAt": _occurred_at,
    "schemaVersion": lambda scope: scope.event.schemaVersion,
}


def _root(name: str) -> Root | None:
    match name:
        case "payload" | "metadata":
            return name
    return None


class _EventNames:
    """The variables of a filter, read through one way of decoding."""

    def __init__(self, through: Documents) -> None:
        self._documents = through

    @property
    def types(self) -> Variables:
        return VARIABLES

    def read(self, name: str) -> Code:
        root = _root(name)
        return _EVENT_FIELDS[name] if root is None else self._documents.read(root)

    def field(self, name: str, path: tuple[str, ...]) -> Field | None:
        root = _root(name)
        return None if root is None or not path else self._documents.field(root, path)

    def present(self, name: str, path: tuple[str, ...]) -> Code | None:
        root = _root(name)
        return None if root is None else self._documents.present(root, path)


def _named(root: Node) -> Iterator[tuple[str, tuple[str, ...], bool]]:
    """What the expression reads: the variable, the keys under it, and whether its value or only its presence."""
    nowhere: Mapping[str, None] = {}
    waiting = [(root, nowhere)]
    while waiting:
        node, local = waiting.pop()
        if isinstance(node, (Ident, Select, Index, Has)):
            path = document_path(node.operand if isinstance(node, Has) else node, VARIABLES, local)
            if path is not None:
                yield (path[0], (*path[1], node.field), False) if isinstance(node, Has) else (*path, True)
                continue
        if isinstance(node, Macro):
            # the list that a macro goes over does not see the macro's variable
            waiting.append((node.over, local))
            inner = {**local, node.variable: None}
            waiting += [(part, inner) for part in (node.keep, node.body) if part is not None]
        elif not isinstance(node, Literal):
            waiting += [(child, local) for child in children(node)]


class Filter:
    """A checked and compiled expression. Immutable, shared between tenants that write the same."""

    __slots__ = ("_code", "_documents", "_locals", "_tree", "_types", "fields", "reads", "source")

    def __init__(
        self,
        source: str,
        tree: Node,
        types: Mapping[int, Type],
        fields: tuple[str, ...],
        reads: tuple[Read, ...],
        through: Documents,
    ) -> None:
        compiler = Compiler(source, _EventNames(through), types)
        self.source = source
        self.fields = fields
        """`payload.total`, `type`: what the expression looks at, sorted."""
        self.reads = reads
        self._tree = tree
        self._types = types
        self._documents = through
        self._code: Callable[[Scope], Value] = compiler.code(tree, {})
        self._locals = compiler.locals

    def matches(self, event: Event) -> bool:
        """Raises FilterFault where the expression cannot be evaluated on this event: then it does not match."""
        return self.decide(self._documents.scope(event))

    def decide(self, scope: Scope, steps: int = MAX_STEPS) -> bool:
        """As `matches`, on an event whose documents were decoded by the Documents that this filter is bound to.

        `scope.steps` tells afterwards what is left of `steps`, below zero if they did not suffice.
        """
        value = self._value(scope, steps)
        if value is True:
            return True
        if value is False:
            return False
        raise FilterFault(f"the expression gives {kind(value)}, not a bool")

    def text(self, event: Event) -> str:
        """Of an expression that gives a text (`compile_text`). Raises FilterFault."""
        value = self._value(self._documents.scope(event), MAX_STEPS)
        if isinstance(value, str):
            return value
        raise FilterFault(f"the expression gives {kind(value)}, not a string")

    def _value(self, scope: Scope, steps: int) -> Value:
        scope.steps = steps
        if self._locals:
            scope.local = [None] * self._locals
        try:
            return self._code(scope)
        except RecursionError:
            raise FilterFault("values are nested too deep to compare") from None

    def bound(self, through: Documents) -> "Filter":
        """The same filter on documents that are decoded for several filters at once; they must cover its reads."""
        if through is self._documents:
            return self
        return Filter(self.source, self._tree, self._types, self.fields, self.reads, through)

    def __repr__(self) -> str:
        return f"Filter({self.source!r})"


@lru_cache(maxsize=_MAX_CACHED)
def compile_filter(source: str) -> Filter:
    """Parses, checks and compiles. Raises FilterError, with the place of the fault and a remedy.

    Time and memory are bounded by the length of the text, which is bounded.
    """
    return _compile(source, "bool", "Compare it with something: … == …")


@lru_cache(maxsize=_MAX_CACHED)
def compile_text(source: str) -> Filter:
    """The same of an expression that gives a text: ask its `text`."""
    return _compile(source, "string", "Make it one: string(…)")


def _compile(source: str, wanted: str, remedy: str) -> Filter:
    tree = parse(source)
    checker = Checker(source, VARIABLES)
    result = checker.of(tree, {})
    if result.kind not in (wanted, "dyn"):
        raise FilterError(source, tree.at, f"the expression gives {result}, not a {wanted}", remedy)
    named = list(_named(tree))
    fields = tuple(sorted({".".join((name, *path)) for name, path, _ in named}))
    reads = tuple(Read(root, path, value) for name, path, value in named if (root := _root(name)) is not None)
    return Filter(source, tree, checker.types, fields, reads, documents(reads))


def documents_for(filters: Iterable[Filter]) -> Documents:
    """One decoding for all of these filters."""
    return documents([read for each in filters for read in each.reads])
