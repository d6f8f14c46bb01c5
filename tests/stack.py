"""The session's embedded Kafka and Redis, as a fixture.

One stack serves a whole test run. For a quick inner loop set `HEADGATE_TEST_STACK_DIR` to the folder of a stack that
is up already (`headgate dev up`): it is used as it is and left running.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dev import stack as embedded
from dev.stack import Stack


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    if named := os.environ.get("HEADGATE_TEST_STACK_DIR"):
        running = embedded.stack(Path(named))
        if running is None:
            pytest.exit(f"HEADGATE_TEST_STACK_DIR={named}: no stack is ready there, see `headgate dev status`", 2)
        yield running
        return
    folder = tmp_path_factory.mktemp("stack") / "dev"
    try:
        yield embedded.up(folder)
    finally:
        embedded.down(folder)
