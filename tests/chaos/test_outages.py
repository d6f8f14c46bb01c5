"""Kafka and Redis that stop, freeze, forget and refuse while events flow (scoreboard R3, R4)."""

import sys
import time
from collections.abc import AsyncIterator, Callable

import pytest
import redis

from dev import stack as embedded
from dev.inbox import Ok, Slow, Steps
from dev.stack import ServiceName, Stack
from tests.chaos.load import POOLED, TAG, Load, all_ended
from tests.deployment import Deployment, event, eventually

pytestmark = pytest.mark.broker

Report = Callable[[str], None]

TENANTS = [f"t{n}" for n in range(10)]
RATE_PER_S = 300
BACK_WITHIN_S = 30.0


@pytest.fixture
async def deployment(breakable: Stack) -> AsyncIterator[Deployment]:
    """On the stack that may be broken."""
    async with Deployment.on(embedded.up(breakable.dir), **POOLED) as made:
        yield made


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("times", "events", "rate_per_s"), [(2, 1200, 300), pytest.param(5, 100_000, 1000, marks=pytest.mark.chaos("R3"))]
)
async def test_a_broker_that_restarts_costs_no_event_and_everything_flows_again(
    deployment: Deployment, times: int, events: int, rate_per_s: int, report: Report
):
    """By turns it is ended in order, and killed. The worker stays."""
    await deployment.apply({"tenants": [deployment.tenant(one) for one in TENANTS]})
    worker = await deployment.worker()
    load = Load(deployment, TENANTS, rate_per_s)
    back_s = []
    async with load.running():
        for turn in range(times):
            await load.flows(events // times, 300)
            deployment.stack.stop_kafka(kill=turn % 2 == 0)
            deployment.stack.start_kafka()
            began = time.monotonic()
            await load.flows(rate_per_s, BACK_WITHIN_S)
            back_s.append(time.monotonic() - began)
    census = await load.census()
    report(f"{times} restarts; {census}; flows again after at most {max(back_s):.1f} s (bar {BACK_WITHIN_S:.0f} s)")
    assert census.lost == set()
    assert census.renamed == set()
    assert worker.process.poll() is None
    assert worker.get("/healthz")[0] == 200


@pytest.mark.scoreboard("R3")
@pytest.mark.parametrize("sabotaged", [False, True], ids=["as it is", "control: gives up"])
async def test_what_fails_while_the_broker_is_away_is_written_when_it_is_back(deployment: Deployment, sabotaged: bool):
    """The control takes a retry record for written that the broker never had, and so loses the delivery."""
    await deployment.apply({"tenants": [deployment.tenant("acme", retry={"schedule": ["0s", "1s"]})]})
    deployment.inbox.script("/acme", Steps((Slow(1.5, 503), Ok())))
    command = (sys.executable, "-m", "tests.chaos.sabotaged_worker", "gives_up") if sabotaged else ()
    worker = await deployment.launch(command=command).ready()
    await deployment.publish([("acme", event("e1"))])
    await deployment.inbox.wait_for("/acme", 1, 30, what="requests")
    deployment.stack.stop_kafka(kill=True)
    sign = "gave up" if sabotaged else "broker_away"
    await eventually(lambda: sign in worker.log.read_text(), sign)
    deployment.stack.start_kafka()
    if not sabotaged:
        await deployment.inbox.wait_for("/acme", 1, 60)
    await deployment.publish([("acme", event("e2"))])
    await all_ended(deployment)
    delivered = len(deployment.inbox.accepted("/acme"))
    assert (delivered, len(deployment.retries(TAG))) == ((1, 1) if sabotaged else (2, 2))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("more", "rate_per_s"), [(RATE_PER_S, RATE_PER_S), pytest.param(14_000, 1000, marks=pytest.mark.chaos("R4"))]
)
async def test_a_redis_that_dies_forgets_freezes_and_refuses_costs_no_event_and_is_seen(
    deployment: Deployment, more: int, rate_per_s: int, report: Report
):
    """`more` events flow in each of the seven states: frozen, that is for 14 s in full size."""
    await deployment.apply({"tenants": [deployment.tenant(one) for one in TENANTS]})
    worker = await deployment.worker()
    client = redis.Redis(port=deployment.stack.redis_port)
    load = Load(deployment, TENANTS, rate_per_s)

    def errors() -> float:
        return worker.metric("headgate_ledger_errors_total")

    async def is_seen_and_stops_nothing() -> None:
        before = errors()
        await load.flows(more, 120)
        await eventually(lambda: errors() > before, "the errors are counted")

    async def is_well_again() -> None:
        def quiet() -> bool:
            before, passed = errors(), load.delivered()
            while load.delivered() < passed + rate_per_s // 2:
                time.sleep(0.05)
            return errors() == before

        await eventually(quiet, "no more errors")

    async with load.running():
        await load.flows(more, 120)
        await is_well_again()  # and so the metric is silent when all is well
        deployment.stack.stop_redis(kill=True)
        await is_seen_and_stops_nothing()
        deployment.stack.start_redis()
        await is_well_again()
        client.flushall()
        await load.flows(more, 120)
        deployment.stack.pause(ServiceName.REDIS)
        await is_seen_and_stops_nothing()
        deployment.stack.resume(ServiceName.REDIS)
        await is_well_again()
        client.config_set("maxmemory", "1")  # answers, and refuses each call that would write
        await is_seen_and_stops_nothing()
        client.config_set("maxmemory", "0")
        await is_well_again()
        await load.flows(2 * more, 120)
    client.close()
    census = await load.census()
    report(f"killed, flushed, frozen, refusing; {census}")
    assert (census.lost, census.twice) == (set(), 0)
    assert worker.process.poll() is None


