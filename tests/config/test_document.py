"""The configuration file: what is accepted, and that every fault names its place, its value and a remedy."""

import inspect
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.apply import RULES, command
from config.document import Document, DocumentError, parse_document, parse_rate_per_s
from config.nodes import MAX_DEPTH, Place, YamlFault, compose, plain
from dev.demo.places import new_secrets
from schemas.control import LimitSpec, RetrySpec
from schemas.ids import Vendor

SIGNING = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"

WHOLE = """\
vendor: default
tenants:
  - externalId: acme
    name: Acme Ltd
    slug: acme
    topics: own
    database: shared
    payloadMode: private
    destinations:
      - id: orders-hook
        type: webhook
        options: {url: "https://hooks.acme.example/in?token=t", timeout: 15s}
        secrets:
          signing: {env: ACME_SIGNING_SECRET}
          headers: {X-Token: {value: abc}}
        retry: {schedule: [0s, 5s, 5m], max_age: 72h, also: [403, 404]}
        limits: {in_flight: 4, rate: 120/m}
    routes:
      - id: big-orders
        match: {types: ["order.*", "invoice.paid"], where: 'payload.total > 100 && payload.country in ["CH", "DE"]'}
        to: [orders-hook]
        redact: [payload.card.number]
"""


def parse(text: str, file: str = "headgate.yaml", env: Mapping[str, str] | None = None) -> Document:
    found = {"ACME_SIGNING_SECRET": SIGNING} if env is None else env
    return parse_document(text, file=file, rules=RULES, env=found, vendors=[Vendor("default")])


def faults(text: str, file: str = "headgate.yaml", env: Mapping[str, str] | None = None) -> list[str]:
    with pytest.raises(DocumentError) as raised:
        parse(text, file, env)
    return [str(fault) for fault in raised.value.faults]


def tenant(body: str) -> str:
    """A file of one tenant; `body` is indented as the tenant's fields are."""
    return "tenants:\n  - externalId: acme\n" + body


def destination(body: str) -> str:
    return tenant("    destinations:\n      - id: hook\n        type: webhook\n" + body)


URL = "        options: {url: 'https://a.example/'}\n"


def test_the_design_s_example_is_read_whole() -> None:
    document = parse(WHOLE)
    (acme,) = document.tenants
    assert (acme.external_id, acme.name, acme.slug, acme.topics, acme.payload_mode) == (
        "acme",
        "Acme Ltd",
        "acme",
        "own",
        "private",
    )
    (hook,) = acme.destinations
    assert msgspec.json.decode(hook.options) == {"url": "https://hooks.acme.example/in?token=t", "timeout": "15s"}
    assert {name: secret.get_secret_value() for name, secret in hook.secrets.items()} == {
        "signing": SIGNING,
        "headers.X-Token": "abc",
    }
    assert hook.retry == RetrySpec((0.0, 5.0, 300.0), 72 * 3600.0, (403, 404))
    assert hook.limits == LimitSpec(4, 2.0)
    (route,) = acme.routes
    assert route.types == ("order.*", "invoice.paid")
    assert route.to == ("orders-hook",)
    assert route.redact == ("payload.card.number",)
    assert [str(warning) for warning in document.warnings] == [
        "headgate.yaml:15:38: tenants[0].destinations[0].secrets.headers.X-Token.value: a secret stands in the file "
        "itself; prefer {env: NAME} or {file: PATH}"
    ]


def test_the_examples_of_the_documentation_and_of_the_help_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "acme-token").write_text("Bearer t")
    page = Path("docs/configuration.md").read_text()
    example = page.partition("```yaml\n")[2].partition("```")[0]
    theirs = new_secrets()
    env = {
        "ACME_SIGNING_SECRET": SIGNING,
        "ACME_KAFKA_PASSWORD": "p",
        "ACME_S3_KEY_ID": theirs["DEMO_S3_KEY_ID"],
        "ACME_S3_KEY": theirs["DEMO_S3_KEY"],
        "ACME_BIGQUERY_KEY": theirs["DEMO_BIGQUERY_KEY"],
    }
    (acme,) = parse(example, str(tmp_path / "headgate.yaml"), env).tenants
    assert acme.external_id == "acme"
    assert sorted(destination.type for destination in acme.destinations) == ["bigquery", "kafka", "s3", "webhook"]
    shown = inspect.cleandoc(command.help or "").partition("\b\n")[2].partition("\n\nPrints")[0]
    assert parse(shown).tenants[0].routes[0].where == "payload.total > 100"


