"""The kind against real servers: moto, which keeps conditional writes and assumes roles but believes every key; and
versitygw, which refuses wrong keys and other tenants' buckets but assumes no roles.

versitygw is found on the path, in HEADGATE_TEST_VERSITYGW, or where `make s3-tools` builds it; without it its tests are
skipped and say so.
"""

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config

from connectors.egress import Egress
from dev import process, s3, wait
from schemas.ids import ExternalId, TenantRef, Vendor
from tests.connectors.post import LOOPBACK
from tests.connectors.s3s import batch, deliver, delivery, sink

ROOT = Path(__file__).parents[2]
BUILT = ROOT / ".headgate-cache" / "bin" / "versitygw"
FOUND = os.environ.get("HEADGATE_TEST_VERSITYGW") or shutil.which("versitygw") or (BUILT.exists() and str(BUILT))
needs_versitygw = pytest.mark.skipif(not FOUND, reason="versitygw is not on the path; `make s3-tools` builds it")

LARGE = b'"%b"' % (b"0123456789abcdef" * (1 << 20))
ADMIN = {"access_key_id": "admin", "secret_access_key": "admin-secret"}
KEYS = {name: {"access_key_id": name, "secret_access_key": f"{name}-secret"} for name in ("acme", "acme2")}
ROLE = "arn:aws:iam::111122223333:role/headgate"


@pytest.fixture
async def egress() -> AsyncIterator[Egress]:
    made = Egress(LOOPBACK)
    yield made
    made.close()


def options(port: int, bucket: str, **more: Any) -> dict[str, Any]:
    endpoint = f"http://127.0.0.1:{port}"
    return {"bucket": bucket, "region": "us-east-1", "endpoint": endpoint, "path_style": True, **more}


def client(port: int, keys: dict[str, str]) -> Any:
    """Another's eyes on what is there."""
    return boto3.client(
        "s3",
        region_name="us-east-1",
        endpoint_url=f"http://127.0.0.1:{port}",
        aws_access_key_id=keys["access_key_id"],
        aws_secret_access_key=keys["secret_access_key"],
        config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
    )


def keys_of(seen: Any, bucket: str) -> list[str]:
    return [one["Key"] for one in seen.list_objects_v2(Bucket=bucket).get("Contents", [])]


@pytest.fixture(scope="module")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    home = tmp_path_factory.mktemp("moto")
    (port,) = wait.free_ports(1)
    running = s3.start(home, port)
    try:
        assert wait.until(lambda: s3.answers(port), s3.START_TIMEOUT_S), s3.log(home).read_text()
        s3.make_bucket(port, "acme-events")
        s3.make_bucket(port, "acme-events")
        yield port
    finally:
        process.end(running, grace_s=0)
    assert not s3.answers(port)


