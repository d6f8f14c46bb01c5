"""What is measured, and the bars it is held against.

Each function makes its own receiver and tenants on the rig and ends what it started. A figure is a list of samples in
the order they were taken; what is compared and shown is their median, with the smallest and largest beside it.
"""

import json
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Final

from confluent_kafka import Consumer, TopicPartition
from msgspec import Struct, structs

from bench import events, headgate, parts
from bench import rig as bench
from bench.rig import ROOT, BenchError, Load, Measured, Rig

Say = Callable[[str], None]

FLOOR_BAR: Final = 0.7
NAIVE_BAR: Final = 2.5
PLAIN_BAR: Final = 15_000.0
TLS_BAR: Final = 10_000.0
REUSED_BAR: Final = 99.0
RATE_PER_S: Final = 2000.0
WARM_S: Final = 3.0
DRAIN_S: Final = 30.0
SETTLE_S: Final = 3.0
IDLE_TENANTS: Final = 100
IDLE_DESTINATIONS_EACH: Final = 100
APPLIED_TENANTS: Final = 1000


class Figure(Struct, frozen=True):
    """`at_least` and `at_most` are bars; None: shown only."""

    name: str
    unit: str
    samples: tuple[float, ...]
    at_least: float | None = None
    at_most: float | None = None
    digits: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def holds(self) -> bool:
        return (self.at_least is None or self.median >= self.at_least) and (
            self.at_most is None or self.median <= self.at_most
        )


def speed(rig: Rig, count: int, rounds: int, say: Say, *, tls: bool = False) -> list[Figure]:
    """Deliveries per CPU-second of floor, naive and headgate, interleaved, over the same events in each round."""
    certificates = bench.certificates(rig.folder) if tls else None
    way = "TLS" if tls else "HTTP"
    rig = structs.replace(rig, prefix=f"{rig.prefix}-{way.lower()}")
    env = headgate.environ(rig, certificates)
    taken: dict[str, list[Measured]] = {"floor": [], "naive": [], "headgate": []}
    bench.make_topic(rig, rig.ingress)
    with bench.receiver(certificates) as inbox:
        headgate.apply_load_tenants(env, inbox)
        for number in range(rounds):
            load = bench.load(rig, f"{way.lower()}{number}", count)
            for one in (
                bench.baseline(rig, "bench.floor", load, inbox, certificates),
                bench.baseline(rig, "bench.naive", load, inbox, certificates),
                headgate.run(rig, load, inbox, env),
            ):
                if one.distinct != count:
                    raise BenchError(f"{one.name} delivered {one.distinct} of {count} events ({one.total} requests)")
                taken[one.name].append(one)
                say(
                    f"{way} round {number + 1}/{rounds}  {one.name:<9}{one.per_cpu_s:>8.0f} per CPU-s"
                    f"{one.deliveries / one.wall_s:>8.0f}/s  {one.total - one.distinct} twice"
                    f"  {one.reused:.2%} reused  receiver {one.receiver_cpu_s / one.deliveries * 1e6:.0f} us"
                )
    ours, floor, naive = taken["headgate"], taken["floor"], taken["naive"]
    ratios = [
        (a.per_cpu_s / b.per_cpu_s, a.per_cpu_s / c.per_cpu_s) for a, b, c in zip(ours, floor, naive, strict=True)
    ]
    return [
        Figure(f"{way}: headgate", "deliveries/CPU-s", _each(ours), at_least=TLS_BAR if tls else PLAIN_BAR),
        Figure(f"{way}: floor", "deliveries/CPU-s", _each(floor)),
        Figure(f"{way}: naive", "deliveries/CPU-s", _each(naive)),
        Figure(f"{way}: headgate / floor", "", tuple(r[0] for r in ratios), None if tls else FLOOR_BAR, digits=2),
        Figure(f"{way}: headgate / naive", "", tuple(r[1] for r in ratios), None if tls else NAIVE_BAR, digits=2),
        Figure(f"{way}: on a reused connection", "%", tuple(one.reused * 100 for one in ours), REUSED_BAR, digits=2),
        Figure(f"{way}: delivered twice", "", tuple(float(one.total - one.distinct) for one in ours), at_most=0),
    ]


def allowed(rig: Rig, say: Say) -> list[Figure]:
    """What a delivery needs beyond the floor, in microseconds of CPU, as single calls (ADR 0010)."""
    found = parts.measure(rig)
    for part in found:
        say(f"parts: {part.us:6.2f} us  {part.name}")
    return [Figure("what the floor leaves out, as single calls", "us", (sum(part.us for part in found),), digits=1)]


def _each(runs: Sequence[Measured]) -> tuple[float, ...]:
    return tuple(run.per_cpu_s for run in runs)


