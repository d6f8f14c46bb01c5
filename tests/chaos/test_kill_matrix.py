"""A worker killed at each arrow of the flow: what became of every event, read from the far side and the topics.

One story for each half of the matrix: a worker that dies at the first point takes a victim and some bystanders; the
next worker, which dies at the next point, is the restart after the first; and so on. Before the next victim comes, all
that the last one left behind has ended. The tests then read what became of each victim.
"""

import asyncio
import json
import signal
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import pytest_asyncio
from msgspec import Struct

from dev.inbox import Ok, Received, Refuse, Script, Steps, Throttle, fail_first
from dev.stack import Stack
from tests.chaos.killed_worker import POINTS
from tests.chaos.load import POOLED, TAG, all_ended
from tests.deployment import Deployment, Read, event, eventually, free_port

pytestmark = [pytest.mark.broker, pytest.mark.timeout(300)]

BYSTANDERS = 5  # before each victim, and as many after it
QUICK: dict[str, Any] = {"schedule": ["0s", "1s", "1s", "1s", "1s"], "max_age": "1h"}
ONE_TIER = {**POOLED, "HEADGATE_RETRY_TIERS": "1s"}
QUICK_COMMITS = {"COMMIT_INTERVAL": "200ms"}


class Predicted(Struct, frozen=True):
    """What the far side and the dead letters hold of a victim in the end; `recovered`: its log says so."""

    requests: tuple[int, ...]
    accepted: int = 1
    letters: tuple[int, ...] = (0,)
    recovered: tuple[bool, ...] = (False,)


ONE_FAILS, TWO_FAIL, THREE_FAIL = (fail_first(times) for times in (1, 2, 3))

FAR_SIDES: dict[str, Script] = {
    "retry_written": THREE_FAIL,  # both of its chains fail once more: each has a hop to write
    "retry_recorded": TWO_FAIL,
    "hop_told": TWO_FAIL,
    "retry_due": ONE_FAILS,
    "retry_answered": ONE_FAILS,
    "retry_acknowledged": ONE_FAILS,
    "retry_committed": ONE_FAILS,
    "dead_written": Refuse(400),
    "dead_told": Refuse(400),
    "disabled_written": Refuse(410),
    "disabled_held": Refuse(410),
}

WITH_LEDGER = {
    "fetched": Predicted((1,)),
    "claimed": Predicted((1,)),  # its own claim does not make it a duplicate
    "answered": Predicted((2,), accepted=2),  # nobody but the far side knows: the one duplicate that must be
    "delivered_told": Predicted((1,), recovered=(True,)),
    "recorded": Predicted((2,), accepted=2),  # the ledger is best effort: here it came too late
    "acknowledged": Predicted((1,), recovered=(True,)),
    "committed": Predicted((1,)),
    "retry_written": Predicted((4,), recovered=(True, False)),  # of the two chains one goes stale, or joins
    "retry_recorded": Predicted((3,), recovered=(True, False)),
    "hop_told": Predicted((3,)),
    "retry_due": Predicted((2,)),
    "retry_answered": Predicted((3,), accepted=2),
    "retry_acknowledged": Predicted((2,), recovered=(True,)),
    "retry_committed": Predicted((2,)),
    "dead_written": Predicted((2,), accepted=0, letters=(2,)),
    "dead_told": Predicted((1,), accepted=0, letters=(1,)),
    "disabled_written": Predicted((1,), accepted=0, letters=(1, 2)),
    "disabled_held": Predicted((2,), accepted=0, letters=(2,)),  # disabled by its second 410
}

WITHOUT_LEDGER = {
    "claimed": Predicted((1,)),
    "delivered_told": Predicted((2,), accepted=2),
    "acknowledged": Predicted((2,), accepted=2),
    "committed": Predicted((1,)),
    "retry_written": Predicted((5,), accepted=2),  # two chains, each to its end
    "hop_told": Predicted((4,), accepted=2),
    "retry_acknowledged": Predicted((3,), accepted=2),
}


NOWHERE = ("event_recorded", "unrouted_written")  # points of events that have no delivery


