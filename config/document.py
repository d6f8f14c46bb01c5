"""The configuration file: YAML of design section 7, read strictly into a typed `Document`.

Owns the file's grammar, the places of its faults and the reading of secrets from where the file points. Every fault is
collected, not just the first. What a kind's options may be, and what a filter, a pattern or a redaction path may say,
belongs to floors above: those come in as `Rules`.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Mapping as MappingOf
from pathlib import Path
from typing import Any, Final, Literal, Protocol, TypeAlias, cast, get_origin

import msgspec
from msgspec import Struct
from pydantic import BaseModel, SecretStr, ValidationError

from config.nodes import Listing, Mapping, Node, Place, Scalar, ScalarKind, YamlFault, compose, plain
from config.secret_fields import assemble, field_name
from config.settings import TopicsChoice, parse_duration_s
from schemas.control import LimitSpec, RetrySpec
from schemas.ids import (
    DEFAULT_VENDOR,
    DestinationId,
    ExternalId,
    RouteId,
    Slug,
    Vendor,
    external_id_problem,
    name_problem,
)

MAX_SECRET_BYTES: Final = 64 * 1024
MAX_WAIT_S: Final = 30 * 86_400.0
MAX_SCHEDULE: Final = 50
MAX_LANE_IN_FLIGHT: Final = 1024
GONE_STATUS: Final = 410

PayloadMode: TypeAlias = Literal["sealed", "private"]


class Kind(Protocol):
    """What the file needs to know of a kind of destination; `connectors.contract.Spec` is one."""

    @property
    def options(self) -> type[BaseModel]: ...

    @property
    def secrets(self) -> type[BaseModel]: ...

    @property
    def generate(self) -> Callable[[], MappingOf[str, str]]:
        """Makes the secrets of the fields that a configuration may leave out."""
        ...

    @property
    def dials(self) -> Callable[[Any], MappingOf[str, tuple[str, bool]]]:
        """By option, the host that options name and whether it is spoken to in TLS."""
        ...

    @property
    def expressions(self) -> Callable[[Any], MappingOf[str, str]]:
        """By option, the expression over an event that it holds; each gives a text."""
        ...


class Objection(Struct, frozen=True):
    """What a rule has against a text, and what to write instead. `column`: from 1 inside the text; 0: all of it."""

    message: str
    remedy: str = ""
    column: int = 0


Check: TypeAlias = Callable[[str], Objection | None]


class Rules(Struct, frozen=True):
    """What the floors above know: kinds of destinations, and how filters, type patterns and redactions are written.

    `check_dial` is asked of a host, and whether it is spoken to in TLS; what it has against it is a warning, since the
    workers' settings decide.
    """

    kinds: MappingOf[str, Kind]
    check_where: Check
    check_pattern: Check
    check_redact: Check
    check_text: Check
    check_dial: Callable[[str, bool], Objection | None] = lambda host, tls: None


class Fault(Struct, frozen=True):
    """One fault of a file: `file:line:column: path: message; remedy`."""

    file: str
    place: Place
    path: str
    message: str
    remedy: str = ""

    def __str__(self) -> str:
        path = f" {self.path}:" if self.path else ""
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{self.file}:{self.place.line}:{self.place.column}:{path} {self.message}{remedy}"


class DocumentError(Exception):
    """The file cannot be applied. Says every fault, in the order of the file."""

    def __init__(self, faults: Iterable[Fault]) -> None:
        self.faults = sorted(faults, key=lambda fault: fault.place)
        super().__init__("\n".join(str(fault) for fault in self.faults))


class DestinationEntry(Struct, frozen=True):
    """`options` is JSON as the kind's model takes it; `secrets` holds the fields that the file names."""

    id: DestinationId
    type: str
    options: msgspec.Raw
    secrets: MappingOf[str, SecretStr]
    retry: RetrySpec
    limits: LimitSpec
    place: Place


