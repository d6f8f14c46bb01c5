"""`headgate demo`: the embedded stack, a worker, far sides, tenants and events, and what becomes of them.

Owns the life of its processes and what is shown. What the tenants are, which events there are and what must become of
them is `dev/demo`'s.
"""

import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import datetime
from itertools import islice
from pathlib import Path
from statistics import quantiles
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Final, NoReturn

import click
import msgspec
from confluent_kafka import Producer
from prometheus_client.parser import text_string_to_metric_families
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cli.output import counted, say, told
from config.kafka import client_config
from config.settings import Settings
from dev import s3
from dev import stack as embedded
from dev.demo import checks
from dev.demo.checks import Letter, Seen
from dev.demo.events import DemoEvent, stream
from dev.demo.far_sides import FarSideError, FarSides, Held
from dev.demo.places import PLACES, STORES, TENANTS, Kind, new_secrets
from dev.inbox import ACCEPT, InboxError, Received, RemoteInbox

CONFIG: Final = Path(checks.__file__).with_name("config.yaml")
PREFIX: Final = "headgate-demo"
SEED: Final = 20261121
READY_TIMEOUT_S: Final = 60.0
END_TIMEOUT_S: Final = 40.0
ONCE_EVENTS: Final = 300
ONCE_RATE_PER_S: Final = 300.0
ONCE_TIMEOUT_S: Final = 90.0
FLUSH_TIMEOUT_S: Final = 30.0
POLL_S: Final = 0.1
REFRESH_S: Final = 0.5
PLAIN_EVERY_S: Final = 5.0
STUMBLE_EVERY_S: Final = 20.0
MEND_EVERY_S: Final = 30.0
SHOWN_FAULTS: Final = 5
TIMED_DELIVERIES: Final = 2000
LOG_TAIL_BYTES: Final = 3000


@click.command()
@click.option("--once", is_flag=True, help="No table: publish, wait, check everything, exit 0 only if all of it held.")
@click.option(
    "--events",
    type=click.IntRange(1),
    help=f"Publish so many, then only watch. With --once: {ONCE_EVENTS} if not given.",
)
@click.option(
    "--rate", type=click.FloatRange(0.1, 2000), default=20.0, show_default=True, help="Events a second, without --once."
)
@click.option("--keep", is_flag=True, help="Leave the broker running at the end, to look around in.")
@click.option(
    "--dir",
    "folder",
    envvar="HEADGATE_DEV_DIR",
    default=".headgate",
    show_default=True,
    show_envvar=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Where the embedded stack lies.",
)
@told
def command(once: bool, events: int | None, rate: float, keep: bool, folder: Path) -> None:
    """Tenants, events and an inbox on this machine, live, until Ctrl-C.

    Starts the embedded stack (unless it runs already), a worker, a local inbox for webhooks, an S3 and a BigQuery
    endpoint; applies ten tenants: one with a filter, one whose destination fails at first, one whose destination
    refuses, three whose names look alike, and one each with a bucket, a dataset and a topic; publishes a stream of
    events and shows what becomes of them.

    Everything the demo makes has names of its own in Kafka (prefix headgate-demo), so that it disturbs no tenants of
    yours, and ends with it: what it started is stopped, and a stack that it made is deleted, unless --keep.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
        signal.signal(signal.SIGHUP, _hung_up)
    try:
        with _running(folder, keep) as demo:
            if once:
                sys.exit(_once(demo, events or ONCE_EVENTS))
            try:
                _watch(demo, events, rate)
            except KeyboardInterrupt:
                say("ending")
            for store in STORES:
                if (fault := demo.far_sides.fault(store.kind)) is not None:
                    say(f"{store.tenant}: {fault}")
    except (embedded.StackError, InboxError, FarSideError, DemoFault) as fault:
        raise click.ClickException(str(fault)) from None
    if not once:
        _farewell(folder, keep)


class DemoFault(Exception):
    """The demo cannot go on. The message is for the user."""


def _interrupt(_signum: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _hung_up(_signum: int, _frame: FrameType | None) -> NoReturn:
    """The terminal was closed: nothing can be written to it any more, and what was started has to end all the same."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the shell tells it, and then the kernel
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    raise KeyboardInterrupt


