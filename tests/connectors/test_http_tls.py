"""TLS: who is trusted, which versions, client certificates."""

import datetime
import ssl
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import trustme

from connectors.egress import Egress
from connectors.http.client import Target
from connectors.http.tls import Identity
from tests.connectors.post import LOOPBACK, aim, begin, post
from tests.connectors.receiver import OK, Peer, Receiver
from tests.connectors.until import until


def _serve(certificate: trustme.LeafCert) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


def _receiver(tls: ssl.SSLContext) -> Receiver:
    async def script(peer: Peer) -> None:
        await receiver.answer(peer)

    receiver = Receiver(script, tls)
    return receiver


async def test_a_verified_connection_is_kept_and_reused(egress: Egress, server_tls: ssl.SSLContext) -> None:
    async with _receiver(server_tls) as receiver:
        target = aim(egress, f"https://localhost:{receiver.port}/")
        for number in range(100):
            answer = await post(target, b"x" * number * 1000)
            assert (answer.status, answer.fault, answer.reused) == (200, "", number > 0)
        assert receiver.connections == 1


async def test_a_large_body_goes_through_tls_whole(egress: Egress, server_tls: ssl.SSLContext) -> None:
    async with _receiver(server_tls) as receiver:
        body = bytes(range(256)) * 20_000
        assert (await post(aim(egress, f"https://localhost:{receiver.port}/"), body)).status == 200
        assert receiver.requests[0].body == body


async def test_a_large_answer_over_tls_is_read_to_its_end(egress: Egress, server_tls: ssl.SSLContext) -> None:
    async def script(peer: Peer) -> None:
        for _ in range(3):
            await peer.request()
            await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 60000\r\n\r\n" + b"x" * 60000)

    async with Receiver(script, server_tls) as receiver:
        target = aim(egress, f"https://localhost:{receiver.port}/")
        assert [(await post(target)).reused for _ in range(3)] == [False, True, True]


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_tls_1_2_and_1_3_are_spoken(egress: Egress, authority: trustme.CA, version: ssl.TLSVersion) -> None:
    context = _serve(authority.issue_cert("localhost"))
    context.minimum_version = context.maximum_version = version
    async with _receiver(context) as receiver:
        target = aim(egress, f"https://localhost:{receiver.port}/")
        assert [(await post(target)).status for _ in range(3)] == [200] * 3
        assert receiver.connections == 1


def _expired(authority: trustme.CA) -> trustme.LeafCert:
    past = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    return authority.issue_cert("localhost", not_before=past, not_after=past + datetime.timedelta(days=1))


FAULTS = {
    "expired": (_expired, "certificate has expired"),
    "other name": (lambda authority: authority.issue_cert("other.example"), "Hostname mismatch"),
    "unknown authority": (lambda authority: trustme.CA().issue_cert("localhost"), "unable to get local issuer"),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_certificate_that_does_not_hold_is_refused_before_anything_is_sent(
    egress: Egress, authority: trustme.CA, fault: str
) -> None:
    make, words = FAULTS[fault]
    async with _receiver(_serve(make(authority))) as receiver:
        answer = await post(aim(egress, f"https://localhost:{receiver.port}/"))
        assert (answer.status, answer.fault, answer.step) == (0, "tls", "tls")
        assert words in answer.detail
        assert receiver.requests == []


async def test_an_authority_that_nobody_named_is_not_trusted(
    server_tls: ssl.SSLContext,
) -> None:
    """Control of the tests above: the same far side, trusted only because its authority was named."""
    egress = Egress(LOOPBACK)
    async with _receiver(server_tls) as receiver:
        assert (await post(aim(egress, f"https://localhost:{receiver.port}/"))).fault == "tls"
    egress.close()


async def test_tls_1_1_is_refused(egress: Egress, authority: trustme.CA) -> None:
    context = _serve(authority.issue_cert("localhost"))
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning):
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    async with _receiver(context) as receiver:
        answer = await post(aim(egress, f"https://localhost:{receiver.port}/"))
        assert (answer.fault, receiver.requests) == ("tls", [])


