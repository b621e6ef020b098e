"""The layout of the code: imports go one way, rooms and files stay small, and the documentation names what exists."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = ("sglang_auf", "server", "benchmarks")
LARGEST_ROOM = 12
LONGEST_FILE = 350
LONG_ON_PURPOSE = {"sglang_auf/cpu/kernels.py"}  # numba's cache looks for changes in a kernel's own file only
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "docs/results/README.md", "benchmarks/*.md", "docker/*.md")
    for path in ROOT.glob(pattern)
)
LINKED = sorted({*DOCUMENTS, *ROOT.glob("docs/results/**/*.md"), *ROOT.glob("drafters/*/README.md")})


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def code() -> list[Path]:
    return [path for room in CODE for path in sorted((ROOT / room).rglob("*.py"))]


def test_imports_go_one_way() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_room_has_few_files() -> None:
    sizes = Counter(name(path.parent) for path in code())
    assert not {room: size for room, size in sizes.items() if size > LARGEST_ROOM}


def test_a_file_is_read_in_one_go() -> None:
    lengths = {name(path): len(path.read_text().splitlines()) for path in code()}
    assert not {path: length for path, length in lengths.items() if length > LONGEST_FILE}.keys() - LONG_ON_PURPOSE


def test_the_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_every_module_has_its_test_in_the_same_room_or_none() -> None:
    """A test file is named after a module of the same room, so that it is found from the module."""
    rooms = {"": "sglang_auf", "server": "server", "benchmarks": "benchmarks"}
    strays = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        below = path.parent.relative_to(ROOT / "tests")
        top = below.parts[0] if below.parts else ""
        if top in ("e2e", "fuzz", "gpu", "docker", "reference"):
            continue
        room = ROOT / rooms[top] / below.relative_to(top) if top in rooms and top else ROOT / "sglang_auf" / below
        module = path.name.removeprefix("test_")
        if not (room / module).is_file() and name(path) not in ABOUT_MORE_THAN_A_MODULE:
            strays.append(name(path))
    assert not strays


ABOUT_MORE_THAN_A_MODULE = {
    "tests/test_makefile.py",
    "tests/test_pins.py",
    "tests/test_rooms.py",
    "tests/test_wheel.py",
    "tests/benchmarks/studies/test_results.py",
    "tests/server/test_cuda_arguments.py",
    "tests/server/test_main.py",
    "tests/server/test_openapi.py",
}


@pytest.mark.parametrize("document", LINKED, ids=name)
def test_links_of_the_documentation_lead_somewhere(document: Path) -> None:
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = (document.parent / path).resolve() if path else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def anchors(document: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


# The changelog and dated results name files as they were called then.
@pytest.mark.parametrize("document", [path for path in DOCUMENTS if path.name != "CHANGELOG.md"], ids=name)
def test_files_that_the_documentation_names_exist(document: Path) -> None:
    folders = "|".join((*CODE, "docker", "tests", "drafters", "docs"))
    named = re.findall(rf"`((?:{folders})/[\w/.-]*[\w/])`", document.read_text())
    assert not [path for path in named if not (ROOT / path).exists()]


@pytest.mark.parametrize("document", sorted(ROOT.glob("docs/*.md")), ids=name)
def test_a_page_begins_with_a_command(document: Path) -> None:
    blocks = document.read_text().split("\n\n")
    assert blocks[0].startswith("# ") and blocks[1].startswith("```sh\n"), "a title, then a command that works"
