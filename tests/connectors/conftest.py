"""A door that lets loopback through, and the far side's authority."""

import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trustme

from connectors.egress import Egress
from tests.connectors.post import LOOPBACK, Clock
from tests.contract.farsides.kafka import KafkaFarSide
from tests.contract.farsides.s3 import S3FarSide


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="session")
def authority_file(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("authority") / "ca.pem"
    authority.cert_pem.write_to_path(file)
    return file


@pytest.fixture
async def egress(authority_file: Path) -> AsyncIterator[Egress]:
    made = Egress(LOOPBACK, ca_file=str(authority_file))
    yield made
    made.close()


@pytest.fixture(scope="session")
def server_tls(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost", "127.0.0.1").configure_cert(context)
    return context


@pytest.fixture
async def far() -> AsyncIterator[KafkaFarSide]:
    """A Kafka cluster of a tenant's that does as it is told."""
    made = KafkaFarSide()
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
async def store() -> AsyncIterator[S3FarSide]:
    """An S3 of a tenant's that does as it is told."""
    made = S3FarSide()
    await made.start()
    yield made
    await made.stop()
