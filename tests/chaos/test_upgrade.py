"""Rolling restarts from one release to another that writes its records in a new form, and back (ADR 0016).

The other releases are real workers with a made-up version 2 of the record format (`tests/streams/other_release.py`).
"""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
from confluent_kafka import Producer

from dev.inbox import Ok, Refuse, Steps
from dev.stack import Stack
from schemas.ids import DeliveryId, DestinationId, EventId, ExternalId, Tag, TenantRef, Vendor
from schemas.topics import delivery_key
from schemas.wire import Parked
from tests.chaos.load import POOLED, TAG, Load
from tests.deployment import ROOT, Deployment, Worker, eventually
from tests.streams.other_release import write_2

pytestmark = pytest.mark.broker

OTHER = (sys.executable, "-m", "tests.streams.other_release")
QUICK = [f"t{n}" for n in range(4)]
MOST_REQUESTS = 30_000  # to one path, in threes
TENANTS = [*QUICK, "flaky", "refused"]
Plan = Sequence[tuple[str, str]]

# (worker, release): two that start together, then restarts one after the other
UP_AND_BACK: Plan = [
    ("w0", "between"), ("w1", "between"), ("w0", "next"), ("w1", "next"), ("w0", "between"), ("w1", "between"),
]  # fmt: skip
SKIPPED: Plan = [("w0", "this"), ("w1", "this"), ("w0", "next"), ("w1", "next"), ("w0", "this"), ("w1", "this")]


