from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.docker.conftest import ROOT, program
from tests.support.monitoring import PROMETHEUS, alert_queries, dashboard, dashboard_queries, metric_names

RULES_TEST = Path(__file__).with_name("alerts_test.yml")
DEBIAN = "Debian package prometheus"


def promtool(*arguments: str, directory: Path = PROMETHEUS) -> subprocess.CompletedProcess[str]:
    tool = program("promtool", DEBIAN)
    return subprocess.run([tool, *arguments], capture_output=True, text=True, cwd=directory)


def test_prometheus_accepts_its_configuration_and_rules() -> None:
    result = promtool("check", "config", "prometheus.yml")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "9 rules found" in result.stdout


def test_alerts_fire_when_they_should_and_not_before() -> None:
    result = promtool("test", "rules", str(RULES_TEST))
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_test_of_the_alerts_sees_a_blunted_one(tmp_path: Path) -> None:
    shutil.copytree(PROMETHEUS, tmp_path / "docker/prometheus")
    (tests := tmp_path / "tests/docker").mkdir(parents=True)
    shutil.copy(RULES_TEST, tests)
    alerts = tmp_path / "docker/prometheus/alerts.yml"
    alerts.write_text(alerts.read_text().replace("< 0.8 *", "< 0.1 *"))
    assert promtool("test", "rules", str(tests / RULES_TEST.name)).returncode == 1


def test_every_alert_is_tested() -> None:
    tested = [
        one["alertname"] for test in yaml.safe_load(RULES_TEST.read_text())["tests"] for one in test["alert_rule_test"]
    ]
    assert set(tested) == {name for name, _ in alert_queries()}


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ('sum(rate(a_total{b=~"c|d"}[5m])) / e:f', {"a_total", "e:f"}),
        ('a{b=""} > sum by (c) (d{e="f"} offset 15m) and g offset -1h', {"a", "d", "g"}),
        ("sum by (instance) (x) unless sum without (y) (z) > 0", {"x", "z"}),
        (
            'histogram_quantile(0.5, sum by (le) (rate(h_bucket[1d]))) < 0.8 * absent(up{job="a"} == 1)',
            {"h_bucket", "up"},
        ),
    ],
)
def test_metric_names(expression: str, names: set[str]) -> None:
    assert metric_names(expression) == names


def test_the_dashboard_is_one_that_grafana_provisions() -> None:
    board = dashboard()
    source = yaml.safe_load((ROOT / "docker/grafana/provisioning/datasources/prometheus.yaml").read_text())
    uids = {target["datasource"]["uid"] for panel in board["panels"] for target in panel["targets"]}
    assert uids == {source["datasources"][0]["uid"]}
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    provider = yaml.safe_load((ROOT / "docker/grafana/provisioning/dashboards/auf.yaml").read_text())
    mounts = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]["grafana"]["volumes"]
    assert f"./grafana/dashboards:{provider['providers'][0]['options']['path']}:ro" in mounts


def test_panels_lie_side_by_side() -> None:
    taken: set[tuple[int, int]] = set()
    for place in (panel["gridPos"] for panel in dashboard()["panels"]):
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in cells) < 24
        assert not cells & taken
        taken |= cells


def test_the_dashboard_uses_no_variable_that_it_does_not_define() -> None:
    defined = {variable["name"] for variable in dashboard()["templating"]["list"]}
    assert defined == {"model", "window"}
    assert not [expression for _, expression in dashboard_queries() if "$" in expression]
