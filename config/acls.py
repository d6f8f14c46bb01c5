"""What each kind of user of Kafka needs, and no more: the ACLs of a role, as data (ADR 0015). No I/O.

A role is a program with its settings, not a person: a worker; a producer of one vendor's events; an operator's
commands, which look, trace and replay; the control plane, which alone writes tenants and keys. What a role may do ends
at the names of its vendors' topics: a prefix always ends in a dot, or `headgate.acme` would open `headgate.acme2` too.
"""

import shlex
from collections.abc import Sequence
from typing import Final, Literal, TypeAlias

from msgspec import Struct

from schemas.ids import Tag, Vendor
from schemas.topics import Topics

Role: TypeAlias = Literal["worker", "producer", "operator", "control"]
Resource: TypeAlias = Literal["topic", "group", "transactional-id", "cluster"]
Pattern: TypeAlias = Literal["literal", "prefixed"]
Operation: TypeAlias = Literal[
    "Read", "Write", "Create", "Delete", "Alter", "Describe", "DescribeConfigs", "AlterConfigs"
]

ROLES: Final[tuple[Role, ...]] = ("worker", "producer", "operator", "control")
CLUSTER: Final = "kafka-cluster"
IMPLIED: Final[dict[Operation, frozenset[Operation]]] = {
    "Describe": frozenset({"Read", "Write", "Delete", "Alter"}),
    "DescribeConfigs": frozenset({"AlterConfigs"}),
}
"""Which operations let a user do this one too, as Kafka's own authorizer has it."""

_EVERY_TAG: Final = Tag("")


class Acl(Struct, frozen=True, order=True):
    """One right: an operation on what has this name, or on all whose names start so."""

    resource: Resource
    name: str
    pattern: Pattern
    operation: Operation

    def __str__(self) -> str:
        if self.resource == "cluster":
            return f"{self.operation} on the cluster"
        what = self.resource.replace("-", " ")
        return f"{self.operation} on {what} {self.name}{'*' if self.pattern == 'prefixed' else ''}"


def acls_of(role: Role, topics: Topics, vendors: Sequence[Vendor]) -> tuple[Acl, ...]:
    """Everything that the role does for these vendors, and nothing that it could do without."""
    match role:
        case "worker":
            found = _worker(topics, vendors)
        case "producer":
            found = [_topic(topics.ingress(vendor), "Write") for vendor in vendors]
        case "operator":
            found = _operator(topics, vendors)
        case "control":
            found = _control(topics, vendors)
    return tuple(acl for each in found for acl in each)


def _worker(topics: Topics, vendors: Sequence[Vendor]) -> list[list[Acl]]:
    found = [_topic(topics.control, "Read"), _topic(topics.keys, "Read"), _topic(topics.state, "Read", "Write")]
    for vendor in vendors:
        found += [
            _topic(topics.ingress(vendor), "Read"),
            _topic(topics.attempts(vendor), "Write"),
            _topic(topics.audit(vendor), "Describe"),  # to see that it is there: a worker makes what is missing
            _topics(topics.retry(vendor, _EVERY_TAG), "Read", "Write"),
            _topics(topics.dead_letters(vendor, _EVERY_TAG), "Write"),
            _topics(topics.stage(vendor, _EVERY_TAG), "Read", "Write"),
            _topics(topics.stage_cursor(vendor, _EVERY_TAG), "Read", "Write"),
        ]
    return [
        *found,
        *(_group(topics, name, "Read") for name in ("route", "retry", "stage")),
        [Acl("transactional-id", stage_transactional_id(topics, ""), "prefixed", "Write")],
    ]


