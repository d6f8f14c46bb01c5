"""The rig: stack, receiver, topics and measured processes of a benchmark run.

Owns how CPU time is taken: from the operating system's account of the measured process (all its threads, its children
too), between the first and the last delivery that the receiver counted. Receiver, broker and producer are other
processes and are not in it; the producer has ended before a run begins.
"""

import json
import os
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import psutil
import trustme
from confluent_kafka import Consumer, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic
from msgspec import Struct

from bench import events
from dev import stack
from dev.inbox import RemoteInbox, Stats
from dev.stack import Stack

ROOT: Final = Path(__file__).resolve().parent.parent
PARTITIONS: Final = 12
POLL_S: Final = 0.02
CPU_CLOCK: Final = 2  # Linux: of a process, as time.clock_gettime names it together with the process id
STALL_S: Final = 60.0
END_GRACE_S: Final = 40.0
ADMIN_TIMEOUT_S: Final = 30.0


class BenchError(Exception):
    """A run did not come to a figure. The message says what was there."""


class Certificates(Struct, frozen=True):
    """A certificate authority and a certificate for loopback, as files."""

    ca: Path
    cert: Path
    key: Path

    def trust(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.ca))


class Rig(Struct, frozen=True):
    """Where the benchmarks work: a running stack, a prefix of their own, a folder for logs."""

    stack: Stack
    prefix: str
    folder: Path

    @property
    def bootstrap(self) -> str:
        return self.stack.kafka_bootstrap

    @property
    def ingress(self) -> str:
        return f"{self.prefix}.default.ingress"


class Load(Struct, frozen=True):
    """The events of one run: how many, and where they begin in each partition of ingress."""

    run: str
    count: int
    first: dict[int, int]


class Measured(Struct, frozen=True):
    """One run of one contestant.

    `deliveries`, CPU and wall time are those between the first and the last delivery; `total` counts all of the run,
    `distinct` their different webhook-ids, `dials` the connections made.
    """

    name: str
    deliveries: int
    total: int
    distinct: int
    dials: int
    cpu_s: float
    wall_s: float
    receiver_cpu_s: float
    rss_mb: float

    @property
    def per_cpu_s(self) -> float:
        return self.deliveries / self.cpu_s

    @property
    def reused(self) -> float:
        """The share of deliveries that found an open connection."""
        return 1 - self.dials / self.total


@contextmanager
def rig(folder: Path | None) -> Iterator[Rig]:
    """A stack of the benchmarks' own in a temporary folder, ended afterwards; or the running one in `folder`."""
    with ExitStack() as cleanup:
        home = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="headgate-bench-")))
        if folder is None:
            cleanup.callback(stack.down, home / "stack")
            running = stack.up(home / "stack")
        else:
            found = stack.stack(folder)
            if found is None:
                raise BenchError(f"no stack is ready in {folder}; see `headgate dev status`")
            running = found
        yield Rig(running, f"bench-{os.getpid()}", home)


def certificates(folder: Path) -> Certificates:
    made = Certificates(folder / "ca.pem", folder / "cert.pem", folder / "key.pem")
    authority = trustme.CA()
    server = authority.issue_cert("127.0.0.1", "localhost")
    authority.cert_pem.write_to_path(made.ca)
    server.private_key_pem.write_to_path(made.key)
    for blob in server.cert_chain_pems:
        blob.write_to_path(made.cert, append=True)
    return made


def make_topic(rig: Rig, name: str) -> None:
    """Ingress, before the worker would make it: with the time of append in its records."""
    admin = AdminClient({"bootstrap.servers": rig.bootstrap})
    topic = NewTopic(name, PARTITIONS, 1, config={"message.timestamp.type": "LogAppendTime"})
    admin.create_topics([topic])[name].result(ADMIN_TIMEOUT_S)
    deadline = time.monotonic() + ADMIN_TIMEOUT_S
    while True:  # a new partition has no leader at first
        try:
            end_offsets(rig, name)
            return
        except KafkaException:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_S)


def load(rig: Rig, run: str, count: int) -> Load:
    """Write the events of one run, then let the broker settle."""
    first = end_offsets(rig, rig.ingress)
    events.produce(rig.bootstrap, rig.ingress, run, count)
    return Load(run, count, first)


def end_offsets(rig: Rig, topic: str) -> dict[int, int]:
    consumer = Consumer({"bootstrap.servers": rig.bootstrap, "group.id": "bench-offsets"})
    try:
        partitions = consumer.list_topics(topic, timeout=ADMIN_TIMEOUT_S).topics[topic].partitions
        return {
            number: consumer.get_watermark_offsets(TopicPartition(topic, number), timeout=ADMIN_TIMEOUT_S)[1]
            for number in partitions
        }
    finally:
        consumer.close()


