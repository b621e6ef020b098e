"""A page of sections, written as one HTML file with everything in it, and as Markdown beside its pictures."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from benchmarks.harness.results import Report
from benchmarks.reports.markdown import markdown_table

TEMPLATES = Path(__file__).parent / "templates"

Table = list[list[str]]


@dataclass(frozen=True, slots=True)
class Section:
    """A heading with text, a table and a picture (PNG), each of which may be missing.

    table: its first row is the heading. in_words: the cells hold text, which is wrapped and not aligned as figures are.
    """

    title: str
    text: str = ""
    table: Table | None = None
    picture: bytes | None = None
    picture_name: str = ""
    in_words: bool = False


class PageReport(Report):
    """What a command returns whose result is a page. summary: what the terminal shows of it."""

    STEM: ClassVar[str] = "report"

    title: str
    sections: list[Section]
    summary: str = ""

    def text(self) -> str:
        return self.summary

    def write(self, out: Path) -> Path:
        return write_page(out, self.STEM, self.title, self.sections)


def write_page(out: Path, stem: str, title: str, sections: Sequence[Section]) -> Path:
    """Write OUT/STEM.html (no script, nothing fetched), OUT/STEM.md and the pictures; returns the HTML's path."""
    out.mkdir(parents=True, exist_ok=True)
    for section in sections:
        if section.picture is not None:
            (out / section.picture_name).write_bytes(section.picture)
    (out / f"{stem}.md").write_text(_markdown(title, sections), encoding="utf-8")
    page = out / f"{stem}.html"
    page.write_text(_html(title, sections), encoding="utf-8")
    return page


def _markdown(title: str, sections: Sequence[Section]) -> str:
    parts = [f"# {title}"]
    for section in sections:
        parts.append(f"## {section.title}")
        parts += [section.text.replace("\n", "  \n")] if section.text else []
        parts += [markdown_table(section.table)] if section.table else []
        parts += [f"![{section.title}]({section.picture_name})"] if section.picture else []
    return "\n\n".join(parts) + "\n"


def _html(title: str, sections: Sequence[Section]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    pictures = {
        section.title: base64.b64encode(section.picture).decode() for section in sections if section.picture is not None
    }
    return environment.get_template("report.html").render(title=title, sections=sections, pictures=pictures)
