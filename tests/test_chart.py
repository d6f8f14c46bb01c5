"""The chart, as far as it can be held to something without a cluster.

Values, schema and templates are checked without any tool. Where `helm` is found (on the path, in HEADGATE_TEST_HELM, or
built by `make chart-tools`), it lints and renders too, and what comes out is validated against the Kubernetes API's
schemas.
"""

import json
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator, ValidationError
from kubernetes_validate import validate

from config.settings import LATER, MASTER_KEY, SETTINGS

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "helm" / "headgate"
TEMPLATES = sorted((CHART / "templates").iterdir())
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA = json.loads((CHART / "values.schema.json").read_text())
CI = sorted((CHART / "ci").glob("*-values.yaml"))
ACTION = re.compile(r"\{\{-?\s*(.*?)\s*-?\}\}", re.DOTALL)
BUILT = ROOT / ".headgate-cache" / "bin" / "helm"
HELM = os.environ.get("HEADGATE_TEST_HELM") or shutil.which("helm") or (str(BUILT) if BUILT.exists() else None)

needs_helm = pytest.mark.skipif(HELM is None, reason="helm is not on the path; `make chart-tools` builds it")


def validator() -> Draft7Validator:
    Draft7Validator.check_schema(SCHEMA)
    return Draft7Validator(SCHEMA)


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """As helm merges values: maps deeply, all else replaced."""
    out = dict(base)
    for name, value in over.items():
        mine = out.get(name)
        out[name] = merged(mine, value) if isinstance(mine, Mapping) and isinstance(value, Mapping) else value
    return out


def test_the_chart_is_of_this_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (chart["apiVersion"], chart["name"], chart["type"]) == ("v2", "headgate", "application")
    assert chart["appVersion"] == project["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", chart["version"])


@pytest.mark.parametrize("file", [CHART / "values.yaml", *CI], ids=lambda file: file.name)
def test_values_hold_against_the_schema(file: Path) -> None:
    validator().validate(merged(VALUES, yaml.safe_load(file.read_text())))


@pytest.mark.parametrize(
    "wrong",
    [
        {"kafka": {"bootstrap": "kafka"}},
        {"kafka": {"securityProtocol": "TLS"}},
        {"replicas": 0},
        {"settings": {"REDIS_URL": "redis://:password@redis/0"}},
        {"settings": {"NO_SUCH": "1"}},
        {"terminationGracePeriodSeconds": 10},
        {"masterKey": {"value": "dev-1:AAAA"}},
        {"replica": 3},
    ],
    ids=str,
)
def test_the_schema_refuses_wrong_values(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        validator().validate(merged(VALUES, wrong))


def test_the_schema_knows_every_setting_that_has_no_value_of_its_own() -> None:
    """A setting that is added to Headgate must be reachable through the chart; one with a secret must not be."""
    by_templates = set(re.findall(r"name: HEADGATE_([A-Z_]+)", (CHART / "templates/statefulset.yaml").read_text()))
    known = {name.removeprefix("HEADGATE_") for name in SETTINGS}
    assert by_templates <= known
    free = known - by_templates - set(LATER) - {MASTER_KEY.name, "DEV_DIR"}
    assert set(SCHEMA["properties"]["settings"]["propertyNames"]["enum"]) == free
    assert not [name for name in free if SETTINGS[f"HEADGATE_{name}"].secret]


def test_every_value_is_in_the_schema_and_every_value_that_a_template_reads_exists() -> None:
    assert set(VALUES) == set(SCHEMA["properties"]) - {"global"}
    for template in TEMPLATES:
        for path in re.findall(r"\.Values\.([A-Za-z.]+)", template.read_text()):
            found: Any = VALUES
            for part in path.split("."):
                assert part in found, f"{template.name} reads .Values.{path}"
                found = found[part]


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)
def test_blocks_of_a_template_are_closed_and_its_includes_are_defined(template: Path) -> None:
    defined = set(re.findall(r'define "([^"]+)"', (CHART / "templates/_helpers.tpl").read_text()))
    text = template.read_text()
    assert text.count("{{") == text.count("}}") == len(ACTION.findall(text))
    depth = 0
    for action in ACTION.findall(text):
        word = action.split()[0]
        depth += (word in ("if", "range", "with", "define")) - (word == "end")
        assert depth >= 0, action
    assert depth == 0
    assert set(re.findall(r'include "([^"]+)"', text)) <= defined


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    assert HELM is not None
    return subprocess.run([HELM, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def rendered(*arguments: str) -> dict[str, dict[str, Any]]:
    """Objects by kind; each kind stands once in this chart."""
    done = helm("template", "rel", str(CHART), "--namespace", "events", *arguments)
    assert done.returncode == 0, done.stderr
    return {one["kind"]: one for one in yaml.safe_load_all(done.stdout) if one}


@needs_helm
@pytest.mark.parametrize("file", [None, *CI], ids=lambda file: file.name if file else "defaults")
def test_helm_lints_and_what_it_renders_is_valid_kubernetes(file: Path | None) -> None:
    values = ["-f", str(file)] if file else []
    linted = helm("lint", "--strict", str(CHART), *values)
    assert linted.returncode == 0, linted.stdout
    for kind, one in rendered(*values).items():
        if kind not in ("ServiceMonitor", "PrometheusRule"):  # of the Prometheus Operator, not of Kubernetes itself
            validate(one, "1.31", strict=True)


@needs_helm
def test_a_pod_is_a_static_member_that_drains_and_can_write_nothing_but_tmp() -> None:
    pod = rendered()["StatefulSet"]["spec"]["template"]["spec"]
    (worker,) = pod["containers"]
    env = {one["name"]: one for one in worker["env"]}
    assert env["HEADGATE_WORKER_ID"]["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.name"
    assert pod["terminationGracePeriodSeconds"] == 40
    assert worker["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert worker["livenessProbe"]["httpGet"]["path"] == "/healthz"
    assert worker["securityContext"]["readOnlyRootFilesystem"] is True
    assert pod["securityContext"]["runAsNonRoot"] is True
    writable = [mount["mountPath"] for mount in worker["volumeMounts"] if not mount.get("readOnly")]
    assert writable == ["/tmp"]
    secret = [name for name, one in env.items() if "secretKeyRef" in one.get("valueFrom", {})]
    assert secret == ["HEADGATE_KAFKA_SASL_USERNAME", "HEADGATE_KAFKA_SASL_PASSWORD", "HEADGATE_REDIS_URL"]


@needs_helm
def test_helm_refuses_what_the_schema_refuses() -> None:
    done = helm("template", "rel", str(CHART), "--set", "kafka.bootstrap=nope")
    assert done.returncode != 0
    assert "kafka" in done.stderr


@needs_helm
def test_monitor_and_budget_follow_their_switches() -> None:
    assert not {"ServiceMonitor", "PrometheusRule"} & set(rendered())
    alerts = yaml.safe_load((CHART / "files/alerts.yaml").read_text())
    assert rendered("--set", "prometheusRule.enabled=true")["PrometheusRule"]["spec"] == alerts
    assert {"ServiceMonitor", "PodDisruptionBudget"} <= set(rendered("--set", "serviceMonitor.enabled=true"))
    assert "PodDisruptionBudget" not in rendered("--set", "podDisruptionBudget.enabled=false")
