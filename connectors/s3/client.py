"""Requests of AWS's protocols: botocore writes, signs and reads them, the door's HTTP client carries them.

botocore opens no socket and reads no environment, no file of credentials and no instance's metadata: its HTTP session
is one that hands the signed request back. So a request waits on the event loop and not in a thread, and a store that
hangs holds up nobody.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

from botocore.awsrequest import AWSPreparedRequest, HeadersDict
from botocore.config import Config
from botocore.configprovider import BOTOCORE_DEFAUT_SESSION_VARIABLES, ConfigValueStore, ConstantProvider
from botocore.parsers import ResponseParserError, ResponseParserFactory
from botocore.session import Session
from msgspec import Struct

from connectors.contract import give
from connectors.egress import Egress
from connectors.http.answer import MAX_ANSWER_BYTES, Answer
from connectors.http.client import USER_AGENT, Target
from connectors.http.place import Place
from connectors.s3.classify import Fault, Step, answered, unanswered
from schemas.ids import TenantRef

THREADS: Final = 2

Made = TypeVar("Made")

# botocore's own record of what it does holds bodies and signatures
logging.getLogger("botocore").setLevel(logging.WARNING)


class Credentials(Struct, frozen=True):
    """`token` belongs to those of an assumed role."""

    access_key_id: str
    secret_access_key: str
    token: str = ""

    def __repr__(self) -> str:
        return "Credentials(…)"


class _SignedInstead(Exception):
    def __init__(self, request: AWSPreparedRequest) -> None:
        super().__init__()
        self.request = request


class _NoSession:
    """In the place of botocore's HTTP session: sends nothing."""

    def send(self, request: AWSPreparedRequest) -> None:
        raise _SignedInstead(request)

    def close(self) -> None:
        pass


class Workshop:
    """What the S3 destinations behind a door share: botocore's models, and the threads that compress and sign.

    No work in them waits for anything outside of the process.
    """

    def __init__(self, egress: Egress) -> None:
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="s3")
        self._lock = threading.Lock()
        self._session = Session()
        # in the place of the one that reads AWS_… and ~/.aws
        defaults = {name: ConstantProvider(known[2]) for name, known in BOTOCORE_DEFAUT_SESSION_VARIABLES.items()}
        self._session.register_component("config_store", ConfigValueStore(defaults))

    async def run(self, work: Callable[[], Made]) -> Made:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def client(self, service: str, region: str, endpoint: str, path_style: bool, credentials: Credentials) -> Any:
        """A botocore client that signs with these. Takes 16 ms; not to be called on the event loop."""
        config = Config(
            user_agent=USER_AGENT,
            signature_version="v4" if service == "sts" else "s3v4",
            retries={"total_max_attempts": 1, "mode": "standard"},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            ignore_configured_endpoint_urls=True,
            proxies={},
            s3={
                "addressing_style": "path" if path_style else "virtual",
                "us_east_1_regional_endpoint": "regional",
                "use_arn_region": False,
            },
        )
        with self._lock:
            client = self._session.create_client(
                service,
                region_name=region,
                endpoint_url=endpoint or None,
                aws_access_key_id=credentials.access_key_id,
                aws_secret_access_key=credentials.secret_access_key,
                aws_session_token=credentials.token or None,
                config=config,
            )
        client._endpoint.http_session.close()
        client._endpoint.http_session = _NoSession()
        return client

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class Service:
    """One AWS service as one destination asks it. Its connections are the destination's own."""

    def __init__(
        self,
        egress: Egress,
        tenant: TenantRef,
        service: str,
        region: str,
        endpoint: Place | None,
        path_style: bool,
        timeout_s: float,
    ) -> None:
        self._shop = egress.keep(Workshop)
        self._egress = egress
        self._tenant = tenant
        self._timeout_s = timeout_s
        url = f"{endpoint.scheme}://{endpoint.authority}" if endpoint is not None else ""
        self._make_client = partial(self._shop.client, service, region, url, path_style)
        self._client: tuple[Credentials, Any] | None = None
        self._targets: dict[tuple[str, str, int], Target] = {}

    async def ask(
        self, credentials: Credentials, operation: str, step: Step, needs: str, **parameters: Any
    ) -> Mapping[str, Any]:
        """What botocore reads of the answer. Raises Fault. `needs`: the permissions that the operation wants."""
        client, request, message = await self._shop.run(partial(self._sign, credentials, operation, parameters))
        given: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._target(request.url).send(message, self._timeout_s, partial(give, given))
        answer = await given
        if not answer.status:
            raise unanswered(answer, step)
        return _read(client, operation, answer, step, needs)

    def _sign(
        self, credentials: Credentials, operation: str, parameters: Mapping[str, Any]
    ) -> tuple[Any, AWSPreparedRequest, bytes]:
        kept = self._client
        if kept is None or kept[0] != credentials:
            kept = self._client = credentials, self._make_client(credentials)
        try:
            getattr(kept[1], operation)(**parameters)
        except _SignedInstead as signed:
            return kept[1], signed.request, _message(signed.request)
        raise AssertionError("botocore has answered without a request")

    def _target(self, url: str) -> Target:
        parts = urlsplit(url)
        tls = parts.scheme == "https"
        where = parts.scheme, parts.hostname or "", parts.port or (443 if tls else 80)
        if where not in self._targets:
            self._targets[where] = self._egress.http.target(
                self._tenant, Place(*where, "/"), excerpt_bytes=MAX_ANSWER_BYTES, keeps_head=True
            )
        return self._targets[where]

    async def close(self) -> None:
        for target in self._targets.values():
            await target.close()


