"""`headgate acls` where there is nothing to give: what it prints and what it refuses. The rest is in tests/secured/."""

import pytest

from tests.cli.shell import headgate, told
from tests.deployment import Deployment

pytestmark = pytest.mark.broker


async def test_it_prints_lines_for_kafkas_own_tool_and_touches_nothing(deployment: Deployment) -> None:
    printed = await headgate(deployment, "acls", "--role", "producer", "--principal", "User:billing")
    assert printed.exit_code == 0
    (line,) = printed.stdout.splitlines()
    start = f"kafka-acls.sh --bootstrap-server {deployment.stack.kafka_bootstrap} --command-config admin.properties"
    assert (
        line
        == f"{start} --add --allow-principal User:billing --operation Write --topic {deployment.prefix}.default.ingress"
    )
    found = await told(deployment, "acls", "--role", "producer", "--principal", "User:billing")
    topic = f"{deployment.prefix}.default.ingress"
    assert found["acls"] == [{"resource": "topic", "name": topic, "pattern": "literal", "operation": "Write"}]
    assert found["applied"] is False


async def test_brokers_without_an_authorizer_take_none_and_say_so(deployment: Deployment) -> None:
    refused = await headgate(deployment, "acls", "--role", "worker", "--principal", "User:worker", "--apply")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "the brokers have no authorizer" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--role", "worker", "--principal", "worker"], "write User:NAME"),
        (["--role", "worker", "--principal", "User:*"], "everybody"),
        (["--role", "worker", "--principal", "User:w", "--vendor", "nobody"], "HEADGATE_VENDORS"),
        (["--role", "producer", "--principal", "User:p"], "--vendor (north, south)"),
        (["--role", "root", "--principal", "User:p"], "'worker', 'producer', 'operator', 'control'"),
    ],
)
async def test_wrong_use_is_told(deployment: Deployment, arguments: list[str], part: str) -> None:
    refused = await headgate(deployment, "acls", *arguments, HEADGATE_VENDORS="north,south")
    assert refused.exit_code == 2
    assert part in refused.stderr
