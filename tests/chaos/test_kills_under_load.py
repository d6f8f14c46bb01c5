"""Workers that are killed, restarted and joined by others while events flow (scoreboard R1, R2, R17)."""

import asyncio
import json
import signal
import sys
from collections.abc import Callable

import pytest
from msgspec import Struct

from dev.inbox import Hang, Ok, Received, Slow
from dev.stack import Stack
from schemas.ids import Vendor
from tests.chaos.load import POOLED, TAG, Load, all_ended
from tests.deployment import Deployment, event, eventually, free_port

pytestmark = pytest.mark.broker

Report = Callable[[str], None]

TENANTS = [f"t{n}" for n in range(10)]
TWICE_A_KILL = 125  # what the bar of R1 comes to: 2.5 % of 100,000 events over 20 kills


class Size(Struct, frozen=True):
    times: int
    events: int
    rate_per_s: int = 500

    @property
    def between(self) -> int:
        """Deliveries between two blows."""
        return self.events // (self.times + 1)


SMALL = pytest.param(Size(2, 1000, 300), id="small")


def full(number: str, times: int, events: int, rate_per_s: int = 1000) -> object:
    return pytest.param(Size(times, events, rate_per_s), id="full", marks=pytest.mark.chaos(number))


def nobody_listens() -> str:
    """The URL of a Redis that is not there."""
    return f"redis://127.0.0.1:{free_port()}/0"


@pytest.mark.parametrize("size", [SMALL, full("R1", 20, 100_000)])
async def test_killed_workers_lose_nothing_and_repeat_little_under_the_same_id(
    stack: Stack, size: Size, report: Report
):
    async with Deployment.on(stack, **POOLED) as deployment:
        await deployment.apply({"tenants": [deployment.tenant(one) for one in TENANTS]})
        worker = await deployment.worker()
        load = Load(deployment, TENANTS, size.rate_per_s)
        async with load.running():
            for _ in range(size.times):
                await load.flows(size.between, 300)
                await load.caught_up()  # a backlog is delivered faster, and so more of it is in flight
                worker.kill()
                worker = await deployment.worker()
            await load.flows(size.between, 300)
        census = await load.census()
        report(f"{size.times} kills; {census} (bar 2.5 %)")
        assert census.lost == set()
        # a machine so busy that Redis missed its deadline switched the ledger off, and it promises nothing then
        if "redis_off" not in worker.log.read_text():
            assert census.twice <= max(TWICE_A_KILL * size.times, 0.025 * census.published)
        assert census.renamed == set()


async def requests_after_a_kill_behind_a_slow_neighbour(stack: Stack, **env: str) -> list[Received]:
    """One hung delivery keeps its partition from being committed, not from being delivered; then the worker is killed.

    Returns the requests of the quick neighbour's 100 events.
    """
    async with Deployment.on(stack, **POOLED, HEADGATE_INGRESS_PARTITIONS="1") as deployment:
        await deployment.apply({"tenants": [deployment.tenant("quick"), deployment.tenant("hung")]})
        deployment.inbox.script("/hung", Hang())
        worker = await deployment.worker(**env)
        await deployment.publish([("hung", event("h")), *[("quick", event(f"e{n}")) for n in range(100)]])
        await deployment.inbox.wait_for("/quick", 100, 30)
        await eventually(lambda: worker.metric("headgate_deliveries_total", end="delivered") == 100, "100 are settled")
        worker.kill()
        deployment.inbox.script("/hung", Ok())
        await deployment.worker(**env)
        await deployment.inbox.wait_for("/hung", 1, 30)
        await all_ended(deployment)
        return deployment.inbox.received("/quick")


@pytest.mark.scoreboard("R1")
async def test_what_a_slow_neighbour_kept_from_being_committed_comes_again_only_without_the_ledger(stack: Stack):
    with_ledger, without = await asyncio.gather(
        requests_after_a_kill_behind_a_slow_neighbour(stack),
        requests_after_a_kill_behind_a_slow_neighbour(stack, REDIS_URL=nobody_listens()),
    )
    assert len({one.webhook_id for one in with_ledger}) == len({one.webhook_id for one in without}) == 100
    assert len(with_ledger) == 100
    assert len(without) == 200


