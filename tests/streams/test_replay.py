"""Letters are sent again, each once, whatever kills the replay, and never another tenant's (R9, small)."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import pytest

from dev.inbox import Ok, Received, Refuse
from dev.stack import Stack
from schemas.attempt import decode_record
from schemas.ids import DEFAULT_VENDOR
from tests.chaos.load import POOLED, TAG, Load, all_ended
from tests.deployment import ROOT, Deployment, Read, event, eventually
from tests.streams.killed_replay import POINTS

pytestmark = [pytest.mark.broker, pytest.mark.timeout(240)]

DEAD: Final = ("a", "b", "c")  # the tenants whose letters there are
LETTERS: Final = 300  # of each, and 10,000 of the first in full size
AT_EACH: Final = 40  # letters that pass a point before the replay dies there
ONE_TRY: Final[dict[str, Any]] = {"schedule": ["0s"], "max_age": "1h"}
REFUSED: Final = Refuse(400)  # the event's fault: it opens no breaker


class Ran:
    def __init__(self, done: "subprocess.CompletedProcess[str]") -> None:
        self.code = done.returncode
        self.stdout = done.stdout
        self.stderr = done.stderr

    @property
    def json(self) -> dict[str, Any]:
        assert self.code == 0, self.stderr
        found: dict[str, Any] = json.loads(self.stdout)
        return found


async def headgate(deployment: Deployment, *arguments: str, die_at: str = "-", without: str = "-") -> Ran:
    """The command; killed where the 40th letter passes `die_at`."""
    command = (sys.executable, "-m", "tests.streams.killed_replay", die_at, str(AT_EACH), without, *arguments)

    def run() -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **deployment.env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )

    return Ran(await asyncio.to_thread(run))


@asynccontextmanager
async def with_letters(stack: Stack, of_a: int) -> AsyncIterator[Deployment]:
    """Three tenants of one pool with dead letters, `a` with so many, and one that is alive. All accept from now on."""
    async with Deployment.on(stack, **POOLED) as deployment:
        names = ("a", "b", "c", "live")
        await deployment.apply({"tenants": [deployment.tenant(name, retry=ONE_TRY) for name in names]})
        await deployment.worker()
        for name in DEAD:
            deployment.inbox.script(f"/{name}", REFUSED)
        await deployment.publish([(name, event(f"{name}-{n}")) for n in range(LETTERS) for name in DEAD])
        await deployment.publish([("a", event(f"a-{n}")) for n in range(LETTERS, of_a)])
        await eventually(lambda: len(deployment.dead_letters(TAG)) == 2 * LETTERS + of_a, "all are dead letters")
        for name in DEAD:
            deployment.inbox.script(f"/{name}", Ok())
        yield deployment


def by_status(deployment: Deployment, path: str) -> tuple[list[Received], list[Received]]:
    """What was refused there, and what was accepted."""
    received = deployment.inbox.received(path)
    return [one for one in received if one.status == 400], [one for one in received if one.status == 200]


@pytest.mark.parametrize("of_a", [LETTERS, pytest.param(10_000, marks=pytest.mark.chaos("R9"))])
async def test_a_replay_killed_at_every_step_delivers_each_letter_of_its_tenant_once_by_the_job_that_copies_share(
    stack: Stack, of_a: int, report: Callable[[str], None]
) -> None:
    async with with_letters(stack, of_a) as deployment:
        load = Load(deployment, ["live"], 100)
        async with load.running():
            for point in POINTS:
                replay = ("dlq", "replay", "--tenant", "a", "--rate", "200/s")
                ran = await headgate(deployment, *replay, die_at=point)
                assert ran.code == -signal.SIGKILL, (point, ran.stderr)
            last = await headgate(deployment, "dlq", "replay", "--tenant", "a", "--wait", "--output", "json")
        await all_ended(deployment)
        result = last.json
        assert result["matched"] == of_a
        assert result["replayed"] + result["skipped"] == of_a
        assert result["skipped"] > 0  # what the killed ones had marked was not sent again

        refused, accepted = by_status(deployment, "/a")
        before = {(one.webhook_id, one.body) for one in refused}
        assert len(before) == of_a
        assert {(one.webhook_id, one.body) for one in accepted} == before  # all, with the same ids and bytes
        assert len(accepted) <= of_a + of_a // 50  # a copy passes only where Redis was late
        assert all(one.attempt == 1 for one in accepted)

        # more than one letter was sent twice: what stops the copies is the ledger, by the job that they share
        retries = deployment.retries(TAG)
        sent = [one for one in retries if one.headers.get("hg-replay")]
        copies = Counter(one.headers["hg-delivery"] for one in sent if one.headers["hg-attempt"] == b"0")
        assert sum(times - 1 for times in copies.values()) >= AT_EACH

        assert {one.headers["hg-tenant"] for one in sent} == {b"a"}
        assert by_status(deployment, "/b")[1] == by_status(deployment, "/c")[1] == []
        census = await load.census()
        report(
            f"{of_a:,} letters, {len(POINTS)} kills: {len({one.webhook_id for one in accepted}):,} delivered with the "
            f"same ids and bytes, {len(accepted) - of_a} twice, 0 of others; live load: {census}; the control, whose "
            "copies share no job, sends them"
        )
        assert not census.lost and not census.renamed

        # the control: where each replay gives a letter another job, the copies arrive
        replay = ("dlq", "replay", "--tenant", "c")
        killed = await headgate(deployment, *replay, die_at="acknowledged", without="jobs")
        assert killed.code == -signal.SIGKILL, killed.stderr
        await headgate(deployment, *replay, "--wait", without="jobs")
        await all_ended(deployment)
        accepted = by_status(deployment, "/c")[1]
        assert len({one.webhook_id for one in accepted}) == LETTERS
        assert len(accepted) >= LETTERS + AT_EACH


async def test_what_is_refused_again_is_a_letter_again_and_wait_tells(deployment: Deployment) -> None:
    await deployment.apply({"tenants": [deployment.tenant("acme", retry=ONE_TRY)]})
    await deployment.worker()
    deployment.inbox.script("/acme", REFUSED)
    await deployment.publish([("acme", event(f"e{n}")) for n in range(3)])
    await eventually(lambda: len(deployment.dead_letters("acme")) == 3, "all are dead letters")
    replay = ("dlq", "replay", "--tenant", "acme", "--wait", "--output", "json")
    again = await headgate(deployment, *replay)
    assert again.json == {"matched": 3, "replayed": 3, "skipped": 0}
    assert "settled: 0 delivered, 3 dead letters again" in again.stderr
    # the old letters are done, the new ones are not, and say of which replay they came
    listing = ("dlq", "list", "--tenant", "acme", "--output", "json")
    letters: Any = (await headgate(deployment, *listing)).json
    assert len(letters) == 3
    assert len({one["replay"] for one in letters}) == 3
    deployment.inbox.script("/acme", Ok())
    mended = await headgate(deployment, *replay)
    assert mended.json == {"matched": 6, "replayed": 3, "skipped": 3}
    assert "settled: 3 delivered, 0 dead letters again" in mended.stderr
    refused, accepted = by_status(deployment, "/acme")
    assert len(refused) == 6
    assert {one.webhook_id for one in accepted} == {one.webhook_id for one in refused}
    triggers = Counter(one["trigger"] for one in deployment.attempts() if one["kind"] == "attempt")
    assert triggers == {"event": 3, "replay": 6}


def origins(letters: Sequence[Read]) -> dict[str, str]:
    """Where each record that was unrouted had been at first, by its payload."""
    return {json.loads(one.value or b"")["payload"]: one.headers["hg-origin"].decode() for one in letters}


async def test_unrouted_records_go_back_as_the_events_that_they_were_by_their_first_position(
    deployment: Deployment,
) -> None:
    await deployment.apply({"tenants": [deployment.tenant("live")]})
    await deployment.worker()
    # without an id, and of tenants that are unknown when they come
    events = [
        (name, {"eventType": "invoice.paid", "payload": n}) for n in range(2 * AT_EACH) for name in ("late", "later")
    ]
    await deployment.publish(events, headers=[("theirs", b"\xff")])
    await eventually(lambda: len(deployment.unrouted()) == len(events), "all are unrouted")
    await deployment.apply({"tenants": [deployment.tenant(name) for name in ("live", "late", "later")]})
    places = origins([one for one in deployment.unrouted() if one.key == b"late"])

    replay = ("dlq", "replay", "--unrouted", "--key", "late")
    killed = await headgate(deployment, *replay, die_at="acknowledged")
    assert killed.code == -signal.SIGKILL, killed.stderr
    last = await headgate(deployment, *replay, "--wait", "--output", "json")
    assert last.json == {"matched": 2 * AT_EACH, "replayed": 2 * AT_EACH, "skipped": 0}
    bodies = [json.loads(one.body) for one in deployment.inbox.received("/late")]
    # the id is that of the record's first place, and a copy is the same event at the same place
    prefix = f"{deployment.settings.topics.ingress(DEFAULT_VENDOR)}-"
    seen = {one["payload"]: one["id"] for one in bodies}
    assert len(seen) == len(places) == 2 * AT_EACH
    for payload, origin in places.items():
        _, partition, offset = origin.rsplit("/", 2)
        assert seen[payload].startswith(prefix) and seen[payload].endswith(f"-{partition}-{offset}")
    assert len(bodies) <= 2 * AT_EACH + 2
    records = [one for one in deployment.attempts() if one["kind"] == "event" and one["tenant"] == "late"]
    assert {one["origin"] for one in records} == set(places.values())
    ingress = deployment.read(deployment.settings.topics.ingress(DEFAULT_VENDOR))
    back = [one for one in ingress if "hg-origin" in one.headers]
    assert len(back) >= 3 * AT_EACH  # some twice
    assert all(set(one.headers) == {"theirs", "hg-origin"} and one.headers["theirs"] == b"\xff" for one in back)
    assert {one.key for one in back} == {b"late"}
    assert (await headgate(deployment, *replay, "--output", "json")).json["replayed"] == 0

    # the control: without their first position copies are other events
    other = ("dlq", "replay", "--unrouted", "--key", "later")
    await headgate(deployment, *other, die_at="acknowledged", without="origin")
    await headgate(deployment, *other, "--wait", without="origin")
    assert len({json.loads(one.body)["id"] for one in deployment.inbox.received("/later")}) >= 3 * AT_EACH


async def test_what_a_producer_writes_as_origin_counts_only_if_it_is_a_place_there(deployment: Deployment) -> None:
    await deployment.apply({"tenants": [deployment.tenant("acme")]})
    await deployment.worker()
    for number, origin in enumerate((b"elsewhere/0/1", b"nonsense", b"\xff/0/0")):
        unnamed = {"eventType": "invoice.paid", "payload": number}
        await deployment.publish([("acme", unnamed)], headers=[("hg-origin", origin)])
    received = await deployment.inbox.wait_for("/acme", 3, 30)
    assert len({json.loads(one.body)["id"] for one in received}) == 3
    await deployment.all_committed()
    ingress = deployment.read(deployment.settings.topics.ingress(DEFAULT_VENDOR))
    places = {f"{one.topic}/{one.partition}/{one.offset}" for one in ingress}
    records = [
        decode_record(one.value or b"") for one in deployment.read(deployment.settings.topics.attempts(DEFAULT_VENDOR))
    ]
    assert {one.origin for one in records} == places
