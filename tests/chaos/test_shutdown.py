"""How a worker ends: SIGTERM in good order, with a destination that hangs, twice, and with the broker away."""

import json
import signal
import time

import pytest

from dev import stack as embedded
from dev.inbox import Hang, Ok
from dev.stack import Stack
from schemas.ids import Vendor
from tests.deployment import Deployment, event, eventually

pytestmark = pytest.mark.broker


def hanging(deployment: Deployment, timeout: str) -> dict[str, object]:
    """A tenant whose destination answers nothing, with one request in flight at most."""
    options = {"url": deployment.inbox.url("/acme"), "timeout": timeout}
    deployment.inbox.script("/acme", Hang())
    return deployment.tenant("acme", options=options, limits={"in_flight": 1})


async def test_sigterm_lets_what_is_in_flight_end_parks_the_rest_and_exits_0(deployment: Deployment):
    await deployment.apply({"tenants": [hanging(deployment, "3s")]})
    worker = await deployment.worker()
    await deployment.publish([("acme", event(f"e{n}")) for n in range(10)])
    await deployment.inbox.wait_for("/acme", 1, 30, what="requests")
    await eventually(lambda: worker.metric("headgate_lane_depth") == 9, "nine wait")
    assert await worker.terminate(30) == 0
    letters = deployment.retries("acme")
    assert sorted(one.headers["hg-error"].decode() for one in letters) == ["draining"] * 9 + ["timeout"]
    assert {one.headers["hg-attempt"] for one in letters if one.headers["hg-error"] == b"draining"} == {b"0"}
    assert len(deployment.inbox.received("/acme")) == 1
    await deployment.all_committed()
    deployment.inbox.script("/acme", Ok())
    await deployment.worker()
    await deployment.inbox.wait_for("/acme", 10, 40)
    assert len(deployment.inbox.received("/acme")) == 11


@pytest.mark.chaos("R17")
async def test_the_longest_hang_that_can_be_configured_still_ends_in_good_order_within_30_s(deployment: Deployment):
    await deployment.apply({"tenants": [hanging(deployment, "25s")]})
    worker = await deployment.worker()
    await deployment.publish([("acme", event("e1"))])
    await deployment.inbox.wait_for("/acme", 1, 30, what="requests")
    assert await worker.terminate(30) == 0
    assert [one.headers["hg-error"] for one in deployment.retries("acme")] == [b"timeout"]


async def test_a_second_signal_ends_it_at_once_with_exit_1_and_commits_nothing_open(deployment: Deployment):
    await deployment.apply({"tenants": [hanging(deployment, "25s")]})
    worker = await deployment.worker()
    await deployment.publish([("acme", event("e1"))])
    await deployment.inbox.wait_for("/acme", 1, 30, what="requests")
    worker.signal(signal.SIGTERM)
    await eventually(lambda: "worker_stopping" in worker.log.read_text(), "the first one is taken")
    assert worker.process.poll() is None
    began = time.monotonic()
    assert await worker.terminate(10) == 1
    assert time.monotonic() - began < 10  # the request in flight had up to 25 s
    topic = deployment.settings.topics.ingress(Vendor("default"))
    assert sum(deployment.ends(topic).values()) == 1
    assert set(deployment.committed("route", topic).values()) <= {-1, 0}


@pytest.mark.parametrize("limit", ["6s", pytest.param("30s", marks=pytest.mark.chaos("R17"))])
async def test_sigterm_while_the_broker_is_away_ends_in_time_with_exit_1(breakable: Stack, limit: str):
    async with Deployment.on(embedded.up(breakable.dir)) as deployment:
        await deployment.apply({"tenants": [hanging(deployment, "1s")]})
        worker = await deployment.worker(SHUTDOWN_TIMEOUT=limit)
        await deployment.publish([("acme", event(f"e{n}")) for n in range(10)])
        await deployment.inbox.wait_for("/acme", 1, 30, what="requests")
        deployment.stack.stop_kafka(kill=True)
        began = time.monotonic()
        assert await worker.terminate(float(limit.rstrip("s")) + 5) == 1
        print(f"{time.monotonic() - began:.1f} s")
        log = worker.log.read_text()
        (told,) = [line for line in map(json.loads, log.splitlines()) if line["event"] == "worker_unsettled"]
        assert told["events"] > 0
        assert "Traceback" not in log
        deployment.stack.start_kafka()
        deployment.inbox.script("/acme", Ok())
        await deployment.worker()
        await deployment.inbox.wait_for("/acme", 10, 60)