async def delivered_after_a_kill_in_flight(stack: Stack, *, sabotaged: bool) -> set[str]:
    """The worker is killed while the delivery of `h` is open; which events came to be delivered then."""
    async with Deployment.on(stack, **POOLED) as deployment:
        await deployment.apply({"tenants": [deployment.tenant("hung")]})
        deployment.inbox.script("/hung", Hang())
        command = (sys.executable, "-m", "tests.chaos.sabotaged_worker", "acknowledges_early") if sabotaged else ()
        worker = await deployment.launch(command=command).ready()
        await deployment.publish([("hung", event("h"))])
        await deployment.inbox.wait_for("/hung", 1, 30, what="requests")
        if sabotaged:
            await deployment.all_committed()
        worker.kill()
        deployment.inbox.script("/hung", Ok())
        await deployment.worker()
        await deployment.publish([("hung", event("after"))])
        await all_ended(deployment)
        assert deployment.retries(TAG) == deployment.dead_letters(TAG) == []
        return {json.loads(one.body)["id"] for one in deployment.inbox.received("/hung") if one.status == 200}


@pytest.mark.scoreboard("R1")
async def test_what_was_in_flight_in_a_killed_worker_is_delivered_by_the_next(stack: Stack):
    """The control, which acknowledges its source before the end of the delivery, loses it."""
    real, control = await asyncio.gather(
        delivered_after_a_kill_in_flight(stack, sabotaged=False),
        delivered_after_a_kill_in_flight(stack, sabotaged=True),
    )
    assert real == {"h", "after"}
    assert control == {"after"}


@pytest.mark.parametrize("size", [SMALL, full("R17", 20, 100_000)])
async def test_a_rolling_restart_loses_nothing_and_sends_nothing_twice_though_redis_is_away(
    stack: Stack, size: Size, report: Report
):
    """Two static members, ended by SIGTERM in turn. Without the ledger: nothing but an orderly end prevents repeats."""
    async with Deployment.on(stack, **POOLED) as deployment:
        await deployment.apply({"tenants": [deployment.tenant(one) for one in TENANTS]})
        away = nobody_listens()
        workers = [await deployment.worker(f"w{n}", REDIS_URL=away) for n in range(2)]
        load = Load(deployment, TENANTS, size.rate_per_s)
        async with load.running():
            for turn in range(size.times):
                await load.flows(size.between, 300)
                assert await workers[turn % 2].terminate(30) == 0
                workers[turn % 2] = await deployment.worker(f"w{turn % 2}", REDIS_URL=away)
            await load.flows(size.between, 300)
        census = await load.census()
        report(f"{size.times} restarts, each ended within 30 s; {census}")
        assert (census.lost, census.twice) == (set(), 0)


@pytest.mark.scoreboard("R17")
async def test_control_the_same_restart_by_sigkill_sends_some_twice(stack: Stack):
    async with Deployment.on(stack, **POOLED) as deployment:
        await deployment.apply({"tenants": [deployment.tenant(one) for one in TENANTS]})
        away = nobody_listens()
        worker = await deployment.worker(REDIS_URL=away, COMMIT_INTERVAL="5s")
        load = Load(deployment, TENANTS, 500)
        async with load.running():
            await load.flows(300)
            worker.kill()
            await deployment.worker(REDIS_URL=away)
            await load.flows(300)
        census = await load.census()
        assert census.lost == set()
        assert census.twice > 0


