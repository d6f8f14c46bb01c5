"""Takes values out of payload and metadata before an event leaves routing.

Owns the grammar of redact paths and the promise that no byte of a redacted value goes on: not in a second key of the
same name, not in a part that cannot be read (such a part is redacted whole). All other values keep their bytes: digits,
escapes, order.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Final, Literal, TypeAlias

import msgspec
from msgspec import Raw, Struct

from schemas.event import Event

REDACTED: Final = b'"[redacted]"'
MAX_PATH_CHARACTERS: Final = 512
MAX_KEYS: Final = 32
# arrays directly inside arrays that are searched; what lies deeper is redacted whole, since each level costs a pass
MAX_NESTED_ARRAYS: Final = 8

Root: TypeAlias = Literal["payload", "metadata"]

_KEY: Final = re.compile(r"(?:`([^`]+)`|([^.`\[\]*\s]+))(\.|$)")
_REDACTED_RAW: Final = Raw(REDACTED)
_decode_object = msgspec.json.Decoder(dict[str, Raw]).decode
_decode_array = msgspec.json.Decoder(list[Raw]).decode
_encode = msgspec.json.Encoder().encode


class PathError(ValueError):
    """A redact path is at fault. The text says what to write instead."""


class Path(Struct, frozen=True, order=True):
    """Where a value is: the keys from the root down. Arrays on the way are passed through, each element alike."""

    root: Root
    keys: tuple[str, ...]

    def __str__(self) -> str:
        return ".".join((self.root, *(key if _KEY.fullmatch(key) else f"`{key}`" for key in self.keys)))


def parse_path(text: str) -> Path:
    """`payload.card.number`, ``metadata.`user.name` ``. Raises PathError."""
    if len(text) > MAX_PATH_CHARACTERS:
        raise PathError(f"a redact path of {len(text)} characters: at most {MAX_PATH_CHARACTERS}")
    name, _, rest = text.partition(".")
    root: Root
    match name:
        case "payload" | "metadata":
            root = name
        case _:
            raise PathError(f"{text!r} must start with payload. or metadata., for example payload.card.number")
    if not rest:
        raise PathError(f"{text!r} names no field: write {name}.field")
    keys: list[str] = []
    at = 0
    ended = False
    while not ended:
        match = _KEY.match(rest, at)
        if match is None:
            if re.match(r"[^.`]*[\[*]", rest[at:]):
                raise PathError(f"{text!r}: [ ] and * are not known: a path goes through arrays, so leave them out")
            raise PathError(f"{text!r}: an empty or unreadable key; quote keys with dots or spaces in backticks: `a.b`")
        keys.append(match.group(1) or match.group(2))
        ended = match.group(3) == ""
        at = match.end()
    if len(keys) > MAX_KEYS:
        raise PathError(f"{text!r} has {len(keys)} keys: at most {MAX_KEYS}")
    return Path(root, tuple(keys))


Tree: TypeAlias = Mapping[str, "Tree | None"]
"""By key: None where the value goes, else what goes within it."""


def _tree(paths: Iterable[tuple[str, ...]]) -> Tree:
    tree: dict[str, Tree | None] = {}
    below: dict[str, list[tuple[str, ...]]] = {}
    for first, *rest in paths:
        if rest:
            below.setdefault(first, []).append(tuple(rest))
        else:
            tree[first] = None
    for key, inner in below.items():
        tree.setdefault(key, _tree(inner))
    return tree


class Redaction(Struct, frozen=True):
    """What is taken out of an event on its way to one destination. Made by `redaction`."""

    paths: tuple[Path, ...]
    payload: Tree
    metadata: Tree

    def apply(self, event: Event) -> Event:
        """A copy without the values; the event itself stays as it is. Never fails."""
        payload, metadata = event.payload, event.metadata
        if self.payload:
            payload = Raw(_value(bytes(payload), self.payload, MAX_NESTED_ARRAYS))
        if self.metadata:
            found = _value(bytes(metadata), self.metadata, MAX_NESTED_ARRAYS)
            metadata = Raw(b"{}" if found == REDACTED else found)  # metadata is always an object
        return msgspec.structs.replace(event, payload=payload, metadata=metadata)


def redaction(paths: Iterable[Path]) -> Redaction | None:
    """All of these paths at once; None if there are none."""
    kept = tuple(sorted(set(paths)))
    if not kept:
        return None
    payload, metadata = (_tree(path.keys for path in kept if path.root == root) for root in ("payload", "metadata"))
    return Redaction(kept, payload, metadata)


def redact(raw: bytes, paths: Iterable[Path], root: Root = "payload") -> bytes:
    """The JSON document `raw`, which is an event's `root`, without the values at `paths`. Never fails.

    A path that leads nowhere does nothing. A document that cannot be read becomes `"[redacted]"` whole.
    """
    tree = _tree(path.keys for path in paths if path.root == root)
    return _value(raw, tree, MAX_NESTED_ARRAYS) if tree else raw


def _value(raw: bytes, tree: Tree, nested: int) -> bytes:
    start = raw.lstrip(b" \t\r\n")[:1]
    try:
        if start == b"{":
            return _object(raw, tree)
        if start == b"[":
            return _array(raw, tree, nested) if nested else REDACTED
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return REDACTED
    return raw if start else REDACTED


def _object(raw: bytes, tree: Tree) -> bytes:
    members = _decode_object(raw)
    touched = False
    for key, inner in tree.items():
        if key in members:
            # written anew even where nothing lies below: the bytes may hold the key twice, and only the last was read
            touched = True
            if inner is None:
                members[key] = _REDACTED_RAW
            else:
                members[key] = Raw(_value(bytes(members[key]), inner, MAX_NESTED_ARRAYS))
    return _encode(members) if touched else raw


def _array(raw: bytes, tree: Tree, nested: int) -> bytes:
    elements = _decode_array(raw)
    touched = False
    for position, element in enumerate(elements):
        before = bytes(element)
        if before[:1] in b"{[":
            after = _value(before, tree, nested - 1)
            if after is not before:
                touched = True
                elements[position] = Raw(after)
    return _encode(elements) if touched else raw
