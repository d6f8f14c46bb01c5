"""The BigQuery connector: what it declares. The writing itself (`writer.py`) is loaded with the first destination:
Google's libraries take 80 MB and a second."""

from collections.abc import Mapping, Set
from typing import TYPE_CHECKING, Final

from config.settings import parse_bytes, parse_duration_s
from connectors.bigquery.classify import CODES, UNSURE
from connectors.bigquery.options import Options, Secrets
from connectors.contract import Batching, Expressions, Feed, Spec
from connectors.egress import Egress
from schemas.ids import DestinationId, TenantRef

if TYPE_CHECKING:
    from connectors.bigquery.writer import BigQueryConnector

MAX_EVENTS: Final = 20_000
# To learn, when an attempt has used up its time, how much it has stored; twice, as the one before may be asked for too.
LEARNING_S: Final = 30.0


def batching(options: Options) -> Batching:
    return Batching(
        max_events=MAX_EVENTS,
        max_bytes=parse_bytes(options.flush_size),
        linger_s=parse_duration_s(options.flush_interval),
        max_in_flight=1,
        timeout_s=options.timeout_s + LEARNING_S,
    )


def connect(
    tenant: TenantRef,
    destination: DestinationId,
    options: Options,
    secrets: Secrets,
    egress: Egress,
    retry_also: Set[int] = frozenset(),
    expressions: Expressions | None = None,
) -> "BigQueryConnector":
    """Call it on the event loop that deliveries are to run on."""
    from connectors.bigquery.writer import BigQueryConnector

    return BigQueryConnector(options, secrets, egress.bigquery, batching(options))


def _dials(options: Options) -> Mapping[str, tuple[str, bool]]:
    """None: where BigQuery is, the operator says."""
    return {}


SPEC: Final = Spec(
    kind="bigquery",
    title="BigQuery",
    feed=Feed.STAGE,
    options=Options,
    secrets=Secrets,
    example={
        "options": {"project": "acme-analytics", "dataset": "product_events"},
        "secrets": {"service_account": {"env": "ACME_BIGQUERY_KEY"}},
    },
    codes=CODES,
    connect=connect,
    dials=_dials,
    batching=batching,
    unsure=UNSURE,
)
