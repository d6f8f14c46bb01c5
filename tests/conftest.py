"""Fixtures shared by all tests."""

from collections.abc import AsyncIterator

import pytest

from dev.stack import Stack
from tests.deployment import Deployment
from tests.stack import stack as stack


@pytest.fixture
async def deployment(stack: Stack) -> AsyncIterator[Deployment]:
    """A deployment of its own on the session's stack: own prefix, own inbox; its workers end with the test."""
    async with Deployment.on(stack) as made:
        yield made
