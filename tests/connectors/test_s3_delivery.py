"""Each object is stored once: what was stored before is found, what is another's is left alone, what failed leaves
nothing behind; and whose rights the requests have."""

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from connectors.egress import Egress
from connectors.s3.bucket import PART_BYTES
from connectors.s3.classify import Fault
from connectors.s3.client import Credentials
from connectors.s3.connector import PARALLEL
from connectors.s3.credentials import RENEW_S, SESSION_S, Role
from schemas.ids import DestinationId, ExternalId, TenantRef, Vendor
from tests.connectors.post import Clock
from tests.connectors.s3s import LAKE, batch, deliver, delivery, sink
from tests.connectors.until import until
from tests.contract.far_side import Mode
from tests.contract.farsides.s3 import ACCESS_KEY, EXTERNAL_ID, LOST, ROLE, Answer, S3FarSide, Stored

LARGE = b'"%b"' % (b"0123456789abcdef" * (1 << 20))  # 16 MiB: three parts, where it is not compressed


def as_role(store: S3FarSide) -> Mapping[str, Any]:
    endpoint = f"http://127.0.0.1:{store.port}"
    return {**store.options(), "role": ROLE, "external_id": EXTERNAL_ID, "sts_endpoint": endpoint}


# ---------------------------------------------------------------- once


async def test_a_batch_that_is_sent_again_finds_its_objects_and_changes_nothing(
    store: S3FarSide, egress: Egress
) -> None:
    connector = sink(egress, store.options(), store.secrets())
    sent = [delivery(1), delivery(2, event_type="other")]
    await deliver(connector, *sent)
    before = dict(store.objects)
    again = await deliver(connector, *sent)
    assert [outcome.verdict for outcome in again] == ["delivered", "delivered"]
    assert store.objects == before
    assert store.operations.count("HeadObject") == 2
    await connector.close()


async def test_an_object_that_was_stored_though_its_answer_was_lost_is_found(store: S3FarSide, egress: Egress) -> None:
    connector = sink(egress, store.options(), store.secrets())
    store.answers["PutObject"] = [LOST]
    (outcome,) = await deliver(connector, delivery())
    assert (outcome.verdict, outcome.code) == ("retry", "reset")
    (outcome,) = await deliver(connector, delivery())
    assert outcome.verdict == "delivered"
    assert len(store.held()) == 1
    await connector.close()


async def test_of_a_batch_that_is_stored_in_part_the_rest_is_stored_at_the_next_attempt(
    store: S3FarSide, egress: Egress
) -> None:
    connector = sink(egress, store.options(), store.secrets())
    sent = [delivery(number, event_type=f"type-{number}") for number in range(12)]
    store.answers["PutObject"] = [Answer(503, "SlowDown") for _ in range(5)]
    first = await deliver(connector, *sent)
    assert sorted({outcome.code for outcome in first}) == ["ok", "throttled"]
    assert len(store.objects) == 7
    second = await deliver(connector, *sent)
    assert {outcome.verdict for outcome in second} == {"delivered"}
    assert sorted(one.delivery for one in store.held()) == [one.id for one in sent]
    assert store.operations == ["PutObject"] * (12 + 5)  # what is stored is not sent again


async def test_what_another_worker_stored_of_a_batch_is_found_there(store: S3FarSide, egress: Egress) -> None:
    """It died, or lost the partition, after half of them."""
    sent = [delivery(number, event_type=f"type-{number}") for number in range(12)]
    store.answers["PutObject"] = [Answer(503, "SlowDown") for _ in range(5)]
    dead = sink(egress, store.options(), store.secrets())
    await deliver(dead, *sent)
    before = dict(store.objects)
    connector = sink(egress, store.options(), store.secrets())
    second = await deliver(connector, *sent)
    assert {outcome.verdict for outcome in second} == {"delivered"}
    assert sorted(one.delivery for one in store.held()) == [one.id for one in sent]
    assert {key: store.objects[key] for key in before} == before
    assert store.operations.count("HeadObject") == 7
    await dead.close()
    await connector.close()