class Seen(Struct, frozen=True):
    """What was there when all was over."""

    requests: dict[str, list[Received]]
    letters: dict[str, list[Read]]
    retries: dict[str, list[Read]]
    attempts: dict[str, list[dict[str, Any]]]
    events: list[dict[str, Any]]
    unrouted: list[Read]


def tenant_of(point: str) -> str:
    return point.replace("_", "-")


def victim_of(point: str) -> str:
    return f"victim-{tenant_of(point)}"


async def killed_at_each(deployment: Deployment, points: Sequence[str], *how: str, **env: str) -> Seen:
    """The story. `how` is told to each worker that dies, `env` are further settings of it, without their HEADGATE_."""
    tenants = [deployment.tenant(tenant_of(point), retry=QUICK) for point in points]
    for tenant in tenants:
        if tenant["externalId"] == tenant_of("event_recorded"):
            tenant["routes"] = []
    await deployment.apply({"tenants": [*tenants, deployment.tenant("bystanders")]})
    for point in points:
        deployment.inbox.script(f"/{tenant_of(point)}", FAR_SIDES.get(point, Ok()))
    expected: set[str] = set()
    for point in points:
        command = (sys.executable, "-m", "tests.chaos.killed_worker", point, victim_of(point), *how)
        worker = await deployment.launch(command=command, **env).ready()
        await all_ended(deployment)
        others = [("bystanders", event(f"{point}-{n}")) for n in range(2 * BYSTANDERS)]
        expected |= {f"{point}-{n}" for n in range(2 * BYSTANDERS)}
        # a mismatched key is what the unrouted victim needs, and nobody else minds
        more = {"customerExternalId": "somebody-else"} if point == "unrouted_written" else {}
        victim = (tenant_of(point), event(victim_of(point), **more))
        await deployment.publish([*others[:BYSTANDERS], victim, *others[BYSTANDERS:]])
        assert await worker.ended(60) == -signal.SIGKILL, f"{point} was not passed"
    await deployment.worker(**env)
    await all_ended(deployment)
    received = deployment.inbox.received("/bystanders")
    assert expected == {json.loads(one.body)["id"] for one in received}
    return seen(deployment, points)


def seen(deployment: Deployment, points: Sequence[str]) -> Seen:
    letters, retries, attempts = deployment.dead_letters(TAG), deployment.retries(TAG), deployment.attempts()
    events = [one for one in attempts if one["kind"] == "event"]
    found = Seen({}, {}, {}, {}, events, deployment.unrouted())
    for point in points:
        name = victim_of(point)
        found.requests[point] = deployment.inbox.received(f"/{tenant_of(point)}")
        found.letters[point] = [one for one in letters if one.headers["hg-event"] == name.encode()]
        found.retries[point] = [one for one in retries if one.headers["hg-event"] == name.encode()]
        found.attempts[point] = [one for one in attempts if one["kind"] == "attempt" and one["eventId"] == name]
    return found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def both(stack: Stack) -> tuple[Seen, Seen]:
    """The stories with the ledger, and without: there Redis is a port at which nobody listens.

    Without it two records of one delivery would still be one, if they happened to be in flight at the same moment: the
    second joins. So that what is predicted without the ledger is sure, the workers there are also without that.
    """
    nobody = f"redis://127.0.0.1:{free_port()}/0"
    async with Deployment.on(stack, **ONE_TIER) as one, Deployment.on(stack, **ONE_TIER) as other:
        return await asyncio.gather(
            killed_at_each(one, [*WITH_LEDGER, *NOWHERE], **QUICK_COMMITS),
            killed_at_each(other, list(WITHOUT_LEDGER), "apart", REDIS_URL=nobody, **QUICK_COMMITS),
        )


def check(found: Seen, point: str, predicted: Predicted) -> None:
    requests = found.requests[point]
    accepted = [one for one in requests if one.status == 200]
    letters = found.letters[point]
    attempts = found.attempts[point]
    assert accepted or letters, f"{point}: the event is lost"
    assert len(requests) in predicted.requests, [(one.attempt, one.status) for one in requests]
    assert len(accepted) == predicted.accepted
    assert len(letters) in predicted.letters, letters
    # whatever comes twice is the same delivery, in the same bytes
    assert len({(one.webhook_id, one.body) for one in requests}) == 1
    assert {one.headers["hg-delivery"].decode() for one in letters} <= {one.webhook_id for one in requests}
    # a success is never missing from the log
    assert bool(accepted) == any(one["verdict"] == "delivered" for one in attempts), attempts
    recovered = [one for one in attempts if one["code"] == "recovered"]
    assert bool(recovered) in predicted.recovered, attempts
    assert all(one["at"] >= attempts[0]["at"] for one in recovered)


