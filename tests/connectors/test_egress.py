"""The door (scoreboard R14): no socket is opened to a blocked address, whichever way it is written or found.

No test dials a forbidden address, not even a control: the socket factory counts what it is asked for, and refuses.
"""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectors.egress import BLOCKED_V4, BLOCKED_V6, FOUND_FOR_S, MISSING_FOR_S, Egress, Ruling, open_socket
from connectors.http.door import Address, Names, literal
from connectors.http.place import parse_url
from schemas.ids import ExternalId, TenantRef, Vendor
from tests.connectors.post import ACME, LOOPBACK, Clock, aim, post
from tests.connectors.receiver import answering

VECTORS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "vectors" / "egress.json").read_text())
EVERYTHING = (ip_network("0.0.0.0/0"), ip_network("::/0"))


class Factory:
    """A socket factory that opens nothing but loopback sockets of the test's own far side, and counts the rest."""

    def __init__(self, own_port: int = 0) -> None:
        self.asked: list[str] = []
        self._own_port = own_port

    def __call__(self, address: Address, port: int) -> socket.socket:
        if address.is_loopback and port == self._own_port:
            return open_socket(address, port)
        self.asked.append(str(address))
        raise ConnectionRefusedError(111, "refused by the test")


class Guarded:
    """A door whose every dial lands in a counting factory."""

    def __init__(self, allow: Sequence[Any] = (), names: Sequence[Sequence[str]] = (), own_port: int = 0) -> None:
        self.clock = Clock()
        self.factory = Factory(own_port)
        self.blocked: list[TenantRef] = []
        answers = iter(names)
        self.egress = Egress(
            allow,
            lookup=lambda host: next(answers),
            connect=self.factory,
            clock=self.clock,
            on_blocked=self.blocked.append,
        )


def _mapped(text: str) -> str:
    address = ip_address(text)
    return f"::ffff:{address}" if address.version == 4 else text


def _url(text: str, scheme: str = "https") -> str:
    return f"{scheme}://[{text}]/" if ":" in text else f"{scheme}://{text}/"


def _rebound(text: str) -> list[list[str]]:
    return [["93.184.216.34"], [text]]


WAYS = ("literal", "name", "mapped literal", "mapped name", "several addresses", "rebinding")


async def _attempt(way: str, text: str, allow: Sequence[Any]) -> tuple[Guarded, str]:
    """Posts to `text` in one of the ways; the fault of the last post."""
    match way:
        case "literal":
            door = Guarded(allow)
            fault = (await post(aim(door.egress, _url(text)))).fault
        case "mapped literal":
            door = Guarded(allow)
            fault = (await post(aim(door.egress, _url(_mapped(text))))).fault
        case "name":
            door = Guarded(allow, [[text]])
            fault = (await post(aim(door.egress, "https://name.example/"))).fault
        case "mapped name":
            door = Guarded(allow, [[_mapped(text)]])
            fault = (await post(aim(door.egress, "https://name.example/"))).fault
        case "several addresses":
            door = Guarded(allow, [[text, _mapped(text), text]])
            fault = (await post(aim(door.egress, "https://name.example/"))).fault
        case "rebinding":
            door = Guarded(allow, _rebound(text))
            target = aim(door.egress, "https://name.example/")
            assert (await post(target)).fault == "connect_refused"
            assert door.factory.asked == ["93.184.216.34"]
            door.factory.asked.clear()
            door.clock.now_s += FOUND_FOR_S + 1
            fault = (await post(target)).fault
        case _:
            raise AssertionError(way)
    door.egress.close()
    return door, fault


@pytest.mark.scoreboard("R14")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("text", VECTORS["block"])
async def test_no_socket_is_opened_to_a_blocked_address(text: str, way: str) -> None:
    door, fault = await _attempt(way, text, ())
    assert (fault, door.factory.asked) == ("egress_blocked", [])
    assert set(door.blocked) == {ACME}