def _operator(topics: Topics, vendors: Sequence[Vendor]) -> list[list[Acl]]:
    """`get`, `trace`, `dlq` and `doctor`. It writes ingress to replay unrouted records, and does not read it. The topic
    `doctor` is where `doctor` asks a broker for its time."""
    found = [_topic(name, "Read", "DescribeConfigs") for name in (topics.control, topics.keys, topics.state)]
    for vendor in vendors:
        found += [
            _topics(f"{topics.prefix}.{vendor}.", "Describe", "DescribeConfigs"),
            _topic(topics.ingress(vendor), "Write"),
            _topic(topics.attempts(vendor), "Read"),
            _topics(topics.retry(vendor, _EVERY_TAG), "Read", "Write"),
            _topics(topics.dead_letters(vendor, _EVERY_TAG), "Read", "Write"),
        ]
    return [
        *found,
        _topic(f"{topics.prefix}.doctor", "Create", "Write", "Delete"),
        *(_group(topics, name, "Describe") for name in ("route", "retry")),
        [Acl("cluster", CLUSTER, "literal", "Describe")],
    ]


def _control(topics: Topics, vendors: Sequence[Vendor]) -> list[list[Acl]]:
    """`apply`, `secrets`, `keys` and `destinations`. It reads no event, no letter and no attempt."""
    making: tuple[Operation, ...] = ("Create", "AlterConfigs")
    found = [_topic(name, "Read", "Write", *making) for name in (topics.control, topics.keys, topics.state)]
    for vendor in vendors:
        found += [
            _topics(f"{topics.prefix}.{vendor}.", "Describe", *making),
            _topics(topics.retry(vendor, _EVERY_TAG), "Alter", "Delete"),  # more tiers; the end of a tenant
            _topics(topics.dead_letters(vendor, _EVERY_TAG), "Delete"),
            _topics(topics.stage(vendor, _EVERY_TAG), "Delete"),
            _topics(topics.stage_cursor(vendor, _EVERY_TAG), "Delete"),
            [Acl("transactional-id", transactional_id(topics, vendor), "literal", "Write")],
        ]
    return found


def transactional_id(topics: Topics, vendor: Vendor) -> str:
    """One a vendor: who begins a change fences whoever began one before (ADR 0007)."""
    return f"{topics.prefix}.apply.{vendor}"


def stage_transactional_id(topics: Topics, reader: str) -> str:
    """One a reader of stages, who commits offsets and cursors together. As with their group, vendors share the name."""
    return topics.group(f"stage.{reader}")


def _topic(name: str, *operations: Operation) -> list[Acl]:
    return [Acl("topic", name, "literal", operation) for operation in operations]


def _topics(start: str, *operations: Operation) -> list[Acl]:
    return [Acl("topic", start, "prefixed", operation) for operation in operations]


def _group(topics: Topics, name: str, operation: Operation) -> list[Acl]:
    return [Acl("group", topics.group(name), "literal", operation)]


# ---------------------------------------------------------------- as commands


def kafka_acls(
    acls: Sequence[Acl], principal: str, bootstrap: str, what: Literal["add", "remove"] = "add"
) -> list[str]:
    """The lines for Kafka's own tool, one for each resource."""
    operations: dict[tuple[Resource, str, Pattern], list[Operation]] = {}
    for acl in acls:
        operations.setdefault((acl.resource, acl.name, acl.pattern), []).append(acl.operation)
    lines = []
    for (resource, name, pattern), names in operations.items():
        words = ["kafka-acls.sh", "--bootstrap-server", bootstrap, "--command-config", "admin.properties"]
        words += [f"--{what}", *(["--force"] if what == "remove" else []), "--allow-principal", principal]
        for operation in names:
            words += ["--operation", operation]
        if pattern == "prefixed":
            words += ["--resource-pattern-type", "prefixed"]
        words += [f"--{resource}"] if resource == "cluster" else [f"--{resource}", name]
        lines.append(shlex.join(words))
    return lines


def headgate_acls(role: Role, principal: str, vendor: Vendor | None) -> str:
    """The command that gives a role's rights."""
    of = f" --vendor {vendor}" if vendor is not None else ""
    return f"headgate acls --role {role} --principal {shlex.quote(principal)}{of} --apply"
