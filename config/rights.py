"""Rights in Kafka: asks what this user may do, says what is lacking, and gives a user what a role needs.

Brokers are asked for the operations that they would allow ("authorized operations"), so nothing has to be tried, and
one question tells of all that is lacking. A client that is denied says little by itself: a topic that a user may not
describe is not listed, and aiokafka consumes nothing of it without a word.
"""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Final

from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
)
from msgspec import Struct

from config.acls import CLUSTER, IMPLIED, Acl, Operation, Role, headgate_acls
from config.kafka import DENIED, KafkaFault, connected_admin, error_of, explain, principal_of
from schemas.ids import Vendor

REQUEST_TIMEOUT_S: Final = 10.0
SHOWN: Final = 8
_NO_SUCH_TAG: Final = "none"  # stands for any tag where a vendor has no tenant yet

_RESOURCES: Final = {
    "topic": ResourceType.TOPIC,
    "group": ResourceType.GROUP,
    "transactional-id": ResourceType.TRANSACTIONAL_ID,
    "cluster": ResourceType.BROKER,  # as the library calls it
}
_OPERATIONS: Final[dict[Operation, AclOperation]] = {
    "Read": AclOperation.READ,
    "Write": AclOperation.WRITE,
    "Create": AclOperation.CREATE,
    "Delete": AclOperation.DELETE,
    "Alter": AclOperation.ALTER,
    "Describe": AclOperation.DESCRIBE,
    "DescribeConfigs": AclOperation.DESCRIBE_CONFIGS,
    "AlterConfigs": AclOperation.ALTER_CONFIGS,
}
_PATTERNS: Final = {"literal": ResourcePatternType.LITERAL, "prefixed": ResourcePatternType.PREFIXED}


# ---------------------------------------------------------------- what is lacking


def lacking(admin: AdminClient, needed: Iterable[Acl], timeout_s: float = REQUEST_TIMEOUT_S) -> list[Acl]:
    """Which of the rights this user does not have, as far as brokers tell.

    Of a prefix one topic is asked for. A broker does not tell of transactional ids, of what does not exist no more than
    whether it may be described, and a broker without an authorizer allows everything. `timeout_s` is for each question.
    Raises KafkaException.
    """
    wanted = list(needed)
    names = sorted(admin.list_topics(timeout=timeout_s).topics)
    places = {acl: _place(acl, names) for acl in wanted if acl.resource == "topic"}
    allowed: dict[tuple[str, str], frozenset[Operation] | None] = {}
    if places:
        topics = TopicCollection(sorted(set(places.values())))
        allowed |= _allowed(
            "topic", admin.describe_topics(topics, include_authorized_operations=True, request_timeout=timeout_s)
        )
    groups = sorted({acl.name for acl in wanted if acl.resource == "group"})
    if groups:
        asked = admin.describe_consumer_groups(groups, include_authorized_operations=True, request_timeout=timeout_s)
        allowed |= _allowed("group", asked)
    if any(acl.resource == "cluster" for acl in wanted):
        one = admin.describe_cluster(include_authorized_operations=True, request_timeout=timeout_s)
        allowed |= _allowed("cluster", {CLUSTER: one})
    return [acl for acl in wanted if not _has(acl, allowed.get((acl.resource, places.get(acl, acl.name))))]


def _place(acl: Acl, listed: Sequence[str]) -> str:
    if acl.pattern == "literal":
        return acl.name
    return next((name for name in listed if name.startswith(acl.name)), acl.name + _NO_SUCH_TAG)


def _allowed(resource: str, futures: Mapping[str, "Future[Any]"]) -> dict[tuple[str, str], frozenset[Operation] | None]:
    """By resource: what is allowed; None where the broker does not say."""
    names = {operation: name for name, operation in _OPERATIONS.items()}
    found: dict[tuple[str, str], frozenset[Operation] | None] = {}
    for name, future in futures.items():
        try:
            told = future.result().authorized_operations
        except KafkaException as exception:
            if error_of(exception).code() in DENIED:
                found[resource, name] = frozenset()
            elif error_of(exception).code() in _ABSENT:
                found[resource, name] = None
            else:
                raise
        else:
            # a broker that is too old to tell leaves the list out
            found[resource, name] = frozenset(names[one] for one in told if one in names) if told else None
    return found