@pytest.mark.parametrize("foreign", [{}, {"x-amz-meta-headgate-batch": "0" * 64}])
async def test_another_s_object_of_the_same_name_is_left_alone_and_we_are_told(
    store: S3FarSide, egress: Egress, foreign: dict[str, str]
) -> None:
    connector = sink(egress, store.options(), store.secrets())
    (first,) = await deliver(connector, delivery())
    store.objects[first.receipt] = Stored(b"theirs", foreign)
    (outcome,) = await deliver(connector, delivery())
    assert (outcome.verdict, outcome.fault, outcome.code) == ("retry", "platform", "name_taken")
    assert store.objects[first.receipt].content == b"theirs"
    await connector.close()


async def test_a_batch_of_another_end_is_not_mistaken_for_the_one_that_is_stored(
    store: S3FarSide, egress: Egress
) -> None:
    """Never made by the stage; if it were, its events would not be taken for delivered."""
    connector = sink(egress, store.options(), store.secrets())
    await deliver(connector, delivery(1), delivery(2))
    outcomes = await deliver(connector, delivery(1), delivery(2), delivery(3))
    assert {outcome.code for outcome in outcomes} == {"name_taken"}
    await connector.close()


@pytest.mark.parametrize(
    ("answer", "code"),
    [(Answer(403), "unverified"), (Answer(404), "conflict"), (Answer(503), "unavailable"), (Answer(0), "reset")],
)
async def test_where_it_cannot_be_told_whose_an_object_is_nothing_is_taken_for_delivered(
    store: S3FarSide, egress: Egress, answer: Answer, code: str
) -> None:
    connector = sink(egress, store.options(), store.secrets())
    await deliver(connector, delivery())
    store.answers["HeadObject"] = [answer]
    (outcome,) = await deliver(connector, delivery())
    assert (outcome.verdict, outcome.fault, outcome.code) == ("retry", "destination", code)
    await connector.close()


# ---------------------------------------------------------------- in parts


async def test_a_large_object_goes_in_parts_and_is_whole(store: S3FarSide, egress: Egress) -> None:
    connector = sink(egress, store.options(), store.secrets(), compression="none")
    (outcome,) = await deliver(connector, delivery(1, LARGE))
    assert outcome.verdict == "delivered"
    assert store.held()[0].payload == LARGE
    assert store.operations == ["CreateMultipartUpload", *["UploadPart"] * 3, "CompleteMultipartUpload"]
    assert max(len(one.body) for one in store.requests) == PART_BYTES
    (again,) = await deliver(connector, delivery(1, LARGE))
    assert again.verdict == "delivered"
    await connector.close()
    assert store.uploads == {}


@pytest.mark.parametrize("operation", ["UploadPart", "CompleteMultipartUpload"])
@pytest.mark.parametrize("answer", [Answer(403, "AccessDenied"), Answer(0)])
async def test_what_failed_in_parts_leaves_no_part_behind(
    store: S3FarSide, egress: Egress, operation: str, answer: Answer
) -> None:
    connector = sink(egress, store.options(), store.secrets(), compression="none")
    store.answers[operation] = [answer]
    (outcome,) = await deliver(connector, delivery(1, LARGE))
    assert outcome.verdict == "retry"
    await connector.close()
    assert (store.uploads, store.objects) == ({}, {})
    assert store.operations[-1] == "AbortMultipartUpload"


async def test_who_is_cancelled_in_the_middle_of_the_parts_leaves_none_behind(store: S3FarSide, egress: Egress) -> None:
    connector = sink(egress, store.options(), store.secrets(), compression="none", timeout="1s")
    waiting = asyncio.create_task(deliver(connector, delivery(1, LARGE)))
    await until(lambda: "UploadPart" in store.operations)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await connector.close()
    assert (store.uploads, store.objects) == ({}, {})


# ---------------------------------------------------------------- connections


