"""Batching kinds from ingress to the far side: in batches, each event once, whatever dies on the way."""

import asyncio
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from connectors.registry import KINDS
from dev.stack import Stack
from tests.deployment import Deployment, Worker, event, eventually
from tests.files import SPEC, become, stored

pytestmark = [pytest.mark.broker]

WORKER = (sys.executable, "-m", "tests.files")
QUICK: dict[str, Any] = {"schedule": ["0s", "1s", "1s", "1s", "1s", "1s", "1s", "1s", "1s", "1s"], "max_age": "1h"}


@pytest.fixture(autouse=True)
def kind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(KINDS, "files", SPEC)  # type: ignore[arg-type]
    yield


@pytest.fixture
async def deployment(stack: Stack) -> AsyncIterator[Deployment]:
    async with Deployment.on(stack, HEADGATE_COMMIT_INTERVAL="200ms") as made:
        yield made


def files(folder: Path, ident: str = "files", **more: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    retry = more.pop("retry", QUICK)
    return {"id": ident, "type": "files", "options": {"folder": str(folder), **more}, "retry": retry}


def tenant(external_id: str, *destinations: dict[str, Any], **more: Any) -> dict[str, Any]:
    routes = [{"id": "all", "match": {"types": ["*"]}, "to": [one["id"] for one in destinations]}]
    return {"externalId": external_id, "destinations": list(destinations), "routes": routes, **more}


def ids(folder: Path, destination: str = "*") -> Counter[str]:
    return Counter(event_id for batch in stored(folder, destination) for _, event_id in batch)


async def worker(deployment: Deployment, name: str = "w0", **env: str) -> Worker:
    return await deployment.launch(name, WORKER, **env).ready()


async def holds(folder: Path, count: int, timeout_s: float = 60.0) -> None:
    await eventually(lambda: len(ids(folder)) >= count, f"{count} events are stored", timeout_s)


async def test_events_arrive_in_batches_each_once_and_one_attempt_record_lists_a_batch(
    deployment: Deployment, tmp_path: Path
) -> None:
    await deployment.apply({"tenants": [tenant("acme", files(tmp_path, events=20))]})
    first = await worker(deployment)
    await deployment.publish([("acme", event(f"e{n}")) for n in range(50)])
    await holds(tmp_path, 50)
    batches = stored(tmp_path)
    assert set(ids(tmp_path).values()) == {1}
    assert [len(one) for one in batches] == [20, 20, 10]

    def listed() -> list[dict[str, Any]] | None:
        found = [one for one in deployment.attempts() if one["kind"] == "attempt"]
        return found if len(found) == 3 else None

    records = await eventually(listed, "three attempts are recorded")
    assert sorted(map(len, (one["deliveries"] for one in records))) == [10, 20, 20]
    assert {ident for one in records for ident in one["deliveries"]} == {ident for one in batches for ident, _ in one}
    assert {(one["verdict"], one["destinationType"]) for one in records} == {("delivered", "files")}
    assert await first.terminate() == 0


async def test_nothing_is_lost_or_stored_twice_when_workers_are_killed_without_redis(
    deployment: Deployment, tmp_path: Path
) -> None:
    nowhere = {"REDIS_URL": "redis://127.0.0.1:1/0"}
    await deployment.apply({"tenants": [tenant("acme", files(tmp_path, window_ms=300, events=40))]})
    sent = 0
    for turn in range(5):
        running = await worker(deployment, f"w{turn % 2}", **nowhere)
        for _ in range(6):
            await deployment.publish([("acme", event(f"e{sent + n}")) for n in range(50)])
            sent += 50
        await holds(tmp_path, sent - 200)
        running.kill()
    await worker(deployment, **nowhere)
    await holds(tmp_path, sent)
    found = ids(tmp_path)
    assert [name for name, times in found.items() if times > 1] == []
    assert len(found) == sent


async def test_a_failing_destination_is_tried_again_as_the_batch_it_was_and_holds_up_nobody(
    deployment: Deployment, tmp_path: Path
) -> None:
    bad, good = tmp_path / "bad", tmp_path / "good"
    await deployment.apply({"tenants": [tenant("acme", files(bad, "bad", events=10), files(good, "good", events=10))]})
    become(bad, "fail")
    await worker(deployment)
    await deployment.publish([("acme", event(f"e{n}")) for n in range(30)])
    await holds(good, 30)

    def parked() -> bool:
        return len({one.headers["hg-batch"] for one in deployment.retries("acme")}) == 3

    await eventually(parked, "three manifests are in the retry topic")
    assert ids(bad) == Counter()
    assert {one.headers["hg-batch-count"] for one in deployment.retries("acme")} == {b"10"}
    become(bad, "")
    await holds(bad, 30)
    assert set(ids(bad).values()) == {1}
    assert [[name for _, name in one] for one in stored(bad)] == [[name for _, name in one] for one in stored(good)]


async def test_a_parked_batch_survives_the_worker_that_parked_it(deployment: Deployment, tmp_path: Path) -> None:
    await deployment.apply({"tenants": [tenant("acme", files(tmp_path, events=10, noting=True))]})
    become(tmp_path, "timeout")  # stored, and nobody says so
    first = await worker(deployment)
    await deployment.publish([("acme", event(f"e{n}")) for n in range(20)])
    await holds(tmp_path, 20)
    await eventually(lambda: len(deployment.retries("acme")) >= 2, "both batches are parked")
    first.kill()
    become(tmp_path, "")
    await worker(deployment, "w1")

    def delivered() -> bool:
        records = [one for one in deployment.attempts() if one.get("verdict") == "delivered"]
        return {ident for one in records for ident in one["deliveries"]} == {i for b in stored(tmp_path) for i, _ in b}

    await eventually(delivered, "all deliveries are recorded as delivered")
    assert set(ids(tmp_path).values()) == {1}
    assert deployment.dead_letters("acme") == []


async def test_what_is_refused_by_itself_becomes_a_dead_letter_alone(deployment: Deployment, tmp_path: Path) -> None:
    await deployment.apply({"tenants": [tenant("acme", files(tmp_path))]})
    await worker(deployment)
    good = [("acme", event(f"e{n}")) for n in range(10)]
    await deployment.publish([*good[:5], ("acme", event("bad", payload={"say": "refuse"})), *good[5:]])
    await holds(tmp_path, 10)
    letters = await eventually(lambda: deployment.dead_letters("acme"), "a dead letter is written")
    assert [(one.headers["hg-event"], one.headers["hg-error"]) for one in letters] == [(b"bad", b"refused")]


@pytest.mark.parametrize(("mode", "code"), [("fail", b"unavailable"), ("timeout", b"unknown_outcome")])
async def test_an_exhausted_batch_becomes_single_dead_letters_and_says_where_nobody_knows(
    deployment: Deployment, tmp_path: Path, mode: str, code: bytes
) -> None:
    once = {"schedule": ["0s", "1s"], "max_age": "1h"}
    await deployment.apply({"tenants": [tenant("acme", files(tmp_path, retry=once))]})
    become(tmp_path, mode)
    await worker(deployment)
    await deployment.publish([("acme", event(f"e{n}")) for n in range(10)])
    letters = await eventually(
        lambda: found if len(found := deployment.dead_letters("acme")) >= 10 else None, "ten dead letters are written"
    )
    assert Counter(one.headers["hg-event"] for one in letters) == Counter({f"e{n}".encode(): 1 for n in range(10)})
    assert {(one.headers["hg-error"], one.headers["hg-attempt"]) for one in letters} == {(code, b"2")}


async def test_another_worker_goes_on_where_one_has_left_and_joins_move_nothing_twice(
    deployment: Deployment, tmp_path: Path
) -> None:
    await deployment.apply({"tenants": [tenant(f"t{n}", files(tmp_path, window_ms=300)) for n in range(6)]})
    first = await worker(deployment)
    sent = 0
    for turn in range(6):
        await deployment.publish([(f"t{n % 6}", event(f"e{sent + n}")) for n in range(60)])
        sent += 60
        if turn == 2:
            await worker(deployment, "w1")
        if turn == 4:
            assert await first.terminate() == 0
        await asyncio.sleep(0.3)
    await holds(tmp_path, sent)
    assert set(ids(tmp_path).values()) == {1}


async def test_a_stalled_owner_writes_nothing_once_another_has_its_partitions(
    deployment: Deployment, tmp_path: Path
) -> None:
    import signal

    await deployment.apply({"tenants": [tenant("acme", files(tmp_path, window_ms=300, events=25, noting=True))]})
    first = await worker(deployment)
    await deployment.publish([("acme", event(f"e{n}")) for n in range(100)])
    await holds(tmp_path, 50)
    first.signal(signal.SIGSTOP)
    await worker(deployment, "w1")
    await deployment.publish([("acme", event(f"e{n}")) for n in range(100, 200)])
    await holds(tmp_path, 200)
    first.signal(signal.SIGCONT)
    await deployment.publish([("acme", event(f"e{n}")) for n in range(200, 300)])
    await holds(tmp_path, 300)
    assert set(ids(tmp_path).values()) == {1}


async def test_what_open_batches_have_no_room_for_is_read_again_from_the_log(
    deployment: Deployment, tmp_path: Path
) -> None:
    """30 batches of 0.6 MB are open at once, where a quarter of 32 MiB is theirs."""
    names = [f"t{n}" for n in range(30)]
    await deployment.apply({"tenants": [tenant(name, files(tmp_path / name, window_ms=3000)) for name in names]})
    running = await worker(deployment, MEMORY_BUDGET="32MiB")
    note = "x" * 60_000
    held: list[float] = []
    for turn in range(10):
        await deployment.publish([(name, event(f"{name}-{turn}", payload={"note": note})) for name in names])
        held.append(running.metric("headgate_held_bytes"))

    def all_there() -> bool:
        held.append(running.metric("headgate_held_bytes"))
        return all(len(ids(tmp_path / name)) == 10 for name in names)

    await eventually(all_there, "all events are stored", 90)
    assert all(set(ids(tmp_path / name).values()) == {1} for name in names)
    assert max(held) < 32 * 2**20
    assert await running.terminate() == 0
