"""A worker's question for its own rights, asked by a process of its own: `python -m streams.rights`.

librdkafka ends the whole process where an admin request is open when the broker goes (its issue 4605, open): a failed
assertion. So what is asked again and again, while brokers come and go, is asked where that hurts nobody.
"""

import asyncio
import os
import sys
from collections.abc import Sequence
from typing import Final

import msgspec
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from config.acls import Acl, acls_of
from config.kafka import client_config
from config.rights import lacking
from config.settings import Settings

REQUEST_TIMEOUT_S: Final = 5.0
LONGEST_S: Final = 30.0


def needed(settings: Settings) -> tuple[Acl, ...]:
    """What a worker with these settings needs."""
    return acls_of("worker", settings.topics, settings.vendors)


async def ask() -> Sequence[Acl] | None:
    """What the user of this process's environment lacks; None where the broker did not say."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", __name__, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        async with asyncio.timeout(LONGEST_S):
            said, _ = await child.communicate()
    except TimeoutError:
        return None
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    return msgspec.json.decode(said, type=list[Acl]) if child.returncode == 0 else None


def main() -> int:
    settings = Settings.load(os.environ)
    try:
        found = lacking(AdminClient(client_config(settings.kafka.confluent())), needed(settings), REQUEST_TIMEOUT_S)
    except KafkaException:  # a broker that is away is told by others
        return 1
    sys.stdout.buffer.write(msgspec.json.encode(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