async def test_connections_are_kept_and_no_more_than_so_many_are_open_at_once(store: S3FarSide, egress: Egress) -> None:
    connector = sink(egress, store.options(), store.secrets())
    for turn in range(5):
        sent = [delivery(turn * 100 + number, event_type=f"type-{number}") for number in range(40)]
        outcomes = await deliver(connector, *sent, first=turn * 100)
        assert {outcome.verdict for outcome in outcomes} == {"delivered"}
    assert len(store.requests) == 200
    assert store.connections <= PARALLEL
    await connector.close()


async def test_a_store_that_hangs_holds_up_no_other(store: S3FarSide, egress: Egress) -> None:
    """More of them hang than there are threads."""
    hung = S3FarSide()
    await hung.start()
    await hung.become(Mode.HANGS)
    stuck = [sink(egress, hung.options(), hung.secrets(), timeout="5s") for _ in range(40)]
    waiting = [asyncio.create_task(deliver(one, delivery())) for one in stuck]
    await until(lambda: len(hung.requests) == 40)
    connector = sink(egress, store.options(), store.secrets())
    (outcome,) = await deliver(connector, delivery())
    assert outcome.verdict == "delivered"
    assert not any(one.done() for one in waiting)
    await hung.stop()
    assert {outcome.code for outcomes in await asyncio.gather(*waiting) for outcome in outcomes} == {"reset"}
    for one in (connector, *stuck):
        await one.close()


# ---------------------------------------------------------------- rights


