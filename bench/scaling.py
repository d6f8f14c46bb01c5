"""What scaling out and in costs: how long partitions stand still, what is delivered twice, and what it takes of CPU.

Events come evenly all the while, and one worker after the other joins and leaves. A pause is the longest time between
two deliveries of one partition around a change; the same without a change is measured beside it.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from statistics import median
from typing import Final

from msgspec import Struct, structs

from bench import events, headgate
from bench import rig as bench
from bench.measures import Figure, Say
from bench.rig import PARTITIONS, BenchError, Rig
from dev.inbox import Arrival, RemoteInbox
from schemas.topics import partition_of

RATE_PER_S: Final = 600.0
CALM_S: Final = 4.0  # before the first change and after each
SESSION_S: Final = 10.0  # a static member keeps its partitions for so long after it has ended
MOST_EVENTS: Final = 1_000_000
DRAIN_S: Final = 60.0


class Change(Struct, frozen=True):
    """Something that happened to the workers, and the time (Unix, ms) from its start until all was calm again."""

    name: str
    from_ms: float
    to_ms: float


class _Crew:
    """The workers of a run."""

    def __init__(self, rig: Rig, *, static: bool) -> None:
        self._rig = rig
        self._static = static
        self._running: dict[str, tuple[ExitStack, int]] = {}
        self.changes: list[Change] = []
        self.start_cpu_s: list[float] = []
        self.us_per_event: dict[int, float] = {}  # by the number of workers

    def join(self, name: str) -> None:
        env = headgate.environ(self._rig)
        env["HEADGATE_WORKER_ID"] = name if self._static else ""
        cleanup = ExitStack()
        pid = cleanup.enter_context(bench.running(name, headgate.WORKER, self._rig.folder, env))
        self._running[name] = cleanup, pid
        headgate.until_ready(env, pid)
        self.start_cpu_s.append(bench.cpu_s(pid))

    def leave(self, name: str) -> None:
        """SIGTERM, and waits for its end."""
        self._running.pop(name)[0].close()

    def end(self) -> None:
        for name in list(self._running):
            self.leave(name)

    @contextmanager
    def change(self, name: str, inbox: RemoteInbox, calm_s: float = CALM_S) -> Iterator[None]:
        """What happens inside is a change; then its calm, in which the cost of an event is taken."""
        began = time.time() * 1000
        yield
        time.sleep(calm_s - CALM_S)
        cpu, count = self._cpu_s(), inbox.stats().requests
        time.sleep(CALM_S)
        delivered = inbox.stats().requests - count
        if delivered:
            self.us_per_event[len(self._running)] = (self._cpu_s() - cpu) / delivered * 1e6
        self.changes.append(Change(name, began, time.time() * 1000))

    def _cpu_s(self) -> float:
        return sum(bench.cpu_s(pid) for _, pid in self._running.values())


def measure(rig: Rig, rounds: int, say: Say) -> list[Figure]:
    """Dynamic members, then static ones: 1 -> 2 -> 3 -> 2 -> 1 workers under a steady load."""
    figures: list[Figure] = []
    for kind in ("dynamic", "static"):
        samples: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
        own = structs.replace(rig, prefix=f"{rig.prefix}-{kind}")
        bench.make_topic(own, own.ingress)
        with bench.receiver(arrivals=True) as inbox:
            headgate.apply_load_tenants(headgate.environ(own), inbox)
            for number in range(rounds):
                inbox.clear()
                _round(own, f"{kind}{number}", inbox, samples, static=kind == "static")
                say(f"{kind} round {number + 1}/{rounds}")
        figures += [Figure(f"{kind}: {name}", unit, tuple(taken)) for (name, unit), taken in samples.items()]
    return figures


def _round(
    rig: Rig, run: str, inbox: RemoteInbox, samples: defaultdict[tuple[str, str], list[float]], *, static: bool
) -> None:
    crew = _Crew(rig, static=static)
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool, ExitStack() as cleanup:
        cleanup.callback(crew.end)
        cleanup.callback(stop.set)
        crew.join("w0")
        written = pool.submit(
            events.produce, rig.bootstrap, rig.ingress, run, MOST_EVENTS, rate_per_s=RATE_PER_S, stop=stop
        )
        time.sleep(CALM_S)
        with crew.change("nothing happens", inbox):
            pass
        with crew.change("one joins, 1 -> 2", inbox):
            crew.join("w1")
        with crew.change("one joins, 2 -> 3", inbox):
            crew.join("w2")
        with crew.change("one is restarted, of 3", inbox):
            crew.leave("w2")
            crew.join("w2")
        calm_s = CALM_S + SESSION_S if static else CALM_S
        with crew.change("one leaves, 3 -> 2", inbox, calm_s):
            crew.leave("w2")
        with crew.change("one leaves, 2 -> 1", inbox, calm_s):
            crew.leave("w1")
        stop.set()
        count = written.result()
        deadline = time.monotonic() + DRAIN_S
        while (got := inbox.stats().accepted) < count:
            if time.monotonic() > deadline:
                raise BenchError(f"{got} of {count} events were delivered")
            time.sleep(bench.POLL_S)
    arrivals = inbox.arrivals()
    for change in crew.changes:
        pauses = _pauses_ms(arrivals, change)
        samples[f"{change.name}: pause of the partition that waits longest", "ms"].append(max(pauses))
        samples[f"{change.name}: pause of half of the partitions", "ms"].append(median(pauses))
    for change, twice in zip(crew.changes, _twice(arrivals, crew.changes), strict=True):
        samples[f"{change.name}: delivered twice", ""].append(twice)
    samples["CPU of a worker until it is ready", "ms"].append(median(crew.start_cpu_s) * 1000)
    for workers, cost in sorted(crew.us_per_event.items()):
        samples[f"CPU per event, {workers} at work", "us"].append(cost)


def _partition(event: str) -> int:
    number = int(event.rpartition("_")[2])
    return partition_of(events.tenant_name(number % events.TENANTS).encode(), PARTITIONS)


def _pauses_ms(arrivals: list[Arrival], change: Change) -> list[float]:
    """The longest time without a delivery that begins during the change, of each partition that has any."""
    times: defaultdict[int, list[float]] = defaultdict(list)
    for one in arrivals:
        times[_partition(one.event)].append(one.at_ms)
    longest = []
    for of_partition in times.values():
        of_partition.sort()
        steps = pairwise(of_partition)
        longest.append(max((b - a for a, b in steps if change.from_ms <= a < change.to_ms), default=0.0))
    return longest


def _twice(arrivals: list[Arrival], changes: list[Change]) -> list[int]:
    """Requests for events that had one before, by the change in which they came."""
    seen: set[str] = set()
    counts = [0] * len(changes)
    for one in sorted(arrivals, key=lambda one: one.at_ms):
        if one.event in seen:
            for number, change in enumerate(changes):
                counts[number] += change.from_ms <= one.at_ms < change.to_ms
        seen.add(one.event)
    return counts
