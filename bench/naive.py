"""The naive way: confluent-kafka and aiohttp, 64 in flight, manual commit, nothing else.

What most would write in an afternoon: no signature, no retry, no dedupe. One slow receiver stops all.
"""

import asyncio
import ssl
from typing import Any, Final

import aiohttp
import uvloop

from bench import source
from bench.source import Options

BATCH: Final = 500
WAIT_S: Final = 0.05


async def deliver(options: Options) -> None:
    tls = ssl.create_default_context(cafile=options.ca) if options.ca else True
    scheme = "https" if options.ca else "http"
    connector = aiohttp.TCPConnector(limit=options.in_flight, ssl=tls)
    room = asyncio.Semaphore(options.in_flight)
    consumer = source.consumer(options, "bench-naive")
    loop = asyncio.get_running_loop()
    async with aiohttp.ClientSession(connector=connector) as session:

        async def post(message: Any) -> None:
            url = f"{scheme}://{options.host}:{options.port}/{message.key().decode()}"
            headers = {
                "content-type": "application/json",
                "webhook-id": f"nve_{message.partition()}_{message.offset()}",
            }
            async with room, session.post(url, data=message.value(), headers=headers) as answer:
                await answer.read()
                answer.raise_for_status()

        while True:
            messages = await loop.run_in_executor(None, consumer.consume, BATCH, WAIT_S)
            if messages:
                await asyncio.gather(*map(post, messages))
                consumer.commit(asynchronous=True)


if __name__ == "__main__":
    chosen = source.options("confluent-kafka and aiohttp, 64 in flight, manual commit, nothing else.")
    runner = uvloop.run if chosen.uvloop else asyncio.run
    runner(deliver(chosen))