def test_every_fault_is_told_with_its_place_not_only_the_first() -> None:
    text = """\
tenants:
  - externalId: acme
    destination: []
    destinations:
      - id: Hook
        type: webhok
        retry: {schedule: [soon]}
      - id: two
        type: webhook
        options: {url: "http://user:pw@a.example/", timeoot: 1s}
        limits: {in_flight: 0, rate: fast}
    routes:
      - id: r
        match: {types: ["a*b"], where: "payload.x >"}
        to: [tow]
"""
    told = faults(text)
    places = [tuple(one.split(": ")[:2]) for one in told]
    assert places == [
        ("headgate.yaml:3:5", "tenants[0].destination"),
        ("headgate.yaml:5:13", "tenants[0].destinations[0].id"),
        ("headgate.yaml:6:15", "tenants[0].destinations[0].type"),
        ("headgate.yaml:7:28", "tenants[0].destinations[0].retry.schedule[0]"),
        ("headgate.yaml:10:24", "tenants[0].destinations[1].options.url"),
        ("headgate.yaml:10:53", "tenants[0].destinations[1].options.timeoot"),
        ("headgate.yaml:11:29", "tenants[0].destinations[1].limits.in_flight"),
        ("headgate.yaml:11:38", "tenants[0].destinations[1].limits.rate"),
        ("headgate.yaml:14:25", "tenants[0].routes[0].match.types[0]"),
        ("headgate.yaml:14:52", "tenants[0].routes[0].match.where"),
        ("headgate.yaml:15:14", "tenants[0].routes[0].to[0]"),
    ]
    assert "did you mean destinations?" in told[0]
    assert "did you mean webhook?" in told[2]
    assert "did you mean timeout?" in told[5]
    assert "'0' is not a whole number from 1 to 1024" in told[6]
    assert "did you mean two?" in told[10]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "headgate.yaml:1:1: the file is empty; write `tenants:` with a list"),
        ("tenants: 3\n", "headgate.yaml:1:10: tenants: is a single value, not a list"),
        ("vendor: default\n", "headgate.yaml:1:1: tenants: is missing; write `tenants:` with a list"),
        (
            "vendor: acme\ntenants: []\n",
            "headgate.yaml:1:9: vendor: 'acme' is no vendor of this deployment (default); add it to HEADGATE_VENDORS, "
            "also that of the workers",
        ),
        (
            "tenants:\n  - externalId: 42\n",
            'headgate.yaml:2:17: tenants[0].externalId: is a number, not a text; write it in quotes: "42"',
        ),
        ("tenants:\n  - name: x\n", "headgate.yaml:2:5: tenants[0].externalId: is missing"),
        (
            'tenants:\n  - externalId: "a\\tb"\n',
            "headgate.yaml:2:17: tenants[0].externalId: holds a control character; 1 to 200 bytes without control "
            "characters",
        ),
        (
            f"tenants:\n  - externalId: {'ü' * 101}\n",
            "headgate.yaml:2:17: tenants[0].externalId: has 202 bytes, more than 200; 1 to 200 bytes without control "
            "characters",
        ),
        (
            "tenants:\n  - externalId: a\n  - externalId: a\n",
            "headgate.yaml:3:17: tenants[1].externalId: the tenant 'a' stands here twice (first on line 2)",
        ),
        (
            "tenants:\n  - {externalId: a, slug: s}\n  - {externalId: b, slug: s}\n",
            "headgate.yaml:3:18: tenants[1].slug: the slug 's' stands here twice (first on line 2)",
        ),
        (
            tenant("    slug: control\n"),
            "headgate.yaml:3:11: tenants[0].slug: 'control' is reserved (control, keys, state, ingress, unrouted, "
            "pool-*)",
        ),
        (
            tenant("    database: own\n"),
            "headgate.yaml:3:15: tenants[0].database: own needs the API's store, which arrives with a later release; "
            "write `shared` or leave it out",
        ),
        (
            tenant("    topics: shared\n"),
            "headgate.yaml:3:13: tenants[0].topics: 'shared' is not one of own, pooled",
        ),
        (
            tenant("    destinations:\n      - {id: lake, type: s4}\n"),
            "headgate.yaml:4:26: tenants[0].destinations[0].type: 's4' is no kind of destination; known here: "
            "bigquery, kafka, s3, webhook",
        ),
        (
            destination(URL + "        retry: {also: [410]}\n"),
            "headgate.yaml:7:24: tenants[0].destinations[0].retry.also[0]: 410 disables the destination and is never "
            "retried; remove it",
        ),
        (
            destination(URL + "        retry: {schedule: [0]}\n"),
            "headgate.yaml:7:28: tenants[0].destinations[0].retry.schedule[0]: '0' is not a duration; write a number "
            "and a unit: 0s, 500ms, 5m, 72h",
        ),
        (
            destination(URL + "        secrets: {signing: {env: NOT_SET}}\n"),
            "headgate.yaml:7:34: tenants[0].destinations[0].secrets.signing.env: the environment has no variable "
            "NOT_SET; set it and run again",
        ),
        (
            destination(URL + "        secrets: {signing: {file: /does/not/exist}}\n"),
            "headgate.yaml:7:35: tenants[0].destinations[0].secrets.signing.file: cannot read /does/not/exist: No such "
            "file or directory",
        ),
        (
            destination("        options: {timeout: 3s}\n"),
            "headgate.yaml:6:18: tenants[0].destinations[0].options.url: is missing",
        ),
        (
            tenant("    routes:\n      - {id: r, to: []}\n"),
            'headgate.yaml:4:9: tenants[0].routes[0].match: is missing; write `match: {types: ["*"]}` for every event',
        ),
        (
            destination(URL + "        secrets: {signign: {env: NOT_SET}}\n"),
            "headgate.yaml:7:19: tenants[0].destinations[0].secrets.signign: unknown field; did you mean signing?",
        ),
        (
            destination(URL + "        secrets: {headers: {X-Token: Bearer}}\n"),
            "headgate.yaml:7:38: tenants[0].destinations[0].secrets.headers: holds what is not a source of a secret; "
            "write NAME: and {env: NAME}, {file: PATH} or {value: TEXT}",
        ),
        (
            destination(URL + "        secrets: {headers: Bearer}\n"),
            "headgate.yaml:7:28: tenants[0].destinations[0].secrets.headers: is a single value, not a mapping of names",
        ),
        (
            destination("        options: {url: 'https://a.example/', timeout: 15}\n"),
            "headgate.yaml:6:55: tenants[0].destinations[0].options.timeout: is a number, not a text; write one such "
            "as 15s",
        ),
        (
            tenant("    routes:\n      - {id: r, match: {types: ['*'], where: ' '}, to: []}\n"),
            "headgate.yaml:4:48: tenants[0].routes[0].match.where: column 2: the expression is empty; Leave `where` "
            "out to let every event pass.",
        ),
        ("tenants:\n\t- externalId: a\n", "headgate.yaml:2:1: not valid YAML: a tab does not indent; write spaces"),
        ("a: [1\nb: 2", "headgate.yaml:2:2: not valid YAML: did not find expected ',' or ']'"),
        (
            "a: 1\na: 2\n",
            "headgate.yaml:2:1: the key 'a' stands here a second time (first on line 1); keep one of them",
        ),
    ],
)
def test_a_fault_names_place_value_and_remedy(text: str, told: str) -> None:
    found = faults(text)
    assert any(one.startswith(told) for one in found), found