@pytest.mark.scoreboard("R4")
async def test_a_redis_that_forgets_lets_a_duplicate_pass_that_it_would_have_stopped(deployment: Deployment):
    await deployment.apply({"tenants": [deployment.tenant("acme")]})
    await deployment.worker()
    await deployment.publish([("acme", event("e1"))])
    await all_ended(deployment)
    await deployment.publish([("acme", event("e1"))])
    await all_ended(deployment)
    assert len(deployment.inbox.received("/acme")) == 1
    redis.Redis(port=deployment.stack.redis_port).flushall()
    await deployment.publish([("acme", event("e1"))])
    await all_ended(deployment)
    assert len({one.webhook_id for one in deployment.inbox.received("/acme")}) == 1
    assert len(deployment.inbox.received("/acme")) == 2


@pytest.mark.scoreboard("R4")
async def test_control_a_worker_that_needs_redis_delivers_nothing_without_it(deployment: Deployment):
    await deployment.apply({"tenants": [deployment.tenant("acme")]})
    command = (sys.executable, "-m", "tests.chaos.sabotaged_worker", "needs_redis")
    worker = await deployment.launch(command=command, SHUTDOWN_TIMEOUT="2s").ready()
    deployment.stack.stop_redis(kill=True)
    await deployment.publish([("acme", event("e1"))])
    assert await worker.ended(40) == 1
    assert deployment.inbox.received("/acme") == []


@pytest.mark.chaos("R4")
async def test_without_redis_the_worker_is_at_least_four_fifths_as_fast(deployment: Deployment, report: Report):
    """The same dump of events, delivered with Redis and with a frozen one, twice each in turn."""
    await deployment.apply({"tenants": [deployment.tenant(one) for one in TENANTS]})
    await deployment.worker()
    events = 25_000

    async def takes_s(run: str) -> float:
        before = deployment.inbox.stats().accepted
        began = time.monotonic()
        await deployment.publish([(TENANTS[n % 10], event(f"{run}-{n}")) for n in range(events)])
        await eventually(lambda: deployment.inbox.stats().accepted - before >= events, "all delivered", 120)
        return time.monotonic() - began

    await takes_s("warm")
    with_redis = without = 0.0
    for turn in range(2):
        with_redis += await takes_s(f"with-{turn}")
        deployment.stack.pause(ServiceName.REDIS)
        try:
            without += await takes_s(f"without-{turn}")
        finally:
            deployment.stack.resume(ServiceName.REDIS)
    speed = with_redis / without
    report(f"{2 * events / with_redis:,.0f}/s with Redis, {2 * events / without:,.0f}/s frozen: {speed:.0%} (bar 80 %)")
    assert speed >= 0.8
