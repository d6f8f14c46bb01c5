"""The kinds of destination there are. A new kind is one line here."""

from collections.abc import Iterable, Mapping
from typing import Any, Final

from connectors.bigquery.connector import SPEC as BIGQUERY
from connectors.contract import Feed, Spec
from connectors.kafka.connector import SPEC as KAFKA
from connectors.s3.connector import SPEC as S3
from connectors.webhook.connector import SPEC as WEBHOOK

KINDS: Final[Mapping[str, Spec[Any, Any]]] = {spec.kind: spec for spec in (WEBHOOK, KAFKA, S3, BIGQUERY)}


class UnknownKind(ValueError):
    """No destination of this kind can be made; the message says which there are."""


def spec_of(kind: str) -> Spec[Any, Any]:
    """Raises UnknownKind."""
    spec = KINDS.get(kind)
    if spec is not None:
        return spec
    known = ", ".join(sorted(KINDS))
    raise UnknownKind(f"unknown type {kind!r}; known: {known}")


def any_staged(kinds: Iterable[str]) -> bool:
    """Whether one of these kinds is fed by the stage."""
    return any(kind in KINDS and KINDS[kind].feed is Feed.STAGE for kind in kinds)
