"""tau by group of the prompts: the table and its notes, for the terminal and for a section of a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.harness.sources.prompt import NO_GROUP
from benchmarks.reports.numbers import interval_text, number
from benchmarks.reports.page import Section, Table
from benchmarks.reports.text import NAMED, aligned
from benchmarks.stats.summary import GroupedTask, RunSummary

MISSING = "(missing)"
"""How the rows without a group are shown."""
LONGEST = 40
"""Characters of a group's name that are shown."""
HEADING = ("task", "group", "prompts", "requests", "failed", "tokens", "tau", "95 %", "micro")

SECTION_TEXT = (
    "tau of the prompts of each group, as that of a task: mean over its requests; micro: ratio of sums. Intervals: "
    f"95 %, bootstrap over the prompts of the group; none under three of them. {MISSING}: rows that have no group."
)


def group_table(tasks: Mapping[str, GroupedTask]) -> Table:
    """A row for each group of each task. Its first row is the heading."""
    rows = [list(HEADING)]
    for task, grouped in tasks.items():
        for name, of in grouped.groups.items():
            counts = [of.prompts, of.requests, of.failed, of.completion_tokens]
            tau = [number(of.tau), interval_text(of.tau_interval), number(of.tau_micro)]
            rows.append([task, _shown(name), *map(str, counts), *tau])
    return rows


def groups_text(tasks: Mapping[str, GroupedTask], without_group: Sequence[str] = ()) -> str:
    """The table for the terminal and its notes; "" where no prompt is in a group."""
    if not tasks:
        return ""
    return "\n".join([aligned(group_table(tasks), names=2), *group_notes(tasks, without_group)])


def group_notes(tasks: Mapping[str, GroupedTask], without_group: Sequence[str] = ()) -> list[str]:
    """Groups that are left out, and the rows that are in none."""
    notes = [
        f"{task}: {len(of.groups) + of.others} groups; the {len(of.groups)} with the most prompts are shown, the "
        f"other {of.others} have {of.others_prompts} prompts"
        for task, of in tasks.items()
        if of.others
    ]
    if without_group:
        more = f" and {len(without_group) - NAMED} more" if len(without_group) > NAMED else ""
        notes.append(f"rows without the field, {MISSING}: {', '.join(without_group[:NAMED])}{more}")
    return notes


def group_sections(runs: Mapping[str, RunSummary]) -> list[Section]:
    """runs: by name, of speculating ones. [] where none has prompts in groups."""
    grouped = {name: run for name, run in runs.items() if run.groups}
    if not grouped:
        return []
    table: Table = [["run", *HEADING]]
    notes: list[str] = []
    for name, run in grouped.items():
        table += [[name, *row] for row in group_table(run.groups)[1:]]
        notes += [f"{name}: {note}." for note in group_notes(run.groups, run.without_group)]
    return [Section("Tau by group", "\n".join([SECTION_TEXT, *notes]), table)]


def _shown(group: str) -> str:
    if group == NO_GROUP:
        return MISSING
    return group if len(group) <= LONGEST else f"{group[: LONGEST - 1]}…"