def latency(rig: Rig, seconds: float, say: Say) -> list[Figure]:
    """From the broker's time of append to the first byte at the receiver, at a steady 2,000 events a second."""
    rig = structs.replace(rig, prefix=f"{rig.prefix}-latency")
    env = headgate.environ(rig)
    bench.make_topic(rig, rig.ingress)
    warm, count = int(WARM_S * RATE_PER_S), int(seconds * RATE_PER_S)
    with bench.receiver(arrivals=True) as inbox:
        headgate.apply_load_tenants(env, inbox)
        with bench.running("latency", headgate.WORKER, rig.folder, env) as pid:
            headgate.until_ready(env, pid)
            events.produce(rig.bootstrap, rig.ingress, "warm", warm, rate_per_s=RATE_PER_S)
            first = bench.end_offsets(rig, rig.ingress)
            cpu = bench.cpu_s(pid)
            events.produce(rig.bootstrap, rig.ingress, "run", count, rate_per_s=RATE_PER_S)
            cpu = bench.cpu_s(pid) - cpu
            deadline = time.monotonic() + DRAIN_S
            while (got := inbox.stats().accepted) < warm + count:
                if time.monotonic() > deadline:
                    raise BenchError(f"{got} of {warm + count} events were delivered")
                time.sleep(bench.POLL_S)
            arrived = {one.event: one.at_ms for one in reversed(inbox.arrivals())}  # the first of each counts
    appended = _append_times(rig, Load("run", count, first))
    ages = sorted(arrived[event] - at_ms for event, at_ms in appended.items())
    p50, p99 = ages[len(ages) // 2], ages[len(ages) * 99 // 100]
    say(f"latency: {len(ages)} events, p50 {p50:.1f} ms, p99 {p99:.1f} ms, max {ages[-1]:.1f} ms")
    return [
        Figure("append to first byte at 2,000/s: p50", "ms", (p50,), at_most=15, digits=1),
        Figure("append to first byte at 2,000/s: p99", "ms", (p99,), at_most=50, digits=1),
        Figure("CPU per event at 2,000/s", "us", (cpu / count * 1e6,)),
    ]


def _append_times(rig: Rig, load: Load) -> dict[str, int]:
    """When the broker appended each event of the load, in ms."""
    consumer = Consumer({"bootstrap.servers": rig.bootstrap, "group.id": "bench-times", "enable.auto.commit": False})
    try:
        consumer.assign([TopicPartition(rig.ingress, number, at) for number, at in load.first.items()])
        appended: dict[str, int] = {}
        while len(appended) < load.count:
            messages = consumer.consume(5000, 5)
            if not messages:
                raise BenchError(f"{len(appended)} of {load.count} events could be read back")
            for message in messages:
                value = message.value()
                appended[value[12 : value.index(b'"', 12)].decode()] = message.timestamp()[1]
        return appended
    finally:
        consumer.close()


def memory(rig: Rig, say: Say) -> list[Figure]:
    """Resident memory of a worker without tenants, and of one with 10,000 destinations that get nothing."""
    rig = structs.replace(rig, prefix=f"{rig.prefix}-memory")
    env = headgate.environ(rig, tenants="pooled")

    def resident_mb() -> float:
        with bench.running("memory", headgate.WORKER, rig.folder, env) as pid:
            headgate.until_ready(env, pid)
            time.sleep(SETTLE_S)
            return bench.rss_mb(pid)

    headgate.apply(env, [headgate.tenant("nobody", "http://127.0.0.1:9")])
    without = resident_mb()
    headgate.apply(
        env,
        [
            headgate.tenant(f"idle-{number:03d}", "http://127.0.0.1:9", destinations=IDLE_DESTINATIONS_EACH)
            for number in range(IDLE_TENANTS)
        ],
    )
    full = resident_mb()
    say(f"memory: {without:.0f} MiB without, {full:.0f} MiB with 10,000 idle destinations")
    return [
        Figure("memory with one tenant", "MiB", (without,)),
        Figure("memory with 10,000 idle destinations", "MiB", (full,)),
    ]


def applying(rig: Rig, say: Say) -> list[Figure]:
    """`headgate apply` of 1,000 new pooled tenants, from the start of the command to its end."""
    rig = structs.replace(rig, prefix=f"{rig.prefix}-apply")
    env = headgate.environ(rig, tenants="pooled")
    file = rig.folder / "tenants.yaml"
    tenants = [headgate.tenant(f"tenant-{number:04d}", "http://127.0.0.1:9") for number in range(APPLIED_TENANTS)]
    file.write_text(json.dumps({"tenants": tenants}))
    began = time.monotonic()
    done = subprocess.run(
        [*headgate.HEADGATE, "apply", "-f", str(file), "--output", "json"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    took = time.monotonic() - began
    if done.returncode != 0:
        raise BenchError(f"apply failed:\n{done.stderr[-2000:]}")
    say(f"apply: 1,000 pooled tenants in {took:.1f} s")
    return [Figure("apply of 1,000 pooled tenants", "s", (took,), at_most=10, digits=1)]


def starting(rig: Rig, rounds: int, say: Say) -> list[Figure]:
    """From the start of the process to ready, with 50 tenants that have topics of their own."""
    rig = structs.replace(rig, prefix=f"{rig.prefix}-start")
    env = headgate.environ(rig)
    headgate.apply(env, [headgate.tenant(events.tenant_name(n), "http://127.0.0.1:9") for n in range(events.TENANTS)])
    taken = []
    for _ in range(rounds):
        with bench.running("start", headgate.WORKER, rig.folder, env) as pid:
            taken.append(headgate.until_ready(env, pid))
    say(f"start: ready after {statistics.median(taken):.1f} s")
    return [Figure("start to ready, 50 tenants", "s", tuple(taken), at_most=5, digits=1)]
