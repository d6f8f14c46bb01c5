"""Fixtures shared by all tests."""

import signal
from collections.abc import AsyncIterator

import pytest
from hypothesis import HealthCheck, settings

from dev.stack import Stack
from tests.deployment import Deployment
from tests.report import pytest_addoption as pytest_addoption
from tests.report import pytest_configure as pytest_configure
from tests.report import report as report
from tests.stack import stack as stack

# a busy machine is no reason to fail: examples take as long as they take
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

# what is started in the background ignores these, and every command that a test starts and signals would inherit it
for number, handler in {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}.items():
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)


@pytest.fixture
async def deployment(stack: Stack) -> AsyncIterator[Deployment]:
    """A deployment of its own on the session's stack: own prefix, own inbox; its workers end with the test."""
    async with Deployment.on(stack) as made:
        yield made