@pytest.mark.parametrize("point", WITH_LEDGER)
def test_nothing_is_lost_and_the_ledger_stops_the_repeat_where_it_can_know(both: tuple[Seen, Seen], point: str):
    check(both[0], point, WITH_LEDGER[point])


@pytest.mark.parametrize("point", WITHOUT_LEDGER)
def test_without_the_ledger_nothing_is_lost_and_the_predicted_duplicates_appear(both: tuple[Seen, Seen], point: str):
    check(both[1], point, WITHOUT_LEDGER[point])


def test_an_event_that_cannot_be_routed_is_kept_though_perhaps_twice(both: tuple[Seen, Seen]):
    name = victim_of("unrouted_written").encode()
    letters = [one for one in both[0].unrouted if name in (one.value or b"")]
    assert {one.headers["hg-error"] for one in letters} == {b"key_mismatch"}
    assert len(letters) == 2
    assert len({one.headers["hg-origin"] for one in letters}) == 1
    assert both[0].requests["unrouted_written"] == []


def test_an_event_that_goes_nowhere_has_its_record_though_perhaps_twice_under_one_id(both: tuple[Seen, Seen]):
    records = [one for one in both[0].events if one["eventId"] == victim_of("event_recorded")]
    assert len(records) == 2
    assert len({(one["id"], one["origin"]) for one in records}) == 1
    assert both[0].requests["event_recorded"] == []


def test_every_chain_of_retries_but_one_ends_when_its_letter_was_written_twice(both: tuple[Seen, Seen]):
    """With the ledger one chain alone goes on to write a last hop; without it both go on, to a delivery each."""

    def last_hops(seen: Seen) -> int:
        hops = [int(one.headers["hg-hop"]) for one in seen.retries["retry_written"]]
        return hops.count(max(hops))

    with_ledger, without = both
    assert sum(one.status == 200 for one in with_ledger.requests["retry_written"]) == 1
    assert last_hops(with_ledger) == 1
    assert sum(one.status == 200 for one in without.requests["retry_written"]) == 2


def test_every_point_of_the_worker_is_in_the_matrix():
    assert set(POINTS) == {*WITH_LEDGER, *NOWHERE, "moved"}


@pytest.mark.parametrize(
    ("wait_s", "to_the_end"), [(600, False), pytest.param(120, True, marks=pytest.mark.chaos("R1"))]
)  # still longer than what memory keeps when the next worker has come, which may take a while
async def test_a_letter_that_was_sent_on_twice_is_delivered_once(stack: Stack, wait_s: int, to_the_end: bool):
    """Its wait is longer than what memory keeps: it must be sent on, which takes minutes to see end."""
    async with Deployment.on(stack, **ONE_TIER) as deployment:
        await deployment.apply({"tenants": [deployment.tenant("moved", retry=QUICK)]})
        deployment.inbox.script("/moved", Steps((Throttle(str(wait_s)), Ok())))
        command = (sys.executable, "-m", "tests.chaos.killed_worker", "moved", "victim")
        worker = await deployment.launch(command=command, **QUICK_COMMITS).ready()
        await deployment.publish([("moved", event("victim"))])
        assert await worker.ended(60) == -signal.SIGKILL
        successor = await deployment.worker(**QUICK_COMMITS)
        letters = await eventually(lambda: (x := deployment.retries(TAG))[2:] and x, "sent on again")
        assert [int(one.headers["hg-hop"]) for one in letters[:3]] == [1, 2, 2]
        assert len({one.headers["hg-not-before"] for one in letters}) == 1
        if to_the_end:
            await deployment.inbox.wait_for("/moved", 1, wait_s + 60)
            await all_ended(deployment)
            statuses = [one.status for one in deployment.inbox.received("/moved")]
            assert statuses == [429, 200], successor.log.read_text()
