"""The PromQL queries in docker/, and the metric names in them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "docker/prometheus"
DASHBOARD = ROOT / "docker/grafana/dashboards/auf.json"
OPERATORS = {"and", "bool", "by", "ignoring", "on", "or", "unless", "without"}


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return found


def dashboard_queries() -> list[tuple[str, str]]:
    """(panel / legend, expression) with Grafana's variables at their widest."""
    return [
        (
            f"{panel['title']} / {target['legendFormat']}",
            target["expr"].replace("$model", ".*").replace("$window", "1m"),
        )
        for panel in dashboard()["panels"]
        for target in panel["targets"]
    ]


def alert_queries() -> list[tuple[str, str]]:
    rules = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())
    return [(rule["alert"], rule["expr"]) for group in rules["groups"] for rule in group["rules"]]


def metric_names(expression: str) -> set[str]:
    """The names that select series: what remains without selectors, ranges, offsets, groupings, functions and so on."""
    dropped = r"\{[^}]*\}|\[[^]]*\]|\boffset\s+-?\w+|\b(?:by|without|on|ignoring)\s*\([^)]*\)"
    bare = re.sub(dropped, " ", expression)
    return {name for name in re.findall(r"(?<![\w:.])[a-zA-Z_][\w:]*(?!\s*\(|[\w:])", bare) if name not in OPERATORS}
