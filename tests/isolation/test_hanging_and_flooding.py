"""One tenant hangs, floods or talks for ever: the others are delivered meanwhile (scoreboard R5, R6, R8).

What is asserted is order and counts: the others are delivered while what hangs is still open. Each control runs the
same through a worker without the safeguard (`without.py`).
"""

import asyncio
import json
import os
import sys
from asyncio.subprocess import DEVNULL
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from dev.inbox import Hang, Inbox, Ok, RemoteInbox, Slow
from schemas.ids import DEFAULT_VENDOR
from tests.deployment import Deployment, Worker, event, eventually, milliseconds
from tests.isolation.ages import Others, p99
from tests.isolation.hostile import CODES, MIB, hostile

pytestmark = pytest.mark.broker

POOL = 32
CLOCKS_MS = 50  # the clock that dates an attempt is not the one that measures it
HUNG_TIMEOUT_S = 25  # the most there is: what hangs is open for longer than the others need


async def without(safeguard: str, deployment: Deployment, **env: str) -> Worker:
    """A worker without one of its safeguards."""
    command = (sys.executable, "-m", "tests.isolation.without", safeguard)
    return await deployment.launch("w0", command, **env).ready()


def hanging(deployment: Deployment, name: str, timeout_s: float = HUNG_TIMEOUT_S, **more: Any) -> dict[str, Any]:
    """A tenant whose destination never answers, and may have the whole pool as far as its own limits go."""
    deployment.inbox.script(f"/{name}", Hang())
    tenant = deployment.tenant(name, limits={"in_flight": 1024}, **more)
    tenant["destinations"][0]["options"]["timeout"] = f"{int(timeout_s * 1000)}ms"
    return tenant


def ended(worker: Worker, name: str) -> float:
    """How many attempts of a tenant have ended."""
    return worker.metric("headgate_attempts_total", tenant=name)


async def delivered(inbox: Inbox, names: list[str], count: int, timeout_s: float = 60) -> None:
    """Waits until each of the tenants has got `count` events."""
    await asyncio.gather(*(inbox.wait_for(f"/{name}", count, timeout_s) for name in names))


def attempts_of(deployment: Deployment, names: list[str]) -> list[tuple[float, float]]:
    """When each of the tenants' attempts began and ended, in ms, by the worker's own clocks."""
    ends = [
        (milliseconds(one["at"]), one["durationMs"])
        for one in deployment.attempts()
        if one["kind"] == "attempt" and one["tenant"] in names
    ]
    return [(end - took, end) for end, took in ends]


async def first_begun_and_first_ended(deployment: Deployment, others: list[str], hung: str) -> tuple[float, float]:
    """When the first attempt of the others began, and when the first hung one ended; once both are in the log."""
    begun = await eventually(lambda: attempts_of(deployment, others), "the others' attempts are in the log")
    ended = await eventually(lambda: attempts_of(deployment, [hung]), "the hung ones have ended")
    return min(start for start, _ in begun), min(end for _, end in ended)


def at_the_others(inbox: Inbox, names: list[str]) -> int:
    return sum(len(inbox.accepted(f"/{name}")) for name in names)


# ---------------------------------------------------------------- R5: hangs


async def test_one_hanging_tenant_of_twenty_holds_up_no_delivery_of_the_others(deployment: Deployment) -> None:
    others = [f"t{n}" for n in range(19)]
    await deployment.apply({"tenants": [hanging(deployment, "hung"), *map(deployment.tenant, others)]})
    worker = await deployment.worker(IN_FLIGHT=str(POOL))
    # what the hanging tenant asks for within its timeout is eight times the pool, ahead of the others and among them
    await deployment.publish([("hung", event(f"first{n}")) for n in range(4 * POOL)])
    await deployment.inbox.wait_for("/hung", 1, 20, what="requests")
    await deployment.publish(
        [(t, event(f"{t}-{n}")) for n in range(20) for t in (*others, *["hung"] * 7)]
        + [("hung", event(f"last{n}")) for n in range(4 * POOL)]
    )
    await delivered(deployment.inbox, others, 20)
    assert ended(worker, "hung") == 0
    assert worker.metric("headgate_in_flight", tenant="hung") >= 1
    assert all(len(deployment.inbox.received(f"/{name}")) == 20 for name in others)