class RouteEntry(Struct, frozen=True):
    id: RouteId
    types: tuple[str, ...]
    to: tuple[DestinationId, ...]
    where: str
    redact: tuple[str, ...]


class TenantEntry(Struct, frozen=True):
    """`slug` and `topics` are None where the file leaves them to the default or to what the tenant has."""

    external_id: ExternalId
    name: str
    slug: Slug | None
    topics: TopicsChoice | None
    payload_mode: PayloadMode
    destinations: tuple[DestinationEntry, ...]
    routes: tuple[RouteEntry, ...]
    place: Place
    path: str


class Document(Struct, frozen=True):
    """`warnings` are faults that do not stop an apply."""

    file: str
    vendor: Vendor
    tenants: tuple[TenantEntry, ...]
    warnings: tuple[Fault, ...]


def parse_document(
    text: str, *, file: str, rules: Rules, env: MappingOf[str, str], vendors: Sequence[Vendor]
) -> Document:
    """The document that `text` holds, its secrets read. Raises `DocumentError` with every fault.

    `file` stands in the messages, and secret files named in the document are sought beside it (`-`: where we are).
    `vendors` are those of this deployment.
    """
    try:
        root = compose(text)
    except YamlFault as fault:
        raise DocumentError([Fault(file, fault.place, "", fault.message, fault.remedy)]) from None
    reader = _Reader(file, rules, env)
    document = reader.document(root, vendors)
    if reader.faults or document is None:
        raise DocumentError(reader.faults)
    return document


_RATE: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*/\s*(s|m|h)")
_RATE_UNITS_S: Final = {"s": 1.0, "m": 60.0, "h": 3600.0}


def parse_rate_per_s(text: str) -> float:
    """`200/s`, `100/m` or `5/h` as a number a second. Raises ValueError."""
    found = _RATE.fullmatch(text.strip())
    if found is None or not (rate := float(found[1]) / _RATE_UNITS_S[found[2]]) > 0:
        raise ValueError(f"{text[:40]!r} is not a rate such as 200/s or 100/m")
    return rate