@pytest.mark.parametrize("retry", ["{max_age: forever}", "{max_age: 800h}", "{max_age: 0s}", "{schedule: 5s}"])
def test_one_fault_is_told_once(retry: str) -> None:
    assert len(faults(destination(URL + f"        retry: {retry}\n"))) == 1


def test_two_destinations_or_routes_of_one_name_are_refused() -> None:
    text = tenant(
        "    destinations:\n"
        "      - {id: h, type: webhook, options: {url: 'https://a.example/'}}\n"
        "      - {id: h, type: webhook, options: {url: 'https://b.example/'}}\n"
        "    routes:\n"
        "      - {id: r, match: {types: ['*']}, to: [h]}\n"
        "      - {id: r, match: {types: ['*']}, to: [h, h]}\n"
    )
    told = faults(text)
    assert len(told) == 3
    assert "destinations[1].id: the destination 'h' stands here twice (first on line 4)" in told[0]
    assert any("routes[1].id: the route 'r' stands here twice" in one for one in told)
    assert any("routes[1].to[1]: 'h' stands here twice" in one for one in told)


def test_look_alike_tenants_are_different_tenants() -> None:
    ids = ["acme", "acme2", "ACME", "a.b", "a/b", "é", "e\u0301", "日本", " acme"]
    text = "tenants:\n" + "".join(f"  - externalId: {msgspec.json.encode(one).decode()}\n" for one in ids)
    assert [entry.external_id for entry in parse(text).tenants] == ids


def test_words_that_older_yaml_reads_as_something_else_stay_texts() -> None:
    text = tenant("    name: no\n") + "  - externalId: on\n  - externalId: 2026-11-21\n  - externalId: 5:30\n"
    document = parse(text)
    assert [entry.external_id for entry in document.tenants] == ["acme", "on", "2026-11-21", "5:30"]
    assert document.tenants[0].name == "no"


