"""Which names and settings topics have."""

import re

import pytest

from schemas.ids import Tag, Vendor
from schemas.topics import DAY_MS, Sizes, Topics, tenant_topics

TOPICS = Topics("head.gate")
ACME, ACME2 = Vendor("acme"), Vendor("acme2")
SIZES = Sizes(
    max_event_bytes=2**20, ingress_partitions=8, retry_tiers_s=(1.0, 5.0), ingress_retention_ms=DAY_MS,
    attempts_retention_ms=DAY_MS, dlq_retention_ms=DAY_MS, longest_max_age_ms=4 * DAY_MS,
)  # fmt: skip


def test_the_pattern_of_stages_finds_those_of_its_vendors_and_neither_cursors_nor_others() -> None:
    stages = re.compile("|".join(TOPICS.stage_patterns([ACME, Vendor("shop")])))
    tags = [Tag("one"), Tag("pool-00"), Tag("cursor"), Tag("stage")]
    assert all(stages.match(TOPICS.stage(vendor, tag)) for vendor in (ACME, Vendor("shop")) for tag in tags)
    others = [TOPICS.ingress(ACME), TOPICS.unrouted(ACME), "head.gate.acme.stage.", "headXgate.acme.stage.one"]
    for tag in tags:
        others += [TOPICS.stage_cursor(ACME, tag), TOPICS.stage(ACME2, tag)]
        others += [TOPICS.retry(ACME, tag), TOPICS.dead_letters(ACME, tag)]
    assert not [topic for topic in others if stages.match(topic)]


@pytest.mark.parametrize("staged", [True, False])
def test_what_a_stage_holds_is_kept_as_long_as_what_waits_for_a_retry(staged: bool) -> None:
    made = {spec.name: spec for spec in tenant_topics(TOPICS, ACME, Tag("one"), SIZES, staged=staged)}
    stage, cursor = TOPICS.stage(ACME, Tag("one")), TOPICS.stage_cursor(ACME, Tag("one"))
    assert (stage in made, cursor in made) == (staged, staged)
    if staged:
        assert made[stage].config == made[TOPICS.retry(ACME, Tag("one"))].config
        assert made[stage].config["retention.ms"] == str(11 * DAY_MS)
        # where a destination's records lie, its cursor has a partition too
        assert made[stage].partitions == made[cursor].partitions
        assert made[cursor].config["cleanup.policy"] == "compact"
