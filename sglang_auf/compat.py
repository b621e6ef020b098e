"""The SGLang release that is relied on, and the check of every name and signature of it that we use.

SGLang's speculative interfaces are private and move between releases. Another release is refused with one message
that names what moved; without this check it would surface as an attribute error in the middle of a request. The rows
(`SEAMS`, `HOOKS`) stand beside the code that uses them, or in a light seams.py where that code is slow to import.

`python -m sglang_auf.compat` prints all rows and whether they hold.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from sglang_auf.errors import CompatError

SGLANG_VERSION = "0.5.23"


@dataclass(frozen=True, slots=True)
class Seam:
    """One name we call, override or replace, or one that we add because SGLang lacks it.

    target: "module:qualified.name"; parameters: the names it must take, in order, or None where only existence counts;
    used_by: the module of ours that would break. added: SGLang must not have it, and what is there must be ours.
    """

    target: str
    used_by: str
    parameters: tuple[str, ...] | None = None
    added: bool = False

    def __str__(self) -> str:
        return f"{self.target} ({'added' if self.added else 'used'} by {self.used_by})"


def resolve(target: str) -> object:
    """The object behind "module:qualified.name". Raises ImportError or AttributeError where it does not exist.

    A field of a dataclass, msgspec or pydantic class is no attribute of the class: it resolves to its annotation.
    """
    module_name, _, qualified_name = target.partition(":")
    found: object = importlib.import_module(module_name)
    for part in qualified_name.split("."):
        found = getattr(found, part) if hasattr(found, part) else _annotation(found, part)
    return found


def _annotation(owner: object, name: str) -> object:
    for base in getattr(owner, "__mro__", ()):
        annotations = inspect.get_annotations(base)
        if name in annotations:
            return annotations[name]
    raise AttributeError(f"{getattr(owner, '__name__', owner)!s} has no {name!r}")


def moved(seam: Seam) -> str | None:
    """What is wrong with a seam in the installed SGLang, or None."""
    try:
        found = resolve(seam.target)
    except AttributeError as error:
        return None if seam.added else f"{seam}: not found: {error}"
    except ImportError as error:
        return f"{seam}: not found: {error}"
    if seam.added:
        ours = getattr(found, "__module__", "").startswith(f"{__package__}.")
        return None if ours else f"{seam}: SGLang has one of its own, so ours can go"
    if seam.parameters is None:
        return None
    if not callable(found):
        return f"{seam}: is a {type(found).__name__}, expected something to call"
    parameters = tuple(inspect.signature(found).parameters)
    if parameters != seam.parameters:
        return f"{seam}: takes {parameters}, expected {seam.parameters}"
    return None


def installed_version() -> str:
    try:
        return version("sglang")
    except PackageNotFoundError:
        return "none"


def check_version() -> None:
    """Raise CompatError unless the pinned SGLang is installed. Cheap: imports nothing of SGLang."""
    installed = installed_version()
    if installed != SGLANG_VERSION:
        raise CompatError(
            f"SGLang {installed}",
            f"SGLang {SGLANG_VERSION}",
            f"pip install sglang=={SGLANG_VERSION} (the plugin relies on private interfaces of exactly that release)",
        )


def check_seams(seams: Iterable[Seam]) -> None:
    """Raise CompatError that names every seam of the installed SGLang which moved."""
    complaints = [complaint for seam in seams if (complaint := moved(seam)) is not None]
    if complaints:
        raise CompatError(
            "; ".join(complaints),
            f"the interfaces of SGLang {SGLANG_VERSION}",
            f"pip install --force-reinstall sglang=={SGLANG_VERSION}",
        )


def main() -> int:
    """Print every row and whether it holds in the installed SGLang. Returns 1 if one does not."""
    from sglang_auf import plugin
    from sglang_auf.training.text import tools

    print(f"SGLang {installed_version()}, relied on: {SGLANG_VERSION}")
    complaints = {seam: moved(seam) for seam in (*plugin.all_seams(), *tools.SEAMS)}
    for seam, complaint in complaints.items():
        print(f"moved  {complaint}" if complaint else f"holds  {seam}")
    return int(any(complaints.values()))


if __name__ == "__main__":
    raise SystemExit(main())