async def test_a_far_side_that_speaks_no_tls_is_a_tls_fault(egress: Egress) -> None:
    async def script(peer: Peer) -> None:
        await peer.send(b"HTTP/1.1 400 this is no TLS\r\ncontent-length: 0\r\n\r\n")
        await peer.gone()

    async with Receiver(script) as receiver:
        assert (await post(aim(egress, f"https://localhost:{receiver.port}/"))).fault == "tls"


async def test_a_far_side_that_closes_during_the_handshake_is_a_tls_fault(egress: Egress) -> None:
    async def script(peer: Peer) -> None:
        await peer.reader.read(10)
        peer.reset()

    async with Receiver(script) as receiver:
        answer = await post(aim(egress, f"https://localhost:{receiver.port}/"))
        assert (answer.fault, answer.step) == ("tls", "tls")


async def test_a_handshake_that_hangs_ends_at_the_timeout(egress: Egress) -> None:
    async def script(peer: Peer) -> None:
        await peer.gone()

    async with Receiver(script) as receiver:
        answer = await post(aim(egress, f"https://localhost:{receiver.port}/"), timeout_s=0.3)
        assert (answer.fault, answer.step) == ("timeout", "tls")
        assert egress.http.connections == 0


async def test_a_kept_tls_connection_that_the_far_side_closed_costs_nothing(
    egress: Egress, server_tls: ssl.SSLContext
) -> None:
    async def script(peer: Peer) -> None:
        receiver.requests.append(await peer.request())
        await peer.send(OK)

    async with Receiver(script, server_tls) as receiver:
        target = aim(egress, f"https://localhost:{receiver.port}/")
        for number in range(5):
            assert (await post(target, b"%d" % number)).status == 200
            await until(lambda: egress.http.connections == 0)
        assert [request.body for request in receiver.requests] == [b"%d" % n for n in range(5)]


# ---------------------------------------------------------------- client certificates


def _asking(authority: trustme.CA, asked_of: trustme.CA, versions: Sequence[ssl.TLSVersion] = ()) -> ssl.SSLContext:
    context = _serve(authority.issue_cert("localhost"))
    asked_of.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    for version in versions:
        context.maximum_version = version
    return context


def _identity(authority: trustme.CA) -> Identity:
    leaf = authority.issue_cert("client@acme.example")
    chain = b"".join(blob.bytes() for blob in leaf.cert_chain_pems)
    return Identity(chain.decode(), leaf.private_key_pem.bytes().decode())


async def _post_each_time(target: Target, times: int) -> list[int]:
    return [(await post(target)).status for _ in range(times)]


async def test_a_client_certificate_opens_a_door_that_is_closed_without(egress: Egress, authority: trustme.CA) -> None:
    clients = trustme.CA()
    async with _receiver(_asking(authority, clients)) as receiver:
        url = f"https://localhost:{receiver.port}/"
        assert await _post_each_time(aim(egress, url, identity=_identity(clients)), 3) == [200] * 3
        for other in (None, _identity(trustme.CA())):
            answer = await post(aim(egress, url, identity=other))
            assert (answer.status, answer.fault) in {(0, "tls"), (0, "reset")}
        assert len(receiver.requests) == 3


async def test_a_key_that_does_not_fit_its_certificate_is_the_destinations_fault(
    egress: Egress, authority: trustme.CA
) -> None:
    clients = trustme.CA()
    mixed = Identity(_identity(clients).certificate, _identity(clients).key)
    async with _receiver(_asking(authority, clients)) as receiver:
        answer = await post(aim(egress, f"https://localhost:{receiver.port}/", identity=mixed))
        assert (answer.fault, receiver.requests) == ("client_identity", [])


@pytest.fixture
def watched_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary files would go; empty at the end."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("watched_folder")
async def test_a_client_key_never_touches_a_file(egress: Egress, authority: trustme.CA) -> None:
    clients = trustme.CA()
    async with _receiver(_asking(authority, clients)) as receiver:
        waiting = begin(aim(egress, f"https://localhost:{receiver.port}/", identity=_identity(clients)))
        assert (await waiting).status == 200
