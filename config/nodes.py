"""YAML as nodes that know their places.

Owns what of YAML a configuration may use: one document of mappings, lists and scalars of the 1.2 core schema (so `NO`,
`on`, `5:30` and dates are texts), aliases within a budget. Composes from the parser's events itself, with a bound on
the depth: libyaml's own composer recurses in C and dies of deep nesting.
"""

import math
import re
from collections.abc import Iterator
from typing import Any, Final, Literal, TypeAlias

import yaml
from msgspec import Struct

MAX_TEXT_BYTES: Final = 16 * 1024 * 1024
MAX_NODES: Final = 2_000_000
MAX_DEPTH: Final = 32
MAX_DIGITS: Final = 40

ScalarKind: TypeAlias = Literal["text", "int", "float", "bool", "null"]

_INT: Final = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT: Final = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_ODD_BREAKS: Final = re.compile("[\\x85\\u2028\\u2029]")
_BOOLS: Final = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_NULLS: Final = frozenset({"", "~", "null", "Null", "NULL"})
_TEXT_TAGS: Final = frozenset({"!", "tag:yaml.org,2002:str"})


class Place(Struct, frozen=True, order=True):
    """Where a node starts; both count from 1."""

    line: int
    column: int


class Scalar(Struct, frozen=True):
    """`text` is the scalar as written; `block` is set for `|` and `>`, `quoted` for both kinds of quotes."""

    place: Place
    text: str
    kind: ScalarKind
    quoted: bool = False
    block: bool = False


class Listing(Struct, frozen=True):
    place: Place
    items: list["Node"]


class Mapping(Struct, frozen=True):
    place: Place
    pairs: list[tuple[Scalar, "Node"]]


Node: TypeAlias = Scalar | Listing | Mapping


