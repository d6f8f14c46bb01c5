"""Attempts come as the schedule says, never early, and one tenant's waiting delays no other's (R6b, R7)."""

import asyncio
import ssl
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

import pytest
import trustme

from dev.inbox import Inbox, Redirect, Refuse, Reset, Script, Throttle, fail_first
from dev.stack import Stack
from schemas.wire import Parked, read_parked
from tests.deployment import Deployment, Read, event, eventually, milliseconds

pytestmark = pytest.mark.broker

SCHEDULE: Final = ["0s", "1s", "2s"]
POOL: Final = "pool-00"


def parked(record: Read) -> Parked:
    found = read_parked(list(record.headers.items()))
    assert found is not None
    return found


def attempts_of(deployment: Deployment) -> Mapping[str, list[dict[str, Any]]]:
    """The attempt records by delivery, in their order."""
    found: defaultdict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for record in deployment.attempts():
        if record["kind"] == "attempt":
            found[record["delivery"]][record["attempt"]] = record
    return {delivery: [made[number] for number in sorted(made)] for delivery, made in found.items()}


def earliness_ms(inbox: Inbox, paths: list[str], attempts: Mapping[str, list[dict[str, Any]]]) -> list[float]:
    """For each repeated request, how long before its planned time it came; below 0: after it."""
    return [
        milliseconds(attempts[one.webhook_id][one.attempt - 2]["nextAt"]) - one.arrived_at_ms
        for path in paths
        for one in inbox.received(path)
        if one.attempt > 1
    ]


def a_tenant(deployment: Deployment, name: str, urls: Mapping[str, str], **more: Any) -> dict[str, Any]:
    """A tenant whose every event goes to all of these destinations."""
    return {
        "externalId": name,
        "destinations": [
            {"id": place, "type": "webhook", "options": {"url": url}, "retry": {"schedule": SCHEDULE}, **more}
            for place, url in urls.items()
        ],
        "routes": [{"id": "all", "match": {"types": ["*"]}, "to": list(urls)}],
    }


# ---------------------------------------------------------------- R7: every way to fail


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("tenants", "each"), [(1, 2), pytest.param(4762, 3, marks=pytest.mark.chaos("R7"))])
async def test_every_way_to_fail_makes_the_attempts_of_its_schedule_never_early_and_then_a_dead_letter(
    stack: Stack, tenants: int, each: int, report: Callable[[str], None]
) -> None:
    """`each` events for each tenant: with three attempts of each they are too few to open a breaker."""
    async with Deployment.on(stack, HEADGATE_POOLS="1", HEADGATE_DEFAULT_TOPICS="pooled") as deployment:
        await every_way_to_fail(deployment, [f"t{n}" for n in range(tenants)], each, report)


async def every_way_to_fail(
    deployment: Deployment, tenants: Sequence[str], each: int, report: Callable[[str], None]
) -> None:
    inbox, events = deployment.inbox, len(tenants) * each
    scripts: dict[str, tuple[Script, str, int]] = {  # what the far side does, the code, the attempts
        "five-hundred": (Refuse(500), "server_error", 3),
        "throttled": (Refuse(429), "throttled", 3),
        "unavailable": (Throttle("2", 503), "server_error", 3),
        "gone": (Refuse(410), "gone", 1),
        "redirect": (Redirect("/five-hundred"), "redirect", 1),
        "reset": (Reset(), "reset", 3),
    }
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(tls)  # signed by nobody that a worker trusts
    async with Inbox(tls=tls) as untrusted:
        urls = {name: inbox.url(f"/{name}") for name in scripts} | {"tls": untrusted.url("/tls")}
        for name, (script, _, _) in scripts.items():
            inbox.script(f"/{name}", script)
        await deployment.apply({"tenants": [a_tenant(deployment, name, urls) for name in tenants]})
        worker = await deployment.worker()
        published = [(name, event(f"e{n}")) for n in range(each) for name in tenants]
        for at in range(0, events, 200):  # at a pace at which the receiver answers in time
            await deployment.publish(published[at : at + 200])
            await asyncio.sleep(1 if events > 200 else 0)
        expected = {name: (code, made) for name, (_, code, made) in scripts.items()} | {"tls": ("tls", 3)}
        total = events * len(expected)
        await eventually(lambda: worker.metric("headgate_dead_letters_total") >= total, "all dead letters", 300)
        letters = await asyncio.to_thread(deployment.dead_letters, POOL)
        assert len(letters) == len({parked(one).delivery for one in letters}) == total
        await deployment.all_committed()
        attempts = await asyncio.to_thread(attempts_of, deployment)
        disabled = 0
        for letter in map(parked, letters):
            code, made = expected[letter.destination]
            if letter.error == "destination_disabled":
                disabled += 1  # came after the 410
                assert (letter.destination, letter.attempt) == ("gone", 0)
                assert letter.delivery not in attempts
                continue
            assert (letter.error, letter.attempt, letter.destination) == (code, made, letter.destination)
            assert [one["code"] for one in attempts[letter.delivery]] == [code] * made
        assert disabled == events - len(inbox.received("/gone"))
        for name, (_, made) in expected.items():
            if name not in ("tls", "gone"):
                numbers = sorted(one.attempt for one in inbox.received(f"/{name}"))
                assert numbers == sorted(list(range(1, made + 1)) * events), name
        assert untrusted.received("/tls") == []
        # nobody followed the redirect
        assert {one.webhook_id for one in inbox.received("/five-hundred")}.isdisjoint(
            one.webhook_id for one in inbox.received("/redirect")
        )
        early = earliness_ms(inbox, [f"/{name}" for name in scripts], attempts)
        report(
            f"{total:,} deliveries to 7 kinds of faults: {len(letters):,} dead letters after the attempts of their "
            f"schedule; {len(early):,} repeats, the earliest {-max(early):.1f} ms after its time"
        )
        assert len(early) == 4 * events * 2
        assert max(early) <= 0
        starts: defaultdict[str, list[float]] = defaultdict(list)
        for one in inbox.received("/unavailable"):
            starts[one.webhook_id].append(one.arrived_at_ms)
        assert all(second - first >= 2000 for times in starts.values() for first, second in pairwise(times))
        assert [one for one in map(parked, deployment.retries(POOL)) if one.error == "redirect"] == []


