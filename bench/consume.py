"""What an event costs from the broker to the agent and back into the commit, and nothing else (ADR 0003).

`python -m bench.consume` reads a backlog through the safe transport; `--rate 2000` measures a trickle, with the time
from append to agent; `--rate 0 --seconds 10 --count 0` an idle worker. CPU is that of the whole reading process.
"""

import argparse
import asyncio
import multiprocessing
import time
from pathlib import Path
from typing import Any, Final

from bench import events
from bench.rig import Rig, make_topic, rig
from streams.transport import Fetching, fetch_of, safe_app

PERCENTILES: Final = (50, 99)
TRICKLE_WARM_UP: Final = 1000  # events before the measuring begins


async def read(on: Rig, topic: str, count: int, skip: int, fetching: Fetching, idle_s: float) -> str:
    """Take and settle events, measured from the one numbered `skip` to the last one's commit."""
    app = safe_app(
        group=f"{on.prefix}.consume",
        bootstrap=on.bootstrap,
        datadir=on.folder / "faust",
        max_record_bytes=2**21,
        fetching=fetching,
    )
    taken = fetches = 0
    ages_ms: list[int] = []
    begin: tuple[float, float] | None = None
    complete = asyncio.Event()

    @app.reads(topic)
    async def take(stream: Any) -> None:
        nonlocal taken, fetches, begin
        async for event in stream.noack().events():
            source, records = fetch_of(event)
            now_ms = time.time() * 1000
            if begin is None and taken >= skip:
                begin = time.process_time(), time.monotonic()
            if begin is not None:
                ages_ms.extend(int(now_ms - record.timestamp) for record in records)
                fetches += 1
            taken += len(records)
            app.reader.settled(source, [record.offset for record in records])
            if taken >= count:
                complete.set()

    await app.start()
    if not count:
        begin = time.process_time(), time.monotonic()
        await asyncio.sleep(idle_s)
    else:
        await complete.wait()
        await app.reader.drain(10.0)
    assert begin is not None
    cpu_s, wall_s = time.process_time() - begin[0], time.monotonic() - begin[1]
    await app.stop()
    if not ages_ms:
        return f"idle: {cpu_s / wall_s * 1000:.1f} ms of CPU a second"
    ages_ms.sort()
    ages = ", ".join(f"p{p} {ages_ms[len(ages_ms) * p // 100]} ms" for p in PERCENTILES)
    done = len(ages_ms)
    return (
        f"{done} events, {done / wall_s:,.0f}/s, {cpu_s / done * 1e6:.2f} us of CPU each "
        f"({done / cpu_s:,.0f} per CPU-s), "
        f"{done / fetches:.1f} events a fetch; append to agent: {ages}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="folder of a running stack; its own otherwise")
    parser.add_argument("--count", type=int, default=300_000)
    parser.add_argument("--rate", type=float, default=0.0, help="events a second; 0: as a backlog")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long an idle worker is watched")
    parser.add_argument("--min-bytes", type=int, default=Fetching().min_bytes)
    parser.add_argument("--max-wait-ms", type=int, default=Fetching().max_wait_ms)
    parser.add_argument("--gather-ms", type=float, default=Fetching().gather_s * 1000)
    asked = parser.parse_args()
    fetching = Fetching(min_bytes=asked.min_bytes, max_wait_ms=asked.max_wait_ms, gather_s=asked.gather_ms / 1000)
    with rig(asked.dir) as on:
        make_topic(on, on.ingress)
        writing = multiprocessing.get_context("spawn").Process(
            target=events.produce,
            args=(on.bootstrap, on.ingress, "consume", asked.count),
            kwargs={"rate_per_s": asked.rate},
        )
        writing.start()
        if not asked.rate:
            writing.join()
        skip = min(TRICKLE_WARM_UP, asked.count // 10) if asked.rate else 0
        print(asyncio.run(read(on, on.ingress, asked.count, skip, fetching, asked.seconds)))
        writing.join()


if __name__ == "__main__":
    main()
