"""Secrets and keys that change or end while events flow: no delivery fails, nothing is shown, nobody else notices."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from confluent_kafka.admin import AdminClient

from config.kafka import read_to_end
from dev.inbox import ACCEPT, Refuse, Steps, signature_ok
from schemas.ids import DEFAULT_VENDOR
from tests.deployment import Deployment, Worker, event, eventually
from tests.quick_keys import make_quick_keys

pytestmark = pytest.mark.broker

FIRST = "whsec_" + "Q0FOQVJZ" * 5
ROTATE = ("secrets", "rotate", "--tenant", "acme", "--destination", "hook", "--output", "json")
SHRED = ("keys", "shred", "--tenant", "acme", "--yes", "--output", "json")
LATER = {"schedule": ["0s", "15s", "1h"]}  # longer than a shredding takes to be known


async def headgate(deployment: Deployment, *args: str, module: str = "cli.main") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", module, *args]
    env = {**os.environ, **deployment.env}
    return await asyncio.to_thread(
        subprocess.run, command, env=env, capture_output=True, stdin=subprocess.DEVNULL, timeout=90
    )


async def told(deployment: Deployment, *args: str) -> dict[str, msgspec.Raw]:
    """What a command that went well says in JSON."""
    done = await headgate(deployment, *args)
    assert done.returncode == 0, done.stderr.decode()
    return msgspec.json.decode(done.stdout)  # type: ignore[no-any-return]


async def rotated(deployment: Deployment, *more: str) -> str:
    shown = await told(deployment, *ROTATE, *more)
    return str(shown["secrets"][0]["value"])  # type: ignore[index]


@asynccontextmanager
async def load(deployment: Deployment, *tenants: str, each: int = 5) -> AsyncIterator[list[str]]:
    """Events for each tenant all the time, `each` at a time; the ids that were published, whole once it has ended."""
    sent: list[str] = []
    stop = asyncio.Event()

    async def run() -> None:
        while not stop.is_set():
            ids = [f"e{len(sent) + n}" for n in range(each)]
            await deployment.publish([(tenant, event(one)) for one in ids for tenant in tenants])
            sent.extend(ids)
            await asyncio.sleep(0.05)

    task = asyncio.create_task(run())
    try:
        yield sent
    finally:
        stop.set()
        await task


async def more_arrive(deployment: Deployment, path: str, count: int = 40) -> None:
    seen = len(deployment.inbox.received(path))
    await deployment.inbox.wait_for(path, seen + count, 120)


def unverified(deployment: Deployment, path: str) -> int:
    return sum(one.signature_ok is not True for one in deployment.inbox.received(path))


def tenants(deployment: Deployment, *names: str, **more: object) -> list[dict[str, object]]:
    return [deployment.tenant(name, secrets={"signing": {"value": FIRST}}, **more) for name in names]


# ---------------------------------------------------------------- rotation


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("each", "more"), [(5, 40), pytest.param(50, 8000, marks=pytest.mark.chaos("R16"))], ids=["small", "full"]
)
async def test_rotations_under_load_fail_no_delivery_and_every_request_verifies(
    deployment: Deployment, each: int, more: int, report: Callable[[str], None]
) -> None:
    """R16. The receiver changes over to each new secret only after it saw requests that both had signed."""
    await deployment.apply({"tenants": tenants(deployment, "acme", "other")})
    worker = await deployment.worker()
    deployment.inbox.script("/acme", secrets=[FIRST])
    deployment.inbox.script("/other", secrets=[FIRST])
    canaries = [FIRST]
    async with load(deployment, "acme", "other", each=each) as sent:
        for _ in range(2):
            await more_arrive(deployment, "/acme", more)
            canaries.append(await rotated(deployment))
            newest = canaries[-1:]
            await eventually(lambda newest=newest: signed_by(deployment, newest), "the new secret signs too")  # type: ignore[misc]
            await more_arrive(deployment, "/acme", more)
            deployment.inbox.script("/acme", secrets=[canaries[-1]])
        for args in (("--tenant", "acme"), ("--master",)):
            await told(deployment, "keys", "rotate", *args, "--output", "json")
            await more_arrive(deployment, "/acme", more)
        canaries.append(await rotated(deployment, "--overlap", "3s"))
        deployment.inbox.script("/acme", secrets=canaries[-2:])
        newest = canaries[-1:]
        await eventually(
            lambda: signed_by(deployment, newest) and not signed_by(deployment, canaries[:-1]),
            "the old secrets sign no more after the overlap",
        )
    await deployment.all_committed()
    await deployment.inbox.wait_for("/acme", len(sent), 60)
    assert unverified(deployment, "/acme") == unverified(deployment, "/other") == 0
    attempts = await asyncio.to_thread(deployment.attempts)
    ends = [(one["tenant"], one["verdict"]) for one in attempts if one["kind"] == "attempt"]
    assert sorted(ends) == sorted((tenant, "delivered") for tenant in ("acme", "other") for _ in sent)
    assert worker.process.poll() is None
    places = await asyncio.to_thread(places_to_look, deployment, worker)
    report(
        f"{2 * len(sent):,} events, 3 secrets and 2 keys rotated: all delivered, all verify; "
        f"{len(canaries)} secrets in none of {len(places)} places"
    )
    assert holding(places, *canaries, *(secret.removeprefix("whsec_") for secret in canaries)) == []
    # the control of the search: texts that do lie in topics, metrics, `get` and arguments are found there
    topics = deployment.settings.topics
    readable = {topics.control, topics.ingress(DEFAULT_VENDOR), topics.attempts(DEFAULT_VENDOR), "metrics"}
    assert readable | {"get tenants", "get destinations"} <= set(holding(places, "acme"))
    assert f"/proc/{worker.process.pid}/cmdline" in holding(places, "cli.main")
    assert worker.log.name in holding(places, "control_caught_up")


def signed_by(deployment: Deployment, secrets: Sequence[str]) -> bool:
    """Whether the newest request carries a signature by one of these."""
    last = deployment.inbox.received("/acme")[-1]
    signature = dict(last.headers)["webhook-signature"]
    return signature_ok(secrets, last.webhook_id, last.timestamp, last.body, signature, int(last.timestamp))


def places_to_look(deployment: Deployment, worker: Worker) -> dict[str, bytes]:
    """All that can be read of a deployment: logs, topics, metrics, `get`, the arguments of processes."""
    places: dict[str, bytes] = {"metrics": worker.get("/metrics")[1].encode()}
    topics: dict[str, list[bytes]] = {}
    for log in deployment.folder.glob("*.log"):
        places[log.name] = log.read_bytes()
    kafka = deployment.settings.kafka.confluent()
    names = [name for name in AdminClient(kafka).list_topics(timeout=10).topics if name.startswith(deployment.prefix)]
    for record in read_to_end(kafka, names, "test", isolation="read_uncommitted"):
        text = b"%b %b %r\n" % (record.key() or b"", record.value() or b"", record.headers())
        topics.setdefault(record.topic() or "", []).append(text)
    places |= {topic: b"".join(texts) for topic, texts in topics.items()}
    for what in ("tenants", "destinations"):
        got = subprocess.run(
            [sys.executable, "-m", "cli.main", "get", what, "--output", "json"],
            env={**os.environ, **deployment.env},
            capture_output=True,
        )
        places[f"get {what}"] = got.stdout + got.stderr
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            places[str(process)] = process.read_bytes()
        except OSError:
            continue  # it has ended
    return places


def holding(places: Mapping[str, bytes], *texts: str) -> list[str]:
    return [place for place, found in places.items() if any(text.encode() in found for text in texts)]


@pytest.mark.scoreboard("R16")
async def test_without_an_overlap_a_receiver_that_has_the_old_secret_refuses_requests(deployment: Deployment) -> None:
    """The control of the overlap: it is what lets every request verify."""
    await deployment.apply({"tenants": tenants(deployment, "acme")})
    await deployment.worker()
    deployment.inbox.script("/acme", secrets=[FIRST])
    async with load(deployment, "acme"):
        await more_arrive(deployment, "/acme")
        assert unverified(deployment, "/acme") == 0
        await rotated(deployment, "--overlap", "0s")
        await eventually(lambda: unverified(deployment, "/acme") > 0, "the receiver knows only the old secret")


# ---------------------------------------------------------------- shredding


async def test_what_waits_for_a_shredded_tenant_is_dropped_and_its_letters_open_no_more(deployment: Deployment) -> None:
    make_quick_keys(deployment.settings)
    await deployment.apply({"tenants": tenants(deployment, "acme", "other", retry=LATER)})
    for path in ("/acme", "/other"):
        deployment.inbox.script(path, Steps((Refuse(400), Refuse(503)), per="path"))
    worker = await deployment.worker()
    await deployment.publish([(tenant, event(f"e{n}")) for n in range(3) for tenant in ("acme", "other")])
    await eventually(lambda: len(deployment.retries("acme")) == len(deployment.retries("other")) == 2, "all parked")
    for path in ("/acme", "/other"):
        deployment.inbox.script(path, ACCEPT)
    (letter,) = await eventually(lambda: deployment.dead_letters("acme"), "a dead letter")
    show = ("dlq", "show", f"{letter.partition}/{letter.offset}", "--tenant", "acme")
    assert b'"total"' in (await headgate(deployment, *show)).stdout  # the control: before, it opens
    await told(deployment, *SHRED)
    after = await headgate(deployment, *show)
    assert (after.returncode, after.stdout) == (1, b"")
    assert b"its key was shredded" in after.stderr
    await eventually(lambda: worker.metric("headgate_dropped_total", reason="shredded") == 2, "dropped when due")
    await deployment.inbox.wait_for("/other", 2, 30)
    assert len(deployment.inbox.received("/acme")) == 3  # the first attempts
    assert deployment.unrouted() == []
    assert worker.process.poll() is None


async def test_a_worker_that_starts_after_a_shredding_drops_what_was_parked_before(deployment: Deployment) -> None:
    make_quick_keys(deployment.settings)
    await deployment.apply({"tenants": tenants(deployment, "acme", retry=LATER)})
    deployment.inbox.script("/acme", Refuse(503))
    first = await deployment.worker()
    await deployment.publish([("acme", event("e1"))])
    await eventually(lambda: deployment.retries("acme"), "parked")
    await deployment.all_committed()  # what is read again from ingress would be unrouted: its key is gone
    first.kill()
    await told(deployment, *SHRED)
    deployment.inbox.script("/acme", ACCEPT)
    fresh = await deployment.worker()
    await eventually(lambda: fresh.metric("headgate_dropped_total", reason="shredded") == 1, "dropped")
    assert deployment.unrouted() == []
    await deployment.apply({"tenants": tenants(deployment, "acme")})
    await deployment.publish([("acme", event("with the new key"))])
    await deployment.inbox.wait_for("/acme", 1, 30)
    assert len(deployment.inbox.received("/acme")) == 2


async def test_deleting_one_tenant_of_a_pool_leaves_the_others_what_waits_for_them(deployment: Deployment) -> None:
    make_quick_keys(deployment.settings)
    both = [{**one, "topics": "pooled"} for one in tenants(deployment, "acme", "other", retry=LATER)]
    deployment.env["HEADGATE_POOLS"] = "1"
    await deployment.apply({"tenants": both})
    deployment.inbox.script("/acme", Refuse(503))
    deployment.inbox.script("/other", Refuse(503))
    worker = await deployment.worker()
    await deployment.publish([(tenant, event(f"e{n}")) for n in range(3) for tenant in ("acme", "other")])
    await eventually(lambda: len(deployment.retries("pool-00")) == 6, "all parked")
    deployment.inbox.script("/other", ACCEPT)
    await deployment.apply({"tenants": both[1:]}, prune=True)
    deleted = await told(deployment, *SHRED)
    assert (deleted["state"], deleted["topicsDeleted"]) == ("deleted", [])
    await deployment.inbox.wait_for("/other", 3, 30)
    await eventually(lambda: worker.metric("headgate_dropped_total", reason="shredded") == 3, "acme's are dropped")
    assert len(deployment.inbox.received("/acme")) == 3
    assert deployment.dead_letters("pool-00") == []


async def test_events_of_a_tenant_that_is_being_deleted_are_dropped_and_never_stored(deployment: Deployment) -> None:
    """`deleting` lasts for as long as the command was dead; the worker outlives the topics' end."""
    make_quick_keys(deployment.settings)
    both = tenants(deployment, "acme", "other", retry=LATER)
    await deployment.apply({"tenants": both})
    deployment.inbox.script("/acme", Refuse(503))
    worker = await deployment.worker()
    await deployment.publish([("acme", event("parked"))])
    await eventually(lambda: deployment.retries("acme"), "parked")
    await deployment.apply({"tenants": both[1:]}, prune=True)
    await deployment.known_to(worker)
    await deployment.publish([("acme", event("removed"))])
    kept = await eventually(deployment.unrouted, "the control: what comes for a removed tenant is stored")
    died = await headgate(deployment, "committed", *SHRED, module="tests.cli.killed_command")
    assert died.returncode == -signal.SIGKILL
    await deployment.known_to(worker)
    await deployment.publish([("acme", event(f"e{n}")) for n in range(5)])
    await eventually(
        lambda: worker.metric("headgate_events_total", result="tenant_deleted") == 5, "its events are dropped"
    )
    assert deployment.unrouted() == kept
    deleted = await told(deployment, *SHRED)
    assert deleted["state"] == "deleted"
    assert len(deleted["topicsDeleted"]) == 2
    assert deployment.retries("acme") == []
    await deployment.publish([("other", event("after"))])
    await deployment.inbox.wait_for("/other", 1, 30)
    assert worker.process.poll() is None
    assert deployment.unrouted() == kept
    await deployment.all_committed()