@pytest.mark.scoreboard("R7")
async def test_a_pump_that_does_not_wait_is_seen_to_be_early(deployment: Deployment) -> None:
    """The control of the test above, as far as it says `never early`."""
    tenant = a_tenant(deployment, "acme", {"hook": deployment.inbox.url("/acme")})
    tenant["destinations"][0]["retry"] = {"schedule": ["0s", "60s"]}
    await deployment.apply({"tenants": [tenant]})
    deployment.inbox.script("/acme", fail_first(1))
    command = (sys.executable, "-m", "tests.isolation.without", "waits")
    await deployment.launch("w0", command, RETRY_TIERS="1s").ready()
    await deployment.publish([("acme", event("e0"))])
    await deployment.inbox.wait_for("/acme", 1, 30)
    attempts = await eventually(
        lambda: (x := attempts_of(deployment)) and len(next(iter(x.values()))) == 2 and x, "two attempts"
    )
    assert max(earliness_ms(deployment.inbox, ["/acme"], attempts)) > 1000


# ---------------------------------------------------------------- R6b: one tenant's waiting


async def two_in_one_pool(deployment: Deployment, soon_s: int) -> None:
    """Tenant a: one destination that asks for a day, one for seconds, one that is dead. Tenant b fails once. One pool.

    What waits for 6 s and for `soon_s`, up to 24, waits in the same partition.
    """
    inbox = deployment.inbox
    inbox.script("/day", Throttle("86400"))
    inbox.script("/soon", Throttle(str(soon_s)))
    inbox.script("/b", fail_first(1))
    urls = {"day": inbox.url("/day"), "soon": inbox.url("/soon"), "dead": "http://127.0.0.1:9/"}
    a = a_tenant(deployment, "a", urls)
    b = a_tenant(deployment, "b", {"hook": inbox.url("/b")})
    b["destinations"][0]["retry"] = {"schedule": ["0s", "6s", "6s"]}
    await deployment.apply({"tenants": [{**tenant, "topics": "pooled"} for tenant in (a, b)]})


async def publish_both(deployment: Deployment, dumped: int, of_b: int) -> None:
    await deployment.publish([("a", event(f"a{n}")) for n in range(dumped)])
    await deployment.inbox.wait_for("/soon", 1, 30, what="requests")
    await eventually(
        lambda: any(parked(one).destination == "soon" for one in deployment.retries("pool-00")), "a's delivery waits"
    )
    await deployment.publish([("b", event(f"b{n}")) for n in range(of_b)])


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dumped", [1000, pytest.param(100_000, marks=pytest.mark.chaos("R6b"))])
async def test_a_tenant_that_waits_for_a_day_and_one_dead_endpoint_delay_no_retry_of_another_in_its_pool(
    stack: Stack, dumped: int, report: Callable[[str], None]
) -> None:
    async with Deployment.on(stack, HEADGATE_POOLS="1") as deployment:
        await two_in_one_pool(deployment, 24)
        worker = await deployment.worker()
        await publish_both(deployment, dumped, 8)
        received = await deployment.inbox.wait_for("/b", 8, 120)
        assert sorted(one.attempt for one in received) == [1] * 8 + [2] * 8
        # all of b's waits of 6 s began after a's of 24 s, and ended before it; a dump that is large takes longer itself
        last = max(one.arrived_at_ms for one in received)
        assert dumped > 1000 or last < deployment.inbox.received("/soon")[0].arrived_at_ms + 24_000
        attempts = await eventually(
            lambda: (x := attempts_of(deployment)) and all(one.webhook_id in x for one in received) and x, "attempts"
        )
        early = earliness_ms(deployment.inbox, ["/b"], attempts)
        report(f"{dumped:,} events of a; b's 8 retries at most {-min(early) / 1000:.2f} s late")
        assert len(early) == 8
        assert max(early) <= 0
        assert sorted(early)[len(early) // 2] >= -1000  # at most 1 s late; some may have met a pause of the machine
        assert worker.metric("headgate_retry_lateness_seconds_count") >= 8
        # what a waits for costs no writes meanwhile
        hops: defaultdict[str, int] = defaultdict(int)
        for one in map(parked, deployment.retries("pool-00")):
            hops[one.delivery] = max(hops[one.delivery], one.hop)
        assert max(hops.values()) <= 20
        assert len(deployment.inbox.received("/day")) <= 16  # its lane closed at the first answers


@pytest.mark.scoreboard("R6b")
async def test_a_pump_that_holds_the_head_of_its_partition_delays_others(stack: Any) -> None:
    """The control of the test above."""
    async with Deployment.on(stack, HEADGATE_POOLS="1") as deployment:
        await two_in_one_pool(deployment, 12)
        command = (sys.executable, "-m", "tests.isolation.without", "tiers")
        await deployment.launch("w0", command).ready()
        await publish_both(deployment, 1, 4)
        received = await deployment.inbox.wait_for("/b", 4, 60)
        assert (
            max(one.arrived_at_ms for one in received) >= deployment.inbox.received("/soon")[0].arrived_at_ms + 12_000
        )