async def test_the_access_key_alone_decides_whatever_the_environment_says(
    store: S3FarSide, egress: Egress, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    shared = tmp_path / "config"
    shared.write_text("[default]\nregion = mars\nendpoint_url = http://127.0.0.1:1\naws_access_key_id = X\n")
    for name, value in {
        "AWS_PROFILE": "nobody",
        "AWS_CONFIG_FILE": str(shared),
        "AWS_SHARED_CREDENTIALS_FILE": str(shared),
        "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
        "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1",
        "AWS_ACCESS_KEY_ID": "theirs",
        "AWS_SECRET_ACCESS_KEY": "theirs",
        "AWS_SESSION_TOKEN": "theirs",
        "AWS_REGION": "mars",
        "AWS_CA_BUNDLE": "/nowhere",
        "AWS_MAX_ATTEMPTS": "9",
        "HTTP_PROXY": "http://127.0.0.1:1",
        "HTTPS_PROXY": "http://127.0.0.1:1",
    }.items():
        monkeypatch.setenv(name, value)
    connector = sink(egress, store.options(), store.secrets())
    (outcome,) = await deliver(connector, delivery())
    assert outcome.verdict == "delivered"
    assert f"Credential={ACCESS_KEY}/" in store.requests[0].headers["authorization"]
    await connector.close()


async def test_a_role_is_assumed_once_with_its_external_id_for_all_that_a_destination_writes(
    store: S3FarSide, egress: Egress
) -> None:
    connector = sink(egress, as_role(store), store.secrets())
    sent = [delivery(number, event_type=f"type-{number}") for number in range(20)]
    assert {outcome.verdict for outcome in await deliver(connector, *sent)} == {"delivered"}
    assert store.operations.count("AssumeRole") == store.sessions == 1
    tokens = {one.headers["x-amz-security-token"] for one in store.requests if one.operation == "PutObject"}
    assert tokens == {"token1canary"}
    await connector.close()


async def test_a_session_that_has_ended_is_followed_by_another(store: S3FarSide, egress: Egress) -> None:
    connector = sink(egress, as_role(store), store.secrets())
    await deliver(connector, delivery(1))
    store.session_ends.add("token1canary")
    (outcome,) = await deliver(connector, delivery(2), first=50)
    assert (outcome.verdict, outcome.code) == ("retry", "expired_token")
    (outcome,) = await deliver(connector, delivery(2), first=50)
    assert (outcome.verdict, store.sessions) == ("delivered", 2)
    await connector.close()


class _Sts:
    def __init__(self) -> None:
        self.asked = 0
        self.down = False

    async def ask(self, credentials: Credentials, operation: str, *_: Any, **parameters: Any) -> Mapping[str, Any]:
        if self.down:
            raise Fault("unavailable", step="role")
        self.asked += 1
        given = {name: f"{name}{self.asked}" for name in ("AccessKeyId", "SecretAccessKey", "SessionToken")}
        return {"Credentials": given}


async def test_a_session_is_renewed_before_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(asyncio.get_running_loop(), "time", clock)
    sts = _Sts()
    role = Role(sts, Credentials("a", "b"), ROLE, "", "headgate")  # type: ignore[arg-type]
    begun_s = clock.now_s
    for after_s, session in ((0, 1), (SESSION_S - RENEW_S - 1, 1), (SESSION_S - RENEW_S, 2), (SESSION_S + 1, 2)):
        clock.now_s = begun_s + after_s
        assert (await role.current()).token == f"SessionToken{session}"


async def test_a_session_serves_to_its_end_where_it_cannot_be_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(asyncio.get_running_loop(), "time", clock)
    sts = _Sts()
    role = Role(sts, Credentials("a", "b"), ROLE, "", "headgate")  # type: ignore[arg-type]
    await role.current()
    sts.down = True
    clock.now_s += SESSION_S - 1
    assert (await role.current()).token == "SessionToken1"
    clock.now_s += 1
    with pytest.raises(Fault, match="unavailable"):
        await role.current()


@pytest.mark.parametrize("asked", [{"external_id": "wrong-one"}, {"role": "arn:aws:iam::111122223333:role/other"}])
async def test_a_role_that_may_not_be_assumed_is_named_and_nothing_is_written(
    store: S3FarSide, egress: Egress, asked: dict[str, str]
) -> None:
    connector = sink(egress, {**as_role(store), **asked}, store.secrets())
    (outcome,) = await deliver(connector, delivery())
    assert (outcome.verdict, outcome.fault, outcome.code) == ("retry", "destination", "role")
    assert "sts:AssumeRole" in outcome.detail
    assert store.operations == ["AssumeRole"]
    steps = await connector.check()
    assert (steps[-1].name, steps[-1].ok) == ("role", False)
    await connector.close()


async def test_a_rotation_drains_with_the_old_key_while_the_new_one_serves(store: S3FarSide, egress: Egress) -> None:
    store.keys["AKIAnew"] = ("new-secret", "")
    old = sink(egress, store.options(), store.secrets())
    new = sink(egress, store.options(), {"access_key_id": "AKIAnew", "secret_access_key": "new-secret"})
    under_way = asyncio.create_task(deliver(old, *[delivery(n, event_type=f"t{n}") for n in range(30)]))
    await until(lambda: len(store.requests) > 0)
    closing = asyncio.create_task(old.close())
    (served,) = await deliver(new, delivery(99), first=99)
    assert {outcome.verdict for outcome in await under_way} == {"delivered"} == {served.verdict}
    await closing
    by = [one.headers["authorization"].split("Credential=")[1].split("/")[0] for one in store.requests]
    assert (by.count(ACCESS_KEY), by.count("AKIAnew")) == (30, 1)
    await new.close()


async def test_of_two_destinations_each_signs_with_its_own_key_alone(store: S3FarSide, egress: Egress) -> None:
    """Look-alike tenants and vendors in one bucket under one prefix: no name is shared, no key is lent."""
    owners = [TenantRef(Vendor(v), ExternalId(t)) for v in ("default", "other") for t in ("acme", "ACME", "acme2")]
    sinks = []
    for number, owner in enumerate(owners):
        store.keys[f"AKIA{number}"] = (f"secret{number}", "")
        secrets = {"access_key_id": f"AKIA{number}", "secret_access_key": f"secret{number}"}
        sinks.append(sink(egress, store.options(), secrets, tenant=owner))
    sent = [[delivery(100 * number + n, tenant=owner) for n in range(3)] for number, owner in enumerate(owners)]
    await asyncio.gather(
        *(one.deliver(batch(*mine, tenant=owner)) for one, mine, owner in zip(sinks, sent, owners, strict=True))
    )
    assert len(store.objects) == len(owners)
    for number, mine in enumerate(sent):
        ids = [{one.id for one in mine}]
        written = [one for one in store.requests if f"Credential=AKIA{number}/" in one.headers["authorization"]]
        assert len(written) == 1
        held = {line.split(b'"deliveryId":"')[1][:30].decode() for line in store.lines(written[0].key)}
        assert [held] == ids
    for one in sinks:
        await one.close()


# ---------------------------------------------------------------- what is asked for


async def test_objects_are_kept_as_the_options_say(store: S3FarSide, egress: Egress) -> None:
    connector = sink(
        egress,
        store.options(),
        store.secrets(),
        encryption="sse-kms",
        kms_key="1234abcd",
        storage_class="STANDARD_IA",
        tags={"source": "head gate", "a/b": "c=d"},
        bucket_owner="111122223333",
    )
    await deliver(connector, delivery())
    headers = store.requests[0].headers
    assert headers["x-amz-server-side-encryption"] == "aws:kms"
    assert headers["x-amz-server-side-encryption-aws-kms-key-id"] == "1234abcd"
    assert headers["x-amz-storage-class"] == "STANDARD_IA"
    assert headers["x-amz-tagging"] == "source=head+gate&a%2Fb=c%3Dd"
    assert headers["x-amz-expected-bucket-owner"] == "111122223333"
    assert headers["if-none-match"] == "*"
    assert "expect" not in headers
    assert headers["user-agent"].startswith("Headgate/")
    await connector.close()


# ---------------------------------------------------------------- check


@pytest.mark.parametrize(
    ("operation", "answers", "step", "missing"),
    [
        ("PutObject", [Answer(403, "AccessDenied")], "write", "s3:PutObject"),
        (
            "PutObject",
            [Answer(403, "AccessDenied", message="not allowed: kms:GenerateDataKey")],
            "write",
            "kms:GenerateDataKey",
        ),
        ("HeadObject", [Answer(403)], "read", "s3:GetObject"),
        ("DeleteObject", [Answer(403, "AccessDenied")], "delete", "s3:DeleteObject"),
    ],
)
async def test_a_check_names_the_permission_that_is_missing(
    store: S3FarSide, egress: Egress, operation: str, answers: list[Answer], step: str, missing: str
) -> None:
    store.answers[operation] = answers
    connector = sink(egress, store.options(), store.secrets())
    steps = await connector.check()
    assert [one.name for one in steps if not one.ok] == [step]
    assert steps[-1].name == step
    assert missing in steps[-1].detail
    assert store.objects == {} or step == "delete"
    await connector.close()


async def test_a_check_finds_a_store_that_overwrites_what_it_was_told_not_to(store: S3FarSide, egress: Egress) -> None:
    store.overwrites = True
    connector = sink(egress, store.options(), store.secrets())
    steps = await connector.check()
    assert (steps[-1].name, steps[-1].ok) == ("once", False)
    assert "If-None-Match" in steps[-1].detail
    assert store.objects == {}
    await connector.close()


async def test_checks_of_two_destinations_at_once_do_not_meet(store: S3FarSide, egress: Egress) -> None:
    sinks = [sink(egress, store.options(), store.secrets(), destination=DestinationId(f"{LAKE}{n}")) for n in range(9)]
    for steps in await asyncio.gather(*(one.check() for one in sinks)):
        assert all(step.ok for step in steps)
    assert store.objects == {}
    for one in sinks:
        await one.close()


async def test_a_wrong_secret_is_refused_and_shows_nowhere(store: S3FarSide, egress: Egress) -> None:
    connector = sink(egress, store.options(), {"access_key_id": ACCESS_KEY, "secret_access_key": "canary-wrong"})
    (outcome,) = await deliver(connector, delivery())
    assert (outcome.verdict, outcome.code) == ("retry", "credentials")
    assert "canary" not in repr(outcome) + repr(connector._holder.__dict__)
    await connector.close()