@pytest.mark.scoreboard("R5")
async def test_without_the_fair_share_a_hanging_tenant_holds_up_all(deployment: Deployment) -> None:
    """The control of the test above."""
    others = [f"t{n}" for n in range(19)]
    await deployment.apply({"tenants": [hanging(deployment, "hung", 4), *map(deployment.tenant, others)]})
    await without("share", deployment, IN_FLIGHT=str(POOL))
    await deployment.publish([("hung", event(f"first{n}")) for n in range(4 * POOL)])
    await deployment.inbox.wait_for("/hung", POOL, 20, what="requests")
    await deployment.publish([(t, event(f"{t}-{n}")) for n in range(20) for t in others])
    await delivered(deployment.inbox, others, 20)
    first_begun, first_ended = await first_begun_and_first_ended(deployment, others, "hung")
    assert first_begun > first_ended - CLOCKS_MS


async def test_fifty_hanging_destinations_of_four_hundred_hold_up_no_delivery_of_the_others(
    deployment: Deployment,
) -> None:
    hung = [f"h{n}" for n in range(50)]
    others = [f"t{n}" for n in range(350)]
    tenants = [*(hanging(deployment, name) for name in hung), *map(deployment.tenant, others)]
    await deployment.apply({"tenants": [{**tenant, "topics": "pooled"} for tenant in tenants]})
    worker = await deployment.worker(IN_FLIGHT="200", TENANT_LABEL="tenant")
    await deployment.publish([(name, event(f"{name}-{n}")) for n in range(3) for name in hung])
    await eventually(lambda: all(deployment.inbox.received(f"/{name}") for name in hung[:25]), "they hang")
    await deployment.publish([(name, event(name)) for name in others])
    await delivered(deployment.inbox, others, 1)
    assert all(ended(worker, name) == 0 for name in hung[:3])
    assert sum(deployment.inbox.stats().paths[f"/{name}"].requests for name in hung) >= 25
    assert at_the_others(deployment.inbox, others) == 350


def slowed(ages_ms: Mapping[tuple[str, str], Sequence[float]]) -> tuple[float, float]:
    """The others' p99 in the quiet periods and in the one between them."""
    of: dict[str, list[float]] = {}
    for (period, _), ages in ages_ms.items():
        of.setdefault(period, []).extend(ages)
    return p99(of["before"] + of["after"]), p99(of["during"])


def told(quiet: float, during: float) -> str:
    return f"p99 of the others {quiet:.1f} ms without, {during:.1f} ms with (bar +10 % or 5 ms)"


@pytest.mark.chaos("R5")
@pytest.mark.timeout(1200)
async def test_p99_of_49_tenants_is_hardly_later_while_the_fiftieth_hangs(
    deployment: Deployment, report: Callable[[str], None]
) -> None:
    """100,000 events of the others, half of them while ten a second are published that hang for 15 s each: twice the
    pool. The quiet halves before and after have the same load, of which all is answered."""
    pool, for_s = 64, 25.0
    hung = hanging(deployment, "hung", 15, retry={"schedule": ["0s"]})
    async with Others.of(deployment, 49, 1000) as others:
        deployment.inbox.script("/hung", Ok())
        await deployment.apply({"tenants": [hung, *others.tenants()]})
        worker = await deployment.worker(IN_FLIGHT=str(pool), TENANT_LABEL="tenant")

        def among(period: str) -> Callable[[int], Sequence[Any]]:
            return lambda chunk: [] if chunk % 5 else [("hung", event(f"{period}-{chunk}"))]

        await others.publish("warm", 5, among=among("warm"))
        await others.publish("before", for_s, among=among("before"))
        deployment.inbox.script("/hung", Hang())
        await others.publish("during", 2 * for_s, among=among("during"))
        assert worker.metric("headgate_in_flight", tenant="hung") >= 1
        deployment.inbox.script("/hung", Ok())
        deployment.inbox.cut()
        await eventually(lambda: worker.metric("headgate_in_flight", tenant="hung") == 0, "nothing hangs any more")
        await others.publish("after", for_s, among=among("after"))
        await others.arrived()
        quiet, during = slowed(others.ages_ms())
        report(f"{others.published:,} events of the others, all delivered; {told(quiet, during)}")
        assert during <= max(1.1 * quiet, quiet + 5)


# ---------------------------------------------------------------- R6: floods


async def flood(deployment: Deployment, worker: Worker) -> None:
    """More events of a hanging tenant than a worker ever queues, and then the others', in the same partition."""
    await deployment.publish([("hung", event(f"h{n}")) for n in range(4500)])
    await deployment.publish([(t, event(f"{t}-{n}")) for n in range(20) for t in ("t0", "t1", "t2")])


