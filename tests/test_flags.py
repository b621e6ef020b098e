"""Command lines made from settings: defaults live in the model alone, and a wrong value names its flag."""

from __future__ import annotations

import argparse
from typing import Any, Self

import pytest
from pydantic import Field, model_validator

from sglang_auf.errors import ConfigError
from sglang_auf.flags import add_flags, from_flags
from sglang_auf.settings import Settings


class Walk(Settings):
    places: tuple[str, ...] = Field(min_length=1, description="where to go")
    pace_kmh: float = Field(default=4.5, gt=0, description="speed")
    stops: tuple[str, ...] = Field(default=(), description="may be repeated")
    rain: bool = Field(default=False, description="in any weather")
    guide: str | None = Field(default=None, alias="led-by", description="who leads")
    hours: float = Field(default_factory=lambda given: 20 / given["pace_kmh"])

    @model_validator(mode="after")
    def _dry(self) -> Self:
        if self.rain and self.pace_kmh > 6:
            raise ValueError("nobody runs in the rain")
        return self


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="walk")
    add_flags(made, Walk, positional=("places",))
    return made


def parsed(*arguments: str) -> dict[str, Any]:
    return vars(parser().parse_args(arguments))


def test_flags_that_are_not_given_are_absent() -> None:
    assert parsed("a", "b") == {"places": ["a", "b"]}
    assert from_flags(Walk, parsed("a")).pace_kmh == 4.5


class Ride(Settings):
    start: str = Field(description="from")
    end: str | None = Field(default=None, description="to; a round trip without it")


@pytest.mark.parametrize(("given", "expected"), [(["a"], {"start": "a"}), (["a", "b"], {"start": "a", "end": "b"})])
def test_an_argument_with_a_default_may_be_left_out(given: list[str], expected: dict[str, Any]) -> None:
    made = argparse.ArgumentParser()
    add_flags(made, Ride, positional=("start", "end"))
    assert vars(made.parse_args(given)) == expected


def test_a_field_without_a_description_is_no_flag() -> None:
    with pytest.raises(SystemExit):
        parsed("a", "--hours", "1")
    assert from_flags(Walk, parsed("a", "--pace-kmh", "5")).hours == 4


def test_flags_are_read_by_the_model() -> None:
    walk = from_flags(Walk, parsed("a", "--pace-kmh", "5", "--stops", "x", "--stops", "y", "--rain"))
    assert (walk.places, walk.pace_kmh, walk.stops, walk.rain) == (("a",), 5.0, ("x", "y"), True)


@pytest.mark.parametrize("value", ["-1", "fast"])
def test_a_wrong_value_names_its_flag(value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_flags(Walk, parsed("a", "--pace-kmh", value))
    assert caught.value.found == f"--pace-kmh {value}" and caught.value.expected


def test_flags_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="nobody runs in the rain"):
        from_flags(Walk, parsed("a", "--pace-kmh", "9", "--rain"))


def test_help_shows_descriptions_and_defaults() -> None:
    shown = " ".join(parser().format_help().split())
    assert "--pace-kmh PACE_KMH speed (default: 4.5)" in shown and "--led-by LED_BY who leads" in shown