@pytest.mark.parametrize("size", [pytest.param(Size(1, 1000), id="small"), full("R2", 20, 100_000)])
async def test_workers_that_join_leave_and_stall_lose_nothing_and_repeat_little(
    stack: Stack, size: Size, report: Report
):
    """The second one has no stable name: it leaves when it ends. In the full size it also hangs, and is killed.

    The controls are the two tests that follow: of what waits in one that stalls, and of what was sent and is not
    committed where one is killed (`…_comes_again_only_without_the_ledger`, above).
    """
    async with Deployment.on(stack, **POOLED) as deployment:
        await deployment.apply({"tenants": [deployment.tenant(one) for one in TENANTS]})
        await deployment.worker()
        load = Load(deployment, TENANTS, size.rate_per_s)
        async with load.running():
            for turn in range(size.times):
                other = await deployment.worker(f"guest-{turn}", WORKER_ID="")
                await load.flows(size.between, 300)
                match turn % 3:
                    case 0:
                        assert await other.terminate(30) == 0
                    case 1:
                        other.kill()
                    case _:  # longer than its session: its partitions go to the first one
                        other.signal(signal.SIGSTOP)
                        await load.flows(20 * size.rate_per_s, 120)
                        other.signal(signal.SIGCONT)
                        await load.flows(size.between, 300)
                        assert await other.terminate(30) == 0
                await load.flows(size.between, 300)
        census = await load.census()
        report(f"{size.times} times joined and left; {census} (bar 5 %)")
        assert census.lost == set()
        assert census.twice <= 0.05 * census.published
        assert census.renamed == set()


class Zombie(Struct, frozen=True):
    """What became of 60 events: one in flight and 49 waiting in a worker when it was stopped, ten that came after.

    `committed`: whether ingress was committed no less and no further afterwards.
    """

    accepted: int
    twice: int
    parked: float
    committed: bool


async def stopped_for_longer_than_its_session(stack: Stack, way: str) -> Zombie:
    """A worker is stopped (SIGSTOP), another one takes its partitions and delivers, and it goes on (SIGCONT)."""
    async with Deployment.on(stack, **POOLED) as deployment:
        await deployment.apply({"tenants": [deployment.tenant("t", limits={"in_flight": 1})]})
        deployment.inbox.script("/t", Slow(3))  # answered while the worker stands still
        command = (sys.executable, "-m", "tests.chaos.sabotaged_worker", way) if way else ()
        first = await deployment.launch("w0", command=command).ready()
        await deployment.publish([("t", event(f"e{n}")) for n in range(50)])
        await eventually(lambda: first.metric("headgate_lane_depth") == 49, "one is in flight, the others wait")
        first.signal(signal.SIGSTOP)
        deployment.inbox.script("/t", Ok())
        await deployment.worker("w1")
        await deployment.publish([("t", event(f"later{n}")) for n in range(10)])
        await deployment.inbox.wait_for("/t", 60, 60)
        await deployment.all_committed()
        topic = deployment.settings.topics.ingress(Vendor("default"))
        committed = deployment.committed("route", topic)
        first.signal(signal.SIGCONT)
        await eventually(
            lambda: first.metric("headgate_in_flight") + first.metric("headgate_lane_depth") == 0, "its work is over"
        )
        await eventually(
            lambda: first.get("/metrics")[1].count("headgate_consumer_lag{") == 2, "it has half of the partitions"
        )
        await all_ended(deployment)
        stats = deployment.inbox.stats().paths["/t"]
        return Zombie(
            stats.accepted,
            stats.duplicates,
            first.metric("headgate_parked_total", reason="stalled"),
            deployment.committed("route", topic) == committed,
        )


@pytest.mark.scoreboard("R2")
async def test_a_worker_that_stood_still_sends_nothing_of_what_others_have_sent_meanwhile(stack: Stack):
    """But for the one in flight, which nobody can know of. The control sends what waited in its lane."""
    real, control = await asyncio.gather(
        stopped_for_longer_than_its_session(stack, ""), stopped_for_longer_than_its_session(stack, "sends_what_is_old")
    )
    print(real, control)
    assert real == Zombie(accepted=60, twice=1, parked=49, committed=True)
    assert (control.accepted, control.parked, control.committed) == (60, 0, True)
    assert control.twice > real.twice