@pytest.mark.scoreboard("R14")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("text", ["127.0.0.1", "169.254.169.254", "::1", "fd00:ec2::254", "64:ff9b::a9fe:a9fe"])
async def test_with_the_guard_open_the_same_ways_reach_the_socket_factory(text: str, way: str) -> None:
    """The control of the test above."""
    door, fault = await _attempt(way, text, EVERYTHING)
    assert fault == "connect_refused"
    assert {ip_address(asked) for asked in door.factory.asked} == {ip_address(text)}
    assert door.blocked == []


@pytest.mark.parametrize("text", VECTORS["allow"])
@pytest.mark.parametrize("way", ["literal", "name", "mapped name", "several addresses"])
async def test_public_addresses_are_dialled(text: str, way: str) -> None:
    door, fault = await _attempt(way, text, ())
    assert fault == "connect_refused"
    assert set(door.factory.asked) == {text}
    assert door.blocked == []


@pytest.mark.scoreboard("R14")
@pytest.mark.parametrize("url", VECTORS["literals_that_mean_loopback"])
@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_every_spelling_of_loopback_is_blocked(url: str, scheme: str) -> None:
    door = Guarded(names=[["127.0.0.1", "::1"]])
    answer = await post(aim(door.egress, url.replace("http:", f"{scheme}:")))
    assert (answer.fault, door.factory.asked) == ("egress_blocked", [])
    door.egress.close()


@pytest.mark.scoreboard("R14")
async def test_a_redirect_to_a_blocked_address_is_not_followed() -> None:
    for text in VECTORS["block"]:
        location = _url(text, "http").encode()
        async with answering(b"HTTP/1.1 302 Found\r\nlocation: %b\r\ncontent-length: 0\r\n\r\n" % location) as receiver:
            door = Guarded([LOOPBACK[0]], own_port=receiver.port)
            answer = await post(aim(door.egress, f"http://127.0.0.1:{receiver.port}/"))
            assert (answer.status, door.factory.asked, receiver.connections) == (302, [], 1)
            door.egress.close()


async def test_only_the_permitted_of_several_addresses_are_dialled() -> None:
    door = Guarded(names=[["10.0.0.1", "1.1.1.1", "::1", "8.8.8.8"]])
    assert (await post(aim(door.egress, "https://mixed.example/"))).fault == "connect_refused"
    assert door.factory.asked == ["1.1.1.1", "8.8.8.8"]
    door.egress.close()


async def test_clear_text_goes_only_to_addresses_that_were_let_through() -> None:
    door = Guarded([ip_network("10.1.0.0/16")])
    assert (await post(aim(door.egress, "http://1.1.1.1/"))).fault == "egress_blocked"
    assert (await post(aim(door.egress, "http://10.2.0.1/"))).fault == "egress_blocked"
    assert door.factory.asked == []
    assert (await post(aim(door.egress, "http://10.1.2.3/"))).fault == "connect_refused"
    assert (await post(aim(door.egress, "https://1.1.1.1/"))).fault == "connect_refused"
    assert door.factory.asked == ["10.1.2.3", "1.1.1.1"]
    door.egress.close()


def test_the_ranges_are_those_of_the_vectors() -> None:
    assert [str(block) for block in BLOCKED_V4] == VECTORS["block_ranges_v4"]
    assert [str(block) for block in BLOCKED_V6] == VECTORS["block_ranges_v6"]


@given(st.sampled_from(BLOCKED_V4), st.integers(min_value=0), st.integers(0, 4))
def test_a_blocked_v4_address_is_blocked_in_every_spelling(block: Any, offset: int, spelling: int) -> None:
    address = block[offset % block.num_addresses]
    number = int(address)
    a, b, rest = number >> 24, number >> 16 & 255, number & 0xFFFF
    text = [str(number), hex(number), f"0{a:o}.0x{b:x}.{rest}", f"{a}.{number & 0xFFFFFF}", f"::ffff:{address}"][
        spelling
    ]
    found = literal(text)
    assert found is not None
    assert Egress().rule(found) is Ruling.BLOCKED
    assert Egress(EVERYTHING).rule(found) is Ruling.ALLOWED