def nearest(name: str, known: Iterable[str]) -> str:
    """A remedy for an unknown name: the nearest known one, or all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, 1, 0.6)
    if close:
        return f"did you mean {close[0]}?"
    return f"known here: {', '.join(names)}" if names else "remove it"


_TENANT_FIELDS: Final = (
    "externalId",
    "name",
    "slug",
    "topics",
    "database",
    "payloadMode",
    "destinations",
    "routes",
)
_DESTINATION_FIELDS: Final = ("id", "type", "options", "secrets", "retry", "limits")
_ROUTE_FIELDS: Final = ("id", "match", "to", "redact")
_SOURCES: Final = ("env", "file", "value")
_SOURCE: Final = "{env: NAME}, {file: PATH} or {value: TEXT}"
_SEEN: Final[MappingOf[ScalarKind, str]] = {
    "text": "a text",
    "int": "a number",
    "float": "a number",
    "bool": "true or false",
    "null": "empty",
}


class _Reader:
    def __init__(self, file: str, rules: Rules, env: MappingOf[str, str]) -> None:
        self.faults: list[Fault] = []
        self._warnings: list[Fault] = []
        self._file = file
        self._folder = Path(file).parent if file != "-" else Path()
        self._rules = rules
        self._env = env

    # ------------------------------------------------------------ the parts of a document

    def document(self, root: Node | None, vendors: Sequence[Vendor]) -> Document | None:
        if root is None or (isinstance(root, Scalar) and root.kind == "null"):
            self._fault(Place(1, 1), "", "the file is empty", "write `tenants:` with a list")
            return None
        fields = self._fields(root, "", ("vendor", "tenants"))
        if fields is None:
            return None
        vendor = DEFAULT_VENDOR
        if (node := fields.get("vendor")) is not None:
            text = self._text(node, "vendor")
            if text is not None:
                self._name(node, "vendor", text)
                vendor = Vendor(text)
                if vendor not in vendors:
                    self._fault(
                        node.place,
                        "vendor",
                        f"{text[:60]!r} is no vendor of this deployment ({', '.join(vendors)})",
                        "add it to HEADGATE_VENDORS, also that of the workers",
                    )
        if "tenants" not in fields:
            self._fault(root.place, "tenants", "is missing", "write `tenants:` with a list")
            return None
        tenants = []
        for path, node in self._items(fields["tenants"], "tenants"):
            entry = self._tenant(node, path)
            if entry is not None:
                tenants.append(entry)
        self._unique(((entry.external_id, entry.place, f"{entry.path}.externalId") for entry in tenants), "tenant")
        self._unique(((entry.slug, entry.place, f"{entry.path}.slug") for entry in tenants if entry.slug), "slug")
        return Document(self._file, vendor, tuple(tenants), tuple(self._warnings))

    def _tenant(self, node: Node, path: str) -> TenantEntry | None:
        fields = self._fields(node, path, _TENANT_FIELDS)
        if fields is None:
            return None
        external_id = self._required_text(fields, "externalId", node, path)
        if external_id is not None and (problem := external_id_problem(external_id)) is not None:
            self._fault(
                fields["externalId"].place, f"{path}.externalId", problem, "1 to 200 bytes without control characters"
            )
        slug = self._optional_text(fields, "slug", path)
        if slug is not None:
            self._name(fields["slug"], f"{path}.slug", slug)
        database = self._choice(fields, "database", path, ("shared", "own"))
        if database == "own":
            self._fault(
                fields["database"].place,
                f"{path}.database",
                "own needs the API's store, which arrives with a later release",
                "write `shared` or leave it out",
            )
        topics = self._choice(fields, "topics", path, ("own", "pooled"))
        payload_mode = self._choice(fields, "payloadMode", path, ("sealed", "private"))
        name = self._optional_text(fields, "name", path)
        if name is not None and (len(name) > 200 or not name.isprintable()):
            self._fault(fields["name"].place, f"{path}.name", "is no name", "at most 200 printable characters")
        destinations = self._destinations(fields, path)
        routes = self._routes(fields, path, {entry.id for entry in destinations})
        if external_id is None:
            return None
        return TenantEntry(
            external_id=ExternalId(external_id),
            name=name or "",
            slug=None if slug is None else Slug(slug),
            topics=cast(TopicsChoice | None, topics),
            payload_mode=cast(PayloadMode, payload_mode or "sealed"),
            destinations=tuple(destinations),
            routes=tuple(routes),
            place=fields["externalId"].place,
            path=path,
        )

    def _destinations(self, fields: MappingOf[str, Node], path: str) -> list[DestinationEntry]:
        found: list[tuple[DestinationEntry, str]] = []
        if (node := fields.get("destinations")) is not None:
            for at, item in self._items(node, f"{path}.destinations"):
                entry = self._destination(item, at)
                if entry is not None:
                    found.append((entry, at))
        self._unique(((entry.id, entry.place, f"{at}.id") for entry, at in found), "destination")
        return [entry for entry, _ in found]

    def _destination(self, node: Node, path: str) -> DestinationEntry | None:
        fields = self._fields(node, path, _DESTINATION_FIELDS)
        if fields is None:
            return None
        ident = self._required_text(fields, "id", node, path)
        if ident is not None:
            self._name(fields["id"], f"{path}.id", ident)
        kind_name = self._required_text(fields, "type", node, path)
        kind = None
        if kind_name is not None:
            kind = self._rules.kinds.get(kind_name)
            if kind is None:
                self._unknown_kind(fields["type"], f"{path}.type", kind_name)
        options = msgspec.Raw(b"{}")
        secrets = self._secrets(kind, fields.get("secrets"), f"{path}.secrets")
        if kind is not None:
            options = self._options(kind, fields.get("options"), node, f"{path}.options")
            self._check_secrets(kind, secrets, fields.get("secrets"), node, f"{path}.secrets")
        retry = self._retry(fields.get("retry"), f"{path}.retry")
        limits = self._limits(fields.get("limits"), f"{path}.limits")
        if ident is None:
            return None
        return DestinationEntry(
            id=DestinationId(ident),
            type=kind_name or "",
            options=options,
            secrets={name: value for name, value in secrets.items() if value is not None},
            retry=retry,
            limits=limits,
            place=fields["id"].place,
        )

    def _unknown_kind(self, node: Node, path: str, name: str) -> None:
        self._fault(node.place, path, f"{name[:60]!r} is no kind of destination", nearest(name, self._rules.kinds))

    def _options(self, kind: Kind, node: Node | None, parent: Node, path: str) -> msgspec.Raw:
        """The options as JSON, in the order of their names: the same options have the same bytes."""
        try:
            options = plain(node) if node is not None else {}
        except YamlFault as fault:
            self._fault(fault.place, path, fault.message, fault.remedy)
            return msgspec.Raw(b"{}")
        if not isinstance(options, dict):
            self._not_a(node or parent, path, "mapping")
            return msgspec.Raw(b"{}")
        encoded = msgspec.json.encode(options, order="deterministic")
        try:
            valid = kind.options.model_validate(msgspec.json.decode(encoded))
        except ValidationError as fault:
            self._model_faults(fault, kind.options, node, parent, path)
        else:
            for name, (host, tls) in kind.dials(valid).items():
                if (objection := self._rules.check_dial(host, tls)) is not None:
                    place = _descend(node or parent, (name,))[0].place
                    self._warn(place, f"{path}.{name}", objection.message, objection.remedy)
            for name, text in kind.expressions(valid).items():
                self._object(_descend(node or parent, (name,))[0], f"{path}.{name}", self._rules.check_text(text))
        return msgspec.Raw(encoded)

    def _secrets(self, kind: Kind | None, node: Node | None, path: str) -> dict[str, SecretStr | None]:
        """What the file names, by field (`config/secret_fields.py`); None where it could not be read (and was said).

        Without a kind, which was said too, a mapping of mappings holds several.
        """
        if node is None or _is_null(node):
            return {}
        if not isinstance(node, Mapping):
            self._not_a(node, path, "mapping")
            return {}
        found: dict[str, SecretStr | None] = {}
        known = None if kind is None else _names(kind.secrets)
        for key, value in node.pairs:
            at = f"{path}.{key.text[:60]}"
            if "." in key.text:
                self._fault(key.place, at, "unknown field", "write a mapping")
            elif known is not None and key.text not in known:
                self._fault(key.place, at, "unknown field", nearest(key.text, known))
            elif _is_several(value) if kind is None else _holds_several(kind.secrets, key.text):
                found |= self._several_secrets(key.text, value, at)
            else:
                found[key.text] = self._secret(value, at)
        return found

    def _several_secrets(self, field: str, node: Node, path: str) -> dict[str, SecretStr | None]:
        """Secrets that have names of their own, such as headers."""
        if not isinstance(node, Mapping):
            self._not_a(node, path, "mapping of names")
            return {field: None}
        found: dict[str, SecretStr | None] = {}
        for name, each in node.pairs:
            if isinstance(each, Mapping):
                found[field_name(field, name.text)] = self._secret(each, f"{path}.{name.text[:60]}")
            else:
                # Where a source is forgotten the name may be the secret, too: neither is quoted
                self._fault(each.place, path, "holds what is not a source of a secret", f"write NAME: and {_SOURCE}")
                found[field] = None
        return found

    def _secret(self, node: Node, path: str) -> SecretStr | None:
        value = self._secret_source(node, path)
        return None if value is None else SecretStr(value)

    def _secret_source(self, node: Node, path: str) -> str | None:
        remedy = f"write {_SOURCE}"
        if isinstance(node, Scalar):
            # What stands here may be the secret itself: it is not quoted
            self._fault(node.place, path, "is not a source of a secret", remedy)
            return None
        if not isinstance(node, Mapping):
            self._not_a(node, path, "source of a secret")
            return None
        if len(node.pairs) != 1 or node.pairs[0][0].text not in _SOURCES:
            self._fault(node.place, path, "needs exactly one source", remedy)
            return None
        ((key, value),) = node.pairs
        source = key.text
        at = f"{path}.{source}"
        text = self._secret_text(value, at)
        if text is None:
            return None
        match source:
            case "env":
                found = self._env.get(text)
                if found is None:
                    self._fault(
                        value.place, at, f"the environment has no variable {text[:100]}", "set it and run again"
                    )
            case "file":
                found = self._secret_file(value, at, text)
            case _:
                found = text
                self._warn(value.place, at, "a secret stands in the file itself", "prefer {env: NAME} or {file: PATH}")
        if found is not None and not found:
            self._fault(value.place, at, "the secret is empty")
            return None
        return found

    def _secret_file(self, node: Node, path: str, name: str) -> str | None:
        file = self._folder / Path(name).expanduser()
        try:
            with file.open("rb") as stream:
                raw = stream.read(MAX_SECRET_BYTES + 1)
            if len(raw) > MAX_SECRET_BYTES:
                self._fault(node.place, path, f"{file} has more than {MAX_SECRET_BYTES >> 10} KiB")
                return None
            return raw.decode().removesuffix("\n").removesuffix("\r")
        except OSError as fault:
            self._fault(node.place, path, f"cannot read {file}: {fault.strerror}")
        except UnicodeDecodeError:
            self._fault(node.place, path, f"{file} is not UTF-8 text")
        return None

    def _secret_text(self, node: Node, path: str) -> str | None:
        """As `_text`, but never quotes what it saw."""
        if isinstance(node, Scalar) and node.kind == "text":
            return node.text
        self._fault(node.place, path, "must be a text", "write it in quotes")
        return None

    def _check_secrets(
        self, kind: Kind, secrets: MappingOf[str, SecretStr | None], node: Node | None, parent: Node, path: str
    ) -> None:
        if None in secrets.values():
            return
        live = {name: (value.get_secret_value(),) for name, value in secrets.items() if value is not None}
        made = {name: (value,) for name, value in kind.generate().items()}
        try:
            kind.secrets.model_validate(assemble({**made, **live}))
        except ValidationError as fault:
            self._model_faults(fault, kind.secrets, node, parent, path)

    def _model_faults(
        self, errors: ValidationError, model: type[BaseModel], node: Node | None, parent: Node, path: str
    ) -> None:
        """Faults of a kind's model, at the places that they speak of. The values seen stay out of the messages."""
        names = _names(model)
        for error in errors.errors(include_url=False, include_input=False, include_context=False):
            found, at = _descend(node or parent, error["loc"] if node is not None else ())
            where = path + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"])
            last = str(error["loc"][-1]) if error["loc"] else ""
            match error["type"]:
                case "extra_forbidden":
                    self._fault(at or found.place, where, "unknown field", nearest(last, names))
                case "missing":
                    self._fault(found.place, where, "is missing", _described(model, last))
                case "string_type" if isinstance(found, Scalar) and last in model.model_fields:
                    self._fault(found.place, where, f"is {_SEEN[found.kind]}, not a text", _such_as(model, last))
                case _:
                    message = error["msg"].removeprefix("Value error, ")
                    message = message[:1].lower() + message[1:] if message[1:2].islower() else message
                    self._fault(found.place, where, message)

    def _retry(self, node: Node | None, path: str) -> RetrySpec:
        if node is None or _is_null(node):
            return RetrySpec()
        fields = self._fields(node, path, ("schedule", "max_age", "also"))
        if fields is None:
            return RetrySpec()
        schedule = RetrySpec().schedule_s
        if (given := fields.get("schedule")) is not None:
            items = self._items(given, f"{path}.schedule")
            waits = [0.0 if (wait := self._duration(item, at)) is None else wait for at, item in items]
            if not isinstance(given, Listing):
                pass  # said by _items
            elif not 1 <= len(waits) <= MAX_SCHEDULE:
                self._fault(
                    given.place,
                    f"{path}.schedule",
                    f"has {len(waits)} attempts, not 1 to {MAX_SCHEDULE}",
                    "list the wait before each attempt, such as [0s, 5s, 5m]",
                )
            elif waits[0] != 0:
                self._fault(
                    given.place,
                    f"{path}.schedule",
                    f"starts with {waits[0]:g} s: the first attempt is made at once",
                    "let the list begin with 0s, then the wait before each further attempt, such as [0s, 5s, 5m]",
                )
            schedule = tuple(waits)
        max_age_s = RetrySpec().max_age_s
        if (given := fields.get("max_age")) is not None:
            if (age_s := self._duration(given, f"{path}.max_age")) == 0:
                self._fault(given.place, f"{path}.max_age", "must be longer than 0")
            max_age_s = age_s or max_age_s
        if sum(schedule) > max_age_s > 0:
            message = f"the schedule takes longer than max_age ({max_age_s:g} s)"
            self._warn(node.place, path, message, "its last attempts are never made")
        also = []
        if (given := fields.get("also")) is not None:
            for at, item in self._items(given, f"{path}.also"):
                status = self._integer(item, at, 300, 599)
                if status == GONE_STATUS:
                    self._fault(item.place, at, "410 disables the destination and is never retried", "remove it")
                elif status is not None and status not in also:
                    also.append(status)
        return RetrySpec(schedule, max_age_s, tuple(also))

    def _limits(self, node: Node | None, path: str) -> LimitSpec:
        if node is None or _is_null(node):
            return LimitSpec()
        fields = self._fields(node, path, ("in_flight", "rate"))
        if fields is None:
            return LimitSpec()
        in_flight = LimitSpec().in_flight
        if (given := fields.get("in_flight")) is not None:
            in_flight = self._integer(given, f"{path}.in_flight", 1, MAX_LANE_IN_FLIGHT) or in_flight
        rate_per_s = 0.0
        if (given := fields.get("rate")) is not None:
            text = given.text if isinstance(given, Scalar) else ""
            try:
                rate_per_s = parse_rate_per_s(text)
            except ValueError as fault:
                self._fault(given.place, f"{path}.rate", str(fault), "write a number and a unit: 200/s, 100/m, 50/h")
        return LimitSpec(in_flight, rate_per_s)

    def _routes(self, fields: MappingOf[str, Node], path: str, destinations: set[DestinationId]) -> list[RouteEntry]:
        found: list[tuple[RouteEntry, Place, str]] = []
        if (node := fields.get("routes")) is not None:
            for at, item in self._items(node, f"{path}.routes"):
                entry = self._route(item, at, destinations)
                if entry is not None:
                    found.append((entry, item.place, at))
        self._unique(((entry.id, place, f"{at}.id") for entry, place, at in found), "route")
        return [entry for entry, _, _ in found]

    def _route(self, node: Node, path: str, destinations: set[DestinationId]) -> RouteEntry | None:
        fields = self._fields(node, path, _ROUTE_FIELDS)
        if fields is None:
            return None
        ident = self._required_text(fields, "id", node, path)
        if ident is not None:
            self._name(fields["id"], f"{path}.id", ident)
        types: list[str] = []
        where = ""
        if "match" not in fields:
            self._fault(node.place, f"{path}.match", "is missing", 'write `match: {types: ["*"]}` for every event')
        elif (match := self._fields(fields["match"], f"{path}.match", ("types", "where"))) is not None:
            types = self._types(match.get("types"), fields["match"], f"{path}.match.types")
            where = self._where(match.get("where"), f"{path}.match.where")
        to: list[DestinationId] = []
        if "to" not in fields:
            self._fault(node.place, f"{path}.to", "is missing", "list the ids of destinations")
        else:
            for at, item in self._items(fields["to"], f"{path}.to"):
                text = self._text(item, at)
                if text is None:
                    continue
                if text not in destinations:
                    self._fault(
                        item.place, at, f"{text[:60]!r} is no destination of this tenant", nearest(text, destinations)
                    )
                elif text in to:
                    self._fault(item.place, at, f"{text!r} stands here twice", "keep one of them")
                to.append(DestinationId(text))
            if not to and isinstance(fields["to"], Listing):
                self._fault(fields["to"].place, f"{path}.to", "is empty", "list the ids of destinations")
        redact = []
        if (given := fields.get("redact")) is not None:
            for at, item in self._items(given, f"{path}.redact"):
                text = self._text(item, at)
                if text is not None:
                    self._object(item, at, self._rules.check_redact(text))
                    redact.append(text)
        if ident is None:
            return None
        return RouteEntry(RouteId(ident), tuple(types), tuple(to), where, tuple(redact))

    def _types(self, node: Node | None, parent: Node, path: str) -> list[str]:
        types: list[str] = []
        if node is None:
            self._fault(
                parent.place, path, "is missing", 'list event types, such as ["order.*", invoice.paid], or ["*"]'
            )
            return types
        for at, item in self._items(node, path):
            text = self._text(item, at)
            if text is not None:
                self._object(item, at, self._rules.check_pattern(text))
                types.append(text)
        if not types and isinstance(node, Listing):
            self._fault(node.place, path, "is empty", 'write ["*"] for every event')
        return types

    def _where(self, node: Node | None, path: str) -> str:
        if node is None or _is_null(node):
            return ""
        text = self._text(node, path)
        if text is None:
            return ""
        self._object(node, path, self._rules.check_where(text))
        return text.strip()

    # ------------------------------------------------------------ nodes to values

    def _fault(self, place: Place, path: str, message: str, remedy: str = "") -> None:
        self.faults.append(Fault(self._file, place, path, message, remedy))

    def _warn(self, place: Place, path: str, message: str, remedy: str) -> None:
        self._warnings.append(Fault(self._file, place, path, message, remedy))

    def _not_a(self, node: Node, path: str, wanted: str) -> None:
        seen = {Listing: "a list", Mapping: "a mapping", Scalar: "a single value"}[type(node)]
        self._fault(node.place, path, f"is {seen}, not a {wanted}")

    def _object(self, node: Node, path: str, objection: Objection | None) -> None:
        if objection is None:
            return
        place = node.place
        if objection.column and isinstance(node, Scalar) and not node.block and "\n" not in node.text:
            place = Place(place.line, place.column + objection.column - 1 + node.quoted)
        self._fault(place, path, objection.message, objection.remedy)

    def _fields(self, node: Node, path: str, known: Sequence[str]) -> dict[str, Node] | None:
        """The fields of a mapping; unknown ones are faults. Fields without a value count as not there."""
        if not isinstance(node, Mapping):
            self._not_a(node, path, f"mapping with {', '.join(known)}")
            return None
        found: dict[str, Node] = {}
        for key, value in node.pairs:
            if key.text not in known:
                at = f"{path}.{key.text[:60]}" if path else key.text[:60]
                self._fault(key.place, at, "unknown field", nearest(key.text, known))
            elif not _is_null(value):
                found[key.text] = value
        return found

    def _items(self, node: Node, path: str) -> list[tuple[str, Node]]:
        if isinstance(node, Listing):
            return [(f"{path}[{index}]", item) for index, item in enumerate(node.items)]
        self._not_a(node, path, "list")
        return []

    def _text(self, node: Node, path: str) -> str | None:
        if not isinstance(node, Scalar):
            self._not_a(node, path, "text")
            return None
        if node.kind != "text":
            remedy = f'write it in quotes: "{node.text[:60]}"'
            self._fault(node.place, path, f"is {_SEEN[node.kind]}, not a text", remedy)
            return None
        return node.text

    def _required_text(self, fields: MappingOf[str, Node], name: str, parent: Node, path: str) -> str | None:
        if name not in fields:
            self._fault(parent.place, f"{path}.{name}", "is missing")
            return None
        return self._text(fields[name], f"{path}.{name}")

    def _optional_text(self, fields: MappingOf[str, Node], name: str, path: str) -> str | None:
        node = fields.get(name)
        return None if node is None else self._text(node, f"{path}.{name}")

    def _choice(self, fields: MappingOf[str, Node], name: str, path: str, choices: Sequence[str]) -> str | None:
        text = self._optional_text(fields, name, path)
        if text is None or text in choices:
            return text
        self._fault(fields[name].place, f"{path}.{name}", f"{text[:60]!r} is not one of {', '.join(choices)}")
        return None

    def _name(self, node: Node, path: str, text: str) -> None:
        if (problem := name_problem(text)) is not None:
            self._fault(node.place, path, f"{text[:60]!r} {problem}")

    def _integer(self, node: Node, path: str, least: int, most: int) -> int | None:
        value = plain(node) if isinstance(node, Scalar) and node.kind == "int" and len(node.text) < 20 else None
        if value is None or not least <= value <= most:
            seen = f"{node.text[:40]!r} is not" if isinstance(node, Scalar) else "must be"
            self._fault(node.place, path, f"{seen} a whole number from {least} to {most}")
            return None
        return int(value)

    def _duration(self, node: Node, path: str) -> float | None:
        """Seconds; None where it is a fault (and was said)."""
        try:
            wait_s = parse_duration_s(node.text if isinstance(node, Scalar) else "")
        except ValueError:
            seen = repr(node.text[:40]) if isinstance(node, Scalar) else "this"
            self._fault(node.place, path, f"{seen} is not a duration", "write a number and a unit: 0s, 500ms, 5m, 72h")
            return None
        if not 0 <= wait_s <= MAX_WAIT_S:
            self._fault(node.place, path, f"must be from 0s to {MAX_WAIT_S / 3600:g}h")
            return None
        return wait_s

    def _unique(self, named: Iterable[tuple[str, Place, str]], what: str) -> None:
        first: dict[str, Place] = {}
        for name, place, path in named:
            earlier = first.setdefault(name, place)
            if earlier is not place:
                self._fault(place, path, f"the {what} {name[:60]!r} stands here twice (first on line {earlier.line})")


