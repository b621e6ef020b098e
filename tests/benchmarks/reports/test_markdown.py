from __future__ import annotations

from benchmarks.reports.markdown import markdown_table


def test_a_cell_stays_a_cell() -> None:
    """A pipe or a line break in a text must not begin another one."""
    assert (
        markdown_table([["run", "command"], ["a", "x | y\nz"]])
        == "| run | command |\n| --- | ---: |\n| a | x \\| y z |"
    )
