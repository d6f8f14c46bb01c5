"""A member of the retry group as a process of its own, for the tests of the pump.

`python -m tests.streams.pump_process OPTIONS` (JSON, see `Options`) appends one line for each record that it hands over
to `log`, flushed before the record is settled: what stands there is what a far side would have got. What must move is
written to the partition of its tier on the real broker, and settled once that is acknowledged.
"""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from confluent_kafka import Producer
from msgspec import Struct
from msgspec import json as msgjson

from routing.policy import tier_for
from streams.pump import Due, Pump


class Options(Struct, frozen=True):
    bootstrap: str
    group: str
    pattern: str
    log: str
    tiers_s: list[float]
    instance_id: str | None = None
    work_s: float = 0.0  # between the line in the log and the settling
    max_bytes: int = 64 * 2**20
    session_timeout_s: float = 6.0
    drain_s: float = 5.0


async def run(options: Options, log: TextIO) -> int:
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[BaseException | None] = loop.create_future()
    producer = Producer({"bootstrap.servers": options.bootstrap, "acks": "all", "linger.ms": 1})
    tiers_ms = [int(tier * 1000) for tier in options.tiers_s]
    working: set[asyncio.Task[None]] = set()

    def write(what: str, **fields: Any) -> None:
        log.write(json.dumps({"what": what, "at_ms": time.time() * 1000, "pid": os.getpid(), **fields}) + "\n")

    def end(reason: BaseException | None = None) -> None:
        if not ended.done():
            ended.set_result(reason)

    async def work(items: Sequence[Due]) -> None:
        await asyncio.sleep(options.work_s)
        for item in items:
            item.source.settled((item.offset,))

    async def on_due(items: Sequence[Due]) -> None:
        for item in items:
            record = item.record
            write(
                "due",
                value=(record.value or b"").decode(),
                due_ms=item.due_ms,
                place=[record.topic, record.partition, record.offset],
            )
        log.flush()
        task = asyncio.create_task(work(list(items)))
        working.add(task)
        task.add_done_callback(working.discard)

    async def on_move(items: Sequence[Due]) -> None:
        now_ms = int(time.time() * 1000)
        for item in items:
            record = item.record
            write("moved", value=(record.value or b"").decode(), place=[record.topic, record.partition, record.offset])
            producer.produce(
                record.topic,
                record.value,
                partition=tier_for(item.due_ms - now_ms, tiers_ms),
                headers=list(record.headers),
                on_delivery=lambda error, _, item=item: (
                    error is None and loop.call_soon_threadsafe(item.source.settled, (item.offset,))
                ),
            )
        log.flush()
        await loop.run_in_executor(None, producer.flush)

    pump = Pump(
        connection={"bootstrap_servers": options.bootstrap},
        group=options.group,
        pattern=options.pattern,
        tiers_s=options.tiers_s,
        on_due=on_due,
        on_move=on_move,
        on_fatal=end,
        instance_id=options.instance_id,
        max_bytes=options.max_bytes,
        commit_interval_s=0.2,
        session_timeout_s=options.session_timeout_s,
    )
    loop.add_signal_handler(signal.SIGTERM, end)
    await pump.start()
    write("started")
    log.flush()
    reason = await ended
    if reason is not None:
        write("fatal", reason=str(reason))
        log.flush()
        return 1
    whole = await pump.drain(options.drain_s)
    await pump.close()
    write("stopped", whole=whole)
    log.flush()
    return 0


def main() -> int:
    options = msgjson.decode(sys.argv[1], type=Options)
    with Path(options.log).open("a", encoding="utf-8") as log:
        return asyncio.run(run(options, log))


if __name__ == "__main__":
    sys.exit(main())
