"""A configuration that changes while events flow: every event is routed by one version of it, and none is lost."""

import asyncio
import json
import signal
from typing import Any

import pytest

from schemas.wire import read_parked
from tests.deployment import Deployment, event, eventually

pytestmark = pytest.mark.broker


def received_ids(deployment: Deployment, path: str) -> list[str]:
    return [json.loads(one.body)["id"] for one in deployment.inbox.received(path)]


def versions(deployment: Deployment, tenant: str) -> dict[str, int]:
    """The configuration that each event of the tenant was routed by."""
    records = [one for one in deployment.attempts() if one["kind"] == "event" and one["tenant"] == tenant]
    found = {one["eventId"]: one["configVersion"] for one in records}
    assert len(found) == len(records)
    return found


async def test_a_tenant_whose_apply_comes_after_its_first_events_gets_them_all(deployment: Deployment) -> None:
    await deployment.apply({"tenants": [deployment.tenant("acme")]})
    worker = await deployment.worker()
    worker.signal(signal.SIGSTOP)  # so that it meets the events while its registry knows nothing of the tenant
    await deployment.publish([("late", event(f"early{n}")) for n in range(20)])
    await deployment.apply({"tenants": [deployment.tenant("late")]})
    worker.signal(signal.SIGCONT)
    await deployment.inbox.wait_for("/late", 20, 30)
    assert deployment.unrouted() == []
    assert worker.metric("headgate_events_total", result="unrouted") == 0


async def test_a_tenant_that_nobody_applies_is_unrouted_after_one_question_for_all(deployment: Deployment) -> None:
    """The control of the test above: the worker did ask, and the answer counts."""
    await deployment.apply({"tenants": [deployment.tenant("acme")]})
    await deployment.worker()
    unknown = [(f"unknown{n}", event("e")) for n in range(200)]
    await deployment.publish([*unknown, *(("acme", event(f"e{n}")) for n in range(20))])
    await deployment.inbox.wait_for("/acme", 20, 30)
    letters = await eventually(lambda: (x := deployment.unrouted())[199:] and x, "200 unrouted records")
    assert {one.headers["hg-error"] for one in letters} == {b"unknown_tenant"}
    assert len({one.key for one in letters}) == len(letters) == 200
    await deployment.publish([("acme", event("after"))])
    await deployment.inbox.wait_for("/acme", 21, 30)


async def test_a_filter_that_changes_under_load_loses_no_event(deployment: Deployment) -> None:
    def configured(where: str) -> dict[str, Any]:
        tenant = deployment.tenant("acme")
        tenant["routes"][0]["match"]["where"] = where
        return {"tenants": [tenant, deployment.tenant("other")]}

    await deployment.apply(configured('id.startsWith("a")'))
    worker = await deployment.worker()
    stop = asyncio.Event()
    sent: list[str] = []

    async def load() -> None:
        number = 0
        while not stop.is_set():
            ids = [f"{letter}{number + n}" for n in range(10) for letter in "ab"]
            await deployment.publish([(key, event(one)) for one in ids for key in ("acme", "other")])
            sent.extend(ids)
            number += 10
            await asyncio.sleep(0.02)

    loading = asyncio.create_task(load())
    await deployment.inbox.wait_for("/acme", 50, 30)
    pid = worker.process.pid
    await deployment.apply(configured('id.startsWith("b")'))
    published = len(sent)
    await eventually(lambda: any(one[0] == "b" for one in received_ids(deployment, "/acme")), "the new filter's first")
    await eventually(lambda: len(sent) > published + 200, "more load")
    stop.set()
    await loading
    await deployment.all_committed()
    assert worker.process.pid == pid and worker.process.poll() is None
    by = await asyncio.to_thread(versions, deployment, "acme")
    assert set(by) == set(sent)  # each was routed once, by the one version or the other
    first, second = sorted(set(by.values()))
    expected = sorted(one for one in sent if one[0] == ("a" if by[one] == first else "b"))
    await deployment.inbox.wait_for("/acme", len(expected), 30)
    assert sorted(received_ids(deployment, "/acme")) == expected
    assert {by[one] for one in sent[-100:]} == {second}
    await deployment.inbox.wait_for("/other", len(sent), 30)
    assert sorted(received_ids(deployment, "/other")) == sorted(sent)
    assert deployment.unrouted() == []


async def test_a_tenant_that_is_removed_while_its_events_come_leaves_none_of_them_unaccounted(
    deployment: Deployment,
) -> None:
    tenants = [deployment.tenant("acme"), deployment.tenant("gone")]
    await deployment.apply({"tenants": tenants})
    worker = await deployment.worker()
    stop = asyncio.Event()
    ids: list[str] = []

    async def load() -> None:
        while not stop.is_set():
            more = [f"e{len(ids) + n}" for n in range(20)]
            await deployment.publish([(key, event(one)) for one in more for key in ("acme", "gone")])
            ids.extend(more)
            await asyncio.sleep(0.05)

    loading = asyncio.create_task(load())
    await deployment.inbox.wait_for("/gone", 40, 30)
    await deployment.apply({"tenants": tenants[:1]}, prune=True)
    await eventually(deployment.unrouted, "the removal takes effect while they come")
    stop.set()
    await loading
    await deployment.inbox.wait_for("/acme", len(ids), 30)
    await deployment.all_committed()
    delivered = set(received_ids(deployment, "/gone"))
    unrouted = [json.loads(one.value or b"")["eventId"] for one in deployment.unrouted()]
    dead = [
        said.event
        for one in deployment.dead_letters("gone")
        if (said := read_parked(list(one.headers.items()))) is not None
    ]
    assert sorted([*delivered, *unrouted, *dead]) == sorted(ids)
    assert worker.process.poll() is None
