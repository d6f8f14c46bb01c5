"""`headgate worker` whose Redis has all the time it needs to answer: `python -m tests.patient_worker`.

A worker gives Redis 50 ms, and after that goes on for a second without it: what is sent twice then, a busy machine has
caused. So a test that counts exactly what the ledger stops runs this one.
"""

import os
import sys
from typing import Final

from msgspec.structs import replace

from config.settings import Settings
from streams.app import run_worker

REDIS_S: Final = 10.0


def main() -> None:
    settings = Settings.load(os.environ)
    sys.exit(run_worker(replace(settings, redis=replace(settings.redis, deadline_s=REDIS_S))))


if __name__ == "__main__":
    main()