# Its processes


class Demo:
    """A running demo: stack, inbox, worker, tenants applied; other far sides may still be starting."""

    def __init__(
        self,
        run: str,
        env: Mapping[str, str],
        inbox: RemoteInbox,
        far_sides: FarSides,
        worker: subprocess.Popen[bytes],
        log: Path,
    ) -> None:
        self.env = env
        self.inbox = inbox
        self.far_sides = far_sides
        self.settings = Settings.load(env)
        self.published: Counter[str] = Counter()
        self._worker = worker
        self._log = log
        self._stream = stream(run, SEED)
        self._refused: list[str] = []
        self._producer = Producer(
            client_config(
                {
                    **self.settings.kafka.confluent(),
                    "acks": "all",
                    "enable.idempotence": True,
                    "partitioner": "murmur2_random",
                    "linger.ms": 5,
                },
                self._refused,
            )
        )

    def publish(self, count: int) -> list[DemoEvent]:
        """The next events of the stream, handed to the producer. None for a far side that is not open yet."""
        topic = self.settings.topics.ingress(self.settings.vendors[0])
        closed = {store.tenant for store in STORES if not self.far_sides.is_open(store.kind)}
        events = list(islice((event for event in self._stream if event.tenant not in closed), count))
        for event in events:
            self._producer.produce(topic, event.value, event.tenant.encode())
            self.published[event.tenant] += 1
        self._producer.poll(0)
        return events

    def flush(self) -> None:
        """Returns once the broker has acknowledged all that was published."""
        if left := self._producer.flush(FLUSH_TIMEOUT_S):
            raise DemoFault(f"the broker has not acknowledged {counted(left, 'event')}. {' '.join(self._refused[-1:])}")

    def look(self) -> dict[str, list[Received]]:
        """What has arrived at each path since the last look."""
        self.assert_worker_runs()
        return {place.path: self.inbox.take(place.path) for place in PLACES}

    def dead(self) -> dict[str, int]:
        """Dead letters by tenant, from the worker's metrics."""
        counts: dict[str, int] = defaultdict(int)
        try:
            with urllib.request.urlopen(self._url("/metrics"), timeout=5) as answer:
                text = answer.read().decode()
        except OSError:
            return counts
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == "headgate_deliveries_total" and sample.labels["end"] == "dead":
                    counts[sample.labels["tenant"]] += int(sample.value)
        return counts

    def letters(self) -> dict[str, list[Letter]]:
        """Every tenant's dead letters, as `headgate dlq list` gives them."""
        found: dict[str, list[Letter]] = {}
        for tenant in TENANTS:
            listing = subprocess.run(
                [*_HEADGATE, "dlq", "list", "--tenant", tenant, "--limit", "100000", "--output", "json"],
                env=_environ(self.env),
                capture_output=True,
                check=False,
            )
            if listing.returncode != 0:
                raise DemoFault(f"`headgate dlq list --tenant {tenant}` failed: {listing.stderr.decode().strip()}")
            found[tenant] = msgspec.json.decode(listing.stdout, type=list[Letter])
        return found

    def start_replay(self, tenant: str) -> subprocess.Popen[bytes]:
        """`headgate dlq replay` of a tenant's letters, which ends when all are settled."""
        return subprocess.Popen(
            [*_HEADGATE, "dlq", "replay", "--tenant", tenant, "--wait", "--output", "json"],
            env=_environ(self.env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def end_replay(self, replay: subprocess.Popen[bytes]) -> int:
        """How many letters it has sent."""
        try:
            out, err = replay.communicate(timeout=ONCE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            replay.kill()
            raise DemoFault(f"a replay was not settled within {ONCE_TIMEOUT_S:.0f} s") from None
        if replay.returncode != 0:
            raise DemoFault(f"`headgate dlq replay` failed: {err.decode().strip()}")
        return msgspec.json.decode(out, type=_Replayed).replayed

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not self._ready():
            self.assert_worker_runs()
            if time.monotonic() > deadline:
                raise DemoFault(
                    f"the worker was not ready within {READY_TIMEOUT_S:.0f} s; the end of its log:\n{self.log()}"
                )
            time.sleep(POLL_S)

    def assert_worker_runs(self) -> None:
        if (code := self._worker.poll()) is not None:
            raise DemoFault(f"the worker ended by itself (exit code {code}); the end of its log:\n{self.log()}")

    def log(self) -> str:
        return self._log.read_text(errors="replace")[-LOG_TAIL_BYTES:]

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(self._url("/readyz"), timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:  # not listening yet, or 503
            return False

    def _url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.env['HEADGATE_HTTP_PORT']}{path}"


class _Replayed(msgspec.Struct):
    replayed: int


# the very interpreter that runs this, whatever is on the PATH
_HEADGATE: Final = (sys.executable, "-m", "cli.main")


@contextmanager
def _running(folder: Path, keep: bool) -> Iterator[Demo]:
    """Everything started; on the way out all of it ended, in the reverse order."""
    with ExitStack() as cleanup:
        before = embedded.status(folder)
        if not before.ready and not keep:
            # data that were there before stay; what only this demo has made goes
            cleanup.callback(embedded.down, folder, keep=before.exists)
        home = Path(cleanup.enter_context(TemporaryDirectory(prefix="headgate-demo-")))
        run = secrets.token_hex(3)
        far_sides = FarSides(home, run)
        cleanup.callback(far_sides.close)
        say("starting S3 and BigQuery")
        far_sides.start()  # first: the latter takes longer than all else
        say("starting Kafka and Redis" if not before.ready else f"using the stack that runs in {folder}")
        stack = embedded.up(folder, say=say)
        far_sides.start_topic(stack.kafka_bootstrap)
        inbox = cleanup.enter_context(RemoteInbox.spawn())
        env = {
            **stack.settings(),
            "HEADGATE_PREFIX": os.environ.get("HEADGATE_PREFIX", PREFIX),
            "HEADGATE_EGRESS_ALLOW": "127.0.0.0/8",
            "HEADGATE_BIGQUERY_ENDPOINT": far_sides.dataset.endpoint,
            "HEADGATE_WORKER_ID": "demo-0",
            "HEADGATE_HTTP_PORT": str(_free_port()),
            "HEADGATE_TENANT_LABEL": "tenant",
            "HEADGATE_LOG_FORMAT": "json",
            "TMPDIR": str(home),
        }
        theirs = new_secrets()
        for place in PLACES:
            inbox.script(place.path, place.script, secrets=[theirs[place.secret]])
        say(f"applying {CONFIG.name}: {len(TENANTS)} tenants")
        text = CONFIG.read_text()
        for name, value in {
            "INBOX/": inbox.url("/"),
            "S3URL": s3.url(far_sides.bucket.port),
            "KAFKA": stack.kafka_bootstrap,
            "RUN": run,
        }.items():
            text = text.replace(name, value)
        _apply({**env, **theirs}, text)
        say("starting a worker")
        log = home / "worker.log"
        worker = _start_worker(env, log)
        cleanup.callback(_end_worker, worker)
        demo = Demo(run, env, inbox, far_sides, worker, log)
        demo.wait_until_ready()
        yield demo


def _apply(env: Mapping[str, str], text: str) -> None:
    # a process of its own can be interrupted at any moment; librdkafka within ours could not
    applied = subprocess.run(
        [*_HEADGATE, "apply", "-f", "-"],
        input=text,
        env=_environ(env),
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,
    )
    if applied.returncode != 0:
        raise DemoFault(f"{CONFIG.name} could not be applied: {applied.stderr.strip()}")


def _environ(env: Mapping[str, str]) -> dict[str, str]:
    """Our environment with the demo's settings and nobody else's."""
    return {**{name: value for name, value in os.environ.items() if not name.startswith("HEADGATE_")}, **env}


def _start_worker(env: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as out:
        # a session of its own: Ctrl-C is for us, who end the worker in order
        return subprocess.Popen(
            [*_HEADGATE, "worker"],
            env=_environ(env),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )


def _end_worker(worker: subprocess.Popen[bytes]) -> None:
    worker.terminate()
    try:
        worker.wait(END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()
    except KeyboardInterrupt:  # asked twice: at once
        worker.kill()
        worker.wait()
        raise


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --once


def _once(demo: Demo, count: int) -> int:
    """Publish, wait until everything has arrived, check. The exit code."""
    demo.far_sides.wait_until_open()
    say(f"publishing {counted(count, 'event')}")
    began = time.monotonic()
    published: list[DemoEvent] = []
    for number in range(count):
        published += demo.publish(1)
        time.sleep(max(0.0, began + (number + 1) / ONCE_RATE_PER_S - time.monotonic()))
    demo.flush()
    say("waiting until all of them have come to an end")
    received: dict[str, list[Received]] = {place.path: [] for place in PLACES}
    stored: dict[Kind, list[Held]] = {store.kind: [] for store in STORES}
    deadline = time.monotonic() + ONCE_TIMEOUT_S
    while True:
        for path, got in demo.look().items():
            received[path] += got
        _take_stored(demo, stored)
        late = time.monotonic() > deadline
        if late or (checks.complete(published, received) and checks.all_stored(published, stored)):
            # an answer of 422 is a moment ahead of its dead letter
            before = Seen(received, demo.letters())
            results = checks.check(published, before)
            if late or all(result.held for result in results):
                break
        time.sleep(REFRESH_S)
    if not late:
        results += _mended(demo, published, before)
        _take_stored(demo, stored)  # what came twice, the second time last
    results += checks.check_stored(published, stored)
    for result in results:
        click.echo(f"{'ok    ' if result.held else 'FAILED'} {result.promise} ({result.count} checked)")
        for fault in result.faults[:SHOWN_FAULTS]:
            click.echo(f"         {fault}")
        if len(result.faults) > SHOWN_FAULTS:
            click.echo(f"         … and {len(result.faults) - SHOWN_FAULTS} more")
    held = all(result.held for result in results)
    requests = sum(map(len, received.values()))
    held_there = sum(map(len, stored.values()))
    click.echo(
        f"{'all held' if held else 'NOT all held'}: {counted(count, 'event')} of {len(TENANTS)} tenants, "
        f"{counted(requests, 'request')}, "
        f"{counted(held_there, 'event')} in bucket, dataset and topic, {time.monotonic() - began:.1f} s"
    )
    if not held:
        say(f"the end of the worker's log:\n{demo.log()}")
    return 0 if held else 1


def _take_stored(demo: Demo, stored: Mapping[Kind, list[Held]]) -> None:
    for kind, come in demo.far_sides.take_all().items():
        stored[kind] += come


def _mended(demo: Demo, published: Sequence[DemoEvent], before: Seen) -> list[checks.Check]:
    """The destinations that refused accept from now on, and their letters are replayed."""
    say("mending what refused, and replaying its dead letters")
    for place in PLACES:
        if place.dead:
            demo.inbox.script(place.path, ACCEPT)
            demo.end_replay(demo.start_replay(place.tenant))
    return checks.check_mended(published, before, Seen(demo.look(), demo.letters()))


# The live table


class Row(msgspec.Struct, frozen=True):
    """Times are from `occurredAt` to the attempt that was accepted, in ms, over the last deliveries; of a bucket, a
    dataset or a topic to the moment in which it was read and the event was there."""

    tenant: str
    published: int
    delivered: int
    retrying: int | None
    """None: cannot be seen from the far side."""
    dead: int
    p50_ms: float | None
    p99_ms: float | None
    note: str


class Tally:
    """What has become of one tenant's deliveries, kept up from look to look."""

    def __init__(self) -> None:
        self.failing: set[str] = set()
        """Answered, but never well; dead letters among them."""
        self.ages_ms: deque[float] = deque(maxlen=TIMED_DELIVERIES)

    def take(self, request: Received) -> None:
        if not 200 <= request.status < 300:
            self.failing.add(request.webhook_id)
            return
        self.failing.discard(request.webhook_id)
        happened = datetime.fromisoformat(msgspec.json.decode(request.body, type=_Happened).occurredAt)
        self.ages_ms.append(request.arrived_at_ms - happened.timestamp() * 1000)


class Stored:
    """What a bucket, a dataset or a topic holds of one tenant's events, kept up from look to look."""

    def __init__(self) -> None:
        self.delivered = 0
        self.ages_ms: deque[float] = deque(maxlen=TIMED_DELIVERIES)
        self._under_way_ms: dict[str, float] = {}

    def publish(self, event: DemoEvent) -> None:
        self._under_way_ms[event.id] = time.time() * 1000

    def take(self, come: Sequence[Held]) -> None:
        for one in come:
            if (since_ms := self._under_way_ms.pop(one.id, None)) is not None:
                self.delivered += 1
                self.ages_ms.append(time.time() * 1000 - since_ms)


class _Happened(msgspec.Struct):
    occurredAt: str


class Mending:
    """The places that refuse, mended every so often: they accept until their letters are replayed and settled."""

    def __init__(self, demo: Demo) -> None:
        self._demo = demo
        self._replays: dict[str, subprocess.Popen[bytes]] = {}
        self._mended = time.monotonic()
        self.replayed: Counter[str] = Counter()

    def turn(self) -> None:
        """Begins and ends what is due; does not wait."""
        for place in PLACES:
            replay = self._replays.get(place.path)
            if replay is not None and replay.poll() is not None:
                del self._replays[place.path]
                self.replayed[place.tenant] += self._demo.end_replay(replay)
                self._demo.inbox.script(place.path, place.script)
        if not self._replays and time.monotonic() - self._mended >= MEND_EVERY_S:
            self._mended = time.monotonic()
            for place in PLACES:
                if place.dead:
                    self._demo.inbox.script(place.path, ACCEPT)
                    self._replays[place.path] = self._demo.start_replay(place.tenant)

    def end(self) -> None:
        for replay in self._replays.values():
            replay.kill()
            replay.communicate()


def _watch(demo: Demo, limit: int | None, rate_per_s: float) -> None:
    """Publish at the rate and show the table until Ctrl-C."""
    console = Console()
    tallies = {place.tenant: Tally() for place in PLACES}
    stored = {store.tenant: Stored() for store in STORES}
    kept = {store.kind: stored[store.tenant] for store in STORES}
    began = time.monotonic()
    looked = shown = began - PLAIN_EVERY_S
    stumbled = began
    mending = Mending(demo)
    with ExitStack() as cleanup:
        cleanup.callback(mending.end)
        screen = cleanup.enter_context(
            Live(console=console, auto_refresh=False) if console.is_terminal else nullcontext()
        )
        while True:
            due = int((time.monotonic() - began) * rate_per_s) + 1
            for event in demo.publish(max(0, min(due, limit or due) - demo.published.total())):
                if event.tenant in stored:
                    stored[event.tenant].publish(event)
            if time.monotonic() - stumbled >= STUMBLE_EVERY_S:
                stumbled = time.monotonic()
                for place in PLACES:
                    if place.failures:
                        demo.inbox.script(place.path, place.script)  # counts its failures from the start
            mending.turn()
            if time.monotonic() - looked >= REFRESH_S:
                looked = time.monotonic()
                arrived = demo.look()
                for place in PLACES:
                    for request in arrived[place.path]:
                        tallies[place.tenant].take(request)
                for kind, come in demo.far_sides.take_done().items():
                    kept[kind].take(come)
                rows = _rows(demo, tallies, stored, mending.replayed)
                table = live_table(rows, demo.published.total())
                if screen is not None:
                    screen.update(Group(table, Text(), *try_next(demo.env)), refresh=True)
                elif looked - shown >= PLAIN_EVERY_S:
                    shown = looked
                    console.print(table)
            time.sleep(POLL_S)


def _rows(
    demo: Demo, tallies: Mapping[str, Tally], stored: Mapping[str, Stored], replayed: Mapping[str, int]
) -> list[Row]:
    ended = demo.dead()
    dead = {tenant: max(0, ended[tenant] - replayed.get(tenant, 0)) for tenant in tallies}
    paths = demo.inbox.stats().paths
    rows = []
    for tenant, tally in tallies.items():
        rows.append(
            Row(
                tenant,
                demo.published[tenant],
                sum(paths[place.path].accepted for place in PLACES if place.tenant == tenant),
                max(0, len(tally.failing) - dead[tenant]),
                dead[tenant],
                *_cuts(tally.ages_ms),
                _NOTES[tenant],
            )
        )
    for store in STORES:
        kept = stored[store.tenant]
        note = f"to {store.shown}" if demo.far_sides.is_open(store.kind) else f"{store.shown} starts"
        if demo.far_sides.fault(store.kind) is not None:
            note = f"no {store.shown}"
        rows.append(
            Row(
                store.tenant,
                demo.published[store.tenant],
                kept.delivered,
                None,
                ended[store.tenant],
                *_cuts(kept.ages_ms),
                note,
            )
        )
    return rows


def _cuts(ages_ms: Sequence[float]) -> tuple[float | None, float | None]:
    """Median and 99th percentile."""
    if len(ages_ms) < 2:
        return None, None
    cuts = quantiles(ages_ms, n=100)
    return cuts[49], cuts[98]


# beside the numbers of a terminal of 80 columns
_NOTES: Final = {
    "acme": "gets everything",
    "acme2": "begins alike",
    "ACME": "differs in case",
    "globex": "totals over 100",
    "hooli": "two destinations",
    "initech": "fails at times",
    "umbrella": "refuses, is mended",
}


def live_table(rows: Sequence[Row], published: int) -> Table:
    title = f"headgate demo: {counted(published, 'event')} published"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("tenant", no_wrap=True)
    for name in ("in", "delivered", "retrying", "dead", "p50", "p99"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")  # the one that gives way in a narrow terminal
    for row in rows:
        table.add_row(
            row.tenant,
            str(row.published),
            Text(str(row.delivered), style="green" if row.delivered else ""),
            Text("-" if row.retrying is None else str(row.retrying), style="yellow" if row.retrying else ""),
            Text(str(row.dead), style="red" if row.dead else ""),
            _duration(row.p50_ms),
            _duration(row.p99_ms),
            Text(row.note, style="dim", no_wrap=True, overflow="ellipsis"),
        )
    return table


def _duration(value_ms: float | None) -> str:
    if value_ms is None:
        return "-"
    return f"{value_ms:.0f} ms" if value_ms < 1000 else f"{value_ms / 1000:.1f} s"


_FINDS: Final = ("HEADGATE_DEV_DIR", "HEADGATE_PREFIX")


def try_next(env: Mapping[str, str]) -> list[Text]:
    """Three commands for a second terminal, with what they need to find this demo."""
    shown = _headgate()
    event = '{"eventType":"order.placed","payload":{"total":500,"country":"CH"}}'
    return [
        Text("Try, in another terminal:", style="bold"),
        *(Text(f"  export {name}={shlex.quote(env[name])}", style="dim") for name in _FINDS),
        Text(f"  {shown} dlq list --tenant umbrella"),
        Text(f"  {shown} get routes --tenant globex"),
        Text(f"  echo '{event}' |"),  # in two lines: a terminal of 80 columns cuts what is longer
        Text(f"    {shown} publish --tenant globex -f -"),
        Text("Ctrl-C ends the demo.", style="dim"),
    ]


def _farewell(folder: Path, keep: bool) -> None:
    """The three commands to try next."""
    shown = _headgate()
    if keep:
        click.echo(f"The stack in {folder} still runs. Try next:")
        click.echo(f"  HEADGATE_PREFIX={os.environ.get('HEADGATE_PREFIX', PREFIX)} {shown} dlq list --tenant umbrella")
        click.echo(f"  {shown} apply --help")
        click.echo(f"  {shown} dev down")
        return
    click.echo("Nothing is left running that the demo started. Try next:")
    click.echo(f"  {shown} dev up          a Kafka and a Redis of your own")
    click.echo(f"  {shown} apply --help    your tenants, to your own endpoint")
    click.echo(f"  {shown} demo --once     the demo again, with every delivery checked")


def _headgate() -> str:
    """How the user can call us."""
    if shutil.which("headgate"):
        return "headgate"
    here = Path(sys.argv[0])
    return os.path.relpath(here) if here.name == "headgate" else f"{os.path.relpath(sys.executable)} -m cli.main"