_ABSENT: Final = frozenset({KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError.GROUP_ID_NOT_FOUND})


def _has(acl: Acl, allowed: frozenset[Operation] | None) -> bool:
    return allowed is None or acl.operation in allowed or bool(IMPLIED.get(acl.operation, frozenset()) & allowed)


def lacks(kafka: Mapping[str, Any], needed: Iterable[Acl]) -> list[Acl]:
    """`lacking`, of a connection of its own. Raises KafkaFault."""
    admin, _ = connected_admin(kafka)
    try:
        return lacking(admin, needed)
    except KafkaException as exception:
        raise explain(error_of(exception), "ask for this user's rights", kafka) from None


def refuse_lacking(kafka: Mapping[str, Any], needed: Iterable[Acl], role: Role) -> None:
    """Raises KafkaFault, which names all that is lacking."""
    if missing := lacks(kafka, needed):
        raise KafkaFault(lack_of(kafka, missing, role))


def lack_of(kafka: Mapping[str, Any], missing: Sequence[Acl], role: Role, vendor: Vendor | None = None) -> str:
    """A sentence that names the user, what it lacks for the role, and what to run."""
    who = principal_of(kafka)
    give = f"`{headgate_acls(role, who, vendor)}`"
    if not missing:  # a transactional id, of which brokers do not tell
        return f"an administrator of Kafka gives all that the role {role} needs by {give}"
    shown = ", ".join(map(str, missing[:SHOWN])) + (f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else "")
    return f"for {role} {who} lacks {shown}; an administrator of Kafka gives that by {give}"


# ---------------------------------------------------------------- giving


class Granted(Struct, frozen=True):
    """`added` were missing. `others` the user has under our names beside what was asked for."""

    added: tuple[Acl, ...]
    others: tuple[Acl, ...]


def grant(kafka: Mapping[str, Any], principal: str, needed: Sequence[Acl], prefix: str) -> Granted:
    """Gives a user what it does not have of these rights; takes nothing away. Running it again changes nothing.

    `others` are of names that start with `prefix` and a dot. Raises KafkaFault.
    """
    admin, _ = connected_admin(kafka)
    has = _acls_of(admin, principal)
    missing = [acl for acl in needed if acl not in has]
    if missing:
        bindings = [binding(principal, acl) for acl in missing]
        for future in admin.create_acls(bindings, request_timeout=REQUEST_TIMEOUT_S).values():
            try:
                future.result()
            except KafkaException as exception:
                error = error_of(exception)
                if error.code() == KafkaError.SECURITY_DISABLED:
                    raise KafkaFault("the brokers have no authorizer: set authorizer.class.name first") from None
                raise explain(error, "write ACLs", kafka) from None
    others = [acl for acl in has if acl not in needed and acl.name.startswith(f"{prefix}.")]
    return Granted(tuple(missing), tuple(sorted(others)))


def _acls_of(admin: AdminClient, principal: str) -> set[Acl]:
    mine = AclBindingFilter(
        ResourceType.ANY, None, ResourcePatternType.ANY, principal, None, AclOperation.ANY, AclPermissionType.ALLOW
    )
    try:
        bindings = admin.describe_acls(mine, request_timeout=REQUEST_TIMEOUT_S).result()
    except KafkaException:  # who may not read them, or a broker without any, is told so when they are written
        return set()
    resources = {kind: name for name, kind in _RESOURCES.items()}
    patterns = {kind: name for name, kind in _PATTERNS.items()}
    operations = {kind: name for name, kind in _OPERATIONS.items()}
    return {
        Acl(
            resources[one.restype],  # type: ignore[arg-type]
            one.name,
            patterns[one.resource_pattern_type],  # type: ignore[arg-type]
            operations[one.operation],
        )
        for one in bindings
        if one.host == "*"
        if one.restype in resources and one.resource_pattern_type in patterns and one.operation in operations
    }


def binding(principal: str, acl: Acl) -> AclBinding:
    return AclBinding(
        _RESOURCES[acl.resource], acl.name, _PATTERNS[acl.pattern], principal, "*", _OPERATIONS[acl.operation],
        AclPermissionType.ALLOW,
    )  # fmt: skip