# Processes


def cpu_s(pid: int) -> float:
    """User and system time of a process, all threads, with its children living and ended."""
    process = psutil.Process(pid)
    times = process.cpu_times()  # in steps of 10 ms: good enough for what has ended
    own = time.clock_gettime(~pid << 3 | CPU_CLOCK)
    return own + float(times.children_user + times.children_system) + sum(cpu_s(one.pid) for one in process.children())


def rss_mb(pid: int) -> float:
    return float(psutil.Process(pid).memory_info().rss) / 2**20


def pin(pid: int, *, receiver: bool) -> None:
    """The receiver gets the last core, what is measured gets the others: neither is moved about during a run."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 1:
        psutil.Process(pid).cpu_affinity(cores[-1:] if receiver else cores[:-1])


@contextmanager
def running(
    name: str, command: Sequence[str], folder: Path, environ: Mapping[str, str], *, pinned: bool = False
) -> Iterator[int]:
    """A process while the block runs; its output goes to `<folder>/<name>.log`, whose end is shown if it fails.

    Pinned where CPU time is measured; not where waiting is, since broker and producer want those cores too.
    """
    log = folder / f"{name}.log"
    with log.open("ab") as out:
        child = subprocess.Popen(command, cwd=ROOT, env=dict(environ), stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    try:
        if pinned:
            pin(child.pid, receiver=False)
        yield child.pid
        if child.poll() is not None:
            raise BenchError(f"{name} ended by itself (exit code {child.returncode})")
    except BenchError as fault:
        raise BenchError(f"{fault}\nthe end of its log:\n{log.read_text(errors='replace')[-3000:]}") from None
    finally:
        child.terminate()
        try:
            child.wait(END_GRACE_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


@contextmanager
def receiver(tls: Certificates | None = None, *, arrivals: bool = False) -> Iterator[RemoteInbox]:
    with RemoteInbox.spawn(
        count_only=True,
        arrivals=arrivals,
        cert=tls.cert if tls else None,
        key=tls.key if tls else None,
        trust=tls.trust() if tls else None,
    ) as inbox:
        yield inbox


def contest(
    name: str,
    command: Sequence[str],
    rig: Rig,
    inbox: RemoteInbox,
    count: int,
    environ: Mapping[str, str] | None = None,
) -> Measured:
    """Run a command that delivers, and watch the receiver from the first of `count` deliveries to the last."""
    inbox.clear()
    pin(inbox.process.pid, receiver=True)
    dialled = inbox.stats().connections
    with running(name, command, rig.folder, os.environ if environ is None else environ, pinned=True) as pid:
        stats = _until(name, pid, inbox, lambda requests: requests > 0)
        first, cpu0, receiver0, at0 = stats.requests, cpu_s(pid), cpu_s(inbox.process.pid), time.monotonic()
        stats = _until(name, pid, inbox, lambda requests: requests >= count)
        cpu1, receiver1, at1 = cpu_s(pid), cpu_s(inbox.process.pid), time.monotonic()
        if stats.requests == first:
            raise BenchError(f"{name} delivered all of {count} between two looks: too few to measure")
        return Measured(
            name=name,
            deliveries=stats.requests - first,
            total=stats.requests,
            distinct=stats.accepted,
            dials=stats.connections - dialled,
            cpu_s=cpu1 - cpu0,
            wall_s=at1 - at0,
            receiver_cpu_s=receiver1 - receiver0,
            rss_mb=rss_mb(pid),
        )


def _until(name: str, pid: int, inbox: RemoteInbox, reached: Callable[[int], bool]) -> Stats:
    seen, since = -1, time.monotonic()
    while True:
        stats = inbox.stats()
        if reached(stats.requests):
            return stats
        if stats.requests != seen:
            seen, since = stats.requests, time.monotonic()
        if time.monotonic() - since > STALL_S:
            raise BenchError(f"{name}: no delivery for {STALL_S:.0f} s after {seen}")
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            raise BenchError(f"{name} ended after {seen} deliveries")
        time.sleep(POLL_S)


def baseline(rig: Rig, module: str, load: Load, inbox: RemoteInbox, tls: Certificates | None, *more: str) -> Measured:
    """One run of `bench.floor` or `bench.naive` over the events of `load`."""
    command = [
        sys.executable, "-m", module, "--bootstrap", rig.bootstrap, "--topic", rig.ingress,
        "--first", json.dumps(load.first), "--receiver", f"127.0.0.1:{inbox.port}", *more,
    ]  # fmt: skip
    command += ["--ca", str(tls.ca)] if tls else []
    return contest(module.removeprefix("bench."), command, rig, inbox, load.count)
