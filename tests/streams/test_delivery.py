"""The main job on real Kafka: what is published arrives, signed, once, at its tenant's place, and is committed."""

import json

import pytest

from tests.deployment import Deployment, event

pytestmark = pytest.mark.broker


async def test_every_published_event_arrives_signed_at_its_tenants_webhook_and_is_committed(deployment: Deployment):
    tenants = [deployment.tenant("acme"), deployment.tenant("acme2")]
    applied = await deployment.apply({"vendor": "default", "tenants": tenants})
    for made in applied.plan.made:
        deployment.inbox.script(f"/{made.tenant}", secrets=[made.value.get_secret_value()])
    await deployment.worker()
    await deployment.publish([(t, event(f"{t}-{n}")) for n in range(50) for t in ("acme", "acme2")])
    for tenant in ("acme", "acme2"):
        await deployment.inbox.wait_for(f"/{tenant}", 50, timeout_s=60)
        received = deployment.inbox.received(f"/{tenant}")
        assert {json.loads(one.body)["id"] for one in received} == {f"{tenant}-{n}" for n in range(50)}
        assert len(received) == 50
        assert all(one.signature_ok for one in received)
    await deployment.all_committed()