@given(st.sampled_from(BLOCKED_V6), st.integers(min_value=0))
def test_a_blocked_v6_address_is_blocked(block: Any, offset: int) -> None:
    address = block[offset % block.num_addresses]
    expected = Ruling.BLOCKED
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        expected = Egress().rule(address.ipv4_mapped)
    assert Egress().rule(address) is expected


@given(st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)))
def test_the_ruling_is_the_lists_and_nothing_else(address: IPv4Address | IPv6Address) -> None:
    judged: Address = address
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        judged = address.ipv4_mapped
    blocks: Sequence[Any] = BLOCKED_V4 if judged.version == 4 else BLOCKED_V6
    blocked = any(judged in block for block in blocks)
    assert Egress().rule(address) is (Ruling.BLOCKED if blocked else Ruling.OPEN)


@given(st.text(alphabet="0123456789abcdefx.:%", max_size=20))
def test_what_the_system_takes_for_an_address_is_taken_for_one_here(text: str) -> None:
    """Else a name would be asked of the resolver, which answers it itself; it would still be judged."""
    try:
        system = socket.getaddrinfo(text, None, flags=socket.AI_NUMERICHOST)[0][4][0] if text else None
    except (OSError, UnicodeError):
        system = None
    if system is not None and text[0].isdigit() and "%" not in text:
        assert literal(text) == ip_address(system)


# ---------------------------------------------------------------- look-ups


async def _names(egress: Egress, host: str, tenant: TenantRef = ACME) -> Names:
    waiter: asyncio.Future[Names] = asyncio.get_running_loop().create_future()
    found = egress.look_up(tenant, host, waiter.set_result)
    return found if found is not None else await waiter


async def test_a_name_is_asked_once_for_all_who_wait_and_kept_for_a_while(clock: Clock) -> None:
    asked: list[str] = []

    def lookup(host: str) -> list[str]:
        asked.append(host)
        return ["1.1.1.1"]

    egress = Egress(lookup=lookup, clock=clock)
    await asyncio.gather(*[_names(egress, "a.example") for _ in range(50)])
    assert asked == ["a.example"]
    clock.now_s += FOUND_FOR_S - 1
    assert (await _names(egress, "a.example")).addresses == (IPv4Address("1.1.1.1"),)
    assert asked == ["a.example"]
    clock.now_s += 2
    await _names(egress, "a.example")
    assert asked == ["a.example"] * 2


async def test_a_failure_is_kept_for_a_few_seconds_only(clock: Clock) -> None:
    answers: Iterator[list[str]] = iter([[], ["1.1.1.1"]])
    egress = Egress(lookup=lambda host: next(answers), clock=clock)
    assert (await _names(egress, "a.example")).problem
    assert (await _names(egress, "a.example")).problem
    clock.now_s += MISSING_FOR_S + 1
    assert (await _names(egress, "a.example")).addresses == (IPv4Address("1.1.1.1"),)


async def test_tenants_do_not_share_what_was_found(clock: Clock) -> None:
    answers = iter([["1.1.1.1"], ["8.8.8.8"]])
    egress = Egress(lookup=lambda host: next(answers), clock=clock)
    await _names(egress, "a.example")
    other = await _names(egress, "a.example", TenantRef(Vendor("default"), ExternalId("other")))
    assert other.addresses == (IPv4Address("8.8.8.8"),)


