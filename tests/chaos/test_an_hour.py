"""A worker at half load for an hour: what it holds is the same at the end as in the middle (scoreboard R18).

All of its ways are gone meanwhile: most destinations accept, one fails at times, one throttles, one refuses, one is
down, one hangs. Half load is half of what the rig was seen to sustain before, but at most 2,000 events a second: with
broker, Redis, receiver and producer beside the worker that is half of two cores, and as many ids as can be kept.
`HEADGATE_TEST_SOAK_S` makes the hour shorter.
"""

import asyncio
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from random import Random
from statistics import fmean, median
from typing import Any, Final

import psutil
import pytest
import redis
from msgspec import Struct

from dev.inbox import Hang, Ok, Refuse, RemoteInbox, Steps, Throttle, fail_first
from dev.stack import Stack
from tests.chaos.load import POOLED, TAG, Load, all_ended
from tests.deployment import Deployment, Worker, event, eventually

pytestmark = pytest.mark.broker

MOST_PER_S: Final = 2000
HEALTHY: Final = [f"t{n}" for n in range(8)]
DEAD: Final = ("refuses", "down", "hangs")
SHARES: Final = {"flaky": 50, "throttles": 20, "refuses": 10, "down": 1, "hangs": 1}  # of 1,000 events
BURST: Final = 30_000

# How much more of each there may be at the end than in the middle, beside a twentieth of what there is.
ALLOWED: Final = {
    "memory, MiB": 8.0,
    "descriptors": 8.0,
    "threads": 2.0,
    "held, KiB": 512.0,
    "waiting in lanes": 50.0,
    "retries": 50.0,
    "Redis keys": 0.0,
}


class Scene(Struct, frozen=True):
    for_s: float
    schedule: tuple[str, ...]  # of what is down or hangs
    every_s: float  # between two samples
    rate_per_s: int = 0  # 0: half of what is sustained
    flat: Sequence[str] = tuple(ALLOWED)


# Redis forgets after a minute at the earliest, so the small size cannot see its keys become constant. Its breakers stay
# closed: what they keep waiting would take minutes to end.
SMALL: Final = Scene(15.0, ("0s",), 0.5, 200, tuple(name for name in ALLOWED if name != "Redis keys"))
HOUR: Final = Scene(float(os.environ.get("HEADGATE_TEST_SOAK_S", "3600")), ("0s", "5s", "20s"), 10.0)

Sample = Mapping[str, float]