@pytest.fixture(scope="module")
def versity(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    home = tmp_path_factory.mktemp("versity")
    for name in ("data", "meta", "iam"):
        (home / name).mkdir()
    (port,) = wait.free_ports(1)
    command = [
        str(FOUND), "--port", f"127.0.0.1:{port}", "--access", ADMIN["access_key_id"],
        "--secret", ADMIN["secret_access_key"], "--iam-dir", str(home / "iam"), "--keep-alive", "--quiet",
        "posix", "--sidecar", str(home / "meta"), str(home / "data"),
    ]  # fmt: skip
    running = process.spawn(command, cwd=home, log=home / "log", environ=os.environ)
    try:
        assert wait.until(lambda: not wait.is_free(port), 20), (home / "log").read_text()
        for name, keys in KEYS.items():
            _admin(port, "create-user", "-a", keys["access_key_id"], "-s", keys["secret_access_key"], "-r", "user")
            client(port, ADMIN).create_bucket(Bucket=f"{name}-events")
            _admin(port, "change-bucket-owner", "-b", f"{name}-events", "-o", keys["access_key_id"])
        client(port, ADMIN).create_bucket(Bucket="shared")
        policy = {
            "Version": "2012-10-17",
            "Statement": [
                {
                    "Effect": "Allow",
                    "Principal": {"AWS": [name]},
                    "Action": ["s3:PutObject", "s3:GetObject", "s3:DeleteObject", "s3:AbortMultipartUpload"],
                    "Resource": f"arn:aws:s3:::shared/{name}/*",
                }
                for name in KEYS
            ],
        }
        client(port, ADMIN).put_bucket_policy(Bucket="shared", Policy=json.dumps(policy))
        yield port
    finally:
        process.end(running, grace_s=0)


def _admin(port: int, *arguments: str) -> None:
    endpoint = ["--endpoint-url", f"http://127.0.0.1:{port}"]
    keys = ["--access", ADMIN["access_key_id"], "--secret", ADMIN["secret_access_key"]]
    done = subprocess.run(
        [str(FOUND), "admin", *keys, *endpoint, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout


@pytest.fixture(params=["moto", pytest.param("versity", marks=needs_versitygw)])
def server(request: pytest.FixtureRequest) -> int:
    port: int = request.getfixturevalue(request.param)
    return port


# ---------------------------------------------------------------- both


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
async def test_what_is_delivered_is_there_once_and_is_found_again(
    server: int, egress: Egress, compression: str
) -> None:
    prefix = f"once/{compression}"
    connector = sink(egress, options(server, "acme-events"), KEYS["acme"], prefix=prefix, compression=compression)
    sent = [delivery(number, event_type=f"a/b %{number % 3}") for number in range(30)]
    seen = client(server, KEYS["acme"])
    for _ in range(2):
        assert {outcome.verdict for outcome in await deliver(connector, *sent)} == {"delivered"}
        found = [key for key in keys_of(seen, "acme-events") if key.startswith(prefix)]
        assert len(found) == 3
    (outcome,) = await deliver(connector, delivery(7, event_type="a/b %0"))
    assert (outcome.fault, outcome.code) == ("platform", "name_taken")
    await connector.close()


async def test_a_large_object_is_whole_and_written_once(server: int, egress: Egress) -> None:
    connector = sink(egress, options(server, "acme-events"), KEYS["acme"], prefix="large", compression="none")
    seen = client(server, KEYS["acme"])
    for _ in range(2):
        (outcome,) = await deliver(connector, delivery(1, LARGE))
        assert (outcome.verdict, outcome.detail) == ("delivered", "")
    content = seen.get_object(Bucket="acme-events", Key=outcome.receipt)["Body"].read()
    assert json.loads(content)["payload"] == json.loads(LARGE)
    await connector.close()
    assert seen.list_multipart_uploads(Bucket="acme-events").get("Uploads", []) == []


async def test_a_check_goes_through_and_leaves_nothing_behind(server: int, egress: Egress) -> None:
    connector = sink(egress, options(server, "acme-events"), KEYS["acme"], prefix="checked")
    steps = await connector.check()
    assert [(step.name, step.detail) for step in steps if not step.ok] == []
    assert [key for key in keys_of(client(server, KEYS["acme"]), "acme-events") if key.startswith("checked")] == []
    await connector.close()


async def test_a_bucket_that_is_not_there_is_named(server: int, egress: Egress) -> None:
    connector = sink(egress, options(server, "nowhere"), KEYS["acme"])
    (outcome,) = await deliver(connector, delivery())
    assert (outcome.verdict, outcome.code) == ("retry", "no_bucket")
    await connector.close()


# ---------------------------------------------------------------- moto


async def test_a_role_is_assumed_and_its_session_writes(moto: int, egress: Egress) -> None:
    told = options(moto, "acme-events", role=ROLE, external_id="acme-7f3k", sts_endpoint=f"http://127.0.0.1:{moto}")
    connector = sink(egress, told, KEYS["acme"], prefix="as-role")
    (outcome,) = await deliver(connector, delivery())
    assert outcome.verdict == "delivered", outcome
    steps = await connector.check()
    assert [step.name for step in steps if step.ok] == ["connect", "role", "write", "once", "read", "delete"]
    await connector.close()


async def test_objects_are_kept_as_the_options_say(moto: int, egress: Egress) -> None:
    how = {"encryption": "sse-kms", "kms_key": "1234abcd", "storage_class": "STANDARD_IA", "tags": {"a": "b c"}}
    connector = sink(egress, options(moto, "acme-events"), KEYS["acme"], prefix="kept", **how)
    (outcome,) = await deliver(connector, delivery())
    seen = client(moto, KEYS["acme"])
    found = seen.head_object(Bucket="acme-events", Key=outcome.receipt)
    assert (found["ServerSideEncryption"], found["StorageClass"]) == ("aws:kms", "STANDARD_IA")
    tags = seen.get_object_tagging(Bucket="acme-events", Key=outcome.receipt)["TagSet"]
    assert tags == [{"Key": "a", "Value": "b c"}]
    await connector.close()


# ---------------------------------------------------------------- versitygw


@needs_versitygw
@pytest.mark.parametrize(
    ("keys", "code"),
    [
        ({"access_key_id": "nobody", "secret_access_key": "x"}, "credentials"),
        ({"access_key_id": "acme", "secret_access_key": "acme2-secret"}, "credentials"),
        (KEYS["acme2"], "denied"),
    ],
)
async def test_who_is_not_the_owner_is_refused(versity: int, egress: Egress, keys: dict[str, str], code: str) -> None:
    before = keys_of(client(versity, ADMIN), "acme-events")
    connector = sink(egress, options(versity, "acme-events"), keys, prefix="stranger")
    (outcome,) = await deliver(connector, delivery())
    assert (outcome.verdict, outcome.fault, outcome.code) == ("retry", "destination", code)
    steps = await connector.check()
    assert (steps[-1].name, steps[-1].ok) == ("write", False)
    assert keys_of(client(versity, ADMIN), "acme-events") == before
    await connector.close()


@needs_versitygw
async def test_two_tenants_of_two_vendors_with_look_alike_names_never_meet_on_one_bucket(
    versity: int, egress: Egress
) -> None:
    """Each with the keys of its own, under the same prefix, and at the same offsets of look-alike logs."""
    owners = [TenantRef(Vendor(v), ExternalId(t)) for v in ("default", "other") for t in ("acme", "acme2", "ACME")]
    sinks = [
        sink(egress, options(versity, "shared"), KEYS[name], tenant=owner, prefix=f"{name}/in")
        for owner in owners
        for name in KEYS
    ]
    sent = [
        batch(*[delivery(1000 * at + n, tenant=owner) for n in range(5)], tenant=owner)
        for at, owner in enumerate(owner for owner in owners for _ in KEYS)
    ]
    for outcomes in await asyncio.gather(*(one.deliver(mine) for one, mine in zip(sinks, sent, strict=True))):
        assert {outcome.verdict for outcome in outcomes.values()} == {"delivered"}
    seen = client(versity, ADMIN)
    held = {key: seen.head_object(Bucket="shared", Key=key)["Metadata"] for key in keys_of(seen, "shared")}
    assert len(held) == len(sinks)
    assert len({tuple(one.items()) for one in held.values()}) == len(sinks)
    # the bucket's own policy says who may write where: the keys of one have not served the other
    for name, other in (("acme", "acme2"), ("acme2", "acme")):
        connector = sink(egress, options(versity, "shared"), KEYS[name], prefix=f"{other}/in")
        (outcome,) = await deliver(connector, delivery())
        assert outcome.code == "denied"
        await connector.close()
    for one in sinks:
        await one.close()