async def test_a_tenant_that_dumps_its_events_holds_up_nobody_in_its_partition(stack: Any) -> None:
    async with Deployment.on(stack, HEADGATE_INGRESS_PARTITIONS="1") as deployment:
        others = ["t0", "t1", "t2"]
        await deployment.apply({"tenants": [hanging(deployment, "hung"), *map(deployment.tenant, others)]})
        worker = await deployment.worker(IN_FLIGHT=str(POOL))
        await flood(deployment, worker)
        await delivered(deployment.inbox, others, 20)
        assert ended(worker, "hung") == 0
        assert worker.metric("headgate_parked_total", tenant="hung") > 0
        assert worker.metric("headgate_attempts_total", tenant="hung") == 0  # a park costs no attempt
        assert len(deployment.dead_letters("hung")) == 0


async def dumped(deployment: Deployment, count: int, folder: Path) -> None:
    """Publishes a tenant's events as fast as it goes, by a process of its own."""
    lines = (json.dumps({"customerExternalId": "dump", **event(f"d{n}")}) for n in range(count))
    file = folder / "dump.ndjson"
    file.write_text("\n".join(lines))
    command = [sys.executable, "-m", "cli.main", "publish", "-f", str(file)]
    process = await asyncio.create_subprocess_exec(*command, env={**os.environ, **deployment.env}, stderr=DEVNULL)
    assert await process.wait() == 0


@pytest.mark.chaos("R6")
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("answers_after_s", [0.0, 0.05], ids=["keeps up", "does not keep up"])
async def test_a_dump_of_100_000_events_delays_others_little_and_its_partition_by_its_routing(
    deployment: Deployment, report: Callable[[str], None], tmp_path: Path, answers_after_s: float
) -> None:
    async with Others.of(deployment, 40, 500) as others:
        with RemoteInbox.spawn(keep_bodies=False) as receiver:
            receiver.script("/dump", Slow(answers_after_s) if answers_after_s else Ok())
            dump = deployment.tenant("dump")
            dump["destinations"][0]["options"]["url"] = receiver.url("/dump")
            await deployment.apply({"tenants": [dump, *others.tenants()]})
            worker = await deployment.worker(TENANT_LABEL="tenant")
            await others.publish("warm", 5)
            await others.publish("quiet", 60)
            cpu = psutil.Process(worker.process.pid).cpu_times()
            await asyncio.gather(dumped(deployment, 100_000, tmp_path), others.publish("dump", 60))
            used = psutil.Process(worker.process.pid).cpu_times()
            await others.arrived()
            if not answers_after_s:  # else what is parked comes through at the pace of its destination, for minutes
                await eventually(lambda: receiver.stats().accepted == 100_000, "the dump is delivered", 300)
            parked = worker.metric("headgate_parked_total", tenant="dump")
        ingress = deployment.read(deployment.settings.topics.ingress(DEFAULT_VENDOR))
        at = {one.key: one.partition for one in ingress}
        began_ms = min(one.timestamp_ms for one in ingress if one.key == b"dump")
        routed_at = [one["at"] for one in deployment.attempts() if one["kind"] == "event" and one["tenant"] == "dump"]
        assert len(routed_at) == 100_000
        routed_in_ms = milliseconds(max(routed_at)) - began_ms
        ages: dict[tuple[str, bool], list[float]] = {}
        for (period, tenant), found in others.ages_ms().items():
            ages.setdefault((period, at[tenant.encode()] == at[b"dump"]), []).extend(found)
        quiet, during, same = p99(ages["quiet", False]), p99(ages["dump", False]), max(ages["dump", True])
        report(
            f"other partitions: p99 {quiet:.1f} ms before, {during:.1f} ms over the 60 s of the dump (bar twice); the "
            f"same one: at most {same / 1000:.1f} s late; the dump was routed within {routed_in_ms / 1000:.1f} s, "
            f"{parked:,.0f} times parked, and the worker's CPU of these 60 s "
            f"{used.user + used.system - cpu.user - cpu.system:.1f} s"
        )
        assert during <= 2 * quiet
        assert same <= routed_in_ms + 2 * quiet


@pytest.mark.scoreboard("R6")
async def test_without_parking_a_tenant_that_dumps_its_events_stops_its_partition(stack: Any) -> None:
    """The control of the test above."""
    async with Deployment.on(stack, HEADGATE_INGRESS_PARTITIONS="1") as deployment:
        others = ["t0", "t1", "t2"]
        await deployment.apply({"tenants": [hanging(deployment, "hung", 4), *map(deployment.tenant, others)]})
        worker = await without("parking", deployment, IN_FLIGHT=str(POOL))
        await flood(deployment, worker)
        await delivered(deployment.inbox, others, 1)
        first_begun, first_ended = await first_begun_and_first_ended(deployment, others, "hung")
        assert first_begun > first_ended - CLOCKS_MS