def growth(samples: Sequence[Sample], name: str) -> tuple[float, float]:
    """Over the second half: the rise from its start to its end, and the mean.

    By the medians of its two parts: what is 0 but for a stalled moment has a regression that is ruled by when that was.
    """
    values = [one[name] for one in samples[len(samples) // 2 :]]
    middle = len(values) // 2
    return 2 * (median(values[middle:]) - median(values[:middle])), fmean(values)


def grown(samples: Sequence[Sample], names: Sequence[str]) -> set[str]:
    """Those of which there is more than there may be."""
    found = set()
    for name in names:
        rise, mean = growth(samples, name)
        if rise > ALLOWED[name] + mean / 20:
            found.add(name)
    return found


def sample(worker: Worker, process: psutil.Process, keys: "redis.Redis[bytes]") -> Sample:
    return {
        "at": time.monotonic(),
        "memory, MiB": process.memory_info().rss / 2**20,
        "descriptors": process.num_fds(),
        "threads": process.num_threads(),
        "held, KiB": worker.metric("headgate_held_bytes") / 1024,
        "waiting in lanes": worker.metric("headgate_lane_depth"),
        "retries": worker.metric("headgate_retry_due"),
        "Redis keys": keys.dbsize(),
    }


def configured(scene: Scene, inbox: RemoteInbox) -> dict[str, Any]:
    for name, script in {"refuses": Refuse(400), "down": Refuse(500), "hangs": Hang()}.items():
        inbox.script(f"/{name}", script)
    short = {"schedule": scene.schedule, "max_age": "2m"}
    patient = {"schedule": ["0s", "2s", "5s", "30s", "60s"]}
    return {
        "tenants": [
            {
                "externalId": name,
                "destinations": [
                    {
                        "id": "hook",
                        "type": "webhook",
                        "options": {"url": inbox.url(f"/{name}"), "timeout": "2s" if name == "hangs" else "15s"},
                        "retry": short if name in DEAD else patient,
                    }
                ],
                "routes": [{"id": "all", "match": {"types": ["*"]}, "to": ["hook"]}],
            }
            for name in (*HEALTHY, *SHARES)
        ]
    }


def in_turn() -> list[str]:
    """The tenants of 1,000 events, each as often as its share says."""
    few = [name for name, share in SHARES.items() for _ in range(share)]
    turn = few + [HEALTHY[n % len(HEALTHY)] for n in range(1000 - len(few))]
    Random(18).shuffle(turn)
    return turn


def disturb(scene: Scene, inbox: RemoteInbox, rate_per_s: float, turn: int) -> None:
    """A fifth of what comes for `flaky` until the next time fails: not enough for its breaker. `throttles` does it
    every tenth time."""
    failures = int(rate_per_s * SHARES["flaky"] / 1000 * scene.every_s / 5) or 1
    inbox.script("/flaky", fail_first(failures, per="path"))
    if turn % 10 == 0:
        inbox.script("/throttles", Steps((Throttle("1"), Ok()), per="path"))


async def sustained_per_s(deployment: Deployment, inbox: RemoteInbox) -> float:
    """How many events a second are delivered of a burst to those who accept; before it, one to warm up."""

    async def burst(run: str) -> float:
        before = inbox.stats().accepted
        began = time.monotonic()
        await deployment.publish([(HEALTHY[n % len(HEALTHY)], event(f"{run}-{n}")) for n in range(BURST)])
        await eventually(lambda: inbox.stats().accepted >= before + BURST, "the burst is delivered", 180)
        return BURST / (time.monotonic() - began)

    await burst("warm")
    return await burst("burst")


async def soaked(
    stack: Stack, scene: Scene, say: Callable[[str], None], command: Sequence[str] = ()
) -> Sequence[Sample]:
    """The samples of a worker under the load. Asserts that of what was published nothing is lost or came twice."""
    settings = {
        **POOLED,
        "HEADGATE_RETRY_TIERS": "1s,5s,30s",
        "HEADGATE_DEDUPE_TTL": "10m",
        "HEADGATE_LEDGER_TTL": "10m",
    }
    keys: redis.Redis[bytes] = redis.Redis(port=stack.redis_port)
    with RemoteInbox.spawn(keep_bodies=False) as inbox:
        async with Deployment.on(stack, **settings) as deployment:
            await deployment.apply(configured(scene, inbox))
            worker = await deployment.launch(command=command).ready()
            process = psutil.Process(worker.process.pid)
            extra = 0 if scene.rate_per_s else 2 * BURST
            most = scene.rate_per_s or await sustained_per_s(deployment, inbox) / 2
            load = Load(deployment, in_turn(), int(min(most, MOST_PER_S)))
            samples: list[Sample] = []
            cpu, began = process.cpu_times(), time.monotonic()
            psutil.cpu_percent()
            async with load.running():
                while (now := time.monotonic()) < began + scene.for_s:
                    if samples:  # once there has been something that went well
                        await asyncio.to_thread(disturb, scene, inbox, load.rate_per_s, len(samples))
                    samples.append(await asyncio.to_thread(sample, worker, process, keys))
                    print(samples[-1], flush=True)
                    for name in (*HEALTHY, *SHARES):  # the receiver keeps what it was sent: it is not what is measured
                        await asyncio.to_thread(inbox.take, f"/{name}")
                    await asyncio.sleep(max(0.0, now + scene.every_s - time.monotonic()))
            used, machine = process.cpu_times(), psutil.cpu_percent()
            busy = (used.user + used.system - cpu.user - cpu.system) / (time.monotonic() - began)
            await all_ended(deployment, 900)
            paths = inbox.stats().paths
            letters = Counter(one.headers["hg-tenant"].decode() for one in deployment.dead_letters(TAG))
            kept = sum(paths[f"/{name}"].accepted for name in (*HEALTHY, *SHARES))
            lost = load.published.total() + extra - kept - letters.total()
            twice = sum(one.duplicates for one in paths.values())
            say(
                f"{scene.for_s:,.0f} s at {len(load.acknowledged) / scene.for_s:,.0f} events/s"
                + (f" (the rig sustained {2 * most:,.0f})" if extra else "")
                + f", the worker {busy:.0%} of a core, the machine {machine:.0f} % busy; "
                f"{load.published.total() + extra:,} events, lost {lost}, twice {twice}, "
                f"{letters.total():,} dead letters; from the middle to the end: "
                + ", ".join("{} {:+,.1f} of {:,.0f}".format(name, *growth(samples, name)) for name in scene.flat)
            )
            assert (lost, twice) == (0, 0)
            assert {name: letters[name] for name in DEAD} == {name: load.published[name] for name in DEAD}
            assert worker.metric("headgate_attempts_total", code="timeout") > 0
            assert worker.metric("headgate_attempts_total", code="throttled") > 0
            assert worker.metric("headgate_attempts_total", verdict="retry", code="server_error") > 0
            assert (worker.metric("headgate_parked_total", reason="breaker") > 0) == (scene is HOUR)
            assert await worker.terminate() == 0
    keys.close()
    return samples


@pytest.mark.chaos("R18")
@pytest.mark.timeout(HOUR.for_s + 1800)
async def test_an_hour_at_half_load_leaves_nothing_behind(stack: Stack, report: Callable[[str], None]) -> None:
    assert grown(await soaked(stack, HOUR, report), HOUR.flat) == set()


@pytest.mark.scoreboard("R18")
async def test_a_quarter_of_a_minute_leaves_nothing_behind_but_of_a_worker_that_leaks(stack: Stack) -> None:
    """The control: the same look finds what a worker leaves behind that does."""
    leaking = (sys.executable, "-m", "tests.chaos.sabotaged_worker", "leaks")
    real, control = await asyncio.gather(soaked(stack, SMALL, print), soaked(stack, SMALL, print, leaking))
    assert grown(real, SMALL.flat) == set()
    assert {"memory, MiB", "descriptors"} <= grown(control, SMALL.flat)
