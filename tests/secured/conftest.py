"""A secured broker for each file of tests: some of them stop it."""

from collections.abc import AsyncIterator, Iterator

import pytest

from dev import stack as embedded
from dev.stack import Stack
from tests.secured.users import Secured


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("secured") / "dev"
    try:
        yield embedded.up(folder, secured=True)
    finally:
        embedded.down(folder)


@pytest.fixture
async def secured(stack: Stack) -> AsyncIterator[Secured]:
    async with Secured.on(stack) as made:
        assert isinstance(made, Secured)
        yield made
