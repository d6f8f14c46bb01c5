"""A small worker process for the tests of the transport, and the example of how an application runs on it.

`python worker_process.py OPTIONS` (JSON, see `Options`) writes one JSON line per happening to `log`, flushed at once:
what it did before a SIGKILL can be read afterwards. `stock` runs the same agent on Faust as it comes.
"""

import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import faust
from msgspec import Struct
from msgspec import json as msgjson

from streams import fetching
from streams.transport import Fetching, Hooks, Record, Source, fetch_of, safe_app


class Options(Struct, frozen=True):
    bootstrap: str
    group: str
    topics: list[str]
    log: str
    datadir: str
    stock: bool = False
    instance_id: str | None = None
    hold: list[tuple[int, int]] = []  # (partition, offset): handed over, not settled before SIGUSR1
    stall: bool = False  # after its first fetch the agent takes nothing more before SIGUSR1
    raise_on: bytes = b""  # the agent raises on a fetch with this value (base64 in JSON)
    work_s: float = 0.0  # each fetch takes that long before it is settled
    commit_interval_s: float = 0.2
    commit_timeout_s: float = 5.0
    metadata_max_age_s: float = 30.0
    drain_s: float = 5.0
    session_timeout_s: float = 10.0
    revoke_grace_s: float = 1.0
    buffer_events: int = 16
    max_records: int = 1000


class Journal:
    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def write(self, what: str, **fields: Any) -> None:
        self._file.write(json.dumps({"what": what, "at": time.time(), "pid": os.getpid(), **fields}) + "\n")
        self._file.flush()


async def run_safe(options: Options, journal: Journal) -> None:
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[BaseException | None] = loop.create_future()

    def end(reason: BaseException | None = None) -> None:
        if not ended.done():
            ended.set_result(reason)

    app = safe_app(
        group=options.group,
        bootstrap=options.bootstrap,
        datadir=Path(options.datadir),
        max_record_bytes=4 * 2**20,
        instance_id=options.instance_id,
        commit_interval_s=options.commit_interval_s,
        commit_timeout_s=options.commit_timeout_s,
        metadata_max_age_s=options.metadata_max_age_s,
        session_timeout_s=options.session_timeout_s,
        revoke_grace_s=options.revoke_grace_s,
        fetching=Fetching(buffer_events=options.buffer_events, max_records=options.max_records),
        hooks=Hooks(
            on_assigned=lambda whole: journal.write("assigned", partitions=sorted([*whole])),
            on_revoked=lambda whole: journal.write("revoked", partitions=sorted([*whole])),
            on_fatal=end,
        ),
    )
    held: list[tuple[Source, int]] = []
    tasks: set[asyncio.Task[None]] = set()

    go_on = asyncio.Event()

    def release() -> None:
        go_on.set()
        for source, offset in held:
            app.reader.settled(source, [offset])
        journal.write("released", offsets=[[source.partition, offset] for source, offset in held])

    async def work(source: Source, records: list[Record]) -> None:
        await asyncio.sleep(options.work_s)
        done = []
        for record in records:
            if (record.partition, record.offset) in options.hold:
                held.append((source, record.offset))
            else:
                done.append(record.offset)
        journal.write("settled", partition=source.partition, offsets=done)
        app.reader.settled(source, done)

    async def take(stream: Any) -> None:
        async for event in stream.noack().events():
            fetch = fetch_of(event)
            journal.write(
                "taken",
                topic=fetch.source.topic,
                partition=fetch.source.partition,
                generation=fetch.source.generation,
                offsets=[record.offset for record in fetch.records],
                values=[(record.value or b"").decode()[:40] for record in fetch.records],
                keys=[record.key if record.key is None else record.key.decode() for record in fetch.records],
            )
            if options.raise_on in [record.value for record in fetch.records]:
                raise ZeroDivisionError("a bug")
            task = asyncio.create_task(work(fetch.source, list(fetch.records)))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            if options.stall:
                await go_on.wait()

    for topic in options.topics:
        app.reads(topic)(take)

    loop.add_signal_handler(signal.SIGUSR1, release)
    loop.add_signal_handler(signal.SIGTERM, end)
    await app.start()
    journal.write("started")
    reason = await ended
    loop.add_signal_handler(signal.SIGTERM, lambda: os._exit(1))  # the second signal ends at once
    if reason is not None:
        journal.write("fatal", reason=str(reason))
        print(reason, file=sys.stderr, flush=True)
        os._exit(1)  # a crashed application does not always stop when it is asked
    drained = await app.reader.drain(options.drain_s)
    journal.write("drained", whole=drained)
    await app.stop()
    journal.write("stopped")


def run_stock(options: Options, journal: Journal) -> None:
    """Faust as it comes, acknowledging by hand as its manual says, with one event that is not acknowledged."""
    for module, name, theirs, _ in fetching.REPLACED:
        setattr(module, name, theirs)
    app = faust.App(
        options.group,
        broker=f"kafka://{options.bootstrap}",
        store="memory://",
        web_enabled=False,
        topic_disable_leader=True,
        topic_allow_declare=False,
        table_standby_replicas=0,
        stream_wait_empty=False,
        consumer_auto_offset_reset="earliest",
        consumer_group_instance_id=options.instance_id,
        broker_commit_interval=0.2,
        broker_session_timeout=options.session_timeout_s,
        broker_heartbeat_interval=3,
        datadir=options.datadir,
    )

    async def take(stream: Any) -> None:
        async for event in stream.noack().events():
            at = event.message
            journal.write("taken", topic=at.topic, partition=at.partition, offsets=[at.offset])
            if (at.partition, at.offset) not in options.hold:
                event.ack()

    for number, topic in enumerate(options.topics):
        source = app.topic(topic, key_type=bytes, value_type=bytes, key_serializer="raw", value_serializer="raw")
        app.agent(source, name=f"take-{number}")(take)
    sys.argv = ["faust", "worker", "-l", "warn", "--without-web"]
    app.main()


def main() -> None:
    options = msgjson.decode(sys.argv[1], type=Options)
    journal = Journal(Path(options.log))
    if options.stock:
        run_stock(options, journal)
        return
    asyncio.run(run_safe(options, journal))


if __name__ == "__main__":
    main()