# ---------------------------------------------------------------- R8: talks for ever


def talking(deployment: Deployment, ports: Mapping[str, int], timeout: str) -> Sequence[dict[str, Any]]:
    """A tenant of the name of each hostile receiver, whose destination it is."""
    tenants = [deployment.tenant(name, retry={"schedule": ["0s"]}) for name in ports]
    for tenant, port in zip(tenants, ports.values(), strict=True):
        tenant["destinations"][0]["options"] = {"url": f"http://127.0.0.1:{port}/", "timeout": timeout}
    return tenants


async def test_far_sides_that_talk_for_ever_cost_bounded_memory_and_hold_up_nobody(deployment: Deployment) -> None:
    others = ["t0", "t1", "t2"]
    async with hostile() as ports:
        tenants = [deployment.tenant(name) for name in others]
        await deployment.apply({"tenants": [*tenants, *talking(deployment, ports, "10s")]})
        worker = await deployment.worker(IN_FLIGHT=str(4 * POOL))
        await deployment.publish([(t, event(f"warm-{n}")) for n in range(50) for t in others])
        await delivered(deployment.inbox, others, 50)
        process = psutil.Process(worker.process.pid)
        before = process.memory_info().rss
        await deployment.publish([(t, event(f"{t}-{n}")) for n in range(3) for t in (*ports, *others)])
        await delivered(deployment.inbox, others, 53)
        assert ended(worker, "slow-loris") == 0
        peak = before
        while worker.metric("headgate_deliveries_total") < 53 * len(others) + 3 * len(ports):
            peak = max(peak, process.memory_info().rss)
            await asyncio.sleep(0.05)
        found = [(one["tenant"], one["code"]) for one in deployment.attempts() if one["kind"] == "attempt"]
        for name, codes in CODES.items():
            assert {code for tenant, code in found if tenant == name} <= set(codes.split()), name
            assert sum(tenant == name for tenant, _ in found) == 3
        assert peak - before < 48 * MIB
        assert worker.process.poll() is None
        assert "connector_bug" not in worker.log.read_text()


@pytest.mark.chaos("R8")
@pytest.mark.timeout(1200)
async def test_p99_of_the_others_is_hardly_later_while_far_sides_talk_for_ever(
    deployment: Deployment, report: Callable[[str], None]
) -> None:
    """100,000 events of the others, half of them while ten a second go to those that mean harm. In turns, so that a
    slow minute of the machine meets both."""
    async with hostile() as ports, Others.of(deployment, 43, 1000) as others:
        await deployment.apply({"tenants": [*others.tenants(), *talking(deployment, ports, "4s")]})
        worker = await deployment.worker(IN_FLIGHT=str(4 * POOL))
        process, names = psutil.Process(worker.process.pid), sorted(ports)

        def harm(chunk: int) -> Sequence[Any]:
            return [] if chunk % 5 else [(names[chunk // 5 % len(names)], event(f"h{chunk}"))]

        await others.publish("warm", 5)
        before, grown = process.memory_info().rss, 0
        for _ in range(5):
            await others.publish("before", 5)
            await others.publish("during", 10, among=harm)
            grown = max(grown, process.memory_info().rss - before)
            await eventually(lambda: worker.metric("headgate_in_flight") == 0, "what talks has been cut off")
            await others.publish("after", 5)
        await others.arrived()
        quiet, during = slowed(others.ages_ms())
        report(
            f"{others.published:,} events of the others, all delivered; {told(quiet, during)}; "
            f"{grown / MIB:+.0f} MiB (bar 48)"
        )
        assert grown < 48 * MIB
        assert during <= max(1.1 * quiet, quiet + 5)


@pytest.mark.scoreboard("R8")
async def test_a_reader_without_bounds_takes_all_that_those_far_sides_say() -> None:
    """The control of the test above: what comes is not bounded by the far side."""
    async with hostile() as ports:
        reader, writer = await asyncio.open_connection("127.0.0.1", ports["gigabyte"])
        writer.write(b"POST / HTTP/1.1\r\ncontent-length: 0\r\n\r\n")
        taken = 0
        while taken < 64 * MIB:
            taken += len(await reader.read(MIB))
        writer.close()
