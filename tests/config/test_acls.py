"""The ACLs of a role, as data: whose names they reach, and how they are printed."""

import shlex

import pytest

from config.acls import ROLES, Acl, Role, acls_of, headgate_acls, kafka_acls
from schemas.ids import DEFAULT_VENDOR, Tag, Vendor
from schemas.topics import Topics

TOPICS = Topics("headgate")
ACME, ACME2 = Vendor("acme"), Vendor("acme2")


def may(acls: tuple[Acl, ...], operation: str, topic: str) -> bool:
    return any(
        acl.resource == "topic"
        and acl.operation == operation
        and (topic.startswith(acl.name) if acl.pattern == "prefixed" else topic == acl.name)
        for acl in acls
    )


@pytest.mark.parametrize("role", ROLES)
def test_a_prefix_ends_in_a_dot_and_reaches_no_vendor_whose_name_goes_on(role: Role) -> None:
    acls = acls_of(role, TOPICS, [ACME])
    assert all(acl.name.endswith(".") for acl in acls if acl.pattern == "prefixed")
    of_another = [
        TOPICS.ingress(ACME2), TOPICS.attempts(ACME2), TOPICS.retry(ACME2, Tag("one")),
        TOPICS.dead_letters(ACME2, Tag("one")), TOPICS.audit(ACME2), TOPICS.stage(ACME2, Tag("one")),
        TOPICS.stage_cursor(ACME2, Tag("one")),
    ]  # fmt: skip
    for operation in {acl.operation for acl in acls}:
        assert not [topic for topic in of_another if may(acls, operation, topic)]
    without_the_dot = (Acl("topic", "headgate.acme", "prefixed", "Read"),)
    assert may(without_the_dot, "Read", TOPICS.ingress(ACME2))  # the control


def test_control_and_keys_are_written_by_the_control_plane_alone() -> None:
    for topic in (TOPICS.control, TOPICS.keys):
        assert [role for role in ROLES if may(acls_of(role, TOPICS, [DEFAULT_VENDOR]), "Write", topic)] == ["control"]


def test_a_producer_writes_the_ingress_of_its_vendor_and_has_no_other_right() -> None:
    assert acls_of("producer", TOPICS, [ACME]) == (Acl("topic", "headgate.acme.ingress", "literal", "Write"),)


@pytest.mark.parametrize("role", ROLES)
def test_the_lines_for_kafkas_own_tool_say_the_same(role: Role) -> None:
    acls = acls_of(role, TOPICS, [ACME, ACME2])
    read = []
    for line in kafka_acls(acls, "User:O=Some Shop,CN=x", "kafka-1:9092,kafka-2:9092"):
        words = iter(shlex.split(line))
        assert next(words) == "kafka-acls.sh"
        operations, pattern, resource, name = [], "literal", "", ""
        for word in words:
            match word:
                case "--operation":
                    operations.append(next(words))
                case "--resource-pattern-type":
                    pattern = next(words)
                case "--topic" | "--group" | "--transactional-id":
                    resource, name = word[2:], next(words)
                case "--cluster":
                    resource, name = "cluster", "kafka-cluster"
                case "--allow-principal":
                    assert next(words) == "User:O=Some Shop,CN=x"
                case "--add":
                    pass
                case _:
                    next(words)
        read += [(resource, name, pattern, operation) for operation in operations]
    assert sorted(read) == sorted((acl.resource, acl.name, acl.pattern, acl.operation) for acl in acls)


def test_the_command_that_gives_a_role_is_one_word_where_a_shell_would_make_more() -> None:
    assert headgate_acls("worker", "User:w", None) == "headgate acls --role worker --principal User:w --apply"
    assert shlex.split(headgate_acls("producer", "User:a b", ACME))[5] == "User:a b"
