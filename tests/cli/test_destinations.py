"""`headgate destinations` on real Kafka: what the receiver gets, what is parked, what an apply leaves alone."""

from typing import Any

import pytest

from dev.inbox import Refuse
from schemas.wire import read_parked
from tests.cli.shell import headgate, told
from tests.deployment import Deployment, event, eventually

pytestmark = pytest.mark.broker


def configured(deployment: Deployment, timeout: str = "15s") -> dict[str, Any]:
    acme = deployment.tenant("acme")
    acme["destinations"][0]["options"]["timeout"] = timeout
    return {"tenants": [acme, deployment.tenant("beta")]}


async def state(deployment: Deployment, tenant: str) -> str:
    (row,) = await told(deployment, "get", "destinations", "--tenant", tenant)
    return str(row["state"])


def suspended(deployment: Deployment) -> list[str]:
    found = [read_parked(list(record.headers.items())) for record in deployment.retries("acme")]
    return [parked.event for parked in found if parked is not None and parked.error == "suspended"]


async def test_a_held_destination_gets_nothing_until_it_is_enabled_whatever_is_applied(deployment: Deployment) -> None:
    await deployment.apply(configured(deployment))
    await deployment.worker()
    found = await headgate(deployment, "destinations", "disable", "--tenant", "acme", "hook")
    assert (found.exit_code, found.stdout) == (0, "~ destination acme/hook: on → held\n")
    await deployment.apply(configured(deployment, "10s"))
    assert (await state(deployment, "acme"), await state(deployment, "beta")) == ("held", "on")
    await deployment.publish([(key, event("e1")) for key in ("acme", "beta")])
    await deployment.inbox.wait_for("/beta", 1, 30)  # the control: what is not held is delivered
    assert await eventually(lambda: suspended(deployment), "the delivery is parked")
    assert deployment.inbox.received("/acme") == []

    found = await headgate(deployment, "destinations", "enable", "--tenant", "acme", "hook")
    assert (found.exit_code, found.stdout) == (0, "~ destination acme/hook: held → on\n")
    (received,) = await deployment.inbox.wait_for("/acme", 1, 60)
    assert received.attempt == 1  # parking cost no attempt
    again = await told(deployment, "destinations", "enable", "--tenant", "acme", "hook")
    assert again == {
        "vendor": "default",
        "tenant": "acme",
        "destination": "hook",
        "was": "on",
        "state": "on",
        "changed": False,
    }


async def test_what_answered_410_is_enabled_without_a_change_of_its_options(deployment: Deployment) -> None:
    await deployment.apply(configured(deployment))
    await deployment.worker()
    deployment.inbox.script("/acme", Refuse(410))
    await deployment.publish([("acme", event("e1"))])
    await eventually(lambda: deployment.dead_letters("acme"), "a dead letter")
    await deployment.all_committed()
    assert (await state(deployment, "acme")).startswith("disabled")
    deployment.inbox.script("/acme")
    await deployment.publish([("acme", event("e2"))])  # the control: until then it gets nothing
    letters = await eventually(lambda: (x := deployment.dead_letters("acme"))[1:] and x, "a second dead letter")
    assert {letter.headers["hg-error"] for letter in letters} == {b"gone", b"destination_disabled"}

    found = await headgate(deployment, "destinations", "enable", "--tenant", "acme", "hook")
    assert found.stdout == "~ destination acme/hook: disabled → on\n"
    assert await state(deployment, "acme") == "on"
    # it is taken on within 2 s; what comes before that is dead, as said
    for number in range(3, 40):
        await deployment.publish([("acme", event(f"e{number}"))])
        await deployment.all_committed()
        if len(deployment.inbox.received("/acme")) > 1:
            break
    assert len(deployment.inbox.received("/acme")) == 2


async def test_who_is_not_there_is_named_with_who_is(deployment: Deployment) -> None:
    await deployment.apply(configured(deployment))
    found = await headgate(deployment, "destinations", "disable", "--tenant", "acme", "hok")
    assert found.exit_code == 1
    assert "no destination 'hok'; did you mean hook?" in found.stderr
    found = await headgate(deployment, "destinations", "disable", "--tenant", "acne", "hook")
    assert found.exit_code == 1
    assert "no tenant 'acne'" in found.stderr
    found = await headgate(deployment, "destinations", "disable", "hook")
    assert found.exit_code == 2