async def test_a_tenant_whose_name_servers_hang_does_not_hold_up_the_look_ups_of_others() -> None:
    release = threading.Event()

    def lookup(host: str) -> list[str]:
        if host.startswith("slow"):
            release.wait(30)
        return ["1.1.1.1"]

    egress = Egress(lookup=lookup)
    slow = [asyncio.create_task(_names(egress, f"slow-{n}.example")) for n in range(200)]
    await asyncio.sleep(0)
    for number in range(50):
        other = TenantRef(Vendor("default"), ExternalId(f"other-{number}"))
        assert (await _names(egress, "quick.example", other)).addresses
    assert not any(task.done() for task in slow)
    release.set()
    assert all(names.addresses for names in await asyncio.gather(*slow))


async def test_a_look_up_ends_at_its_deadline_and_its_late_answer_serves_the_next(
    clock: Clock,
) -> None:
    release = threading.Event()
    asked: list[str] = []

    def lookup(host: str) -> list[str]:
        asked.append(host)
        release.wait(30)
        return ["1.1.1.1"]

    egress = Egress(lookup=lookup, clock=clock, lookup_timeout_s=0.1)
    assert "no answer" in (await _names(egress, "late.example")).problem
    clock.now_s += MISSING_FOR_S + 1
    assert (await _names(egress, "late.example")).problem
    release.set()
    clock.now_s += MISSING_FOR_S + 1
    assert (await _names(egress, "late.example")).addresses
    assert asked == ["late.example"]


# ---------------------------------------------------------------- URLs


@pytest.mark.parametrize(
    ("text", "host", "port", "path", "display"),
    [
        ("https://Hooks.Acme.example", "hooks.acme.example", 443, "/", "https://hooks.acme.example/"),
        ("https://a.example:8443/in?t=s", "a.example", 8443, "/in?t=s", "https://a.example:8443/in?…"),
        ("https://bücher.example/ü?ü=ß", "xn--bcher-kva.example", 443, "/%C3%BC?%C3%BC=%C3%9F", None),
        ("https://127.1/", "127.0.0.1", 443, "/", "https://127.0.0.1/"),
        ("https://１２７.0.0.1/", "127.0.0.1", 443, "/", "https://127.0.0.1/"),
        ("http://[::ffff:1.2.3.4]:80/", "::ffff:102:304", 80, "/", "http://[::ffff:102:304]/"),
        ("https://a.example./x%20y?", "a.example", 443, "/x%20y?", "https://a.example/x%20y?…"),
    ],
)
def test_a_url_is_read_once_and_shown_without_its_query(
    text: str, host: str, port: int, path: str, display: str | None
) -> None:
    place = parse_url(text)
    assert (place.host, place.port, place.path) == (host, port, path)
    if display is not None:
        assert place.display == display


@pytest.mark.parametrize(
    "text",
    [
        "", "a.example", "//a.example/", "ftp://a.example/", "https:/a.example", "https://", "https:///x",
        "https://user@a.example/", "https://user:pw@a.example/", "https://a.example:0/", "https://a.example:65536/",
        "https://a.example:/", "https://a.example:x/", "https://a.example/a b", "https://a.example/\r\nx: y",
        "https://a.example/\t", "https://a.example/#x", "https://a.example\\@b.example/", "https://a..example/",
        "https://-a.example/", "https://a.example/" + "x" * 3000, "https://[::1/", "https://[zz]/", "https://[1.2.3.4]/",
        "https://[fe80::1%25eth0]/", "https://1.2.3.4.5/", "https://256.256.256.256/", "https://a_b!.example/",
        "https://a.example/\u202e", "https://a\u0000.example/",
    ],
)  # fmt: skip
def test_a_url_that_could_be_read_in_two_ways_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_url(text)


@given(st.text(max_size=60))
def test_any_text_is_a_place_or_a_value_error(text: str) -> None:
    for url in (text, f"https://{text}", f"https://a.example/{text}"):
        try:
            place = parse_url(url)
        except ValueError:
            continue
        request = f"{place.path} {place.authority}"
        assert request.isascii() and request.isprintable() and request.count(" ") == 1