def sizes(small: Plan, full: Plan) -> pytest.MarkDecorator:
    """Deliveries between two restarts, and events a second. In the small size the first restarts are over."""
    return pytest.mark.parametrize(
        ("plan", "flow", "rate_per_s"),
        [
            pytest.param(small, 300, 200, id="small"),
            pytest.param(full, 100_000 // (len(full) - 1), 1000, id="full", marks=pytest.mark.chaos("R17")),
        ],
    )


def launch(deployment: Deployment, name: str, release: str) -> Worker:
    """`this` is the real command."""
    return deployment.launch(name, command=() if release == "this" else (*OTHER, release, "worker"))


async def command(deployment: Deployment, release: str, *args: str) -> Any:
    """A command of a release; its JSON."""
    done = await asyncio.to_thread(
        subprocess.run,
        [*OTHER, release, *args, "--output", "json"],
        cwd=ROOT,
        env={**os.environ, **deployment.env},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


async def apply(deployment: Deployment) -> None:
    """A third of the attempts of `flaky` is to be retried, a third of those of `refused` makes dead letters.

    Fewer than half, or the breaker would open.
    """
    retry = {"schedule": ["0s", *["1s"] * 7]}
    await deployment.apply({"tenants": [deployment.tenant(one, retry=retry) for one in TENANTS]})
    deployment.inbox.script("/flaky", Steps((Refuse(503), Ok(), Ok()) * MOST_REQUESTS, per="path"))
    deployment.inbox.script("/refused", Steps((Refuse(400), Ok(), Ok()) * MOST_REQUESTS, per="path"))


async def restarted(deployment: Deployment, load: Load, plan: Plan, flow: int) -> list[Worker]:
    """Two workers of the first two steps; each further step restarts one of them, by name, as a release."""
    running: dict[str, Worker] = {name: launch(deployment, name, release) for name, release in plan[:2]}
    await asyncio.gather(*(worker.ready() for worker in running.values()))
    async with load.running():
        for name, release in plan[2:]:
            await load.flows(flow, 300)
            assert await running[name].terminate() == 0
            running[name] = await launch(deployment, name, release).ready()
        await load.flows(flow, 300)
    return list(running.values())


@sizes([("w0", "between"), ("w1", "next"), ("w0", "next"), ("w1", "between")], UP_AND_BACK)
async def test_an_upgrade_to_a_new_form_and_back_delays_nothing_where_the_release_before_reads_it(
    stack: Stack, plan: Plan, flow: int, rate_per_s: int
):
    async with Deployment.on(stack, **POOLED) as deployment:
        await apply(deployment)
        load = Load(deployment, TENANTS, rate_per_s)
        workers = await restarted(deployment, load, plan, flow)
        census = await load.census()
        print(census)
        assert (census.lost, census.twice, census.renamed) == (set(), 0, set())
        assert "unread_record" not in "".join(worker.log.read_text() for worker in workers)
        assert {one.headers["hg-v"] for one in deployment.retries(TAG)} == {b"1", b"2"}
        refused = [one for one in deployment.dead_letters(TAG) if one.headers["hg-tenant"] == b"refused"]
        letters = {one.headers["hg-v"]: one for one in refused}
        assert letters.keys() == {b"1", b"2"}

        # each one's commands read what the other wrote
        for release, version in (("between", b"2"), ("next", b"1")):
            one = letters[version]
            place = f"{one.partition}/{one.offset}"
            name = one.headers["hg-event"].decode()
            shown = await command(deployment, release, "dlq", "show", place, "--tenant", "refused")
            assert (shown["content"]["eventId"], shown["attempts"]) == (name, 1)
            traced = await command(deployment, release, "trace", "--tenant", "refused", name)
            now = traced["events"][0]["deliveries"][0]["now"]
            assert (now["state"], now["letter"]) == ("dead", place)
        deployment.inbox.script("/refused", Ok())
        before = deployment.inbox.stats().paths["/refused"].accepted
        told = await command(deployment, "next", "dlq", "replay", "--tenant", "refused", "--wait")
        assert told == {"matched": len(refused), "replayed": len(refused), "skipped": 0}
        after = deployment.inbox.stats().paths["/refused"]
        assert (after.accepted, after.duplicates) == (before + len(refused), 0)


@sizes([("w0", "this"), ("w1", "next"), ("w1", "this")], SKIPPED)
async def test_a_release_that_does_not_read_the_new_form_leaves_it_to_the_one_that_does(
    stack: Stack, plan: Plan, flow: int, rate_per_s: int
):
    """Nothing tells this release of version 2: it works beside the next one, and alone after the way back."""
    async with Deployment.on(stack, **POOLED, HEADGATE_RETRY_TIERS="1s,2s") as deployment:
        await apply(deployment)
        load = Load(deployment, TENANTS, rate_per_s)
        workers = await restarted(deployment, load, plan, flow)
        unread = lambda: sum(worker.metric("headgate_unread_records_total") for worker in workers)  # noqa: E731
        await eventually(lambda: unread() > 0, "records of version 2 are met")
        assert all(worker.get("/readyz")[0] == 200 for worker in workers)
        for worker in workers:
            assert await worker.terminate() == 0
        await asyncio.gather(*(launch(deployment, name, "next").ready() for name in ("w0", "w1")))
        census = await load.census()
        print(census)
        assert (census.lost, census.twice, census.renamed) == (set(), 0, set())
        assert deployment.unrouted() == []
        assert "unread_record" in "".join(worker.log.read_text() for worker in workers)


async def after_meeting_version_2(deployment: Deployment, release: str) -> tuple[bool, list[str]]:
    """Whether a worker meets a retry record of version 2 again and again, and the errors in `dlq.unrouted`."""
    acme = TenantRef(Vendor("default"), ExternalId("acme"))
    hook, delivery = DestinationId("hook"), DeliveryId("dlv_x")
    parked = Parked(acme, hook, delivery, EventId("e"), "t", 1, 1, 0, 0, "in/0/1", "timeout", "destination", "", 1, "")
    topic = deployment.settings.topics.retry(acme.vendor, Tag(TAG))
    producer = Producer(deployment.settings.kafka.confluent())
    producer.produce(topic, b"sealed", delivery_key(acme, hook), 0, headers=[("hg-v", b"2"), *write_2(parked)])
    await asyncio.to_thread(producer.flush, 10)
    worker = launch(deployment, "w0", release)
    again = lambda: worker.metric("headgate_unread_records_total") > 2  # noqa: E731
    await eventually(lambda: again() or deployment.unrouted(), "it is met, and met again")
    return again(), [one.headers["hg-error"].decode() for one in deployment.unrouted()]


async def test_a_record_of_another_release_is_neither_judged_nor_lost(stack: Stack):
    """The control takes every version for its own."""
    for release, found in (("this", (True, [])), ("blind", (False, ["malformed"]))):
        async with Deployment.on(stack, **POOLED, HEADGATE_RETRY_TIERS="1s") as deployment:
            await deployment.apply({"tenants": [deployment.tenant("acme")]})
            assert await after_meeting_version_2(deployment, release) == found
            if release == "this":
                assert {one.headers["hg-v"] for one in deployment.retries(TAG)} == {b"2"}
                assert {one.value for one in deployment.retries(TAG)} == {b"sealed"}