def _message(request: AWSPreparedRequest) -> bytes:
    """The request as it goes out: what was signed, to the byte."""
    parts = urlsplit(request.url)
    path = f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
    # without Host, which botocore signs and leaves to its session; the body goes at once: no answer is waited for
    lines = [f"{request.method} {path} HTTP/1.1\r\nHost: {_host(parts.netloc, parts.scheme)}\r\n".encode()]
    for name, value in request.headers.items():
        if name.lower() not in ("host", "expect"):
            lines.append(b"%b: %b\r\n" % (name.encode(), value if isinstance(value, bytes) else str(value).encode()))
    body = request.body or b""
    if isinstance(body, BytesIO):  # which botocore makes of what it was given
        body = body.getvalue()
    return b"".join((*lines, b"\r\n", body.encode() if isinstance(body, str) else body))


def _host(netloc: str, scheme: str) -> str:
    return netloc.removesuffix(":443" if scheme == "https" else ":80")


def _read(client: Any, operation: str, answer: Answer, step: Step, needs: str) -> Mapping[str, Any]:
    headers = HeadersDict()
    for line in answer.head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        headers[name.decode("latin-1").strip()] = value.decode("latin-1").strip()
    status = answer.status
    # S3 answers 200 before it has put the parts together, and tells in the body that it could not
    if 200 <= status < 300 and b"<Error>" in answer.excerpt[:1024]:
        status = 500
    model = client.meta.service_model.operation_model(client.meta.method_to_api_mapping[operation])
    response = {"headers": headers, "status_code": status, "body": answer.excerpt, "context": {}}
    try:
        parser = ResponseParserFactory().create_parser(model.service_model.resolved_protocol)
        parsed: Mapping[str, Any] = parser.parse(response, model.output_shape)
    except (ResponseParserError, ValueError, KeyError, TypeError, AttributeError):
        raise Fault("protocol", status=answer.status, step=step) from None
    if status < 300:
        return parsed
    error = parsed.get("Error", {})
    code, message, region = (str(error.get(name, "")) for name in ("Code", "Message", "Region"))
    region = region or str(headers.get("x-amz-bucket-region", ""))
    raise answered(status, code, message, region, answer.retry_after, step, needs)
