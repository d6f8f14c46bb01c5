"""The HTTP client against far sides that speak HTTP, if sometimes oddly."""

import asyncio
import contextlib
import errno
import socket

import pytest

from connectors.egress import Egress, open_socket
from connectors.http.answer import Answer
from connectors.http.client import ADDRESS_S, IDLE_S
from connectors.http.door import Address
from connectors.http.place import parse_url
from schemas.ids import ExternalId, TenantRef, Vendor
from tests.connectors.post import ACME, LOOPBACK, Clock, aim, begin, post
from tests.connectors.receiver import OK, Peer, Receiver, answering
from tests.connectors.until import until


async def test_a_thousand_deliveries_to_one_place_share_a_connection(egress: Egress) -> None:
    async with answering(OK) as receiver:
        target = aim(egress, f"http://127.0.0.1:{receiver.port}/in?key=1")
        for number in range(1000):
            answer = await post(target, b"%d" % number)
            assert (answer.status, answer.excerpt, answer.reused) == (200, b"ok", number > 0)
        assert receiver.connections == 1
        assert [request.body for request in receiver.requests] == [b"%d" % n for n in range(1000)]
        assert receiver.requests[0].line == "POST /in?key=1 HTTP/1.1"
        assert receiver.requests[0].headers["host"] == f"127.0.0.1:{receiver.port}"


async def test_connections_are_never_shared_between_destinations_or_tenants(egress: Egress) -> None:
    async with answering(OK) as receiver:
        url = f"http://127.0.0.1:{receiver.port}/"
        other = TenantRef(Vendor("default"), ExternalId("acme2"))
        for target in (aim(egress, url), aim(egress, url), aim(egress, url, tenant=other)):
            for _ in range(3):
                await post(target)
        assert receiver.connections == 3


async def test_requests_under_way_at_once_each_have_their_own_connection_and_answer(egress: Egress) -> None:
    async def script(peer: Peer) -> None:
        while True:
            body = (await peer.request()).body
            await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))

    async with Receiver(script) as receiver:
        target = aim(egress, f"http://127.0.0.1:{receiver.port}/")
        for _ in range(3):
            answers = await asyncio.gather(*[begin(target, b"body-%d" % n) for n in range(50)])
            assert [answer.excerpt for answer in answers] == [b"body-%d" % n for n in range(50)]
        assert receiver.connections == 50