def _is_null(node: Node) -> bool:
    return isinstance(node, Scalar) and node.kind == "null"


def _is_several(node: Node) -> bool:
    return isinstance(node, Mapping) and bool(node.pairs) and all(isinstance(each, Mapping) for _, each in node.pairs)


def _names(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _holds_several(model: type[BaseModel], name: str) -> bool:
    field = model.model_fields.get(name)
    return field is not None and get_origin(field.annotation) in (dict, MappingOf)


def _such_as(model: type[BaseModel], name: str) -> str:
    examples = model.model_fields[name].examples
    return f"write one such as {examples[0]}" if examples else "write it in quotes"


def _descend(node: Node, loc: Sequence[str | int]) -> tuple[Node, Place | None]:
    """The node that a model's error speaks of, as far as the path leads, and the place of its key."""
    key_place = None
    for part in loc:
        if isinstance(node, Mapping):
            pair = next(((key, value) for key, value in node.pairs if key.text == part), None)
            if pair is None:
                break
            key_place, node = pair[0].place, pair[1]
        elif isinstance(node, Listing) and isinstance(part, int) and part < len(node.items):
            node = node.items[part]
        else:
            break
    return node, key_place


def _described(model: type[BaseModel], name: str) -> str:
    field = model.model_fields.get(name)
    return field.description if field is not None and field.description else ""