def test_a_secret_file_is_sought_beside_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "signing").write_text(SIGNING + "\n")
    text = destination(URL + "        secrets: {signing: {file: signing}}\n")
    document = parse(text, str(tmp_path / "headgate.yaml"))
    assert document.tenants[0].destinations[0].secrets["signing"].get_secret_value() == SIGNING


CANARY = "whsec_CANARYcanaryCANARYcanaryCANARY00"


@pytest.mark.parametrize(
    "source",
    [
        CANARY,
        f"{{value: {CANARY}!}}",
        f"{{value: [{CANARY}]}}",
        f"{{{CANARY}}}",
        f"{{valu: {CANARY}}}",
        f"[{CANARY}]",
        f"!{CANARY}",
        f"*{CANARY}",
        f"{{value: '{CANARY}é'}}",
        "{env: LEAK}",
    ],
)
@pytest.mark.parametrize("field", ["signing", "headers", "client_cert", "unknown"])
def test_no_fault_quotes_a_secret(source: str, field: str) -> None:
    text = destination(URL + f"        secrets: {{{field}: {source}}}\n")
    told = faults(text, env={"LEAK": CANARY + "!"})
    assert told
    assert "CANARY" not in "".join(told)
    assert "canary" not in repr(told).lower()


def test_a_document_s_repr_shows_no_secret() -> None:
    assert SIGNING not in repr(parse(WHOLE))


def test_what_the_schedule_never_reaches_is_warned_of() -> None:
    document = parse(destination(URL + "        retry: {schedule: [0s, 2h], max_age: 1h}\n"))
    assert "the schedule takes longer than max_age" in str(document.warnings[0])


def test_aliases_share_values_but_a_bomb_is_refused() -> None:
    shared = (
        "tenants:\n"
        "  - externalId: a\n"
        "    destinations: &both\n"
        "      - {id: h, type: webhook, options: {url: 'https://a.example/'}}\n"
        "  - externalId: b\n"
        "    destinations: *both\n"
    )
    first, second = parse(shared).tenants
    assert first.destinations == second.destinations
    bomb = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 30))
    assert "more than 2000000 values" in faults(bomb)[0]


@pytest.mark.parametrize("opening", ["[", "- ", "{a: ", "? "])
def test_deep_nesting_is_refused_not_died_of(opening: str) -> None:
    assert compose("[" * MAX_DEPTH + "]" * MAX_DEPTH) is not None  # the control: what is allowed is read
    with pytest.raises(YamlFault):
        compose(opening * 100_000)


@given(st.text(max_size=200))
def test_no_text_makes_the_parser_fail_in_another_way(text: str) -> None:
    try:
        parse(text)
    except DocumentError as fault:
        assert str(fault).startswith("headgate.yaml:")


_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**18), 10**18) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize("character", ["\x85", "\u2028", "\u2029"])
def test_a_character_that_yaml_would_fold_to_a_space_is_refused_with_its_escape(character: str) -> None:
    with pytest.raises(YamlFault) as refused:
        compose(f'{{"name":\n "a{character}b"}}')
    assert refused.value.place == Place(2, 4)
    assert f"\\u{ord(character):04x}" in refused.value.remedy
    node = compose(f'{{"name": "a\\u{ord(character):04x}b"}}')
    assert node is not None
    assert plain(node) == {"name": f"a{character}b"}


@given(_json)
def test_json_is_read_as_what_it_is(value: object) -> None:
    text = msgspec.json.encode(value).decode()
    try:
        node = compose(text)
    except YamlFault as fault:
        # a key `<<` is a merge key, and YAML refuses some characters that JSON has
        assert "merge" in fault.message or "not valid YAML" in fault.message
        return
    assert node is not None
    assert plain(node) == value


@pytest.mark.parametrize(("text", "rate"), [("200/s", 200.0), ("90/m", 1.5), ("36/h", 0.01), ("0.5 / s", 0.5)])
def test_rates(text: str, rate: float) -> None:
    assert parse_rate_per_s(text) == pytest.approx(rate)


@pytest.mark.parametrize("text", ["", "200", "0/s", "-1/s", "1/d", "fast"])
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a rate"):
        parse_rate_per_s(text)


def test_a_schedule_whose_first_attempt_would_wait_is_refused() -> None:
    (fault,) = faults(destination(URL + "        retry: {schedule: [5s, 10s]}\n"))
    assert "retry.schedule: starts with 5 s" in fault
