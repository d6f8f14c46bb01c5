"""A stack of its own for the tests that stop, freeze and restart Kafka and Redis."""

from collections.abc import Iterator

import pytest

from dev import stack as embedded
from dev.stack import Stack


@pytest.fixture(scope="session")
def breakable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Started once for all of them; `up` before each use wakes and starts again what the test before left down."""
    folder = tmp_path_factory.mktemp("breakable") / "dev"
    try:
        yield embedded.up(folder)
    finally:
        embedded.down(folder)