class YamlFault(Exception):
    """The text is no YAML that a configuration may use."""

    def __init__(self, place: Place, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.place = place
        self.message = message
        self.remedy = remedy


def scalar_kind(text: str) -> ScalarKind:
    """The kind of a plain scalar by YAML 1.2's core schema."""
    if text in _NULLS:
        return "null"
    if text in _BOOLS:
        return "bool"
    if _INT.fullmatch(text):
        return "int"
    if _FLOAT.fullmatch(text):
        return "float"
    return "text"


def compose(text: str) -> Node | None:
    """The document's root, or None if the text holds nothing.

    Raises `YamlFault`. Time and memory are bounded: in bytes, in depth, and in values with aliases written out.
    """
    if len(text) > MAX_TEXT_BYTES:
        raise YamlFault(Place(1, 1), f"the file has more than {MAX_TEXT_BYTES >> 20} MiB", "split it by tenants")
    odd = _ODD_BREAKS.search(text)
    if odd is not None:  # YAML 1.1 would fold it to a space: the value would be another one than what JSON says
        code = f"{ord(odd[0]):04x}"
        raise YamlFault(
            _place_of(text, odd.start()),
            f"not valid YAML: the character U+{code.upper()} is a line break in YAML",
            f'write it in double quotes as "\\u{code}"',
        )
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return _Composer(yaml.parse(text, Loader=loader)).document()
    except yaml.MarkedYAMLError as fault:
        mark = fault.problem_mark or fault.context_mark
        place = Place(mark.line + 1, mark.column + 1) if mark else Place(1, 1)
        if _character_at(text, place) == "\t":
            raise YamlFault(place, "not valid YAML: a tab does not indent", "write spaces") from None
        raise YamlFault(place, f"not valid YAML: {fault.problem or fault.context}") from None
    except yaml.reader.ReaderError as fault:
        place = _place_of(text, fault.position if isinstance(fault.position, int) else 0)
        raise YamlFault(place, f"not valid YAML: {fault.reason}") from None


def _character_at(text: str, place: Place) -> str:
    """What stands there; nothing past the end, and where YAML sees lines that Python does not."""
    lines = text.split("\n")
    return lines[place.line - 1][place.column - 1 : place.column] if place.line <= len(lines) else ""


def _place_of(text: str, position: int) -> Place:
    before = text[:position]
    return Place(before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1)


def plain(node: Node) -> Any:
    """The node as Python data, as JSON would have it. Raises `YamlFault` for a number that JSON cannot say."""
    if isinstance(node, Scalar):
        return _plain_scalar(node)
    if isinstance(node, Listing):
        return [plain(item) for item in node.items]
    return {key.text: plain(value) for key, value in node.pairs}


def _plain_scalar(node: Scalar) -> Any:
    match node.kind:
        case "null":
            return None
        case "bool":
            return _BOOLS[node.text]
        case "int":
            if len(node.text) > MAX_DIGITS:
                raise YamlFault(node.place, f"a number of more than {MAX_DIGITS} digits", "write it in quotes")
            return int(node.text, 0) if node.text[:2] in ("0o", "0x") else int(node.text)
        case "float":
            number = _float(node.text)
            if not math.isfinite(number):
                raise YamlFault(node.place, f"{node.text[:40]} is not a finite number", "write a finite number")
            return number
        case "text":
            return node.text


def _float(text: str) -> float:
    lower = text.lower()
    return math.inf if lower.endswith((".inf", ".nan")) else float(lower)


class _Composer:
    """Builds nodes from events. `_left` counts down every node as if aliases were written out."""

    def __init__(self, events: Iterator[yaml.Event]) -> None:
        self._events = events
        self._anchors: dict[str, tuple[Node, int]] = {}
        self._left = MAX_NODES

    def document(self) -> Node | None:
        root: Node | None = None
        for event in self._events:
            if isinstance(event, (yaml.StreamStartEvent, yaml.StreamEndEvent, yaml.DocumentEndEvent)):
                continue
            if isinstance(event, yaml.DocumentStartEvent):
                if root is not None:
                    raise YamlFault(_place(event), "a second document starts here", "keep one document in a file")
                continue
            root = self._node(event, 0)
        return root

    def _node(self, event: yaml.Event, depth: int) -> Node:
        place = _place(event)
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event.anchor or "", place)
        assert isinstance(event, (yaml.ScalarEvent, yaml.CollectionStartEvent))
        if depth > MAX_DEPTH:
            raise YamlFault(place, f"nested deeper than {MAX_DEPTH} levels")
        before = self._left
        self._spend(1, place)
        node: Node
        if isinstance(event, yaml.ScalarEvent):
            node = _scalar(event, place)
        elif isinstance(event, yaml.SequenceStartEvent):
            _refuse_tag(event, place)
            node = self._listing(place, depth)
        else:
            _refuse_tag(event, place)
            node = self._mapping(place, depth)
        if event.anchor is not None:
            self._anchors[event.anchor] = (node, before - self._left)
        return node

    def _listing(self, place: Place, depth: int) -> Listing:
        items = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            items.append(self._node(event, depth + 1))
        return Listing(place, items)

    def _mapping(self, place: Place, depth: int) -> Mapping:
        pairs: list[tuple[Scalar, Node]] = []
        seen: dict[str, Place] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            key = self._node(event, depth + 1)
            if not isinstance(key, Scalar):
                raise YamlFault(key.place, "a key is a list or a mapping", "write a name")
            if key.text == "<<" and not key.quoted:
                raise YamlFault(key.place, "merge keys (<<) are not supported", "write the fields out")
            first = seen.setdefault(key.text, key.place)
            if first is not key.place:
                raise YamlFault(
                    key.place,
                    f"the key {key.text[:100]!r} stands here a second time (first on line {first.line})",
                    "keep one of them",
                )
            pairs.append((key, self._node(next(self._events), depth + 1)))
        return Mapping(place, pairs)

    def _alias(self, anchor: str, place: Place) -> Node:
        found = self._anchors.get(anchor)
        if found is None:
            raise YamlFault(place, "the alias names no anchor that is complete before it")
        node, size = found
        self._spend(size, place)
        return node

    def _spend(self, nodes: int, place: Place) -> None:
        self._left -= nodes
        if self._left < 0:
            raise YamlFault(place, f"more than {MAX_NODES} values, aliases written out", "use fewer aliases")


def _place(event: yaml.Event) -> Place:
    mark = event.start_mark
    return Place(mark.line + 1, mark.column + 1) if mark else Place(1, 1)


def _refuse_tag(event: yaml.CollectionStartEvent, place: Place) -> None:
    if event.tag is not None and event.tag != "!":
        raise YamlFault(place, "tags (!…) are not supported", "remove it, or write the text in quotes")


def _scalar(event: yaml.ScalarEvent, place: Place) -> Scalar:
    block = event.style in ("|", ">")
    quoted = event.style in ("'", '"')
    if event.tag is not None and event.tag not in _TEXT_TAGS:
        raise YamlFault(place, "tags (!…) are not supported", "remove it, or write the text in quotes")
    kind = scalar_kind(event.value) if not (block or quoted or event.tag) else "text"
    return Scalar(place, event.value, kind, quoted, block)
