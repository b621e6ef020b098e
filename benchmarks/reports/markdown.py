"""Parts of Markdown documents that several reports share."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from benchmarks.harness.results import Measured
from benchmarks.reports.numbers import UNKNOWN

Versions = Mapping[str, str | None]
"""Package -> version, as `results.versions` gives them."""


def markdown_document(report: Measured, *parts: str) -> str:
    """The parts that are not empty, and where the figures come from."""
    return "\n\n".join([*filter(None, parts), markdown_origin(report)]) + "\n"


def markdown_origin(report: Measured) -> str:
    """Machine, versions and command of a report."""
    machine = report.machine
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in report.versions.items())
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB"
    return f"Machine: {', '.join([where, *machine['gpus']])}.\n{versions}.\nCommand: `{shlex.join(report.command)}`"


def kept_text(figures: Iterable[Versions], now: Versions) -> str:
    """Which figures were measured by earlier calls with other versions than `now`; "" where none was.

    figures: the versions of each.
    """
    others = Counter(_other_versions(then, now) for then in figures if then != now)
    if not others:
        return ""
    calls = "; ".join(f"{count} with {versions}" for versions, count in others.items())
    return f"Figures of earlier calls: {calls}."


def _other_versions(then: Versions, now: Versions) -> str:
    return ", ".join(
        f"{name} {then.get(name) or 'unknown'}" for name in {**then, **now} if then.get(name) != now.get(name)
    )


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the heading; the first column is aligned to the left, the others to the right."""
    rule = ["---", *("---:" for _ in rows[0][1:])]
    return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in [rows[0], rule, *rows[1:]])


def _cell(text: str) -> str:
    """What stays one cell of one line."""
    return " ".join(text.replace("|", r"\|").splitlines())


def prompts_cell(prompts: int, failed: int) -> str:
    """How many prompts were asked, and how many of them failed."""
    return f"{prompts} ({failed} FAILED)" if failed else str(prompts)


def milliseconds(seconds: float | None) -> str:
    return UNKNOWN if seconds is None else f"{1000 * seconds:.1f} ms"