@pytest.mark.parametrize(
    ("answer", "status", "excerpt", "kept"),
    [
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n1\r\nb\r\n0\r\n\r\n", 200, b"ab", True),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b"", True),
        (b"HTTP/1.1 204 No Content\r\ncontent-length: 10\r\n\r\n", 204, b"", True),
        (b"HTTP/1.1 304 Not Modified\r\ncontent-length: 10\r\n\r\n", 304, b"", True),
        (b"HTTP/1.1 200\r\ncontent-length: 0\r\n\r\n", 200, b"", True),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok", 200, b"ok", False),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok", 200, b"ok", False),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\nconnection: keep-alive\r\n\r\nok", 200, b"ok", True),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nx: y\r\n\r\n" + OK, 200, b"ok", True),
        (OK + b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nbad", 200, b"ok", False),
        (OK + b"H", 200, b"ok", False),
        (OK + b"garbage", 200, b"ok", False),
        (b"HTTP/1.1 503 Busy\r\nRETRY-after:   120 \r\ncontent-length: 0\r\n\r\n", 503, b"", True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("split", [False, True], ids=["whole", "byte by byte"])
async def test_an_answer_of_any_legal_shape_is_understood(
    egress: Egress, answer: bytes, status: int, excerpt: bytes, kept: bool, split: bool
) -> None:
    async def script(peer: Peer) -> None:
        for _ in range(2):
            await peer.request()
            for piece in [answer[i : i + 1] for i in range(len(answer))] if split else [answer]:
                await peer.send(piece)
                await asyncio.sleep(0)
        await peer.gone()

    async with Receiver(script) as receiver:
        target = aim(egress, f"http://127.0.0.1:{receiver.port}/")
        for _ in range(2):
            got = await post(target)
            assert (got.status, got.fault, got.excerpt) == (status, "", excerpt)
            assert got.retry_after == ("120" if status == 503 else "")
            await until(lambda: kept or egress.http.connections == 0)
        assert receiver.connections == (1 if kept else 2)


async def test_an_answer_without_a_length_ends_with_the_connection(egress: Egress) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\n\r\nall of it")
        peer.close()

    async with Receiver(script) as receiver:
        got = await post(aim(egress, f"http://127.0.0.1:{receiver.port}/"))
        assert (got.status, got.excerpt) == (200, b"all of it")


async def test_an_answer_cut_short_is_not_an_answer(egress: Egress) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf")
        peer.close()

    async with Receiver(script) as receiver:
        got = await post(aim(egress, f"http://127.0.0.1:{receiver.port}/"))
        assert (got.status, got.fault) == (0, "reset")


@pytest.mark.parametrize("framing", [b"content-length: 5000", b"transfer-encoding: chunked", b"x: y"])
async def test_an_answer_to_head_ends_with_its_headers_which_are_kept(egress: Egress, framing: bytes) -> None:
    """It announces a body that never comes."""

    async def script(peer: Peer) -> None:
        assert (await peer.request()).line == "HEAD /object HTTP/1.1"
        await peer.send(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nX-Meta: mine\r\n%b\r\n\r\n" % framing)
        await peer.gone()

    async with Receiver(script) as receiver:
        target = egress.http.target(ACME, parse_url(f"http://127.0.0.1:{receiver.port}/"), keeps_head=True)
        given: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        target.send(b"HEAD /object HTTP/1.1\r\ncontent-length: 0\r\n\r\n", 5.0, given.set_result)
        answer = await given
        assert (answer.status, answer.fault, answer.excerpt) == (200, "", b"")
        assert answer.head == b"HTTP/1.1 200 OK\r\nX-Meta: mine\r\n%b" % framing
        await target.close()


async def test_a_peer_that_half_closes_and_still_answers_is_heard(egress: Egress) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        peer.writer.write(OK)
        peer.writer.write_eof()
        await peer.gone()

    async with Receiver(script) as receiver:
        target = aim(egress, f"http://127.0.0.1:{receiver.port}/")
        for _ in range(2):
            assert (await post(target)).status == 200
            await until(lambda: egress.http.connections == 0)


async def test_a_peer_that_closes_without_an_answer_is_a_reset(egress: Egress) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()

    async with Receiver(script) as receiver:
        assert (await post(aim(egress, f"http://127.0.0.1:{receiver.port}/"))).fault == "reset"
        assert receiver.connections == 1


async def test_an_early_answer_counts_and_the_rest_of_the_body_is_not_sent(egress: Egress) -> None:
    async def script(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        await peer.send(b"HTTP/1.1 413 Too Large\r\ncontent-length: 0\r\n\r\n")
        await peer.gone()

    async with Receiver(script) as receiver:
        target = aim(egress, f"http://127.0.0.1:{receiver.port}/")
        got = await post(target, b"x" * 20_000_000)
        assert (got.status, got.fault) == (413, "")
        assert egress.http.connections == 0


async def test_an_early_answer_followed_by_a_reset_is_still_heard(egress: Egress) -> None:
    async def script(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        await peer.send(b"HTTP/1.1 401 No\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        peer.close()  # with most of the body unread: the system answers it with a reset

    async with Receiver(script) as receiver:
        got = await post(aim(egress, f"http://127.0.0.1:{receiver.port}/"), b"x" * 20_000_000)
        assert (got.status, got.fault) == (401, "")


async def test_a_body_larger_than_every_buffer_arrives_whole(egress: Egress) -> None:
    async with answering(OK) as receiver:
        target = aim(egress, f"http://127.0.0.1:{receiver.port}/")
        body = bytes(range(256)) * 40_000
        for _ in range(2):
            assert (await post(target, body)).status == 200
        assert [request.body == body for request in receiver.requests] == [True, True]
        assert receiver.connections == 1


HEAD_OF_OK, BODY_OF_OK = OK[:-2], OK[-2:]
BUSY = b"HTTP/1.1 503 Busy\r\nretry-after: 7\r\ncontent-length: 2\r\n\r\nno"


@pytest.mark.parametrize(
    ("pieces", "status", "kept"),
    [
        ([OK], 200, True),
        ([HEAD_OF_OK, BODY_OF_OK], 200, True),
        ([b"HTTP/1.1 100 Continue\r\n\r\n", OK], 200, True),
        ([b"\r\n", OK], 200, True),
        ([OK + b"H"], 200, False),
        ([OK + OK], 200, False),
        ([OK.replace(b"200", b"201")], 201, True),
        ([b"HTTP/1.0" + OK[8:]], 200, False),
        ([BUSY], 503, True),
        ([b"H", OK], 0, False),
        ([HEAD_OF_OK[:-2] + b"x: ", OK], 0, False),
    ],
)
async def test_what_comes_after_answers_that_were_all_the_same_is_read_for_itself(
    egress: Egress, pieces: list[bytes], status: int, kept: bool
) -> None:
    """The client remembers the bytes of the last answer and what they meant: only where all of it is the same again."""

    async def script(peer: Peer) -> None:
        for answer in [[OK], [OK], [OK], pieces, [OK], [BUSY], [BUSY], [BUSY], [OK]]:
            await peer.request()
            for piece in answer:
                await peer.send(piece)
                await asyncio.sleep(0.02)

    async with Receiver(script) as receiver:
        target = aim(egress, f"http://127.0.0.1:{receiver.port}/")
        for number in range(3):
            got = await post(target)
            assert (got.status, got.excerpt, got.reused) == (200, b"ok", number > 0)
        got = await post(target)
        assert (got.status, got.retry_after) == (status, "7" if status == 503 else "")
        assert got.excerpt == {0: b"", 503: b"no"}.get(status, got.excerpt)
        await asyncio.sleep(0.05)
        assert egress.http.connections == kept
        if kept:
            rest = [await post(target) for _ in range(5)]
            assert [answer.status for answer in rest] == [200, 503, 503, 503, 200]
            assert [answer.retry_after for answer in rest] == ["", "7", "7", "7", ""]
            assert receiver.connections == 1


async def test_a_repeated_answer_that_comes_before_the_whole_request_is_sent_still_ends_its_connection(
    egress: Egress,
) -> None:
    async def script(peer: Peer) -> None:
        for _ in range(3):
            await peer.request()
            await peer.send(OK)
        await peer.reader.readuntil(b"\r\n\r\n")
        await peer.send(OK)
        await peer.gone()

    async with Receiver(script) as receiver:
        target = aim(egress, f"http://127.0.0.1:{receiver.port}/")
        for _ in range(3):
            await post(target)
        assert (await post(target, b"x" * 20_000_000)).status == 200
        assert egress.http.connections == 0


async def test_a_repeated_answer_to_a_closing_target_still_ends_its_connection(egress: Egress) -> None:
    async def script(peer: Peer) -> None:
        for _ in range(3):
            await peer.request()
            await peer.send(OK)
        await peer.request()
        await answer.wait()
        await peer.send(OK)
        await peer.gone()

    answer = asyncio.Event()
    async with Receiver(script) as receiver:
        target = aim(egress, f"http://127.0.0.1:{receiver.port}/")
        for _ in range(3):
            await post(target)
        waiting = begin(target)
        closing = asyncio.create_task(target.close())
        await asyncio.sleep(0)
        answer.set()
        await closing
        assert (await waiting).status == 200
        assert egress.http.connections == 0


# ---------------------------------------------------------------- kept connections that died


async def test_a_kept_connection_that_the_far_side_closed_is_thrown_away_for_free(egress: Egress) -> None:
    async def script(peer: Peer) -> None:
        receiver.requests.append(await peer.request())
        await peer.send(OK)

    async with Receiver(script) as receiver:
        target = aim(egress, f"http://127.0.0.1:{receiver.port}/")
        for number in range(20):
            got = await post(target, b"%d" % number)
            assert (got.status, got.fault) == (200, "")
            await until(lambda: egress.http.connections == 0)
        assert [request.body for request in receiver.requests] == [b"%d" % n for n in range(20)]


async def test_a_request_that_crosses_the_close_is_sent_again_within_the_attempt(egress: Egress) -> None:
    """The far side's end lies in the system's buffers, but the loop has not turned when the next request is sent."""
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        target = aim(egress, f"http://127.0.0.1:{listener.getsockname()[1]}/")
        waiting = begin(target, b"first")
        connection, _ = await loop.sock_accept(listener)
        assert (await loop.sock_recv(connection, 65536)).endswith(b"first")
        await loop.sock_sendall(connection, OK)
        assert (await waiting).status == 200
        connection.close()
        waiting = begin(target, b"second")
        connection, _ = await loop.sock_accept(listener)
        assert (await loop.sock_recv(connection, 65536)).endswith(b"second")
        await loop.sock_sendall(connection, OK)
        answer = await waiting
        assert (answer.status, answer.reused) == (200, False)
        connection.close()


async def test_a_request_that_was_read_and_then_reset_is_not_sent_again(egress: Egress) -> None:
    """Else one attempt would be two requests at the far side."""

    async def script(peer: Peer) -> None:
        receiver.requests.append(await peer.request())
        await peer.send(OK)
        receiver.requests.append(await peer.request())
        peer.reset()

    async with Receiver(script) as receiver:
        target = aim(egress, f"http://127.0.0.1:{receiver.port}/")
        assert (await post(target, b"1")).status == 200
        got = await post(target, b"2")
        assert (got.fault, got.reused) == ("reset", True)
        assert [request.body for request in receiver.requests] == [b"1", b"2"]


async def test_a_request_that_was_read_and_then_closed_is_not_sent_again(egress: Egress) -> None:
    async def script(peer: Peer) -> None:
        receiver.requests.append(await peer.request())
        await peer.send(OK)
        receiver.requests.append(await peer.request())

    async with Receiver(script) as receiver:
        target = aim(egress, f"http://127.0.0.1:{receiver.port}/")
        assert (await post(target, b"1")).status == 200
        assert (await post(target, b"2")).fault == "reset"
        assert [request.body for request in receiver.requests] == [b"1", b"2"]


async def test_an_answer_nobody_asked_for_ends_the_connection(egress: Egress) -> None:
    async def script(peer: Peer) -> None:
        receiver.requests.append(await peer.request())
        await peer.send(OK)
        await ask.wait()
        await peer.send(b"HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n")
        await receiver.answer(peer)

    ask = asyncio.Event()
    async with Receiver(script) as receiver:
        target = aim(egress, f"http://127.0.0.1:{receiver.port}/")
        assert (await post(target)).status == 200
        ask.set()
        await until(lambda: egress.http.connections == 0)
        assert (await post(target)).status == 200
        assert receiver.connections == 2


async def test_idle_connections_are_closed_after_a_minute(clock: Clock) -> None:
    egress = Egress(LOOPBACK, clock=clock)
    async with answering(OK) as receiver:
        target = aim(egress, f"http://127.0.0.1:{receiver.port}/")
        await post(target)
        clock.now_s += IDLE_S - 1
        assert (await post(target)).reused
        clock.now_s += IDLE_S - 1
        assert egress.http.connections == 1
        clock.now_s += 2
        await until(lambda: egress.http.connections == 0)
    egress.close()


async def test_the_oldest_idle_connections_make_room_for_new_ones() -> None:
    egress = Egress(LOOPBACK, max_idle_connections=3)
    async with answering(OK) as receiver:
        targets = [aim(egress, f"http://127.0.0.1:{receiver.port}/{n}") for n in range(10)]
        for target in targets:
            await post(target)
        assert egress.http.connections == 3
        assert [(await post(target)).reused for target in reversed(targets[-3:])] == [True] * 3
        assert not (await post(targets[0])).reused
    egress.close()


# ---------------------------------------------------------------- time


async def test_a_request_ends_at_its_timeout_and_not_before(egress: Egress) -> None:
    async def script(peer: Peer) -> None:
        await peer.gone()

    async with Receiver(script) as receiver:
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        got = await post(aim(egress, f"http://127.0.0.1:{receiver.port}/"), timeout_s=0.3)
        assert (got.fault, got.step) == ("timeout", "answer")
        assert loop.time() - started_s >= 0.3
        assert egress.http.connections == 0


async def test_thousands_of_hung_requests_do_not_slow_another(egress: Egress) -> None:
    async def hang(peer: Peer) -> None:
        await peer.gone()

    async with Receiver(hang) as hung, answering(OK) as receiver:
        slow = aim(egress, f"http://127.0.0.1:{hung.port}/")
        waiting = [begin(slow, timeout_s=60) for _ in range(2000)]
        target = aim(egress, f"http://127.0.0.1:{receiver.port}/")
        for _ in range(200):
            assert (await post(target, timeout_s=3)).status == 200
        assert not any(future.done() for future in waiting)
        egress.close()
        assert {(await future).fault for future in waiting} == {"closed"}


async def test_a_request_may_be_begun_where_another_ended_at_its_timeout(egress: Egress) -> None:
    """With a timeout that no request has had before."""

    async def hang(peer: Peer) -> None:
        await peer.gone()

    async with Receiver(hang) as receiver:
        target = aim(egress, f"http://127.0.0.1:{receiver.port}/")
        faults: list[str] = []
        ended = asyncio.Event()

        def again(answer: Answer) -> None:
            faults.append(answer.fault)
            if len(faults) == 3:
                ended.set()
            else:
                target.post(target.head + b"\r\n", 0.1 + len(faults) / 100, again)

        target.post(target.head + b"\r\n", 0.1, again)
        await ended.wait()
        assert faults == ["timeout"] * 3


async def test_a_short_timeout_is_met_behind_long_ones(egress: Egress) -> None:
    async def hang(peer: Peer) -> None:
        await peer.gone()

    async with Receiver(hang) as receiver:
        target = aim(egress, f"http://127.0.0.1:{receiver.port}/")
        long = [begin(target, timeout_s=60) for _ in range(5)]
        assert (await post(target, timeout_s=0.2)).fault == "timeout"
        assert not any(future.done() for future in long)
        egress.close()
        await asyncio.gather(*long)


# ---------------------------------------------------------------- connecting


async def test_nothing_listening_is_a_refused_connection(egress: Egress) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        got = await post(aim(egress, f"http://127.0.0.1:{free.getsockname()[1]}/"))
        assert (got.fault, got.step) == ("connect_refused", "connect")


async def test_the_next_address_is_tried_where_one_refuses() -> None:
    egress = Egress(LOOPBACK, lookup=lambda host: ["::1", "127.0.0.9", "127.0.0.1"])
    async with answering(OK) as receiver:
        assert (await post(aim(egress, f"http://several.example:{receiver.port}/"))).status == 200
        assert receiver.requests[0].headers["host"] == f"several.example:{receiver.port}"
    egress.close()


async def test_the_next_address_is_tried_where_one_says_nothing(clock: Clock) -> None:
    egress = Egress(LOOPBACK, clock=clock, lookup=lambda host: ["127.0.0.9", "127.0.0.1"])
    async with answering(OK) as receiver:
        with contextlib.ExitStack() as open_sockets:
            silent = open_sockets.enter_context(socket.socket())
            silent.bind(("127.0.0.9", receiver.port))
            silent.listen(0)
            for _ in range(3):  # a full queue: the system drops what else wants to connect
                filler = open_sockets.enter_context(socket.socket())
                filler.setblocking(False)
                filler.connect_ex(("127.0.0.9", receiver.port))
            waiting = begin(aim(egress, f"http://several.example:{receiver.port}/"), timeout_s=15)
            await until(lambda: egress.http.connections == 1)
            clock.now_s += ADDRESS_S + 1
            assert (await waiting).status == 200
            assert egress.http.opened == 2
    egress.close()


async def test_a_process_without_descriptors_gives_up_idle_connections_first() -> None:
    full = 3

    def connect(address: Address, port: int) -> socket.socket:
        if egress.http.connections >= full:
            raise OSError(errno.EMFILE, "too many open files")
        return open_socket(address, port)

    egress = Egress(LOOPBACK, connect=connect)
    async with answering(OK) as receiver:
        for number in range(10):
            assert (await post(aim(egress, f"http://127.0.0.1:{receiver.port}/{number}"))).status == 200
        full = 0
        assert (await post(aim(egress, f"http://127.0.0.1:{receiver.port}/last"))).fault == "no_resources"
    egress.close()


async def test_a_name_that_does_not_resolve_is_a_fault_of_the_name() -> None:
    def lookup(host: str) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    egress = Egress(LOOPBACK, lookup=lookup)
    got = await post(aim(egress, "http://nowhere.example/"))
    assert (got.fault, got.step) == ("dns", "resolve")
    assert "Name or service not known" in got.detail
    egress.close()


async def test_closing_a_target_waits_for_what_is_under_way(egress: Egress) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await answer.wait()
        await peer.send(OK)
        await peer.gone()

    answer = asyncio.Event()
    async with Receiver(script) as receiver:
        target = aim(egress, f"http://127.0.0.1:{receiver.port}/")
        waiting = begin(target)
        await until(lambda: receiver.connections == 1)
        closing = asyncio.create_task(target.close())
        await asyncio.sleep(0)
        assert not closing.done()
        answer.set()
        await closing
        assert waiting.done() and waiting.result().status == 200
        await target.close()
        assert egress.http.connections == 0
        assert (await post(target)).fault == "closed"


async def test_proxies_named_in_the_environment_are_not_asked(egress: Egress, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    async with answering(OK) as receiver:
        assert (await post(aim(egress, f"http://127.0.0.1:{receiver.port}/"))).status == 200
